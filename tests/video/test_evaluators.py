"""The evaluators against a loop like the official programs, on random sets; what they leave out and say."""

import time

import numpy as np
import pytest

from benchmarks.temporal import TIOUS, loop_average_precision, random_tables
from tasks.core.errors import UserError
from tasks.video import matching
from tasks.video.evaluators import ACTIVITYNET_TIOUS, evaluate, metrics_by_name
from tasks.video.false_positives import KINDS, false_positives
from tasks.video.recall import average_recall, top_kx_recall
from tasks.video.segments import SegmentTable


def table(*rows, **names):
    """Rows (video, class, start, end[, score])."""
    return SegmentTable.from_rows([(*row, 1.0)[:5] for row in rows], **names)


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_loop_on_random_sets(seed, monkeypatch):
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", 100)
    truth, detections = random_tables(videos=7, detections=60, classes=3, instances=12, seed=seed)
    result = evaluate(truth, detections, TIOUS)
    np.testing.assert_allclose(result.ap, loop_average_precision(truth, detections, TIOUS), rtol=0, atol=1e-12)
    assert result.average == pytest.approx(result.ap.mean())


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_loop_with_ties_duplicates_and_instances_without_length(seed):
    generator = np.random.default_rng(seed)
    truth, detections = random_tables(videos=5, detections=40, classes=2, instances=8, seed=seed)
    for part in (truth, detections):
        for column in (part.start, part.end):
            column[:] = column.round()
    detections.score[:] = generator.integers(0, 5, len(detections)) / 5
    result = evaluate(truth, detections, TIOUS, "activitynet")
    np.testing.assert_allclose(result.ap, loop_average_precision(truth, detections, TIOUS), rtol=0, atol=1e-12)


def test_equals_the_loop_when_one_instance_is_wanted_by_all_and_thresholds_are_in_any_order():
    generator = np.random.default_rng(0)
    starts = generator.uniform(0, 4, 30)
    rows = [("v", "a", s, s + generator.uniform(3, 6), i / 30) for i, s in enumerate(starts)]
    truth = table(("v", "a", 1, 6), ("v", "a", 2, 7), ("v", "a", 2, 7), ("v", "a", 3, 7.5))
    tious = (0.9, 0.3, 0.6)
    result = evaluate(truth, table(*rows), tious)
    np.testing.assert_allclose(result.ap, loop_average_precision(truth, table(*rows), tious), rtol=0, atol=1e-12)


def test_is_faster_than_the_loop():
    """A scaled-down case of `python -m benchmarks temporal`, which measures the full ratio."""
    truth, detections = random_tables(videos=100, detections=200, classes=20, instances=15)

    def seconds(function, rounds):
        times = []
        for _ in range(rounds):
            begin = time.process_time()
            function(truth, detections, TIOUS)
            times.append(time.process_time() - begin)
        return min(times)

    assert seconds(loop_average_precision, 2) > 8 * seconds(evaluate, 5)


def test_detections_in_other_videos_are_dropped_or_false_positives():
    truth = table(("v", "a", 0, 10), videos=["empty"])
    detections = table(("empty", "a", 0, 10, 0.9), ("nowhere", "a", 0, 10, 0.8), ("v", "a", 0, 10, 0.5))
    dropped = evaluate(truth, detections, [0.5], "afsd")
    assert dropped.average == 1
    assert dropped.warnings == ["2 predictions in 2 videos (empty, nowhere) without instances do not count"]
    for evaluator in ("opentad", "activitynet"):
        counted = evaluate(truth, detections, [0.5], evaluator)
        assert counted.average == pytest.approx(1 / 3)
        assert counted.warnings == [
            "2 predictions in 2 videos (empty, nowhere) without instances count as false positives"
        ]


def test_what_is_left_out_is_said():
    truth = table(("v", "a", 0, 10), ("v", "a", 0.0005, 10), ("w", "a", 3, 3), ("x", "b", 0, 1))
    detections = table(("v", "z", 0, 10, 0.9), ("v", "a", 5, 4, 0.1))
    result = evaluate(truth, detections, [0.5], "opentad", blocked=["x", "unknown"])
    assert result.warnings == [
        "1 instances and 0 predictions are in blocked videos and do not count",
        "2 instances repeat another or have no length and do not count",
        "1 predictions of 1 class (z) without instances do not count",
        "1 predictions do not end after they start; they match nothing",
    ]
    assert result.classes == ("a",)
    both = evaluate(truth, detections, [0.5], "afsd")
    assert "1 instances do not end after they start; they match where the union is 0" in both.warnings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evaluator": "voc"}, "evaluator: 'voc' was given, one of afsd, opentad, activitynet was expected"),
        ({"tious": []}, "tious"),
        ({"tious": [0.5, 1.2]}, "thresholds above 0 and at most 1"),
        ({"blocked": ["v"]}, "holds no instance"),
    ],
)
def test_bad_options(change, message):
    options = {"tious": [0.5], "evaluator": "afsd", "blocked": ()} | change
    with pytest.raises(UserError, match=message):
        evaluate(table(("v", "a", 0, 1)), table(), **options)


def test_numbers_must_be_finite():
    with pytest.raises(UserError, match=r"video 'v', class 'a'.*nan"):
        table(("v", "a", 0, float("nan")))


def test_order_of_equal_scores():
    truth = table(("v", "a", 0, 10))
    detections = table(("v", "a", 0, 10, 0.5), ("v", "a", 50, 60, 0.5))
    assert evaluate(truth, detections, [0.5]).average == 0.5
    assert evaluate(truth, detections, [0.5], ties="first_first").average == 1


def test_names_of_metrics():
    truth = table(("v", "a", 0, 10))
    metrics = metrics_by_name(evaluate(truth, table(("v", "a", 0, 8, 1.0)), (0.5, 0.9)))
    assert metrics == {"mAP": 0.5, "mAP@0.50": 1, "mAP@0.90": 0}
    assert len(ACTIVITYNET_TIOUS) == 10


def test_average_recall_by_hand():
    truth = table(("v", "a", 0, 10), ("v", "b", 20, 30), ("w", "a", 0, 10))
    detections = table(
        ("v", "b", 0, 10, 0.9), ("v", "a", 20, 30, 0.8), ("w", "a", 40, 50, 0.7), ("w", "a", 0, 10, 0.6)
    )  # fmt: skip
    curve = average_recall(evaluate(truth, detections, [0.5]), tious=[0.5], largest=2)
    assert curve.proposals_per_video.tolist() == [1, 2]
    assert curve.average.tolist() == pytest.approx([1 / 3, 1])
    assert curve.at(1) == pytest.approx(1 / 3)
    none = average_recall(evaluate(truth, table(), [0.5]), largest=3)
    assert not none.recall.any()


def test_average_recall_equals_a_loop():
    truth, detections = random_tables(videos=6, detections=30, classes=2, instances=5, seed=3)
    result = evaluate(truth, detections, [0.5])
    tious = (0.5, 0.7)
    curve = average_recall(result, tious, largest=10)
    found = np.zeros((2, 10))
    for video in range(6):
        mine = np.flatnonzero(detections.video == video)
        mine = mine[np.argsort(-detections.score[mine])][:10]
        for start, end in zip(truth.start[truth.video == video], truth.end[truth.video == video], strict=True):
            shared = (np.minimum(end, detections.end[mine]) - np.maximum(start, detections.start[mine])).clip(0)
            iou = shared / ((end - start) + (detections.end[mine] - detections.start[mine]) - shared)
            for row, tiou in enumerate(tious):
                for number in range(10):
                    found[row, number] += (iou[: number + 1] >= tiou).any()
    np.testing.assert_allclose(curve.recall, found / 30)


def test_top_kx_recall_by_hand():
    truth = table(("v", "a", 0, 10), ("v", "a", 20, 30))
    detections = table(
        ("v", "a", 0, 10, 0.9), ("v", "a", 0, 9, 0.8), ("v", "a", 20, 30, 0.7), ("u", "a", 0, 1, 0.95)
    )  # fmt: skip
    recall = top_kx_recall(evaluate(truth, detections, [0.5], "opentad"), ks=(1, 2))
    assert recall[0, :, 0].tolist() == [0.5, 1]


def test_kinds_of_false_positives():
    truth = table(("v", "a", 0, 10), ("v", "b", 20, 30))
    detections = table(
        ("v", "a", 0, 10, 0.9),  # true positive
        ("v", "a", 0, 9, 0.8),  # found before
        ("v", "a", 20, 30, 0.7),  # b
        ("v", "a", 7, 15, 0.6),  # too little of it
        ("v", "a", 28, 36, 0.5),  # too little, and b
        ("v", "a", 50, 60, 0.4),
        ("w", "b", 0, 10, 0.3),  # no such video
    )
    errors = false_positives(evaluate(truth, detections, [0.3, 0.5], "opentad"), tiou=0.5)
    assert [KINDS[kind] for kind in errors.kind] == [
        "true positive",
        "double detection",
        "wrong label",
        "localization",
        "confusion",
        "background",
        "background",
    ]
    assert errors.counts[0].tolist() == [1, 0, 0, 0, 0, 1]  # the best of a, the best of b
    assert errors.counts[9].tolist() == [1, 1, 1, 1, 1, 2]
