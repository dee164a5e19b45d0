"""Deformable transformer encoder over feature levels (Deformable DETR, arXiv 2010.04159)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.ms_deform_attn import ms_deform_attn


def reference_points(shapes: list[tuple[int, int]], like: Tensor) -> Tensor:
    """Return the cell centres (sum of H * W, 2) of all levels, (x, y) in [0, 1], levels in order, rows first."""
    levels = []
    for height, width in shapes:
        y = (torch.arange(height, dtype=like.dtype, device=like.device) + 0.5) / height
        x = (torch.arange(width, dtype=like.dtype, device=like.device) + 0.5) / width
        levels.append(torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1))
    return torch.cat(levels)


class DeformableAttention(nn.Module):
    """Multi-head attention that reads `num_points` learned offsets on each of `num_levels` levels."""

    def __init__(self, dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head k starts looking along direction 2 pi k / heads, point p at p + 1 cells; all points weigh the same."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)  # (heads, 2), on the unit square
        steps = torch.arange(1, self.num_points + 1)[:, None]
        offsets = directions[:, None, None] * steps  # (heads, 1, points, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, reference: Tensor, value: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """Attend from query (B, Lq, d) around reference (Lq, 2), or (B, Lq, levels, 2), to value (B, S, d)."""
        batch, num_queries, dim = query.shape
        layout = (batch, num_queries, self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).view(*layout, 2)
        # The softmax runs over levels and points jointly.
        weights = self.attention_weights(query).view(*layout[:3], -1).softmax(dim=-1).view(layout)
        extent = offsets.new_tensor([(width, height) for height, width in shapes])  # offsets are in cells of the level
        centre = reference[:, None, None, None] if reference.ndim == 2 else reference[:, :, None, :, None]
        locations = centre + offsets / extent[:, None]
        heads = self.value_proj(value).view(batch, -1, self.num_heads, dim // self.num_heads)
        return self.output_proj(ms_deform_attn(heads, shapes, locations, weights))


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention and feed-forward network, each followed by residual sum and LayerNorm."""

    def __init__(self, dim: int, num_heads: int, dim_feedforward: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(dim, num_heads, num_levels, num_points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm2 = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, tokens: Tensor, pos: Tensor, reference: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """Update tokens (B, S, d); positions (B, S, d) are added to the queries only."""
        tokens = self.norm1(tokens + self.self_attn(tokens + pos, reference, tokens, shapes))
        return self.norm2(tokens + self.linear2(F.relu(self.linear1(tokens))))


class DeformableEncoder(nn.Module):
    """A stack of deformable encoder layers over several levels at once."""

    def __init__(
        self, dim: int, num_heads: int, dim_feedforward: int, num_layers: int, num_levels: int = 3, num_points: int = 4
    ) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.randn(num_levels, dim))
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(dim, num_heads, dim_feedforward, num_levels, num_points) for _ in range(num_layers)
        )

    def forward(self, maps: list[Tensor], positions: list[Tensor]) -> list[Tensor]:
        """Return the encoded maps, shapes as given: one (B, d, H, W) per level, with positions of the same shapes."""
        shapes = [(level.shape[2], level.shape[3]) for level in maps]
        tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)  # (B, S, d)
        pos = torch.cat(
            [p.flatten(2).transpose(1, 2) + embed for p, embed in zip(positions, self.level_embed, strict=True)], dim=1
        )
        reference = reference_points(shapes, tokens)
        for layer in self.layers:
            tokens = layer(tokens, pos, reference, shapes)
        levels = tokens.split([height * width for height, width in shapes], dim=1)
        return [
            level.transpose(1, 2).unflatten(2, (height, width))
            for level, (height, width) in zip(levels, shapes, strict=True)
        ]
