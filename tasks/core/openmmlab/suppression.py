"""Non-maximum suppression: hard, soft, grouped, of rotated boxes and of quadrilaterals."""

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor

from tasks.core.openmmlab.overlaps import IOU, overlap_ratios, polygon_overlaps, quadri_corners, rotated_corners
from tasks.core.openmmlab.precision import round_to_float32, widen

NAIVE, LINEAR, GAUSSIAN = 0, 1, 2


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Return the indices of the kept (x1, y1, x2, y2) boxes, best first; a side is `x2 - x1 + offset` long."""
    order = best_first(scores)
    ranked, ranked_scores = widen(boxes[order], scores[order])
    threshold = round_to_float32(iou_threshold)
    if offset == 0:
        return order[torchvision.ops.nms(ranked, ranked_scores, threshold)]
    groups = _suppress(len(ranked), lambda i: overlap_ratios(ranked[i], ranked[i + 1 :], IOU, offset) > threshold)
    return order[[group[0] for group in groups]]


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Return for each kept row of `dets` (x1, y1, x2, y2, score) its index and those it suppresses, best first."""
    order = best_first(dets[:, 4])
    (ranked,) = widen(dets[order, :4])
    threshold = round_to_float32(iou_threshold)
    groups = _suppress(len(ranked), lambda i: overlap_ratios(ranked[i], ranked[i + 1 :], IOU, 0) >= threshold)
    return [order[group].tolist() for group in groups]


def nms_rotated(
    dets: Tensor,
    scores: Tensor,
    order: Tensor,
    dets_sorted: Tensor,
    labels: Tensor,
    iou_threshold: float,
    multi_label: bool,
) -> Tensor:
    """Return the indices of the kept (x, y, w, h, angle) boxes, best first.

    With `multi_label`, boxes of different `labels` leave each other alone.
    """
    return _nms_polygons(rotated_corners(dets[:, :5]), scores, iou_threshold, labels if multi_label else None)


def nms_quadri(
    dets: Tensor, scores: Tensor, order: Tensor, dets_sorted: Tensor, iou_threshold: float, multi_label: bool
) -> Tensor:
    """Return the indices of the kept (x1, y1, ..., x4, y4) boxes, best first.

    With `multi_label`, a ninth column of `dets` holds labels, and boxes of different labels leave each other alone.
    """
    return _nms_polygons(quadri_corners(dets[:, :8]), scores, iou_threshold, dets[:, 8] if multi_label else None)


def _nms_polygons(corners: Tensor, scores: Tensor, iou_threshold: float, labels: Tensor | None) -> Tensor:
    threshold = round_to_float32(iou_threshold)
    order = best_first(scores)
    ranked = corners[order]
    ranked_labels = None if labels is None else labels[order]

    def suppressed_by(i: int) -> Tensor:
        close = polygon_overlaps(ranked[i], ranked[i + 1 :], IOU).to(scores.dtype) >= threshold
        return close if ranked_labels is None else close & (ranked_labels[i] == ranked_labels[i + 1 :])

    return order[[group[0] for group in _suppress(len(ranked), suppressed_by)]]


def best_first(scores: Tensor) -> Tensor:
    """Return the order of falling scores, equal ones in the order in which mmcv takes them, which is no stable one."""
    return scores.sort(0, descending=True)[1]


def _suppress(count: int, suppressed_by: Callable[[int], Tensor]) -> list[list[int]]:
    """Return for each kept rank the ranks of its group, itself first.

    `suppressed_by(i)` says which of the ranks behind i are too close to it.
    """
    alive = torch.ones(count, dtype=torch.bool)
    groups = []
    for i in range(count):
        if alive[i]:
            taken = suppressed_by(i).cpu() & alive[i + 1 :]
            alive[i + 1 :] &= ~taken
            groups.append([i, *(taken.nonzero().flatten() + i + 1).tolist()])
    return groups


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Write boxes and lowered scores, best first, into `dets` (n, 5); return the indices of those of `min_score`.

    Every selected box multiplies the scores of the others by a weight: 0 (naive) or 1 - IoU (linear) from
    `iou_threshold` on, exp(-IoU² / sigma) (gaussian). Soft-NMS, arXiv 1704.04503.
    """
    boxes, scores = widen(boxes, scores)
    threshold, lowest = round_to_float32(iou_threshold), round_to_float32(min_score)
    indices = torch.arange(len(boxes))
    scores = scores.clone()
    selected = 0
    while selected < len(indices):
        rest = indices[selected:]
        best = int(scores[rest].argmax())
        rest[[0, best]] = rest[[best, 0]]
        top, rest = rest[0], rest[1:]
        dets[selected, :4], dets[selected, 4] = boxes[top], scores[top]
        selected += 1

        iou = overlap_ratios(boxes[top], boxes[rest], IOU, offset)
        if method == GAUSSIAN:
            weight = torch.exp(-(iou * iou) / sigma)
        else:
            weight = torch.where(iou >= threshold, 1 - iou if method == LINEAR else 0.0, 1.0)
        scores[rest] *= weight
        indices = torch.cat([indices[:selected], _fill_gaps(rest, scores[rest] < lowest)])
    return indices


def _fill_gaps(values: Tensor, dropped: Tensor) -> Tensor:
    """Return the values that are not `dropped`; the last ones fill the gaps, which decides between equal scores."""
    count = int((~dropped).sum())
    values = values.clone()
    gaps = dropped[:count].nonzero().flatten()
    movers = (~dropped[count:]).nonzero().flatten().flip(0) + count
    values[gaps] = values[movers]
    return values[:count]
