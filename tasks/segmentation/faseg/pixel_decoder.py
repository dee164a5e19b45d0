"""Pixel decoder: a deformable encoder on 1/32, 1/16, 1/8 and one feature-pyramid step to 1/4.

Mask2Former (arXiv 2112.01527) with the conditional positional encodings of FASeg (arXiv 2204.01244).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.segmentation.faseg.deformable_encoder import DeformableEncoder

NUM_ENCODER_LEVELS = 3


class PixelDecoderOutput(NamedTuple):
    """Maps for the transformer decoder; lists run from 1/32 to the finest level."""

    mask_features: Tensor  # (B, mask_dim, H/4, W/4)
    features: list[Tensor]  # (B, d, H_l, W_l)
    positions: list[Tensor]  # (B, d, H_l, W_l)


def sine_positions(feature: Tensor) -> Tensor:
    """Return the normalised sine encoding (B, d, H, W) of the cells of a (B, d, H, W) map, y half first.

    Attention Is All You Need (arXiv 1706.03762) per axis, as in DETR (arXiv 2005.12872). Needs d divisible by 4.
    """
    batch, dim, height, width = feature.shape
    channel = torch.arange(dim // 2, dtype=feature.dtype, device=feature.device)
    wavelength = 10000 ** (2 * (channel // 2) / (dim // 2))

    def encode(size: int) -> Tensor:
        index = torch.arange(1, size + 1, dtype=feature.dtype, device=feature.device)
        phase = 2 * math.pi * index[:, None] / (size + 1e-6) / wavelength  # (size, d / 2)
        return torch.stack([phase[:, 0::2].sin(), phase[:, 1::2].cos()], dim=2).flatten(1)

    rows = encode(height)[:, None].expand(height, width, dim // 2)
    columns = encode(width)[None].expand(height, width, dim // 2)
    return torch.cat([rows, columns], dim=2).permute(2, 0, 1).expand(batch, dim, height, width)


def pointwise_conv(in_channels: int, dim: int) -> nn.Conv2d:
    """Return a 1x1 convolution with Kaiming-uniform weights (a = 1) and zero bias."""
    conv = nn.Conv2d(in_channels, dim, kernel_size=1)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class ConvNorm(nn.Module):
    """Convolution and GroupNorm with 32 groups (fewer when the channels are not divisible by 32).

    Input projections have a bias and Xavier weights, pyramid convolutions no bias and Kaiming weights (a = 1).
    """

    def __init__(self, in_channels: int, dim: int, kernel_size: int = 1, bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, dim, kernel_size, padding=kernel_size // 2, bias=bias)
        self.norm = nn.GroupNorm(math.gcd(32, dim), dim)
        if self.conv.bias is None:
            nn.init.kaiming_uniform_(self.conv.weight, a=1)
        else:
            nn.init.xavier_uniform_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)

    def forward(self, feature: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, dim, H, W)."""
        return self.norm(self.conv(feature))


class PixelDecoder(nn.Module):
    """Turn a backbone pyramid into per-pixel mask features, attention levels and their positions.

    `num_levels` is 3 (1/32, 1/16, 1/8) or 4 (also 1/4). Conditional positions are depthwise convolutions of the
    projected backbone features; otherwise positions are sines of the coordinates. All arithmetic is at least float32,
    also under autocast.
    """

    def __init__(
        self,
        channels: Sequence[int],
        dim: int = 256,
        mask_dim: int = 256,
        num_heads: int = 8,
        num_layers: int = 6,
        dim_feedforward: int = 1024,
        num_levels: int = 4,
        conditional_positions: bool = True,
    ) -> None:
        super().__init__()
        if len(channels) != 4:
            raise ValueError(f"PixelDecoder: channels {list(channels)}: expected four, for strides 4, 8, 16, 32")
        if num_levels not in (3, 4):
            raise ValueError(f"PixelDecoder: num_levels {num_levels}: expected 3 or 4")
        self.num_levels = num_levels
        self.conditional_positions = conditional_positions
        num_projections = num_levels if conditional_positions else NUM_ENCODER_LEVELS
        coarse_to_fine = list(channels)[::-1]
        self.input_proj = nn.ModuleList(ConvNorm(c, dim, bias=True) for c in coarse_to_fine[:num_projections])
        if conditional_positions:
            self.pos_conv = nn.ModuleList(
                nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim) for _ in range(num_projections)
            )
        self.encoder = DeformableEncoder(dim, num_heads, dim_feedforward, num_layers)
        self.lateral = ConvNorm(channels[0], dim)
        self.output = ConvNorm(dim, dim, kernel_size=3)
        self.mask_features = pointwise_conv(dim, mask_dim)

    def forward(self, features: Sequence[Tensor]) -> PixelDecoderOutput:
        """Decode four backbone maps (B, channels[i], H/s, W/s) of strides s = 4, 8, 16, 32."""
        with torch.autocast("cpu" if features[0].is_meta else features[0].device.type, enabled=False):
            return self._decode([feature.to(self.mask_features.weight.dtype) for feature in features])

    def _decode(self, features: list[Tensor]) -> PixelDecoderOutput:
        # Positions come from the backbone features, before the encoder; the 1/4 projection serves nothing else.
        projected = [proj(feature) for proj, feature in zip(self.input_proj, features[::-1], strict=False)]
        if self.conditional_positions:
            positions = [conv(feature) for conv, feature in zip(self.pos_conv, projected, strict=True)]
        else:
            positions = [sine_positions(feature) for feature in projected]
        levels = self.encoder(projected[:NUM_ENCODER_LEVELS], positions[:NUM_ENCODER_LEVELS])

        lateral = self.lateral(features[0])
        upsampled = F.interpolate(levels[-1], size=lateral.shape[-2:], mode="bilinear", align_corners=False)
        finest = F.relu(self.output(lateral + upsampled))
        if self.num_levels == 4:
            levels = [*levels, finest]
            if not self.conditional_positions:
                positions = [*positions, sine_positions(finest)]
        return PixelDecoderOutput(self.mask_features(finest), levels, positions)
