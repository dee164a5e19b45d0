"""Averages over rotated regions of interest."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.core.openmmlab.precision import widen
from tasks.core.openmmlab.sampling import add_samples_gradient, parts_of, points_of_bins, sample


class _Points(NamedTuple):
    """Samples of the regions `rows`: image (n,), y and x (n, h, w, samples, samples) and their weights in the sum."""

    rows: Tensor
    batch: Tensor
    y: Tensor
    x: Tensor
    weight: Tensor


def roi_align_rotated_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
) -> None:
    """Pool `rois` (n, 6), rows (image, x, y, w, h, angle), of `input` (B, C, H, W) into `output` (n, C, h, w).

    `sampling_ratio` samples span a bin per direction, 0: one per pixel. `aligned` shifts regions by half a pixel.
    Angles are in radians, from x to y where `clockwise`. RRPN, arXiv 1703.01086.
    """
    features, boxes = widen(input, rois)
    size = (pooled_height, pooled_width)
    for points in _points(boxes.to(features), size, spatial_scale, sampling_ratio, aligned, clockwise, input.shape[1]):
        samples = sample(features, points.batch, points.y.flatten(1), points.x.flatten(1))
        weighted = samples.unflatten(1, points.y.shape[1:]) * points.weight[..., None]
        output[points.rows] = weighted.sum((3, 4)).movedim(-1, 1).to(output.dtype)


def roi_align_rotated_backward(
    grad_output: Tensor,
    rois: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
) -> None:
    """Add the gradient of `roi_align_rotated_forward` by `input` to `grad_input` (B, C, H, W)."""
    grad, boxes = widen(grad_output, rois)
    total = torch.zeros_like(grad_input, dtype=grad.dtype)
    size = (pooled_height, pooled_width)
    for points in _points(boxes.to(grad), size, spatial_scale, sampling_ratio, aligned, clockwise, grad.shape[1]):
        grads = grad[points.rows].movedim(1, -1)[:, :, :, None, None] * points.weight[..., None]
        add_samples_gradient(total, grads.flatten(1, 4), points.batch, points.y.flatten(1), points.x.flatten(1))
    grad_input += total.to(grad_input)


def _points(
    boxes: Tensor,
    size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
    channels: int,
) -> Iterator[_Points]:
    """Yield the samples of as many regions at a time as memory is meant for."""
    center = boxes[:, 1:3] * spatial_scale - (0.5 if aligned else 0)
    sides = boxes[:, 3:5] * spatial_scale
    if not aligned:
        sides = sides.clamp(min=1)
    angle = boxes[:, 5] if clockwise else -boxes[:, 5]
    bins = sides / sides.new_tensor(size[::-1])
    counts = bins.ceil().long() if sampling_ratio <= 0 else torch.full_like(bins, sampling_ratio, dtype=torch.long)
    along_y, has_y = points_of_bins(-sides[:, 1] / 2, bins[:, 1], size[0], counts[:, 1])  # (n, h, samples)
    along_x, has_x = points_of_bins(-sides[:, 0] / 2, bins[:, 0], size[1], counts[:, 0])
    share = 1 / counts.prod(1).clamp(min=1).to(boxes)
    per_box = channels * along_y.shape[1:].numel() * along_x.shape[1:].numel()
    for rows in parts_of(boxes, per_box):
        dy, dx = along_y[rows, :, None, :, None], along_x[rows, None, :, None, :]
        cos, sin = (v[rows, None, None, None, None] for v in (angle.cos(), angle.sin()))
        y = dy * cos + dx * sin + center[rows, 1, None, None, None, None]
        x = dx * cos - dy * sin + center[rows, 0, None, None, None, None]
        exists = has_y[rows, None, None, :, None] & has_x[rows, None, None, None, :]
        yield _Points(rows, boxes[rows, 0], y, x, exists * share[rows, None, None, None, None])
