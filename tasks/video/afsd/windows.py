"""Windows around the boundaries of proposals, over which AFSD pools (arXiv 2103.13137), section 3.3."""

import torch
from torch import Tensor


def boundary_windows(starts: Tensor, ends: Tensor, lengths: Tensor) -> Tensor:
    """First and last position of a window around each start and each end (..., 4).

    A window reaches a quarter of the proposal's length inwards and a tenth outwards, at least one position, rounded.
    """
    inward, outward = (lengths / 4).clamp(min=1), (lengths / 10).clamp(min=1)
    return torch.stack([starts - outward, starts + inward, ends - inward, ends + outward], dim=-1).round()


def level_windows(distances: Tensor, centres: Tensor, length: int) -> Tensor:
    """Windows (B, T, 4), in positions of a level, of proposals at its points.

    `distances` (B, T, 2) are frames to start and end, `centres` (T,) the points from 0 to 1 of a clip of `length`.
    """
    steps = len(centres)
    distances = distances / length * steps
    positions = (centres * steps - 0.5).round()
    return boundary_windows(positions - distances[..., 0], positions + distances[..., 1], distances.sum(dim=-1))


def frame_windows(starts: Tensor, ends: Tensor) -> Tensor:
    """Windows (..., 4), in frames, of proposals between `starts` and `ends`, whose last frame counts as inside."""
    return boundary_windows(starts, ends, ends - starts + 1)
