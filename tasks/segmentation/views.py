"""How an image becomes a map of class scores, whatever the network: whole, by a sliding window, at several sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as image_ops

from tasks.core.errors import expect
from tasks.core.images import resized_size

Scores = Callable[[Tensor], Tensor]


@dataclass
class EvaluationConfig:
    """How an image becomes a map of class scores.

    Args:
        mode: `whole` image, or `slide` a window over it and average.
        window: Height and width of the sliding window in pixels of the resized image.
        stride: Its steps, likewise.
        short_sides: Sizes of the shorter side for multi-scale evaluation, averaged; empty for the size given by
            the data alone.
        max_long_side: Bound of the longer side in multi-scale evaluation.
        flip: In multi-scale evaluation, average with the mirrored image too.
    """

    mode: Literal["whole", "slide"] = "whole"
    window: tuple[int, int] = (512, 512)
    stride: tuple[int, int] = (341, 341)
    short_sides: list[int] = field(default_factory=list)
    max_long_side: int = 3584
    flip: bool = True

    def __post_init__(self) -> None:
        _expect_no_gaps("model.evaluation.stride", self.stride, self.window)
        sides = [*self.short_sides, self.max_long_side]
        expect("model.evaluation.short_sides and max_long_side", sides, min(sides) > 0, "at least 1 pixel")


def scores_of_views(scores: Scores, image: Tensor, size: tuple[int, int], config: EvaluationConfig) -> Tensor:
    """Class scores (K, *size) of a uint8 image (3, H, W); `scores` maps (3, h, w) to (K, h, w)."""

    def windows(view: Tensor) -> Tensor:
        return sliding_window_scores(scores, view, config.window, config.stride)

    one_size = windows if config.mode == "slide" else scores
    if config.short_sides:
        return multi_scale_scores(one_size, image, config.short_sides, config.max_long_side, size, config.flip)
    return resize_maps(one_size(image), size)


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps (K, h, w) bilinearly to (K, *size)."""
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def multi_scale_scores(
    scores: Scores,
    image: Tensor,
    short_sides: Sequence[int],
    max_size: int,
    output_size: tuple[int, int],
    flip: bool = True,
) -> Tensor:
    """Average the class scores of an image over sizes and, with `flip`, horizontal mirroring.

    `image` is uint8 (3, H, W); `scores` maps (3, h, w) to (K, h, w). Returns (K, *output_size).
    """
    expect("short_sides", list(short_sides), min(short_sides, default=0) >= 1, "at least one size of at least 1 pixel")
    total: Tensor | None = None
    for short_side in short_sides:
        size = resized_size(image.shape[-2], image.shape[-1], short_side, max_size)
        resized = image_ops.resize(image, list(size), antialias=True)
        for mirrored in (False, True) if flip else (False,):
            view = scores(resized.flip(-1)).flip(-1) if mirrored else scores(resized)
            view = resize_maps(view, output_size)
            total = view if total is None else total + view
    assert total is not None
    return total / (len(short_sides) * (2 if flip else 1))


def sliding_window_scores(scores: Scores, image: Tensor, window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Average the class scores of overlapping windows; `scores` maps (3, h, w) to (K, h, w). Returns (K, H, W).

    The last window of a row or column is moved back inside the image, so all have the size of `window` unless the
    image is smaller. Raises `UserError` when strides would leave gaps.
    """
    _expect_no_gaps("stride", stride, window)
    height, width = image.shape[-2:]
    total: Tensor | None = None
    count = torch.zeros(height, width, device=image.device)
    for top in _window_starts(height, window[0], stride[0]):
        for left in _window_starts(width, window[1], stride[1]):
            rows, columns = slice(top, top + window[0]), slice(left, left + window[1])
            view = scores(image[:, rows, columns])
            if total is None:
                total = view.new_zeros(view.shape[0], height, width)
            total[:, rows, columns] += view
            count[rows, columns] += 1
    assert total is not None
    return total / count.to(total.dtype)


def _expect_no_gaps(option: str, stride: tuple[int, int], window: tuple[int, int]) -> None:
    for axis, (step, extent) in enumerate(zip(stride, window, strict=True)):
        expect(f"{option}[{axis}]", step, 0 < step <= extent, f"1 to {extent} (the window)")


def _window_starts(extent: int, window: int, stride: int) -> list[int]:
    last = max(extent - window, 0)
    return [*range(0, last, stride), last]
