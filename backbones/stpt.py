"""STPT: "An Efficient Spatio-Temporal Pyramid Transformer for Action Detection" (ECCV 2022, arXiv 2207.10448).

The first two stages attend within windows of space and time, the last two globally. No code was released: the layout
of the stages, their kinds of attention and the stage-2 window are the paper's, what a comment calls ours is not stated
there. With it a detector of the paper's size costs 108 instead of the about 112 G multiply-adds that follow from the
paper's figures. Maps are channel-last, (B, T, H, W, C), between the stages.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from backbones.registration import build, video_cfg
from backbones.staged import feature_indices, initialise
from kernels.attention import attention
from kernels.window_attention import window_attention

Axes = tuple[int, int, int]  # along (t, h, w)
STRIDES: tuple[Axes, ...] = ((2, 4, 4), (2, 8, 8), (4, 16, 16), (8, 32, 32))
EMBEDDING_STRIDES: tuple[Axes, ...] = ((2, 4, 4), (1, 2, 2), (2, 2, 2), (2, 2, 2))
NORM_EPS = 1e-6


def _depthwise(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """A convolution of maps (B, T, H, W, C)."""
    return conv(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)


class PatchEmbedding(nn.Module):
    """Overlapping patches, projected and normalised: (B, C_in, T, H, W) to (B, T / s_t, H / s_h, W / s_w, C).

    Sizes that the stride does not divide are rounded up.
    """

    def __init__(self, in_chans: int, dim: int, kernel_size: Axes, stride: Axes) -> None:
        super().__init__()
        t, h, w = (size // 2 for size in kernel_size)
        self.proj = nn.Conv3d(in_chans, dim, kernel_size, stride, padding=(t, h, w))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, clip: Tensor) -> Tensor:
        """Embed a clip or a map."""
        return self.norm(self.proj(clip).permute(0, 2, 3, 4, 1))


class PooledAttention(nn.Module):
    """Attention of maps (B, T, H, W, C), within windows or global, to keys and values on a coarser grid.

    Keys and values are reduced, after their projection, by a depth-wise convolution of 3 x 3 x 3 with stride `ratio`
    and a LayerNorm each; a ratio of 1 reduces nothing. Within windows the convolution sees the window alone. At the
    ends of maps that windows do not divide there are zero tokens, which no query sees.

    Args:
        dim: C.
        num_heads: Heads.
        window: Tokens of a window along (t, h, w); None attends globally.
        ratio: Tokens per key along (t, h, w).
        qkv_bias: Biases of the query, key and value projections.
    """

    def __init__(self, dim: int, num_heads: int, window: Axes | None, ratio: Axes, qkv_bias: bool = True) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}")
        if window is not None and any(side % step for side, step in zip(window, ratio, strict=True)):
            raise ValueError(f"ratio {tuple(ratio)} does not divide the window {tuple(window)}")
        self.num_heads, self.window, self.ratio = num_heads, window, ratio
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.reduces = max(ratio) > 1
        if self.reduces:
            for name in ("k", "v"):
                pool = nn.Conv3d(dim, dim, 3, ratio, padding=1, groups=dim, bias=False)
                self.add_module(f"{name}_pool", pool)
                self.add_module(f"{name}_norm", nn.LayerNorm(dim, eps=NORM_EPS))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each map (B, T, H, W, C)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        # A window larger than the map would hold nothing but hidden keys beyond it.
        grid = x.shape[1:4]
        window = None if self.window is None else [min(pair) for pair in zip(self.window, grid, strict=True)]
        if self.reduces:
            k = self.k_norm(self._reduce(k, self.k_pool, window))  # type: ignore[operator]
            v = self.v_norm(self._reduce(v, self.v_pool, window))  # type: ignore[operator]
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in (q, k, v))  # (B, T, H, W, heads, d)
        if window is not None:
            kv_window = [-(-side // step) for side, step in zip(window, self.ratio, strict=True)]
            return self.proj(window_attention(q, k, v, window, kv_window).flatten(-2))
        tokens = [part.flatten(1, 3).transpose(1, 2) for part in (q, k, v)]  # (B, heads, L, d)
        return self.proj(attention(*tokens).transpose(1, 2).flatten(2)).view_as(x)

    def _reduce(self, x: Tensor, pool: Any, window: Sequence[int] | None) -> Tensor:
        """Pool maps (B, T, H, W, C) to (B, T / r_t, H / r_h, W / r_w, C), rounded up, each window by itself."""
        if window is None:
            return _depthwise(x, pool)
        grid = [-(-size // step) for size, step in zip(x.shape[1:4], self.ratio, strict=True)]
        t, h, w = [-(-size // side) for size, side in zip(x.shape[1:4], window, strict=True)]
        missing = [n * side - size for n, side, size in zip((t, h, w), window, x.shape[1:4], strict=True)]
        if any(missing):
            x = F.pad(x, (0, 0, 0, missing[2], 0, missing[1], 0, missing[0]))
        # windows stay channel-last, which depth-wise convolutions are faster on
        batch, channels = x.shape[0], x.shape[-1]
        x = x.reshape(batch, t, window[0], h, window[1], w, window[2], channels).permute(0, 1, 3, 5, 2, 4, 6, 7)
        x = _depthwise(x.reshape(batch * t * h * w, *window, channels), pool)
        x = x.unflatten(0, (batch, t, h, w)).permute(0, 1, 4, 2, 5, 3, 6, 7)
        return x.flatten(5, 6).flatten(3, 4).flatten(1, 2)[:, : grid[0], : grid[1], : grid[2]]


class Block(nn.Module):
    """Conditional position encoding (arXiv 2102.10882), pre-norm attention and MLP on maps (B, T, H, W, C)."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        # The paper names the encoding; a depth-wise 3 x 3 x 3 convolution with bias is that of CPVT and UniFormer.
        self.pos = nn.Conv3d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map (B, T, H, W, C)."""
        x = x + _depthwise(x, self.pos)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """A patch embedding and the blocks behind it: (B, C_in, T, H, W) to a map (B, T', H', W', C)."""

    def __init__(self, embed: PatchEmbedding, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embed = embed
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Embed and transform a clip or the map of the stage before."""
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing and torch.is_grad_enabled() else block(x)
        return x


class STPTStages(nn.Module):
    """The four stages; of each option there is one value per stage.

    Args:
        in_chans: Channels of the clip.
        embed_dims: Widths. Ours: those of MViT-B, whose block counts the paper has and whose cost it states.
        depths: Blocks.
        num_heads: Heads; ours, as MViT-B.
        windows: Tokens of a window along (t, h, w), None for global attention. (8, 6, 6) in stage 2 is the paper's,
            in stage 1 ours.
        kv_ratios: Tokens per key along (t, h, w). (2, 2, 2) in stage 2 is the paper's, the others are ours.
        kernel_sizes: Kernels of the patch embeddings; ours, as MViT-B's first one, and overlapping behind it.
        mlp_ratio: Hidden width of the MLPs over their dim.
        qkv_bias: Biases of the query, key and value projections; ours.
        drop_path_rate: Stochastic depth of the last block, rising linearly from none.
    """

    def __init__(
        self,
        in_chans: int = 3,
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (1, 2, 11, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        windows: Sequence[Axes | None] = ((8, 6, 6), (8, 6, 6), None, None),
        kv_ratios: Sequence[Axes] = ((2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 1, 1)),
        kernel_sizes: Sequence[Axes] = ((3, 7, 7), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        per_stage = {
            "embed_dims": embed_dims, "depths": depths, "num_heads": num_heads, "windows": windows,
            "kv_ratios": kv_ratios, "kernel_sizes": kernel_sizes,
        }  # fmt: skip
        for name, values in per_stage.items():
            if len(values) != len(STRIDES):
                raise ValueError(f"{name} has {len(values)} values, expected one for each of {len(STRIDES)} stages")
        self.dims = list(embed_dims)
        rates = [drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        stages, channels = [], in_chans
        for i, dim in enumerate(embed_dims):
            embed = PatchEmbedding(channels, dim, kernel_sizes[i], EMBEDDING_STRIDES[i])
            blocks = []
            for _ in range(depths[i]):
                attn = PooledAttention(dim, num_heads[i], windows[i], kv_ratios[i], qkv_bias)
                blocks.append(Block(dim, attn, mlp_ratio, rates.pop(0)))
            stages.append(Stage(embed, blocks))
            channels = dim
        self.stages = nn.ModuleList(stages)

    def forward_stages(self, clip: Tensor) -> list[Tensor]:
        """Maps (B, T / s_t, H / s, W / s, C) of the stages of a clip (B, C_in, T, H, W), sizes rounded up."""
        maps, x = [], clip
        for stage in self.stages:
            maps.append(stage(x))
            x = maps[-1].permute(0, 4, 1, 2, 3)
        return maps

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        stages: Any = self.stages
        for stage in stages:
            stage.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """None: there are no position tables."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that number the layers for layer-wise learning rates (timm)."""
        if coarse:
            return {"stem": r"^stages\.0\.embed", "blocks": r"^stages\.(\d+)"}
        blocks = [(r"^stages\.(\d+)\.embed", (-1,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stages\.0\.embed", "blocks": blocks}


class STPT(STPTStages):
    """Classifier of clips (B, 3, T, H, W) of any size, for pre-training on Kinetics.

    Args:
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: ``avg``, or an empty string for the map of the last stage.
        drop_rate: Dropout before the classifier.
        **stages: The arguments of `STPTStages`.
    """

    num_frames: ClassVar[int] = 256

    def __init__(
        self, *, num_classes: int = 400, global_pool: str | None = None, drop_rate: float = 0.0, **stages: Any
    ) -> None:
        super().__init__(**stages)
        self.drop_rate = drop_rate
        self.num_features = self.head_hidden_size = self.dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": stride[-1], "temporal_reduction": stride[0], "module": f"stages.{i}"}
            for i, (dim, stride) in enumerate(zip(self.dims, STRIDES, strict=True))
        ]
        self.norm = nn.LayerNorm(self.num_features, eps=NORM_EPS)
        self._set_classifier(num_classes, "avg" if global_pool is None else global_pool)
        initialise(self)

    def forward_features(self, clip: Tensor) -> Tensor:
        """Map (B, T / 8, H / 32, W / 32, C) of the last stage for a clip (B, 3, T, H, W)."""
        return self.forward_stages(clip)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Class scores (B, K) of `forward_features`; with `pre_logits` what enters the classifier, (B, C)."""
        x = self.norm(x.mean(dim=(1, 2, 3)) if self.global_pool else x)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, clip: Tensor) -> Tensor:
        """Class scores (B, K) of a clip (B, 3, T, H, W)."""
        return self.forward_head(self.forward_features(clip))

    def get_classifier(self) -> nn.Module:
        """The linear classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one of `num_classes` (0: none)."""
        self._set_classifier(num_classes, self.global_pool if global_pool is None else global_pool)
        old = next(self.parameters())
        initialise(self.head.to(old.device, old.dtype))

    def _set_classifier(self, num_classes: int, global_pool: str) -> None:
        if global_pool not in ("avg", ""):
            raise ValueError(f"global_pool={global_pool!r}: expected 'avg' or ''")
        self.num_classes, self.global_pool = num_classes, global_pool
        self.head: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()


class STPTFeatures(STPTStages):
    """Maps of stages as (B, C, T, H, W), normalised (ours), for detection.

    ``channels`` and ``strides``, along (t, h, w), describe the returned maps.

    Args:
        out_indices: Stages to return, counted from 0.
        **stages: The arguments of `STPTStages`.
    """

    def __init__(self, *, out_indices: Sequence[int] = (2, 3), **stages: Any) -> None:
        super().__init__(**stages)
        self.out_indices = feature_indices(len(STRIDES), out_indices)
        del self.stages[max(self.out_indices) + 1 :]  # parameters without gradient
        self.channels = [self.dims[i] for i in self.out_indices]
        self.strides = [STRIDES[i] for i in self.out_indices]
        for i in self.out_indices:
            self.add_module(f"norm{i}", nn.LayerNorm(self.dims[i], eps=NORM_EPS))
        initialise(self)

    def forward(self, clip: Tensor) -> list[Tensor]:
        """Map a clip (B, 3, T, H, W) to maps (B, C_i, T / s_t, H / s_h, W / s_w), sizes rounded up."""
        maps = self.forward_stages(clip)
        return [getattr(self, f"norm{i}")(maps[i]).permute(0, 4, 1, 2, 3) for i in self.out_indices]


default_cfgs = generate_default_cfgs({"stpt": video_cfg(96, "stages.0.embed.proj", "head")})


@register_model
def stpt(pretrained: bool = False, **kwargs: Any) -> STPT:
    """The network of the paper; clips of 256 frames of 96 x 96 pixels."""
    return build(STPT, "stpt", pretrained, **kwargs)
