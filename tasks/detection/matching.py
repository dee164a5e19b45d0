"""Which objects of an image were found, what kind of mistake every other detection is, and a score to rank images by.

The kinds are those of TIDE (Bolya et al. 2020, arXiv 2008.08115), told apart by the IoU of boxes with the ground truth.
They count mistakes; TIDE's own figures say how much AP each kind costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.core.evaluation import all_gather
from tasks.detection.annotations import Categories
from tasks.detection.network import Record

MIN_SCORE = 0.3  # detections below it are not shown to people, so they are neither mistakes nor finds here
FOREGROUND_IOU = 0.5
BACKGROUND_IOU = 0.1
CORRECT, LOCATION, CLASS, DUPLICATE, BACKGROUND, OTHER, MISSED = range(7)
KINDS = ("correct", "badly localised", "wrong class", "duplicate", "background", "other", "missed")
OBJECTS = len(KINDS)  # counted beside them: all objects, found or not
IGNORED = -1  # a detection in a region of the ground truth that marks a crowd


@dataclass(frozen=True)
class Truth:
    """The annotated objects of an image, in its original pixels.

    `boxes` (n, 4) are xyxy, `labels` (n,) train ids, `crowd` (n,) says which are regions of many objects, and
    `segmentations` are polygons or run-length encodings as annotated, none or one per object.
    """

    boxes: NDArray[np.floating]
    labels: NDArray[np.integer]
    crowd: NDArray[np.bool_]
    segmentations: Sequence[Any] = ()

    @classmethod
    def of(cls, annotations: Sequence[dict[str, Any]], categories: Categories, with_masks: bool) -> Truth:
        """Take the records of one image from an annotation file."""
        boxes = np.array([record["bbox"] for record in annotations], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return cls(
            boxes,
            np.array(categories.to_train([record["category_id"] for record in annotations]), dtype=np.int64),
            np.array([bool(record["iscrowd"]) for record in annotations], dtype=bool),
            [record["segmentation"] for record in annotations] if with_masks else (),
        )


@dataclass(frozen=True)
class Matches:
    """What became of the detections and of the objects of one image.

    Attributes:
        shown: Indices into the record of the s detections with a score of at least `MIN_SCORE`.
        kinds: (s,) index into `KINDS`, or `IGNORED`.
        found: (n,) whether an object has a detection of its class with an IoU of at least 0.5; crowds count as found.
        score: See `image_score`.
        counts: {(class, kind): number}, by the detection's class, and by the object's for `MISSED` and `OBJECTS`.
    """

    shown: NDArray[np.integer]
    kinds: NDArray[np.integer]
    found: NDArray[np.bool_]
    score: float
    counts: dict[tuple[int, int], int]


def match_image(record: Record, truth: Truth) -> Matches:
    """Compare the detections of an image with its objects, best detection first, as COCO's evaluation does at 0.5.

    A detection that is not the best of its object is, in this order: badly localised (IoU 0.1 to 0.5 with an object of
    its class), of the wrong class (0.5 or more with another class), a duplicate, background (less than 0.1 with
    anything), or other. An object without detection is missed, unless a detection badly localised or of the wrong
    class is about it.
    """
    shown = np.flatnonzero(record["scores"] >= MIN_SCORE)
    labels, crowd = record["labels"][shown], truth.crowd
    objects = np.flatnonzero(~crowd)
    overlap = box_iou(record["boxes"][shown], truth.boxes[objects])  # (s, o)
    same = labels[:, None] == truth.labels[objects]
    partner = _best_partners(np.where(same, overlap, 0))
    kinds = np.full(len(shown), CORRECT)
    covered = np.zeros(len(objects), dtype=bool)
    covered[partner[partner >= 0]] = True
    found = crowd.copy()
    found[objects[covered]] = True
    in_crowd = _covered_share(record["boxes"][shown], truth.boxes[crowd]) >= FOREGROUND_IOU
    in_crowd = (in_crowd & (labels[:, None] == truth.labels[crowd])).any(axis=1)
    for i in np.flatnonzero(partner < 0):
        own, others = (np.where(mask, overlap[i], 0) for mask in (same[i], ~same[i]))
        kinds[i], about = _kind(own, others)
        if in_crowd[i]:
            kinds[i], about = IGNORED, None
        if about is not None:
            covered[about] = True
    counts: dict[tuple[int, int], int] = {}
    pairs = [*zip(labels, kinds, strict=True), *((label, MISSED) for label in truth.labels[objects[~covered]])]
    pairs += [(label, OBJECTS) for label in truth.labels[objects]]
    for label, kind in pairs:
        if kind != IGNORED:
            counts[int(label), int(kind)] = counts.get((int(label), int(kind)), 0) + 1
    false = (kinds != CORRECT) & (kinds != IGNORED)
    score = image_score((kinds == CORRECT).sum(), (~found).sum(), record["scores"][shown][false])
    return Matches(shown, kinds, found, score, counts)


def image_score(correct: int, not_found: int, false_scores: NDArray[np.floating]) -> float:
    """Rank an image by what was found in it, 0..1: F1 at IoU 0.5 whose false positives count by their confidence.

    (2 c + 1) / (2 c + 1 + m + Σ s) for c objects found, m not found and false positives of scores s. The 1 lets more
    misses and more false positives rank below fewer where nothing was found, and more finds above fewer where all
    was. NaN for an image without objects and without false positives: there was nothing to do.
    """
    if not correct and not not_found and not len(false_scores):
        return float("nan")
    hits = 2 * float(correct) + 1
    return hits / (hits + float(not_found) + float(false_scores.sum()))


class ErrorCounts:
    """Numbers of finds, mistakes and objects of every class over the images of an evaluation."""

    def __init__(self, num_classes: int) -> None:
        self.counts = np.zeros((num_classes, len(KINDS) + 1), dtype=np.int64)

    def add(self, matches: Matches) -> None:
        """Count one image."""
        for place, number in matches.counts.items():
            self.counts[place] += number

    def gather(self) -> NDArray[np.int64]:
        """The counts (K, kinds + 1) of all processes, objects last; every process must call it."""
        return np.sum(all_gather(self.counts), axis=0)


def box_iou(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.floating]:
    """IoU (n, m) of boxes (n, 4) with boxes (m, 4), xyxy; 0 for empty boxes."""
    inside = _intersections(a, b)
    union = _areas(a)[:, None] + _areas(b) - inside
    return np.divide(inside, union, out=np.zeros_like(inside), where=union > 0)


def _best_partners(overlap: NDArray[np.floating]) -> NDArray[np.integer]:
    """For each detection (s, o), best first, the free object of the largest IoU of at least 0.5, or -1."""
    partner = np.full(len(overlap), -1)
    if not overlap.shape[1]:
        return partner
    free = overlap.copy()
    for i, row in enumerate(free):  # rows are views: later ones see which objects are taken
        best = int(row.argmax())
        if row[best] >= FOREGROUND_IOU:
            partner[i] = best
            free[:, best] = 0
    return partner


def _kind(own: NDArray[np.floating], others: NDArray[np.floating]) -> tuple[int, int | None]:
    """Kind of a detection that found nothing, and the object it is about, by its IoU with those of its own class."""
    best, best_other = own.max(initial=0), others.max(initial=0)
    if BACKGROUND_IOU <= best < FOREGROUND_IOU:
        return LOCATION, int(own.argmax())
    if best_other >= FOREGROUND_IOU:
        return CLASS, int(others.argmax())
    if best >= FOREGROUND_IOU:
        return DUPLICATE, None
    return (BACKGROUND, None) if best_other < BACKGROUND_IOU else (OTHER, None)


def _covered_share(boxes: NDArray[np.floating], regions: NDArray[np.floating]) -> NDArray[np.floating]:
    inside, areas = _intersections(boxes, regions), _areas(boxes)[:, None]
    return np.divide(inside, areas, out=np.zeros_like(inside), where=areas > 0)


def _intersections(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.floating]:
    a, b = a.astype(np.float64).reshape(-1, 4), b.astype(np.float64).reshape(-1, 4)
    top_left, bottom_right = np.maximum(a[:, None, :2], b[:, :2]), np.minimum(a[:, None, 2:], b[:, 2:])
    return np.clip(bottom_right - top_left, 0, None).prod(axis=-1)


def _areas(boxes: NDArray[np.floating]) -> NDArray[np.floating]:
    boxes = boxes.astype(np.float64).reshape(-1, 4)
    return np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=-1)
