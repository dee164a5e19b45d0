"""Pooling of regions of interest to maps of one size, by bilinear samples or by the largest pixel."""

from typing import NamedTuple

import torch
from torch import Tensor

from tasks.core.openmmlab.precision import widen
from tasks.core.openmmlab.sampling import add_samples_gradient, parts_of, points_of_bins, sample

MAX, AVERAGE = 0, 1
NOTHING = -10000.0  # the largest sample of a region without samples


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Pool `rois` (n, 5), rows (image, x1, y1, x2, y2), of `input` (B, C, H, W) into `output` (n, C, h, w).

    The maximum also writes the sample it took into `argmax_y` and `argmax_x`. `sampling_ratio` samples span a bin
    per direction, 0: one per pixel. `aligned` shifts regions by half a pixel. Mask R-CNN, arXiv 1703.06870, 3.
    """
    features, boxes = widen(input, rois)
    size = (aligned_height, aligned_width)
    if pool_mode == AVERAGE:
        align = torch.ops.torchvision.roi_align
        output.copy_(align(features, boxes.to(features), spatial_scale, *size, max(sampling_ratio, 0), aligned))
        return
    grid = _grid(boxes.to(features), size, spatial_scale, sampling_ratio, aligned)
    per_box = features.shape[1] * grid.y.shape[1:].numel() * grid.x.shape[1:].numel()
    for rows in parts_of(boxes, per_box):
        part = _Grid(*(values[rows] for values in grid))
        largest, at_y, at_x = _largest_samples(features, part)
        output[rows], argmax_y[rows], argmax_x[rows] = (v.to(output.dtype) for v in (largest, at_y, at_x))


class _Grid(NamedTuple):
    """Samples of axis-aligned regions: rows of bins y (n, h, samples) and columns x (n, w, samples)."""

    batch: Tensor
    y: Tensor
    x: Tensor
    has_y: Tensor
    has_x: Tensor


def _grid(boxes: Tensor, size: tuple[int, int], spatial_scale: float, sampling_ratio: int, aligned: bool) -> _Grid:
    corners = boxes[:, 1:] * spatial_scale - (0.5 if aligned else 0)
    starts, sides = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not aligned:
        sides = sides.clamp(min=1)
    bins = sides / sides.new_tensor(size[::-1])
    counts = bins.ceil().long() if sampling_ratio <= 0 else torch.full_like(bins, sampling_ratio, dtype=torch.long)
    y, has_y = points_of_bins(starts[:, 1], bins[:, 1], size[0], counts[:, 1])
    x, has_x = points_of_bins(starts[:, 0], bins[:, 0], size[1], counts[:, 0])
    return _Grid(boxes[:, 0], y, x, has_y, has_x)


def _largest_samples(features: Tensor, grid: _Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest sample (n, C, h, w) of every bin and where it is: y and x."""
    (n, height, per_row), (_, width, per_column) = grid.y.shape, grid.x.shape
    shape = (n, height, width, per_row, per_column)
    y = grid.y[:, :, None, :, None].expand(shape)
    x = grid.x[:, None, :, None, :].expand(shape)
    exists = (grid.has_y[:, None, None, :, None] & grid.has_x[:, None, None, None, :]).expand(shape)
    values = sample(features, grid.batch, y.flatten(1), x.flatten(1)).unflatten(1, shape[1:])  # (*shape, C)
    values = values.masked_fill(~exists[..., None], NOTHING).flatten(3, 4)
    best = values.argmax(3)  # (n, h, w, C)
    largest = values.gather(3, best[:, :, :, None]).squeeze(3)
    found = largest > NOTHING
    at_y, at_x = (torch.where(found, v.flatten(3).gather(3, best), -1.0) for v in (y, x))
    return largest.movedim(-1, 1), at_y.movedim(-1, 1), at_x.movedim(-1, 1)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Add the gradient of `roi_align_forward` by `input` to `grad_input` (B, C, H, W)."""
    grad, boxes, at_y, at_x = widen(grad_output, rois, argmax_y, argmax_x)
    boxes = boxes.to(grad)
    if pool_mode == AVERAGE:
        size = (aligned_height, aligned_width)
        backward = torch.ops.torchvision._roi_align_backward
        grad_input += backward(
            grad, boxes, spatial_scale, *size, *grad_input.shape, max(sampling_ratio, 0), aligned
        ).to(grad_input)
        return
    # Every channel has samples of its own, so channels take the place of images.
    batch_size, channels, height, width = grad_input.shape
    planes = boxes[:, :1].long() * channels + torch.arange(channels, device=grad.device)  # (n, C)
    grad = torch.where(at_y == -1, 0, grad).reshape(-1, aligned_height * aligned_width, 1)
    total = grad.new_zeros(batch_size * channels, 1, height, width)
    add_samples_gradient(total, grad, planes.flatten(), at_y.flatten(2).flatten(0, 1), at_x.flatten(2).flatten(0, 1))
    grad_input += total.view(grad_input.shape).to(grad_input)


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Write the largest pixel of every bin of `rois` (n, 5) into `output` (n, C, h, w), its index into `argmax`.

    A region ends behind its last pixel, bins grow to whole pixels; one without pixels is 0 and has the index -1.
    Fast R-CNN, arXiv 1504.08083, 2.1.
    """
    features, boxes = widen(input, rois)
    height, width = features.shape[2:]
    starts = boxes[:, 1:3] * spatial_scale
    bins = ((boxes[:, 3:] + 1) * spatial_scale - starts) / starts.new_tensor([pooled_width, pooled_height])
    top, bottom = _pixel_ranges(starts[:, 1], bins[:, 1], pooled_height, height)  # (n, h)
    left, right = _pixel_ranges(starts[:, 0], bins[:, 0], pooled_width, width)  # (n, w)
    tallest, widest = (int((end - start).max()) if len(boxes) else 0 for start, end in ((top, bottom), (left, right)))
    if min(tallest, widest) <= 0:
        output.zero_(), argmax.fill_(-1)
        return
    batch, valid = boxes[:, 0].long(), (bins > 0).all(1)
    per_box = features.shape[1] * pooled_height * tallest * pooled_width * widest
    for part in parts_of(boxes, per_box):
        y = top[part, :, None] + torch.arange(tallest, device=boxes.device)  # (n, h, tallest)
        x = left[part, :, None] + torch.arange(widest, device=boxes.device)
        exists = (y < bottom[part, :, None])[:, :, None, :, None] & (x < right[part, :, None])[:, None, :, None, :]
        index = y.clamp(max=height - 1)[:, :, None, :, None] * width + x.clamp(max=width - 1)[:, None, :, None, :]
        exists &= valid[part, None, None, None, None]
        pixels = features.flatten(2)[batch[part, None], :, index.flatten(1)].unflatten(1, index.shape[1:])
        pixels = pixels.masked_fill(~exists[..., None], -torch.inf).flatten(3, 4)  # (n, h, w, pixels, C)
        best = pixels.argmax(3)
        largest = pixels.gather(3, best[:, :, :, None]).squeeze(3).movedim(-1, 1)
        empty = ~exists.flatten(3).any(-1)[:, None]
        output[part] = largest.masked_fill(empty, 0).to(output.dtype)
        argmax[part] = index.flatten(3).gather(3, best).movedim(-1, 1).masked_fill(empty, -1).to(argmax.dtype)


def _pixel_ranges(starts: Tensor, sizes: Tensor, bins: int, length: int) -> tuple[Tensor, Tensor]:
    """Return the first pixel and the one behind the last (n, bins) of bins in a row of `length` pixels."""
    step = torch.arange(bins, device=starts.device)
    first = (step * sizes[:, None] + starts[:, None]).floor().clamp(0, length)
    behind = ((step + 1) * sizes[:, None] + starts[:, None]).ceil().clamp(0, length)
    return first.long(), behind.long()


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Add the gradient of `roi_pool_forward` by `input` to `grad_input` (B, C, H, W)."""
    channels, height, width = grad_input.shape[1:]
    planes = rois[:, :1].long() * channels + torch.arange(channels, device=rois.device)
    index = planes[..., None, None] * (height * width) + argmax.clamp(min=0)
    grad = grad_output.masked_fill(argmax < 0, 0).to(grad_input.dtype)
    grad_input.view(-1).index_add_(0, index.flatten(), grad.flatten())
