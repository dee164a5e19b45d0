"""Sampling of masks at points (PointRend, arXiv 1912.08193, section 3.1)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PointSource = Callable[[int, int, Tensor], Tensor]


def uniform_points(num_rows: int, num_points: int, like: Tensor) -> Tensor:
    """Draw (num_rows, num_points, 2) uniform points (x, y) in [0, 1), with dtype and device of `like`."""
    return torch.rand(num_rows, num_points, 2, dtype=like.dtype, device=like.device)


def point_sample(maps: Tensor, points: Tensor) -> Tensor:
    """Read maps (N, C, H, W) bilinearly at points (N, P, 2), (x, y) in [0, 1], zero outside; returns (N, C, P)."""
    grid = 2 * points.to(maps.dtype).unsqueeze(2) - 1
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False).squeeze(3)


@torch.no_grad()
def uncertain_points(
    logits: Tensor,
    num_points: int,
    oversample_ratio: float = 3.0,
    importance_sample_ratio: float = 0.75,
    draw_points: PointSource = uniform_points,
) -> Tensor:
    """Choose points (N, num_points, 2) where the mask logits (N, H, W) are least decided.

    Of `oversample_ratio * num_points` uniform points the `importance_sample_ratio * num_points` with the smallest
    absolute logit are kept, most uncertain first; fresh uniform points fill the rest.
    """
    num_rows = logits.shape[0]
    candidates = draw_points(num_rows, int(num_points * oversample_ratio), logits)
    num_uncertain = int(importance_sample_ratio * num_points)
    uncertainty = -point_sample(logits.unsqueeze(1), candidates).squeeze(1).abs()
    kept = uncertainty.topk(num_uncertain, dim=1).indices  # (N, num_uncertain)
    chosen = candidates.gather(1, kept.unsqueeze(2).expand(-1, -1, 2))
    if num_uncertain == num_points:
        return chosen
    return torch.cat([chosen, draw_points(num_rows, num_points - num_uncertain, logits)], dim=1)
