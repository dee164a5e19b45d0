"""Pruned Swin Transformer of SPViT (He et al. 2021, arXiv 2111.11802).

State-dict keys are the official ones: patches are merged at the end of a stage. Shift masks and index tables, which
official files hold too, are computed here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn

from backbones.lit_stages import PatchEmbedding
from backbones.positions import relative_index
from backbones.spvit_architecture import SWIN_T, TAPS, WINDOW, Architecture, Mixer
from backbones.spvit_layers import BottleneckConv, MixerBlock, Passed, SplitAttention, checkpointed
from backbones.staged import LayeredStages, StagedClassifier
from backbones.swin import PatchMerging

EPS = 1e-5


@dataclass(frozen=True)
class Windows:
    """How a block divides a map of `height` x `width` tokens into windows of `side` x `side`, shifted by `shift`.

    A map is zero-padded to whole windows, then shifted. `mask` (windows, N, N) is the additive mask where it is.
    """

    height: int
    width: int
    side: int
    shift: int
    mask: Tensor | None

    @classmethod
    def shifted(cls, x: Tensor, side: int) -> "Windows":
        """Windows of a map `x` (B, H, W, C) that is shifted by half a window.

        The mask is -100 between tokens that were not neighbours before the shift, because one came around an edge.
        """
        height, width = x.shape[1:3]
        shift, axes = side // 2, []
        for length in (height, width):
            padded = length + -length % side
            position = torch.arange(padded, device=x.device)
            axes.append((position >= padded - side).long() + (position >= padded - shift))
        region = cls(height, width, side, 0, None).split((3 * axes[0][:, None] + axes[1])[None, ..., None]).flatten(1)
        blocked = region[:, None, :] != region[:, :, None]  # (windows, N, N)
        return cls(height, width, side, shift, torch.zeros_like(blocked, dtype=x.dtype).masked_fill(blocked, -100.0))

    def split(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B * windows, side, side, C)."""
        x = F.pad(x, (0, 0, 0, -x.shape[2] % self.side, 0, -x.shape[1] % self.side))
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))
        return x.unflatten(2, (-1, self.side)).unflatten(1, (-1, self.side)).transpose(2, 3).flatten(0, 2)

    def join(self, windows: Tensor) -> Tensor:
        """The reverse of `split`."""
        rows, columns = (-(-length // self.side) for length in (self.height, self.width))
        x = windows.unflatten(0, (-1, rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if self.shift:
            x = x.roll((self.shift, self.shift), dims=(1, 2))
        return x[:, : self.height, : self.width]


class WindowAttention(SplitAttention):
    """Self-attention inside windows of `side` x `side` tokens, with a bias per head and relative position."""

    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, side: int) -> None:
        super().__init__(dim, num_heads)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * side - 1) ** 2, num_heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_index(side, side), persistent=False)

    def forward(self, x: Tensor, where: Windows) -> Tensor:
        """(B, H, W, C) to the same shape."""
        windows = where.split(x)
        mixed = self.attend(windows.flatten(1, 2), self.bias(windows.shape[0], where.mask))
        return where.join(mixed.view(windows.shape))

    def bias(self, count: int, mask: Tensor | None) -> Tensor:
        """What is added to the scores of `count` windows: (1 or count, heads, N, N)."""
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]
        return bias if mask is None else (bias + mask[:, None]).repeat(count // mask.shape[0], 1, 1, 1)


class WindowConv(BottleneckConv):
    """Convolution inside the windows of a block, or of the whole map where `whole_map`."""

    def __init__(self, *args: Any, whole_map: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.whole_map = whole_map or self.size == 1  # a 1 x 1 convolution knows no neighbours

    def forward(self, x: Tensor, where: Windows) -> Tensor:
        """(B, H, W, C) to the same shape."""
        return self.convolve(x) if self.whole_map else where.join(self.convolve(where.split(x)))


class MixerStage(nn.Module):
    """Blocks of one resolution, every second one with shifted windows, and the patch merging behind them."""

    def __init__(self, blocks: list[MixerBlock], side: int, downsample: PatchMerging | None) -> None:
        super().__init__()
        self.side = side
        self.blocks = nn.ModuleList(blocks)
        self.downsample: PatchMerging | None = downsample
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks to a map (B, H, W, C); the patch merging is left to the caller."""
        height, width = x.shape[1:3]
        plain = shifted = Windows(height, width, self.side, 0, None)
        if min(height, width) > self.side:
            shifted = Windows.shifted(x, self.side)
        for i, block in enumerate(self.blocks):
            where = shifted if i % 2 else plain
            recompute = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpointed(block, x, where) if recompute else block(x, where)
        return x


class SwinStages(LayeredStages):
    """Patches, then stages of dims C, 2C, 4C, 8C at strides 4, 8, 16, 32; arguments as of `backbones.spvit`'s DeiT.

    Windows have 7 x 7 tokens, or as many as the shorter side of the stage's map has at `img_size`. Maps of other images
    are zero-padded to whole windows, and before patches are merged to even sides.

    Args:
        architecture: What the blocks are: an `Architecture`, what its `to_dict` gives, or the name of its JSON file.
        img_size: Side, or height and width, of the images.
        in_chans: Channels of the image.
        drop_path_rate: Stochastic depth of the last block; it rises linearly from 0 at the first.
        official_blocks: Skip a mixer and convolve as the official pruned network does (see `SPViTSwin`).
        collapsed: Convolutions keep their kernels instead of the heads they are made of.
    """

    def __init__(
        self,
        architecture: Architecture | Mapping[str, Any] | str | Path = SWIN_T,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        official_blocks: bool = False,
        collapsed: bool = False,
    ) -> None:
        super().__init__()
        found = self.architecture = Architecture.read(architecture)
        if found.family != "swin":
            raise ValueError(f"architecture of family {found.family!r}: expected that of a Swin Transformer")
        self.img_size = img_size
        self.patch_size = found.patch_size
        self.num_stages = len(found.depths)
        self.dims = found.dims
        self.strides = [found.patch_size * 2**stage for stage in range(self.num_stages)]
        self.stage_names = [f"layers.{stage}" for stage in range(self.num_stages)]
        self.patch_embed = PatchEmbedding(in_chans, found.embed_dim, found.patch_size, norm=True)

        def mixer(kind: Mixer, dim: int, heads: int, side: int) -> nn.Module | None:
            if kind == "skip":
                return Passed() if official_blocks else None
            if kind == "msa":
                return WindowAttention(dim, heads, side)
            size, taps = int(kind[0]), TAPS["swin"]
            return WindowConv(dim, heads, size, taps, found.alpha, collapsed, whole_map=official_blocks)

        rates = iter(torch.linspace(0, drop_path_rate, len(found.blocks), device="cpu").tolist())
        choices = iter(found.blocks)
        self.layers = nn.ModuleList()
        for stage, (depth, dim, heads) in enumerate(zip(found.depths, self.dims, found.num_heads, strict=True)):
            side = min(WINDOW, *(-(-length // self.strides[stage]) for length in to_2tuple(img_size)))
            blocks = []
            for _ in range(depth):
                choice = next(choices)
                layer = mixer(choice.mixer, dim, heads, side)
                blocks.append(MixerBlock(dim, layer, choice.width, next(rates), EPS))
            last = stage == self.num_stages - 1
            self.layers.append(MixerStage(blocks, side, None if last else PatchMerging(dim)))

    def embed(self, image: Tensor) -> Tensor:
        """The map (B, ceil(H / p), ceil(W / p), C) of an image (B, C_in, H, W)."""
        height, width = image.shape[-2:]
        return self.patch_embed(F.pad(image, (0, -width % self.patch_size, 0, -height % self.patch_size)))


class SPViTSwin(StagedClassifier, SwinStages):
    """Pruned Swin Transformer for images (B, 3, H, W) of any size; arguments are those of its two bases.

    A block without mixer adds nothing in its place, and a 3 x 3 convolution stays inside the (shifted) windows, as in
    the search. With `official_blocks` it is as in the official pruned network, whose trained weights need it: such a
    block adds the layer norm of its input, and convolutions see the whole map.
    """
