"""Bilinear samples of feature maps at any points, and their gradient."""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 2**25  # numbers gathered at a time


def sample(features: Tensor, batch: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Return samples (n, k, C) of `features` (B, C, H, W) at points `y`, `x` (n, k) of image `batch` (n,).

    Pixel centres have integer coordinates. The border continues for one pixel; beyond it everything is 0.
    """
    maps = features.permute(0, 2, 3, 1).flatten(0, 2)  # (B * H * W, C)
    samples = features.new_zeros(*y.shape, features.shape[1])
    for index, weight in _corners(batch, y, x, *features.shape[2:]):
        samples += maps[index] * weight[..., None]
    return samples


def add_samples_gradient(grad_features: Tensor, grad: Tensor, batch: Tensor, y: Tensor, x: Tensor) -> None:
    """Add to `grad_features` (B, C, H, W) the gradient of `sample`, given that of the samples (n, k, C)."""
    batch_size, channels, height, width = grad_features.shape
    maps = grad.new_zeros(batch_size * height * width, channels)
    for index, weight in _corners(batch, y, x, height, width):
        maps.index_add_(0, index.flatten(), (grad * weight[..., None]).flatten(0, 1))
    grad_features += maps.unflatten(0, (batch_size, height, width)).permute(0, 3, 1, 2)


def _corners(batch: Tensor, y: Tensor, x: Tensor, height: int, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield index in the pixels of all images and weight (n, k) of the four neighbours of every point."""
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y, x = (torch.where(inside, v, 0).clamp(0, size - 1) for v, size in ((y, height), (x, width)))
    top, left = y.long(), x.long()
    down, right = y - top, x - left  # 0 on the last row and column
    offset = batch.long()[:, None] * (height * width)
    for row, row_weight in ((top, 1 - down), ((top + 1).clamp(max=height - 1), down)):
        for column, column_weight in ((left, 1 - right), ((left + 1).clamp(max=width - 1), right)):
            yield offset + row * width + column, row_weight * column_weight * inside


def points_of_bins(starts: Tensor, sizes: Tensor, bins: int, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the points of `bins` bins in a row, and which of them exist: (n, bins, most) and (n, most).

    Row i starts at `starts[i]`, and its bins of `sizes[i]` hold `counts[i]` points at equal distances each.
    """
    step = torch.arange(max(int(counts.max()), 1) if len(counts) else 1, device=starts.device)
    bin_starts = starts[:, None] + torch.arange(bins, device=starts.device) * sizes[:, None]  # (n, bins)
    within = (step + 0.5) * sizes[:, None] / counts.clamp(min=1)[:, None]  # (n, most)
    return bin_starts[..., None] + within[:, None], step < counts[:, None]


def parts_of(boxes: Tensor, numbers: int) -> Iterator[Tensor]:
    """Yield the rows of as many `boxes` at a time as gather `CHUNK` numbers, of which each needs `numbers`."""
    yield from torch.arange(len(boxes), device=boxes.device).split(max(1, CHUNK // max(numbers, 1)))
