"""Tables and pictures of an evaluation."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.temporal import random_tables
from tasks.core.errors import UserError
from tasks.video.evaluators import evaluate
from tasks.video.metrics import TemporalDetectionMetric
from tasks.video.report import detection_report, video_scores

TRUTH, DETECTIONS = random_tables(videos=7, detections=30, classes=3, instances=5, seed=2)


@pytest.fixture(scope="module")
def metric():
    metric = TemporalDetectionMetric([*TRUTH.classes, "unseen"])
    metric.ground_truth = TRUTH
    for video, id in enumerate(TRUTH.videos):
        rows = DETECTIONS.video == video
        segments = np.stack([DETECTIONS.start[rows], DETECTIONS.end[rows]], axis=1)
        labels = DETECTIONS.label[rows].copy()
        labels[0] = 3
        metric.update(id, 0, *map(torch.from_numpy, (segments, DETECTIONS.score[rows], labels)))
    metric.compute()
    return metric


def test_tables(metric):
    classes, errors, warnings = detection_report(metric).tables
    assert [row[0] for row in classes.rows] == list(metric.last.classes)
    assert sum(row[1] for row in classes.rows) == len(TRUTH)
    assert np.mean([row[3] for row in classes.rows]) == pytest.approx(100 * metric.last.average)
    assert [row[0] for row in errors.rows] == ["1 G", "2 G", "5 G", "10 G"]
    assert sum(errors.rows[0][1:]) == len(TRUTH)
    assert warnings.rows == [["7 predictions of 1 class (unseen) without instances do not count"]]


def test_pictures(metric):
    pictures = detection_report(metric).pictures
    titles = [picture.title for picture in pictures]
    assert titles[:4] == ["Mean AP over tIoU", "AP per class", "Kinds of detections", "Durations"]
    assert titles[4:] == ["Best videos"] * 3 + ["Worst videos"] * 3
    assert len({picture.caption for picture in pictures[4:]}) == 6
    for picture in pictures:
        image = np.asarray(Image.open(io.BytesIO(picture.png)).convert("L"))
        assert image.min() < 128 < image.max()


def test_scores_of_videos_are_those_of_the_evaluator_alone(metric):
    result = metric.last
    scores = video_scores(result)
    for video in (0, 4):
        rows = result.detections.video == video
        alone = evaluate(
            result.instances.take(result.instances.video == video),
            result.detections.take(rows),
            metric.tious,
            ties="first_first",
        )
        assert scores[video] == pytest.approx(alone.average, abs=1e-12)


def test_without_detections():
    metric = TemporalDetectionMetric(TRUTH.classes)
    metric.ground_truth = TRUTH
    metric.compute()
    assert len(detection_report(metric).pictures) == 10
    with pytest.raises(UserError, match="nothing was evaluated yet"):
        detection_report(TemporalDetectionMetric(TRUTH.classes))
