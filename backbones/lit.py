"""LIT-S, LIT-M, LIT-B: "Less is More: Pay Less Attention in Vision Transformers" (AAAI 2022, arXiv 2105.14217).

MLP blocks in the first two stages, global attention with a relative position bias in the last two, deformable token
merging between them. LIT-Ti has an architecture of its own, in `backbones.lit_ti`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import Mlp, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from backbones.lit_stages import LITFeatures, LITStages
from backbones.positions import relative_index
from backbones.registration import build, imagenet_cfg
from backbones.staged import Flavour, StagedClassifier
from kernels.attention import attention

# Base image of the position tables in the official code (pixels).
DENSE_TABLE_SIZES: dict[Flavour, int] = {"segmentation": 512, "detection": 800}


class RelativeAttention(nn.Module):
    """Global multi-head attention with a learned bias per head and relative position, on maps (B, H, W, C).

    The bias table belongs to a grid of `grid_size` tokens and is resized (bicubic) for other grids.

    Args:
        dim: C.
        num_heads: Heads.
        grid_size: Height and width of the table's grid.
        qkv_bias: Biases of the query, key and value projections.
        index_buffer: Keep the official index buffer in the state dict; it is not used here.
    """

    def __init__(
        self, dim: int, num_heads: int, grid_size: tuple[int, int], qkv_bias: bool = True, index_buffer: bool = True
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}")
        self.num_heads, self.grid_size = num_heads, grid_size
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        height, width = grid_size
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * height - 1) * (2 * width - 1), num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        if index_buffer:
            self.register_buffer("relative_position_index", relative_index(height, width))

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each map (B, H, W, C)."""
        batch, height, width, dim = x.shape
        qkv = self.qkv(x).view(batch, height * width, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, d)
        x = attention(q, k, v, bias=self.bias(height, width)[None])
        return self.proj(x.transpose(1, 2).reshape(batch, height, width, dim))

    def bias(self, height: int, width: int) -> Tensor:
        """Bias (heads, L, L) of a grid of L = height * width tokens, rows are queries."""
        rows, columns = (2 * side - 1 for side in self.grid_size)
        table = self.relative_position_bias_table.t().view(self.num_heads, rows, columns)
        if (height, width) != self.grid_size:
            size = (2 * height - 1, 2 * width - 1)
            table = F.interpolate(table[None], size=size, mode="bicubic", align_corners=False)[0]
        # Entry (y1 - y2 + H - 1, x1 - x2 + W - 1) is window (y1, x1) of the table read backwards from its end.
        windows = table.unfold(1, height, 1).unfold(2, width, 1)  # (heads, y1, x1, H, W)
        return windows.flip(3, 4).reshape(self.num_heads, height * width, height * width)


class LITTableStages(LITStages):
    """Stages of LIT: attention with position tables that belong to an image size, and plain MLPs.

    Args:
        img_size: Side, or height and width, of the image whose grids the position tables have.
        patch_size: Side of a patch.
        num_heads: Heads per stage.
        mlp_ratio: Hidden width of the MLPs over their dim.
        qkv_bias: Biases of the query, key and value projections.
        **stages: The other arguments of `LITStages`.
    """

    index_buffer: ClassVar[bool] = True  # see `RelativeAttention`

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        **stages: Any,
    ) -> None:
        height, width = (side // patch_size for side in to_2tuple(img_size))

        def attention_of(stage: int, dim: int) -> nn.Module:
            grid = (max(height >> stage, 1), max(width >> stage, 1))
            return RelativeAttention(dim, num_heads[stage], grid, qkv_bias, self.index_buffer)

        super().__init__(attention_of, lambda dim: Mlp(dim, int(mlp_ratio * dim)), patch_size=patch_size, **stages)


class LIT(StagedClassifier, LITTableStages):
    """LIT classifier for images (B, 3, H, W) of any size; arguments are those of its two bases."""


class LITDense(LITFeatures, LITTableStages):
    """LIT feature pyramid with the official position tables of each flavour.

    Args:
        flavour: ``segmentation`` or ``detection``.
        table_size: Side of the image whose grids the position tables have; None is the flavour's official one.
        **features: The other arguments of `LITFeatures` and `LITTableStages`.
    """

    index_buffer = False

    def __init__(self, *, flavour: Flavour = "segmentation", table_size: int | None = None, **features: Any) -> None:
        super().__init__(flavour=flavour, img_size=table_size or DENSE_TABLE_SIZES[flavour], **features)


VARIANTS: dict[str, dict[str, Any]] = {
    "lit_s": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "lit_m": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "lit_b": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
}


DENSE_VARIANTS: dict[str, Callable[..., nn.Module]] = {
    name: partial(LITDense, **options) for name, options in VARIANTS.items()
}

default_cfgs = generate_default_cfgs({name: imagenet_cfg() for name in VARIANTS})


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> LIT:
    return build(LIT, name, pretrained, **{**VARIANTS[name], **kwargs})


@register_model
def lit_s(pretrained: bool = False, **kwargs: Any) -> LIT:
    """LIT-S: 27 M parameters without classifier, 4.1 GMACs."""
    return _create("lit_s", pretrained, kwargs)


@register_model
def lit_m(pretrained: bool = False, **kwargs: Any) -> LIT:
    """LIT-M: 48 M parameters without classifier, 8.6 GMACs."""
    return _create("lit_m", pretrained, kwargs)


@register_model
def lit_b(pretrained: bool = False, **kwargs: Any) -> LIT:
    """LIT-B: 86 M parameters without classifier, 15.0 GMACs."""
    return _create("lit_b", pretrained, kwargs)
