"""Which detection finds which instance, for all classes, videos and thresholds at once.

The official evaluators go through the detections of a class by descending score; each takes, of the instances of its
video that are still free, the one of highest overlap. That is a stable matching in which all instances prefer the
higher score, so deferred acceptance (Gale and Shapley, 1962) finds the same pairs with every detection proposing at
once; a few rounds suffice, because few instances overlap one detection enough.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.video.segments import Floats, Integers, SegmentTable

PAIRS_AT_ONCE = 1 << 20  # bounds the memory for videos with many instances and detections


@dataclass(frozen=True)
class Pairs:
    """Detections and instances that overlap, by detection, then by falling overlap."""

    detection: Integers  # (P,)
    instance: Integers  # (P,)
    iou: Floats  # (P,); infinite where the official quotient is 0 / 0


def temporal_iou(
    start: Floats, end: Floats, other_start: Floats, other_end: Floats, smallest_union: float | None
) -> Floats:
    """Intersection over union of intervals, element by element, in the order of operations of the official code.

    Without `smallest_union` the quotient of intervals whose union has no length is infinite: the official evaluators
    of ActivityNet and AFSD compute NaN there, which fails their test for being below a threshold.
    """
    intersection = (np.minimum(end, other_end) - np.maximum(start, other_start)).clip(0)
    union = (other_end - other_start) + (end - start) - intersection
    if smallest_union is not None:
        return intersection / union.clip(smallest_union)
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = intersection / union
    return np.where(np.isnan(iou), np.inf, iou)


def overlapping_pairs(
    instances: SegmentTable,
    detections: SegmentTable,
    threshold: float,
    smallest_union: float | None,
    same_class: bool = True,
) -> Pairs:
    """All pairs in the same video, and of the same class if so wanted, whose IoU is not below `threshold`.

    Of instances with equal overlap the later comes first.
    """
    # Instances by group, of one video and class; a group's instances are order[first : first + count].
    num_classes = len(instances.classes) if same_class else 1
    group, of_detection = (t.video * num_classes + (t.label if same_class else 0) for t in (instances, detections))
    known = (detections.video >= 0) & ((detections.label >= 0) | (not same_class))
    sizes = np.bincount(group, minlength=len(instances.videos) * num_classes)
    order = np.argsort(group, kind="stable")
    of_detection = np.where(known, of_detection, 0)
    first = (np.cumsum(sizes) - sizes)[of_detection]
    count = np.where(known, sizes[of_detection], 0)
    parts = []
    for block in _blocks(count):
        detection = np.repeat(np.arange(block.start, block.stop), count[block])
        within = np.arange(len(detection)) - np.repeat(np.cumsum(count[block]) - count[block], count[block])
        instance = order[first[detection] + within]
        iou = temporal_iou(
            detections.start[detection],
            detections.end[detection],
            instances.start[instance],
            instances.end[instance],
            smallest_union,
        )
        kept = iou >= threshold
        parts.append((detection[kept], instance[kept], iou[kept]))
    detection, instance, iou = (np.concatenate(column) for column in zip(*parts, strict=True))
    return _by_overlap(Pairs(detection, instance, iou))


def _by_overlap(pairs: Pairs) -> Pairs:
    """Sort pairs, given by detection; only detections with several pairs, which are few, have to be looked at."""
    repeats = pairs.detection[1:] == pairs.detection[:-1]
    several = np.flatnonzero(np.append(repeats, False) | np.append(False, repeats))
    detection, instance, iou = (column[several] for column in (pairs.detection, pairs.instance, pairs.iou))
    order = several[np.lexsort((-instance, -iou, detection))]
    pairs.instance[several], pairs.iou[several] = pairs.instance[order], pairs.iou[order]
    return pairs


def match(pairs: Pairs, num_instances: int, tious: Floats) -> Integers:
    """The detection that takes each instance at each threshold: (T, G), -1 where none does.

    Detections are numbered by rank: the lower its number, the earlier it chooses.
    """
    taken_by = np.full((len(tious), num_instances), -1)
    detections, first = np.unique(pairs.detection, return_index=True)
    if not len(detections):
        return taken_by
    for row, tiou in enumerate(tious):
        # As pairs fall in overlap, those that reach the threshold come first.
        last = first + np.add.reduceat(pairs.iou >= tiou, first, dtype=np.int64)
        holder = _deferred_acceptance(pairs.instance, first, last, num_instances)
        taken_by[row] = np.append(detections, -1)[holder]
    return taken_by


def _deferred_acceptance(choices: Integers, first: Integers, last: Integers, num_instances: int) -> Integers:
    """The number of the detection that each instance ends up with; that of detections where there is none.

    Detection d wants ``choices[first[d] : last[d]]``, the best first.
    """
    free = len(first)
    holder = np.full(num_instances, free)
    asking, place = np.flatnonzero(first < last), first.copy()
    while len(asking):
        wanted = choices[place[asking]]
        before = holder[wanted]
        np.minimum.at(holder, wanted, asking)
        won = holder[wanted] == asking
        displaced = before[won]
        refused = np.concatenate([asking[~won], displaced[displaced < free]])
        place[refused] += 1
        asking = refused[place[refused] < last[refused]]
    return holder


def average_precision(found: NDArray[np.bool_], label: Integers, num_instances: Integers) -> Floats:
    """All-point interpolated average precision (T, K) of ranked detections.

    Args:
        found: (T, D) whether a detection, the highest score first, found an instance.
        label: (D,) classes of the detections, 0..K-1, or -1 for classes that do not count.
        num_instances: (K,) instances per class, at least one each.
    """
    num_classes = len(num_instances)
    narrow = label.astype(np.int16) if num_classes < 1 << 15 else label  # NumPy sorts 16 bits in linear time
    by_class = np.argsort(narrow, kind="stable")
    sorted_label = label[by_class]
    first = np.searchsorted(sorted_label, np.arange(num_classes + 1))
    rank = np.arange(len(label)) - first[sorted_label] + 1  # within the class, from 1; unused for -1
    precision_at = np.zeros((len(found), num_classes))
    for row, hits in enumerate(found):
        hit = np.flatnonzero(hits[by_class])
        bounds = np.searchsorted(hit, first)
        for c in range(num_classes):
            ranks = rank[hit[bounds[c] : bounds[c + 1]]]
            # Recall grows at hits alone, and so does the largest precision still to come.
            precision = np.arange(1, len(ranks) + 1) / ranks
            recall = np.arange(len(ranks) + 1) / num_instances[c]
            best_to_come = np.maximum.accumulate(precision[::-1])[::-1]
            precision_at[row, c] = np.sum(np.diff(recall) * best_to_come)
    return precision_at


def _blocks(count: Integers) -> list[slice]:
    """Runs of detections with about `PAIRS_AT_ONCE` pairs, at least one run."""
    edges = np.searchsorted(np.cumsum(count), np.arange(PAIRS_AT_ONCE, count.sum(), PAIRS_AT_ONCE)) + 1
    bounds = np.unique(np.concatenate([[0], edges, [len(count)]]))
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(bounds)] or [slice(0, 0)]
