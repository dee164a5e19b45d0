"""Suppression of detections; tests/goldens compares it with the official programs."""

import numpy as np
import pytest

from tasks.core.errors import UserError
from tasks.video.post_processing import (
    PostProcessingConfig,
    clip_to_video,
    hard_nms,
    label_by_video,
    soft_nms,
    suppress,
    vote,
)

SEGMENTS = np.array([[0.0, 10], [1, 11], [20, 30], [0, 10]])
SCORES = np.array([0.9, 0.8, 0.7, 0.002])


def record(segments=SEGMENTS, scores=SCORES, labels=(0, 0, 0, 0)):
    return {"segments": np.asarray(segments), "scores": np.asarray(scores), "labels": np.asarray(labels)}


def test_soft_nms_by_hand():
    chosen, scores = soft_nms(SEGMENTS, SCORES, sigma=0.5)
    assert chosen.tolist() == [0, 2, 1]  # the copy of the best falls below the floor
    np.testing.assert_allclose(scores, [0.9, 0.7, 0.8 * np.exp(-((9 / 11) ** 2) / 0.5)])


@pytest.mark.parametrize(("keep_last", "count"), [(True, 3), (False, 2)])
def test_the_last_detection(keep_last, count):
    """The official code loses it, so a class with one detection has none."""
    assert len(soft_nms(SEGMENTS, SCORES, keep_last=keep_last)[0]) == count
    assert len(soft_nms(SEGMENTS[:1], SCORES[:1], keep_last=keep_last)[0]) == int(keep_last)
    assert len(soft_nms(SEGMENTS[:0], SCORES[:0], keep_last=keep_last)[0]) == 0


def test_soft_nms_stops_and_drops():
    assert soft_nms(SEGMENTS, SCORES, top_k=2)[0].tolist() == [0, 2]
    assert soft_nms(SEGMENTS, SCORES, floor=0.75)[0].tolist() == [0]
    equal = soft_nms(SEGMENTS[[0, 2]], np.array([0.5, 0.5]))
    assert equal[0].tolist() == [0, 1]


def test_segments_of_no_length():
    points = np.array([[5.0, 5], [5, 5], [0, 10]])
    _, scores = soft_nms(points, np.array([0.9, 0.8, 0.7]))
    np.testing.assert_allclose(scores, [0.9, 0.8, 0.7])
    assert hard_nms(points, np.array([0.9, 0.8, 0.7])).tolist() == [0, 1, 2]


def test_hard_nms():
    assert hard_nms(SEGMENTS, SCORES).tolist() == [0, 2]
    assert hard_nms(SEGMENTS, SCORES, overlap=0.9).tolist() == [0, 1, 2]
    assert hard_nms(SEGMENTS, SCORES, overlap=1.0).tolist() == [0, 1, 2]
    assert hard_nms(SEGMENTS, SCORES, top_k=1).tolist() == [0]


def test_votes():
    kept = vote(SEGMENTS[[0, 2]], SEGMENTS[:3], SCORES[:3], overlap=0.5)
    np.testing.assert_allclose(kept, [[0.8 / 1.7, (9 + 8.8) / 1.7], [20, 30]])
    np.testing.assert_allclose(vote(np.array([[5.0, 5]]), SEGMENTS, SCORES, 0.5), [[5, 5]])


def test_classes_suppress_themselves():
    labels = [0, 1, 0, 0]
    alone = suppress(record(labels=labels), PostProcessingConfig(score_threshold=0.01))
    assert alone["labels"].tolist() == [0, 0, 1]
    np.testing.assert_allclose(alone["scores"], [0.9, 0.7, 0.8])
    together = suppress(record(labels=labels), PostProcessingConfig(per_class=False))
    assert together["labels"].tolist() == [0, 1, 0]
    assert together["scores"][1] < 0.3


@pytest.mark.parametrize("method", ["soft", "hard", "none"])
def test_methods_on_nothing_and_on_a_video(method):
    config = PostProcessingConfig(method=method)
    empty = suppress(record(SEGMENTS[:0], SCORES[:0], np.zeros(0, dtype=np.int64)), config)
    assert empty["segments"].shape == (0, 2)
    assert len(empty["scores"]) == len(empty["labels"]) == 0
    expected = {"soft": [0, 1, 20], "hard": [0, 20], "none": [0, 1, 20]}[method]
    assert suppress(record(), config)["segments"][:, 0].tolist() == expected


def test_limits():
    best = suppress(record(labels=[0, 1, 1, 0]), PostProcessingConfig(max_per_video=2))
    np.testing.assert_allclose(best["scores"], [0.9, 0.8])
    assert len(suppress(record(), PostProcessingConfig(max_per_class=1, method="none"))["scores"]) == 1
    voted = suppress(record(), PostProcessingConfig(per_class=False, voting=0.5, method="hard"))
    np.testing.assert_allclose(voted["segments"][0], [0.8 / 1.7, 17.8 / 1.7])


def test_labels_from_a_video_classifier():
    found = label_by_video(record(SEGMENTS[:2], SCORES[:2], [0, 0]), [0.1, 0.6, 0.3], classes=2)
    assert found["labels"].tolist() == [1, 1, 2, 2]
    np.testing.assert_allclose(found["scores"], [0.54, 0.48, 0.27, 0.24])
    assert found["segments"].tolist() == [*SEGMENTS[:2].tolist()] * 2


def test_ends_of_the_video():
    found = clip_to_video(record([[-1.0, 5], [9, 12], [11, 12]], [0.9, 0.8, 0.7], [0, 1, 2]), 10.0)
    assert found["segments"].tolist() == [[0, 5], [9, 10]]
    assert found["labels"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "hardest"}, "method: 'hardest'"),
        ({"sigma": 0}, "sigma: 0"),
        ({"max_per_class": 0}, "max_per_class: 0"),
        ({"max_per_video": 0}, "max_per_video: 0"),
        ({"voting": 2.0, "per_class": False}, "voting: 2.0"),
        ({"voting": 0.5}, "voting: 0.5 was given, null where per_class is true"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        PostProcessingConfig(**options)
