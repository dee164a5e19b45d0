"""Swin Transformer as a feature pyramid (Liu et al. 2021, arXiv 2103.14030), in the form dense prediction uses it.

It differs from timm's classification Swin where maps do not fit the windows. A map is zero-padded to whole windows
*before* it is shifted (timm shifts first), and a map smaller than a window is padded up to it instead of shrinking the
window. Every stage ends in a LayerNorm of its own. Parameter names are timm's, plus ``norm0`` to ``norm3``.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backbones.positions import relative_index
from kernels.window_attention import window_attention

# embed_dim, depths, num_heads, window_size
SWIN_VARIANTS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...], int]] = {
    "swin_tiny_patch4_window7_224": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "swin_small_patch4_window7_224": (96, (2, 2, 18, 2), (3, 6, 12, 24), 7),
    "swin_base_patch4_window7_224": (128, (2, 2, 18, 2), (4, 8, 16, 32), 7),
    "swin_base_patch4_window12_384": (128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
    "swin_large_patch4_window7_224": (192, (2, 2, 18, 2), (6, 12, 24, 48), 7),
    "swin_large_patch4_window12_384": (192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
}


class SwinFeatures(nn.Module):
    """Swin Transformer returning ``len(depths)`` maps of strides 4, 8, 16, 32 for images of any size.

    ``window_size`` is the side of a window in tokens, ``drop_path_rate`` the stochastic depth of the last block (linear
    from 0 at the first). ``channels`` and ``strides`` describe the returned maps.
    """

    def __init__(
        self,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.channels = [embed_dim * 2**i for i in range(len(depths))]
        self.strides = [4 * 2**i for i in range(len(depths))]
        self.patch_embed = PatchEmbed(embed_dim)
        rates = [drop_path_rate * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
        self.layers = nn.ModuleList(
            SwinStage(
                dim,
                num_heads[i],
                window_size,
                mlp_ratio,
                drop_path=rates[sum(depths[:i]) : sum(depths[: i + 1])],
                downsample=i > 0,
            )
            for i, dim in enumerate(self.channels)
        )
        for i, dim in enumerate(self.channels):
            self.add_module(f"norm{i}", nn.LayerNorm(dim))
        self.apply(_init_weights)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Map a normalised image (B, 3, H, W) to maps (B, C_i, ceil(H / s_i), ceil(W / s_i))."""
        x = self.patch_embed(image)  # (B, H/4, W/4, C)
        maps = []
        for i, stage in enumerate(self.layers):
            x = stage(x)
            maps.append(self.get_submodule(f"norm{i}")(x).permute(0, 3, 1, 2).contiguous())
        return maps

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        for stage in self.layers:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay under timm's convention."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that number the layers for layer-wise learning-rate decay (timm's convention)."""
        blocks = [(r"^layers\.(\d+)\.downsample", (0,)), (r"^layers\.(\d+)\.\w+\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else blocks}


class PatchEmbed(nn.Module):
    """Project 4x4 patches of a right/bottom zero-padded image and normalise them."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=4, stride=4)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, ceil(H/4), ceil(W/4), C)."""
        height, width = image.shape[-2:]
        image = F.pad(image, (0, -width % 4, 0, -height % 4))
        return self.norm(self.proj(image).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Halve the resolution: concatenate 2x2 neighbours, normalise, project 4C to 2C."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ceil(H/2), ceil(W/2), 2C)."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        # Order of the released weights: (row, column) = (even, even), (odd, even), (even, odd), (odd, odd).
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class SwinStage(nn.Module):
    """An optional patch merging, then blocks that alternate plain and shifted windows."""

    def __init__(
        self, dim: int, num_heads: int, window_size: int, mlp_ratio: float, drop_path: list[float], downsample: bool
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = PatchMerging(dim // 2) if downsample else nn.Identity()
        self.blocks = nn.ModuleList(
            SwinBlock(dim, num_heads, window_size, window_size // 2 if i % 2 else 0, mlp_ratio, rate)
            for i, rate in enumerate(drop_path)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H', W', C'), halved when the stage merges patches."""
        x = self.downsample(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing and self.training else block(x)
        return x


class SwinBlock(nn.Module):
    """Pre-norm window attention and MLP, both residual."""

    def __init__(
        self, dim: int, num_heads: int, window_size: int, shift_size: int, mlp_ratio: float, drop_path: float
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.shift_size = shift_size
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        height, width = x.shape[1:3]
        side = self.window_size
        padded = F.pad(self.norm1(x), (0, 0, 0, -width % side, 0, -height % side))
        x = x + self.drop_path(self.attn(padded, self.shift_size)[:, :height, :width])
        return x + self.drop_path(self.mlp(self.norm2(x)))


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows with a learned bias per head and relative position."""

    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.num_heads, self.window_size = num_heads, window_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_index(window_size, window_size), persistent=False)

    def forward(self, x: Tensor, shift: int) -> Tensor:
        """(B, H, W, C), sides divisible by the window, to the same shape; the map is shifted by ``shift`` tokens."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)  # (B, H, W, heads, d)
        # (N, N, heads) -> (heads, N, N)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1).contiguous()
        window, shifts = (self.window_size, self.window_size), (shift, shift)
        return self.proj(window_attention(q, k, v, window, bias=bias, shift=shifts).flatten(-2))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
