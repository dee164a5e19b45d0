"""Deformable token merging (LIT, arXiv 2105.14217, section 3.3): halves a map and widens its channels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.init import kaiming_uniform_, zeros_


class DeformableTokenMerging(nn.Module):
    """Merge 2 x 2 tokens, sampled at learned offsets, into one: deformable convolution, batch norm, GELU.

    Maps a channel-last map (B, H, W, C) to (B, H // 2, W // 2, C'). The deformable convolution (kernel and stride 2,
    no modulation) reads bilinearly and counts what lies outside the map as zero; offsets start at zero. The last
    row and column of an odd map are no sampling positions of their own, but offsets may reach them. Under autocast
    offsets, samples and projection are computed in float32, as in the official code.

    Args:
        in_channels: C.
        out_channels: C'.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.dconv = DeformableConv2x2(in_channels, out_channels)
        self.norm_layer = nn.BatchNorm2d(out_channels)
        self.act_layer = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Merge the tokens of a map (B, H, W, C)."""
        merged = self.norm_layer(self.dconv(x).permute(0, 3, 1, 2))  # channels_last in memory all along
        return self.act_layer(merged.permute(0, 2, 3, 1))


class DeformableConv2x2(nn.Module):
    """Deformable convolution (v1, kernel and stride 2) of channel-last maps: samples first, then one matrix product.

    The same function as ``torchvision.ops.deform_conv2d(x, conv_offset(x), weight, bias, stride=2)``; that one needs
    channel-first copies and, on a CPU, five times as long.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 2, 2))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.conv_offset = nn.Conv2d(in_channels, 8, kernel_size=2, stride=2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform weights and biases within 1 / sqrt(4C); zero offsets."""
        kaiming_uniform_(self.weight, a=5**0.5)
        bound = (4 * self.weight.shape[1]) ** -0.5
        nn.init.uniform_(self.bias, -bound, bound)
        zeros_(self.conv_offset.weight)
        if self.conv_offset.bias is not None:
            zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve a map (B, H, W, C) to (B, H // 2, W // 2, C')."""
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            x = x.to(self.weight.dtype)
            offsets = self.conv_offset(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            kernel = self.weight.permute(0, 2, 3, 1).flatten(1)  # (C', 4C), as the samples lie in memory
            return F.linear(sample_2x2(x, offsets), kernel, self.bias)


def sample_2x2(x: Tensor, offsets: Tensor) -> Tensor:
    """Read each cell of 2 x 2 tokens at displaced positions, bilinearly.

    Args:
        x: Channel-last map (B, H, W, C).
        offsets: Displacements in tokens (B, h, w, 8) of the 2h x 2w first tokens: for each of the four tokens of a
            cell, row by row, first down, then right.

    Returns:
        Samples (B, h, w, 4C), zero outside the map; differentiable in both arguments.
    """
    batch, height, width, channels = x.shape
    rows, columns = offsets.shape[1:3]
    position = offsets if offsets.dtype == torch.float64 else offsets.float()  # half precision is too coarse
    position = position.unflatten(-1, (4, 2))
    corner = torch.arange(2, device=x.device)
    top = torch.arange(rows, device=x.device)[:, None, None] * 2 + corner.repeat_interleave(2)
    left = torch.arange(columns, device=x.device)[:, None] * 2 + corner.repeat(2)
    y, x_ = position[..., 0] + top, position[..., 1] + left  # (B, h, w, 4)
    y0, x0 = y.floor(), x_.floor()
    weight_y = torch.stack([y0 + 1 - y, y - y0], dim=-1)
    weight_x = torch.stack([x0 + 1 - x_, x_ - x0], dim=-1)
    corners_y, corners_x = y0[..., None] + corner, x0[..., None] + corner  # (B, h, w, 4, 2)
    weight_y = weight_y * ((corners_y >= 0) & (corners_y < height))
    weight_x = weight_x * ((corners_x >= 0) & (corners_x < width))
    weights = weight_y[..., :, None] * weight_x[..., None, :]  # (B, h, w, 4, 2, 2)

    # Converted before clamping: not-a-number and infinity then become an index that exists.
    index_y, index_x = corners_y.long().clamp(0, height - 1), corners_x.long().clamp(0, width - 1)
    image = torch.arange(batch, device=x.device)[:, None, None, None, None, None] * (height * width)
    index = image + index_y[..., :, None] * width + index_x[..., None, :]
    samples = F.embedding_bag(
        index.reshape(-1, 4), x.reshape(-1, channels), per_sample_weights=weights.reshape(-1, 4).to(x.dtype), mode="sum"
    )
    return samples.view(batch, rows, columns, 4 * channels)
