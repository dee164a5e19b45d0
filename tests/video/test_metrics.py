"""Windows of one video on any process: merged by video, the same numbers for one and two processes."""

import numpy as np
import pytest
import torch

from benchmarks.temporal import random_tables
from tasks.core.errors import UserError
from tasks.video.evaluators import evaluate, metrics_by_name
from tasks.video.metrics import TemporalDetectionMetric
from tasks.video.recall import average_recall

TRUTH, DETECTIONS = random_tables(videos=13, detections=40, classes=3, instances=6, seed=1)
TIOUS = (0.3, 0.5)


def halve_repeated_labels(id, found):
    """A stand-in for soft-NMS: depends on all windows of a video and on the order of its detections."""
    seen = np.cumsum(np.eye(3)[found["labels"]], axis=0)[np.arange(len(found["labels"])), found["labels"]]
    return found | {"scores": found["scores"] / seen}


def windows():
    """(video, offset, rows) of three windows per video, in no order."""
    parts = []
    for video in range(13):
        rows = np.flatnonzero(DETECTIONS.video == video)
        parts += [(video, 30 * part, chunk) for part, chunk in enumerate(np.array_split(rows, 3))]
    return [parts[i] for i in np.random.default_rng(0).permutation(len(parts))]


def metric_of(parts, as_tensors=True):
    metric = TemporalDetectionMetric(TRUTH.classes, "activitynet", TIOUS, halve_repeated_labels)
    metric.ground_truth = TRUTH
    for video, offset, rows in parts:
        segments = np.stack([DETECTIONS.start[rows], DETECTIONS.end[rows]], axis=1)
        columns = (segments, DETECTIONS.score[rows], DETECTIONS.label[rows])
        columns = map(torch.from_numpy, columns) if as_tensors else columns
        metric.update(DETECTIONS.videos[video], offset, *columns)
    return metric


def test_equals_the_evaluator_on_whole_videos():
    metric = metric_of(windows())
    results = metric.compute()
    scores = DETECTIONS.score.copy()
    for video in range(13):
        rows = np.flatnonzero(DETECTIONS.video == video)
        scores[rows] = halve_repeated_labels("", {"labels": DETECTIONS.label[rows], "scores": scores[rows]})["scores"]
    DETECTIONS_AFTER = DETECTIONS.take(np.arange(len(DETECTIONS)))
    DETECTIONS_AFTER.score[:] = scores
    expected = evaluate(TRUTH, DETECTIONS_AFTER, TIOUS, "activitynet")
    curve = average_recall(expected)
    assert results == metrics_by_name(expected) | {"AR@10": curve.at(10), "AR@100": curve.at(100)}
    assert 0.05 < results["mAP"] < 0.95
    np.testing.assert_array_equal(metric.last.ap, expected.ap)
    assert len(metric.videos) == 13


def test_the_order_of_windows_does_not_matter():
    forwards, backwards = metric_of(windows()).compute(), metric_of(windows()[::-1], as_tensors=False).compute()
    assert forwards == backwards


def test_reset_and_errors():
    metric = metric_of(windows()[:2])
    metric.reset()
    assert not metric._windows
    with pytest.raises(UserError, match="a: 1 segments, 2 scores and 1 labels"):
        metric.update("a", 0, torch.zeros(1, 2), torch.zeros(2), torch.zeros(1))
    metric.ground_truth = None
    with pytest.raises(UserError, match="no ground truth was set"):
        metric.compute()


def test_half_precision_and_empty_windows():
    metric = TemporalDetectionMetric(TRUTH.classes)
    metric.ground_truth = TRUTH
    metric.update("video_000000", 0, torch.zeros(0, 2), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    metric.update("video_000000", 8, torch.ones(1, 2).half(), torch.ones(1).half(), torch.zeros(1, dtype=torch.int32))
    results = metric.compute()
    assert results["mAP"] == 0
    assert set(results) == {"mAP", *(f"mAP@0.{i}0" for i in range(3, 8)), "AR@10", "AR@100"}


def test_two_processes_equal_one(monkeypatch):
    """13 videos whose windows are divided between processes; `gather_by_id` itself is tested with real ones."""
    ranks = [metric_of(windows()[rank::2]) for rank in range(2)]
    parts = [metric._windows for metric in ranks]
    assert {key.partition("@")[0] for key in parts[0]} & {key.partition("@")[0] for key in parts[1]}
    expected = metric_of(windows()).compute()
    monkeypatch.setattr("tasks.core.evaluation.all_gather", lambda value: parts)
    for metric in ranks:
        assert metric.compute() == expected
