"""LITv2 and HiLo: "Fast Vision Transformers with HiLo Attention" (NeurIPS 2022, arXiv 2205.13213)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from backbones.lit_stages import LITFeatures, LITStages
from backbones.registration import build, imagenet_cfg
from backbones.staged import StagedClassifier
from kernels.hilo import hilo, lo_fi
from kernels.window_attention import window_attention


class HiLo(nn.Module):
    """Attention of two head groups on maps (B, H, W, C): high frequencies in windows, low ones over a pooled map.

    Hi-Fi heads attend within windows of `window_size` x `window_size` tokens. Lo-Fi heads attend, from every token, to
    the map averaged over such windows. The outputs are concatenated, Hi-Fi channels first. `num_heads * alpha` heads,
    rounded down, are Lo-Fi; a window of 1 makes all of them Lo-Fi, which is then plain global attention.

    Maps whose sides the window does not divide are zero-padded at the right and bottom, unmasked, as in the official
    dense-prediction code. Without Hi-Fi heads the official classification code leaves the rest of such a map out of the
    pooling instead; so does this one unless `pad` is set.

    Args:
        dim: C.
        num_heads: Heads of both groups together.
        qkv_bias: Biases of the query, key and value projections.
        qk_scale: Factor on the logits; None is (C / num_heads) ** -0.5.
        window_size: Side of a window in tokens.
        alpha: Share of Lo-Fi heads.
        pad: Pad also without Hi-Fi heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        window_size: int = 2,
        alpha: float = 0.5,
        pad: bool = False,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}")
        if window_size < 1 or not 0 <= alpha <= 1:
            raise ValueError(f"window_size={window_size}, alpha={alpha}: expected at least 1 and a share in 0..1")
        self.num_heads, self.head_dim, self.window_size, self.pad = num_heads, dim // num_heads, window_size, pad
        self.scale = qk_scale or self.head_dim**-0.5
        self.lo_heads = num_heads if window_size == 1 else int(num_heads * alpha)
        self.hi_heads = num_heads - self.lo_heads
        lo_dim, hi_dim = self.lo_heads * self.head_dim, self.hi_heads * self.head_dim
        if self.lo_heads:
            self.l_q = nn.Linear(dim, lo_dim, bias=qkv_bias)
            self.l_kv = nn.Linear(dim, 2 * lo_dim, bias=qkv_bias)
            self.l_proj = nn.Linear(lo_dim, lo_dim)
        if self.hi_heads:
            self.h_qkv = nn.Linear(dim, 3 * hi_dim, bias=qkv_bias)
            self.h_proj = nn.Linear(hi_dim, hi_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each map (B, H, W, C)."""
        height, width = x.shape[1:3]
        window = self.window_size
        below, right = -height % window, -width % window
        if (below or right) and (self.pad or self.hi_heads or min(height, width) < window):
            x = F.pad(x, (0, 0, 0, right, 0, below))
        return self._attend(x)[:, :height, :width]

    def _attend(self, x: Tensor) -> Tensor:
        """(B, H, W, C), sides divisible by the window where there are Hi-Fi heads, to (B, H, W, C)."""
        if not self.hi_heads:
            return self.l_proj(lo_fi(*self._lo_projections(x), self.scale))
        qkv = self.h_qkv(x).unflatten(3, (3, self.hi_heads, self.head_dim))
        if not self.lo_heads:
            q, k, v = qkv.unbind(3)
            out = window_attention(q, k, v, (self.window_size, self.window_size), scale=self.scale)
            return self.h_proj(out.flatten(3))
        hi, lo = hilo(qkv, *self._lo_projections(x), self.window_size, self.scale)
        return torch.cat([self.h_proj(hi), self.l_proj(lo)], dim=-1)

    def _lo_projections(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, H, W, heads, d), and keys and values (B, H // s, W // s, 2, heads, d) of the pooled map."""
        heads = (self.lo_heads, self.head_dim)
        return self.l_q(x).unflatten(3, heads), self.l_kv(self._pooled(x)).unflatten(3, (2, *heads))

    def _pooled(self, x: Tensor) -> Tensor:
        """Averages over whole windows, (B, H // s, W // s, C)."""
        window = self.window_size
        if window == 1:
            return x
        return F.avg_pool2d(x.permute(0, 3, 1, 2), window).permute(0, 2, 3, 1)


class ConvFFN(nn.Module):
    """MLP with a depth-wise 3 x 3 convolution before its activation, on maps (B, H, W, C).

    Args:
        dim: C.
        hidden_dim: Hidden width.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = DepthwiseConv(hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map (B, H, W, C)."""
        return self.fc2(self.act(self.dwconv(self.fc1(x))))


class DepthwiseConv(nn.Module):
    """Depth-wise 3 x 3 convolution of maps (B, H, W, C), zero-padded; weights start at normal(0, sqrt(2 / 9))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        nn.init.normal_(self.dwconv.weight, std=(2 / 9) ** 0.5)
        if self.dwconv.bias is not None:
            nn.init.zeros_(self.dwconv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve a map (B, H, W, C)."""
        return self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # channels_last in memory: no copies


class LITv2Stages(LITStages):
    """Stages of LITv2: HiLo attention and convolutional MLPs.

    Args:
        num_heads: Heads per stage.
        mlp_ratio: Hidden width of the MLPs over their dim.
        qkv_bias: Biases of the query, key and value projections.
        alpha: Share of Lo-Fi heads.
        local_ws: Window side per stage; unused in stages without attention.
        **stages: The other arguments of `LITStages`.
    """

    pad: ClassVar[bool] = False  # see `HiLo`

    def __init__(
        self,
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        alpha: float = 0.9,
        local_ws: Sequence[int] = (0, 0, 2, 1),
        **stages: Any,
    ) -> None:
        def attention(stage: int, dim: int) -> nn.Module:
            return HiLo(dim, num_heads[stage], qkv_bias, window_size=local_ws[stage], alpha=alpha, pad=self.pad)

        super().__init__(attention, lambda dim: ConvFFN(dim, int(mlp_ratio * dim)), **stages)


class LITv2(StagedClassifier, LITv2Stages):
    """LITv2 classifier for images (B, 3, H, W) of any size; arguments are those of its two bases."""


class LITv2Dense(LITFeatures, LITv2Stages):
    """LITv2 feature pyramid; arguments are those of its two bases.

    The released "window 4" detectors have ``local_ws=(0, 0, 4, 1)``.
    """

    pad = True


SMALL: dict[str, Any] = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
MEDIUM: dict[str, Any] = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
BASE: dict[str, Any] = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
VARIANTS: dict[str, dict[str, Any]] = {
    "litv2_s": SMALL,
    "litv2_m": MEDIUM,
    "litv2_b": BASE,
    "litv2_b_384": BASE,
    **{f"litv2_s_alpha{round(10 * alpha):02}": {**SMALL, "alpha": alpha} for alpha in (0.0, 0.2, 0.4, 0.5, 0.7, 1.0)},
}


DENSE_VARIANTS: dict[str, Callable[..., nn.Module]] = {
    name: partial(LITv2Dense, **options) for name, options in VARIANTS.items()
}

default_cfgs = generate_default_cfgs(
    {name: imagenet_cfg(384, crop_pct=1.0) if name.endswith("384") else imagenet_cfg() for name in VARIANTS}
)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> LITv2:
    return build(LITv2, name, pretrained, **{**VARIANTS[name], **kwargs})


@register_model
def litv2_s(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-S: 28 M parameters, 3.7 GMACs, alpha 0.9."""
    return _create("litv2_s", pretrained, kwargs)


@register_model
def litv2_m(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-M: 49 M parameters, 7.5 GMACs."""
    return _create("litv2_m", pretrained, kwargs)


@register_model
def litv2_b(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-B: 87 M parameters, 13.2 GMACs."""
    return _create("litv2_b", pretrained, kwargs)


@register_model
def litv2_b_384(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-B fine-tuned at 384 pixels, 39.7 GMACs; the same network as LITv2-B."""
    return _create("litv2_b_384", pretrained, kwargs)


@register_model
def litv2_s_alpha00(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-S with Hi-Fi heads only in stage 3."""
    return _create("litv2_s_alpha00", pretrained, kwargs)


@register_model
def litv2_s_alpha02(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-S with 2 Lo-Fi and 10 Hi-Fi heads in stage 3."""
    return _create("litv2_s_alpha02", pretrained, kwargs)


@register_model
def litv2_s_alpha04(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-S with 4 Lo-Fi and 8 Hi-Fi heads in stage 3."""
    return _create("litv2_s_alpha04", pretrained, kwargs)


@register_model
def litv2_s_alpha05(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-S with 6 Lo-Fi and 6 Hi-Fi heads in stage 3."""
    return _create("litv2_s_alpha05", pretrained, kwargs)


@register_model
def litv2_s_alpha07(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-S with 8 Lo-Fi and 4 Hi-Fi heads in stage 3."""
    return _create("litv2_s_alpha07", pretrained, kwargs)


@register_model
def litv2_s_alpha10(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-S with Lo-Fi heads only in stage 3."""
    return _create("litv2_s_alpha10", pretrained, kwargs)
