"""Overlaps of boxes: axis-aligned, rotated and quadrilateral, all pairs or pair by pair."""

import torch
from torch import Tensor

from tasks.core.openmmlab.precision import widen

IOU, IOF = 0, 1  # mode flags: intersection over union, over the first box
SMALLEST_AREA = 1e-14  # a smaller box overlaps nothing
COINCIDENT = 1e-9  # distance of two lines taken for one, relative to the size of the boxes


def bbox_overlaps(boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Write overlaps of (x1, y1, x2, y2) boxes into `ious`: (m, n), or (n,) where `aligned`.

    A side is `x2 - x1 + offset` long.
    """
    first, second = widen(boxes1, boxes2)
    if not aligned:
        first = first[:, None]
    ious.copy_(overlap_ratios(first, second, mode, offset))


def overlap_ratios(first: Tensor, second: Tensor, mode: int, offset: float) -> Tensor:
    """Return overlaps of broadcast (..., 4) boxes."""
    sides = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2]) + offset
    intersection = sides.clamp(min=0).prod(-1)
    area = (first[..., 2:] - first[..., :2] + offset).prod(-1)
    if mode == IOU:
        area = area + (second[..., 2:] - second[..., :2] + offset).prod(-1) - intersection
    return intersection / area


def box_iou_rotated(boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode_flag: int, aligned: bool) -> None:
    """Write overlaps of (x, y, w, h, angle in radians) boxes into `ious`: (m * n,), or (n,) where `aligned`."""
    _write_overlaps(rotated_corners(boxes1), rotated_corners(boxes2), ious, mode_flag, aligned)


def box_iou_quadri(boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode_flag: int, aligned: bool) -> None:
    """Write overlaps of convex quadrilaterals (x1, y1, ..., x4, y4) into `ious`: (m * n,), or (n,) where `aligned`."""
    _write_overlaps(quadri_corners(boxes1), quadri_corners(boxes2), ious, mode_flag, aligned)


def _write_overlaps(first: Tensor, second: Tensor, ious: Tensor, mode: int, aligned: bool) -> None:
    ratios = polygon_overlaps(first if aligned else first[:, None], second, mode)
    ious.copy_(ratios.reshape(ious.shape))


def rotated_corners(boxes: Tensor) -> Tensor:
    """Return the corners (..., 4, 2) in float64 of (x, y, w, h, angle) boxes, in the order of positive angles."""
    boxes = boxes.double()
    center, size, angle = boxes[..., None, :2], boxes[..., 2:4], boxes[..., 4, None]
    signs = boxes.new_tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]]) / 2
    x, y = (size[..., None, :] * signs).unbind(-1)  # (..., 4)
    return center + torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], dim=-1)


def quadri_corners(boxes: Tensor) -> Tensor:
    """Return the corners (..., 4, 2) in float64 of (x1, y1, ..., x4, y4) boxes, in the order of positive angles."""
    corners = boxes.double().unflatten(-1, (4, 2))
    return torch.where(_signed_areas(corners)[..., None, None] < 0, corners.flip(-2), corners)


def polygon_overlaps(first: Tensor, second: Tensor, mode: int) -> Tensor:
    """Return overlaps of broadcast convex polygons (..., corners, 2) whose corners follow positive angles."""
    middle = (first.mean(-2, keepdim=True) + second.mean(-2, keepdim=True)) / 2  # digits for the differences
    first, second = torch.broadcast_tensors(first - middle, second - middle)
    area1, area2 = _signed_areas(first), _signed_areas(second)
    # The outline of the intersection: the parts of each outline inside the other, shared lines once (Green's theorem).
    intersection = _area_under_edges(first, second, shared=True) + _area_under_edges(second, first, shared=False)
    intersection = intersection.clamp(min=0)
    ratios = intersection / (area1 + area2 - intersection if mode == IOU else area1)
    return torch.where((area1 < SMALLEST_AREA) | (area2 < SMALLEST_AREA), 0, ratios)


def _signed_areas(corners: Tensor) -> Tensor:
    return _cross(corners, corners.roll(-1, -2)).sum(-1) / 2


def _area_under_edges(polygon: Tensor, window: Tensor, shared: bool) -> Tensor:
    """Return half the cross products of the edges of `polygon`, cut to the inside of `window`.

    `shared` says whether an edge on an edge of `window` counts.
    """
    start, end = polygon[..., :, None, :], polygon.roll(-1, -2)[..., :, None, :]
    corner = window[..., None, :, :]
    side = window.roll(-1, -2)[..., None, :, :] - corner
    length = side.norm(dim=-1)
    # Signed distances (..., edges, sides) of the ends of every edge from every side, positive inside.
    d_start, d_end = _cross(side, start - corner) / length, _cross(side, end - corner) / length
    tolerance = COINCIDENT * length.sum(-1, keepdim=True)
    coincident = (d_start.abs() <= tolerance) & (d_end.abs() <= tolerance)
    crossing = d_start / (d_start - d_end)
    enters = torch.where((d_start < 0) & (d_end >= 0) & ~coincident, crossing, 0.0).amax(-1)
    leaves = torch.where((d_start >= 0) & (d_end < 0) & ~coincident, crossing, 1.0).amin(-1)
    outside = (d_start < 0) & (d_end < 0) & ~coincident
    if not shared:
        outside |= coincident
    kept = (leaves - enters).clamp(min=0).masked_fill(outside.any(-1), 0)
    # The cross product of two points of a line grows with their distance.
    return (kept * _cross(start.squeeze(-2), end.squeeze(-2))).sum(-1) / 2


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def points_in_polygons_forward(points: Tensor, polygons: Tensor, output: Tensor) -> None:
    """Write 1 into `output` (points, polygons) where a point (x, y) is inside a quadrilateral, else 0."""
    corners = polygons.double().unflatten(-1, (4, 2))  # (polygons, 4, 2)
    x, y = points.double()[:, None, None].unbind(-1)
    (x1, y1), (x2, y2) = corners.unbind(-1), corners.roll(-1, -2).unbind(-1)
    crosses = (y1 > y) != (y2 > y)  # even-odd rule: edges that a ray to the right may meet
    at = x1 + (y - y1) * (x2 - x1) / (y2 - y1)
    output.copy_((crosses & (x < at)).sum(-1) % 2)
