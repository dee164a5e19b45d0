"""Which instance a point of the pyramid has to find: AFSD (arXiv 2103.13137), section 3.4."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Frames that the farther boundary of an instance may be away from a point of a level: ActivityNet-1.3, 768 frames.
ACTIVITYNET_RANGES = ((0, 30), (15, 60), (30, 120), (60, 240), (96, 768), (256, 768))


class Targets(NamedTuple):
    """`distances` (N, 2), in frames, from each point to the ends of its instance, and `labels` (N,), 0 for none."""

    distances: Tensor
    labels: Tensor


def assign(
    points: Tensor,
    levels: Tensor,
    segments: Tensor,
    labels: Tensor,
    length: int,
    ranges: Sequence[tuple[float, float]] | None = None,
) -> Targets:
    """Give each point (N,), from 0 to 1, the shortest instance that it lies in, boundaries included.

    `segments` (M, 2) are instances in frames of the clip of `length` frames, `labels` (M,) their classes from 1; among
    equally short instances the first is taken. With `ranges`, of each level, an instance is open to a point only if its
    farther boundary is more than the first and at most the second number of frames away.
    """
    if not len(segments):
        return Targets(points.new_zeros(len(points), 2), labels.new_zeros(len(points)))
    places = points.to(segments.dtype)[:, None]
    distances = torch.stack([places - segments[:, 0] / length, segments[:, 1] / length - places], dim=-1) * length
    open_to = (distances >= 0).all(dim=-1)  # (N, M)
    if ranges is not None:
        bounds = distances.new_tensor(ranges)[levels][:, None]  # (N, 1, 2)
        farther = distances.amax(dim=-1)
        open_to &= (farther > bounds[..., 0]) & (farther <= bounds[..., 1])
    spans = distances.sum(dim=-1).masked_fill(~open_to, torch.inf)
    shortest = spans.argmin(dim=1)
    rows = torch.arange(len(points), device=points.device)
    found = open_to[rows, shortest]
    return Targets(distances[rows, shortest], labels[shortest] * found)


def overlaps(distances: Tensor, others: Tensor) -> Tensor:
    """IoU of segments around the same point, given as distances (..., 2) to start and end."""
    intersection = torch.minimum(distances, others).sum(dim=-1)
    union = distances.sum(dim=-1) + others.sum(dim=-1) - intersection
    return intersection / union.clamp(min=torch.finfo(torch.float32).eps)


def refined_labels(distances: Tensor, targets: Targets, threshold: float, keep_best: bool = False) -> Tensor:
    """Labels (N,) of those coarse proposals (N, 2) that overlap their instance by at least `threshold`, else 0.

    With `keep_best` the threshold is lowered to the best overlap of the clip, so that one is left.
    """
    overlap = overlaps(distances, targets.distances)
    least = overlap.new_tensor(threshold)
    positive = targets.labels > 0
    if keep_best and positive.any():
        least = torch.minimum(least, overlap[positive].amax())
    return targets.labels * (overlap >= least)
