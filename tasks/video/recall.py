"""Recall: average recall over the number of proposals (ActivityNet), and top-kx recall (OpenTAD)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tasks.video.evaluators import Evaluation
from tasks.video.matching import Pairs, overlapping_pairs
from tasks.video.segments import Floats, Integers, SegmentTable


@dataclass(frozen=True)
class RecallCurve:
    """Recall (T, N) when every video keeps such a share of its proposals that they are 1..N on average."""

    tious: Floats
    recall: Floats
    proposals_per_video: Floats  # (N,)

    @property
    def average(self) -> Floats:
        """Average recall at 1..N proposals per video: the mean over the thresholds."""
        return self.recall.mean(axis=0)

    def at(self, number: int) -> float:
        """AR@`number`."""
        return float(self.average[number - 1])

    @property
    def area(self) -> float:
        """Area under the curve as a share of the largest possible one."""
        return float(np.trapezoid(self.average, self.proposals_per_video) / self.proposals_per_video[-1])


def average_recall(
    result: Evaluation, tious: Sequence[float] = tuple(np.linspace(0.5, 0.95, 10)), largest: int = 100
) -> RecallCurve:
    """Average recall of all detections, whatever their class, as the proposal task of ActivityNet defines it.

    A proposal may cover several instances. The share of the proposals of a video that is kept is the same in all
    videos, so AR@N allows a video with many proposals more than N.
    """
    instances, detections = result.instances, result.detections
    thresholds = np.array(tious, dtype=np.float64)
    num_videos = len(instances.videos)
    if not len(detections):
        return RecallCurve(thresholds, np.zeros((len(tious), largest)), np.arange(1.0, largest + 1))
    ratio = largest * float(num_videos) / len(detections)
    rank, count = _rank_in_video(detections, num_videos)
    kept = np.minimum((count * ratio).astype(np.int64), count)  # (V,)
    pairs = overlapping_pairs(instances, detections, min(tious), result.rules.smallest_union, same_class=False)
    within = rank[pairs.detection] < kept[detections.video[pairs.detection]]
    pairs = Pairs(pairs.detection[within], pairs.instance[within], pairs.iou[within])
    share = np.arange(1, largest + 1) / largest * (largest * float(num_videos) / max(int(kept.sum()), 1))
    allowed = np.minimum((kept[:, None] * share).astype(np.int64), kept[:, None])  # (V, N)
    recall = np.zeros((len(tious), largest))
    for row, threshold in enumerate(thresholds):
        first = _first_hit(pairs, rank, threshold, len(instances))
        recall[row] = (first[:, None] < allowed[instances.video]).mean(axis=0)
    return RecallCurve(thresholds, recall, share * (float(kept.sum()) / num_videos))


def top_kx_recall(result: Evaluation, ks: Sequence[int] = (1, 5)) -> Floats:
    """Recall (T, len(ks), K) with the k x best detections of a class in a video that has x instances of it."""
    instances, detections = result.instances, result.detections
    num_classes = len(result.classes)
    group = instances.video * num_classes + instances.label
    number = np.bincount(group, minlength=len(instances.videos) * num_classes)
    valid = (detections.video >= 0) & (detections.label >= 0)
    detections = detections.take(valid)
    rank, _ = _rank_in_group(detections.video * num_classes + detections.label, len(number))
    pairs = overlapping_pairs(instances, detections, float(result.tious.min()), result.rules.smallest_union)
    recall = np.zeros((len(result.tious), len(ks), num_classes))
    for row, threshold in enumerate(result.tious):
        first = _first_hit(pairs, rank, threshold, len(instances))
        for column, k in enumerate(ks):
            hits = np.bincount(instances.label[first < k * number[group]], minlength=num_classes)
            recall[row, column] = hits / result.num_instances
    return recall


def _first_hit(pairs: Pairs, rank: Integers, threshold: float, num_instances: int) -> Integers:
    """Lowest rank, from 0, of a detection that reaches `threshold` with each instance; very large where none does."""
    first = np.full(num_instances, np.iinfo(np.int64).max)
    reached = pairs.iou >= threshold
    np.minimum.at(first, pairs.instance[reached], rank[pairs.detection[reached]])
    return first


def _rank_in_video(detections: SegmentTable, num_videos: int) -> tuple[Integers, Integers]:
    """Rank of each detection among those of its video and the number of them per video; -1 is no video."""
    group = np.where(detections.video < 0, num_videos, detections.video)
    rank, count = _rank_in_group(group, num_videos + 1)
    return rank, count[:-1]


def _rank_in_group(group: Integers, num_groups: int) -> tuple[Integers, Integers]:
    count = np.bincount(group, minlength=num_groups)
    order = np.argsort(group, kind="stable")
    rank = np.empty(len(group), dtype=np.int64)
    rank[order] = np.arange(len(group)) - np.repeat(np.cumsum(count) - count, count)
    return rank, count
