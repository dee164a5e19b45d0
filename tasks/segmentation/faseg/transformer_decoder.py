"""Masked-attention decoder with dynamic focus-aware queries and high-resolution cross-attention.

FASeg (arXiv 2204.01244); without its three ideas this is the decoder of Mask2Former (arXiv 2112.01527).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import attention
from tasks.segmentation.faseg.pixel_decoder import PixelDecoderOutput, pointwise_conv

HIGH_RESOLUTION_LEVEL = 3


class Attention(nn.Module):
    """Multi-head attention that can return its weights averaged over heads."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None = None, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from query (B, Q, d) to key and value (B, N, d).

        `blocked` (B, Q, N) is true where a query must not look, the same for all heads. Returns (B, Q, d) and, on
        request, the head-averaged weights (B, Q, N). With N = 0 the result is the bias of the output projection.
        """
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, *, d / heads)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        mask = None if blocked is None else blocked.unsqueeze(1)
        averaged = None
        if need_weights:
            scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(2, 3)  # (B, heads, Q, N)
            if mask is not None:
                scores = scores.masked_fill(mask, float("-inf"))
            probabilities = scores.softmax(dim=-1)
            averaged = probabilities.mean(dim=1)
            attended = probabilities.to(v.dtype) @ v
        else:
            attended = attention(q, k, v, mask=mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), averaged


class DecoderLayer(nn.Module):
    """Cross-attention, self-attention and feed-forward network, each followed by residual sum and LayerNorm."""

    def __init__(self, dim: int, num_heads: int, dim_feedforward: int) -> None:
        super().__init__()
        self.cross_attn = Attention(dim, num_heads)
        self.cross_norm = nn.LayerNorm(dim)
        self.self_attn = Attention(dim, num_heads)
        self.self_norm = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.ffn_norm = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(
        self,
        tokens: Tensor,
        cross_pos: Tensor,
        self_pos: Tensor,
        key: Tensor,
        value: Tensor,
        blocked: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Update query tokens (B, Q, d) from key and value (B, N, d); also return the cross-attention weights."""
        attended, weights = self.cross_attn(tokens + cross_pos, key, value, blocked, need_weights)
        tokens = self.cross_norm(tokens + attended)
        query = tokens + self_pos
        attended, _ = self.self_attn(query, query, tokens)
        tokens = self.self_norm(tokens + attended)
        return self.ffn_norm(tokens + self.linear2(F.relu(self.linear1(tokens)))), weights


def attention_mask(mask_logits: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """Return (B, Q, h * w), true where a query's predicted mask, resized to `size`, has probability < threshold.

    A row that would be blocked everywhere is opened completely. Carries no gradient.
    """
    blocked = _resized_probability(mask_logits, size) < threshold
    return blocked & ~blocked.all(dim=-1, keepdim=True)


def _resized_probability(mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    resized = F.interpolate(mask_logits.detach(), size=size, mode="bilinear", align_corners=False)
    return resized.sigmoid().flatten(2)


def split_windows(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cut maps (B, d, H, W) into grid[0] x grid[1] square windows; returns (B, cells, side * side, d), rows first."""
    height, width = maps.shape[-2:]
    side = math.isqrt(height * width // (grid[0] * grid[1]))
    if (grid[0] * side, grid[1] * side) != (height, width):
        raise ValueError(
            f"high-resolution attention: a {height}x{width} map has no {grid[0]}x{grid[1]} grid of square windows; "
            "pad images to a multiple of 32"
        )
    windows = maps.unflatten(3, (grid[1], side)).unflatten(2, (grid[0], side))  # (B, d, rows, side, columns, side)
    return windows.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def select_windows(weights: Tensor, omega_rate: int) -> Tensor:
    """Return the N // omega_rate cells that attention weights (B, Q, N) favour, best first, shared by all queries."""
    return weights.detach().sum(dim=1).topk(weights.shape[2] // omega_rate, dim=1).indices


def _gather_windows(windows: Tensor, index: Tensor) -> Tensor:
    _, _, area, dim = windows.shape
    return windows.gather(1, index[:, :, None, None].expand(-1, -1, area, dim)).flatten(1, 2)  # (B, k * area, d)


class TransformerDecoder(nn.Module):
    """Refine learned queries against the feature levels, predicting classes and masks before and after every layer.

    `dynamic_queries` regenerates the positional queries from the cross-attention of the previous layer.
    `high_resolution` adds the 1/4 level to the cycle, attended only in the windows of the 1/32 cells that the
    1/32 layer of the same cycle favoured, one of `omega_rate` cells. All three switches off and
    `num_layers=9, mask_threshold=0.5` is Mask2Former. Projections exist only when `in_channels` differs from `dim`.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int = 256,
        mask_dim: int = 256,
        num_queries: int = 100,
        num_heads: int = 8,
        dim_feedforward: int = 2048,
        num_layers: int = 13,
        omega_rate: int = 32,
        mask_threshold: float = 0.15,
        dynamic_queries: bool = True,
        high_resolution: bool = True,
        in_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.num_levels = 4 if high_resolution else 3
        self.omega_rate = omega_rate
        self.mask_threshold = mask_threshold
        self.dynamic_queries = dynamic_queries
        self.query_feat = nn.Embedding(num_queries, dim)
        self.query_embed = nn.Embedding(num_queries, dim)
        self.level_embed = nn.Embedding(self.num_levels, dim)
        self.layers = nn.ModuleList(DecoderLayer(dim, num_heads, dim_feedforward) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.mask_embed = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, mask_dim)
        )
        if dynamic_queries:
            self.query_pos_mlp = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.input_proj = nn.ModuleList()
        if in_channels is not None and in_channels != dim:
            self.input_proj.extend(pointwise_conv(in_channels, dim) for _ in range(self.num_levels))

    def forward(self, pixels: PixelDecoderOutput) -> list[tuple[Tensor, Tensor]]:
        """Return `num_layers + 1` pairs of logits: classes (B, Q, K + 1) and masks (B, Q, H/4, W/4)."""
        features = [self._embed_level(level, feature) for level, feature in enumerate(pixels.features)]
        sizes = [(feature.shape[2], feature.shape[3]) for feature in features]
        values = [feature.flatten(2).transpose(1, 2) for feature in features[:HIGH_RESOLUTION_LEVEL]]  # (B, N_l, d)
        positions = [pos.flatten(2).transpose(1, 2) for pos in pixels.positions[:HIGH_RESOLUTION_LEVEL]]
        if self.num_levels > HIGH_RESOLUTION_LEVEL:
            value_windows = split_windows(features[HIGH_RESOLUTION_LEVEL], sizes[0])
            pos_windows = split_windows(pixels.positions[HIGH_RESOLUTION_LEVEL], sizes[0])

        batch = pixels.mask_features.shape[0]
        tokens = self.query_feat.weight.expand(batch, -1, -1)  # (B, Q, d)
        static_pos = self.query_embed.weight.expand(batch, -1, -1)
        predictions = [self._predict(tokens, pixels.mask_features)]
        query_pos = self._initial_query_pos(predictions[0][1], positions[0], sizes[0], static_pos)
        index = torch.zeros(batch, 0, dtype=torch.long, device=tokens.device)  # cells chosen by the last 1/32 layer
        for i, layer in enumerate(self.layers):
            level = i % self.num_levels
            if level == HIGH_RESOLUTION_LEVEL:
                # Cross-attention uses the static query here and its window choice needs no mask.
                value, pos = _gather_windows(value_windows, index), _gather_windows(pos_windows, index)
                tokens, _ = layer(tokens, static_pos, query_pos, value + pos, value)
            else:
                value, pos = values[level], positions[level]
                blocked = attention_mask(predictions[-1][1], sizes[level], self.mask_threshold)
                need_weights = self._weights_used(i)
                tokens, weights = layer(tokens, query_pos, query_pos, value + pos, value, blocked, need_weights)
                if level == 0 and self.num_levels > HIGH_RESOLUTION_LEVEL and weights is not None:
                    index = select_windows(weights, self.omega_rate)
                if self.dynamic_queries and weights is not None:
                    query_pos = self.query_pos_mlp(weights @ pos + static_pos)
            predictions.append(self._predict(tokens, pixels.mask_features))
        return predictions

    def _weights_used(self, i: int) -> bool:
        """Whether a later layer reads the cross-attention weights of layer i."""
        is_last = i == len(self.layers) - 1
        chooses_windows = self.num_levels > HIGH_RESOLUTION_LEVEL and i % self.num_levels == 0
        return not is_last and (self.dynamic_queries or chooses_windows)

    def _embed_level(self, level: int, feature: Tensor) -> Tensor:
        if len(self.input_proj):
            feature = self.input_proj[level](feature)
        return feature + self.level_embed.weight[level][:, None, None]

    def _predict(self, tokens: Tensor, mask_features: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.norm(tokens)
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_embed(tokens), mask_features)
        return self.class_embed(tokens), masks

    def _initial_query_pos(self, mask_logits: Tensor, pos: Tensor, size: tuple[int, int], static_pos: Tensor) -> Tensor:
        if not self.dynamic_queries:
            return static_pos
        # Published weights were trained with the mean position of the predicted background, not of the mask.
        background = (_resized_probability(mask_logits, size) < 0.5).to(pos.dtype)  # (B, Q, N_0)
        centre = background @ pos / (background.sum(dim=-1, keepdim=True) + 1e-6)
        return self.query_pos_mlp(centre + static_pos)
