"""Temporal feature pyramid and frame-level feature of AFSD (arXiv 2103.13137), section 3.1 and 3.3."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from backbones.same_padding import SameConv1d

NORM_GROUPS = 32


class ConvNorm(nn.Module):
    """Convolution, group normalisation and ReLU along time: (B, C, T) to (B, C', ceil(T / stride))."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv: nn.Module = SameConv1d(in_channels, out_channels, kernel_size, stride)
        self.norm = nn.GroupNorm(NORM_GROUPS, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Transform a feature (B, C, T)."""
        return F.relu(self.norm(self.conv(x)))


class Squeeze(ConvNorm):
    """Reduce a map (B, C, T, side, side) to a feature (B, C', T) by one convolution over all of its pixels."""

    def __init__(self, in_channels: int, out_channels: int, side: int) -> None:
        super().__init__(1, out_channels, 1)
        self.side = side
        self.conv = nn.Conv3d(in_channels, out_channels, (1, side, side))

    def forward(self, x: Tensor) -> Tensor:
        """Squeeze a map; raises ValueError for one of another size."""
        if tuple(x.shape[3:]) != (self.side, self.side):
            height, width = x.shape[3:]
            raise ValueError(f"the head is made for maps of {self.side} x {self.side}, got {height} x {width}")
        return F.relu(self.norm(self.conv(x).flatten(2)))


class Pyramid(nn.Module):
    """Features of halving length: (B, dim, T), (B, dim, ceil(T / 2)), ...

    Its inputs are one or two maps of a video backbone, or one sequence of features. The first levels are made from
    them, the others each from the one before; with two maps the second level, upsampled, is added to the first.

    Args:
        channels: Channels of each input.
        sides: Height and width of each input map; None where the input is a sequence of features (B, C, T).
        dim: Width.
        num_levels: Levels.
    """

    def __init__(self, channels: Sequence[int], sides: Sequence[int | None], dim: int, num_levels: int) -> None:
        super().__init__()
        if not 1 <= len(channels) <= min(2, num_levels) or len(channels) != len(sides):
            raise ValueError(f"channels {list(channels)} and sides {list(sides)}: expected one or two of each")
        self.num_inputs = len(channels)
        levels: list[nn.Module] = [
            ConvNorm(width, dim, 1) if side is None else Squeeze(width, dim, side)
            for width, side in zip(channels, sides, strict=True)
        ]
        levels += [ConvNorm(dim, dim, 3, stride=2) for _ in range(num_levels - len(levels))]
        self.levels = nn.ModuleList(levels)

    def forward(self, inputs: Sequence[Tensor], num_levels: int | None = None) -> list[Tensor]:
        """The first `num_levels` levels (all for None) of the inputs, the finest first."""
        if len(inputs) != self.num_inputs:
            raise ValueError(f"the head reads {self.num_inputs} maps, got {len(inputs)}")
        features = [level(x) for level, x in zip(self.levels, inputs, strict=False)]
        if len(features) == 2:
            features[0] = features[0] + F.interpolate(features[1], features[0].shape[2])
        for level in self.levels[self.num_inputs : num_levels]:
            features.append(level(features[-1]))
        return features[:num_levels]


class FrameFeature(nn.Module):
    """A feature of every frame from the finest level: its first half is about starts, its second about ends."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ConvNorm(dim, dim, kernel_size) for kernel_size in (3, 3, 1))

    def forward(self, finest: Tensor, length: int) -> Tensor:
        """Repeat a level (B, dim, T) to `length` frames and transform it to (B, dim, length)."""
        x = F.interpolate(finest, length)
        for layer in self.layers:
            x = layer(x)
        return x
