"""What LIT and LITv2 share: stages of pre-norm blocks with token merging between them.

Maps are channel-last, (B, H, W, C), from the patch embedding to the end: windows, depth-wise convolutions and token
merging then need no copies. State-dict keys are those of the official repositories.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import checkpoint
from torch import Tensor, nn

from backbones.deformable_merging import DeformableTokenMerging
from backbones.staged import Flavour, LayeredStages, StagedFeatures

# (stage, dim) -> layer on maps (B, H, W, C)
AttentionFactory = Callable[[int, int], nn.Module]
MlpFactory = Callable[[int], nn.Module]
TOKENS_IN_CACHE = 1600


class PatchEmbedding(nn.Module):
    """Project patches to tokens: (B, C_in, H, W) to a channel-last map (B, H // p, W // p, C)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, norm: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        """Embed an image (B, C_in, H, W)."""
        image = image.contiguous(memory_format=torch.channels_last)  # then so is the projection, and needs no copy
        return self.norm(self.proj(image).permute(0, 2, 3, 1))


class Block(nn.Module):
    """Pre-norm attention (absent in early stages) and MLP on maps (B, H, W, C), each with stochastic depth."""

    def __init__(self, dim: int, attention: nn.Module | None, mlp: nn.Module, drop_path: float) -> None:
        super().__init__()
        if attention is not None:
            self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map (B, H, W, C)."""
        if self.attn is not None:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Blocks of one resolution and the token merging behind them."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample: nn.Module | None = downsample
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks to a map (B, H, W, C); the token merging is left to the caller."""
        if x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # A few images at a time keep the hidden maps of the MLPs in the processor's cache.
            return torch.cat([self._blocks(part) for part in x.split(_images_in_cache(x))])
        return self._blocks(x)

    def _blocks(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return x


def _images_in_cache(x: Tensor) -> int:
    """How many maps of a batch (B, H, W, C) to process together on a CPU: enough tokens for fast matrix products."""
    batch, height, width, _ = x.shape
    parts = max(1, round(batch * height * width / TOKENS_IN_CACHE))
    return max(1, -(-batch // parts))


class LITStages(LayeredStages):
    """Patch embedding and stages, of dims C, 2C, 4C, 8C at strides 4, 8, 16, 32.

    Args:
        attention: Makes the attention of a block from (stage, dim).
        mlp: Makes the MLP of a block from its dim.
        in_chans: Channels of the image.
        patch_size: Side of a patch.
        embed_dim: C.
        depths: Blocks per stage.
        has_msa: Whether the blocks of each stage have attention.
        patch_norm: Layer norm behind the patch embedding.
        drop_path_rate: Stochastic depth of the last block; it rises linearly from 0 at the first.
    """

    def __init__(
        self,
        attention: AttentionFactory,
        mlp: MlpFactory,
        in_chans: int = 3,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        has_msa: Sequence[bool | int] = (False, False, True, True),
        patch_norm: bool = True,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if len(has_msa) < len(depths):
            raise ValueError(f"has_msa={tuple(has_msa)}: expected one value for each of the {len(depths)} stages")
        self.patch_size = patch_size
        self.dims = [embed_dim * 2**stage for stage in range(len(depths))]
        self.strides = [patch_size * 2**stage for stage in range(len(depths))]
        self.stage_names = [f"layers.{stage}" for stage in range(len(depths))]
        self.num_stages = len(depths)
        self.patch_embed = PatchEmbedding(in_chans, embed_dim, patch_size, patch_norm)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.layers = nn.ModuleList()
        for stage, (depth, dim) in enumerate(zip(depths, self.dims, strict=True)):
            blocks = [
                Block(dim, attention(stage, dim) if has_msa[stage] else None, mlp(dim), next(rates))
                for _ in range(depth)
            ]
            last = stage == len(depths) - 1
            self.layers.append(Stage(blocks, None if last else DeformableTokenMerging(dim, 2 * dim)))


class LITFeatures(StagedFeatures):
    """Feature pyramid over `LITStages`: maps of strides 4, 8, 16, 32 of an image of any size.

    The image is zero-padded at the right and bottom to whole patches, token merging drops odd rows and columns. The
    returned maps are layer-normed, those that enter the next stage are not; for detection stage 1 has no such norm.

    Args:
        flavour: ``segmentation`` or ``detection``.
        **features: The other arguments of `StagedFeatures` and of the stages.
    """

    patch_size: int

    def __init__(self, *, flavour: Flavour = "segmentation", **features: Any) -> None:
        super().__init__(flavour=flavour, **features)
        for i in self.out_indices:
            if i > 0 or flavour == "segmentation":
                self.add_module(f"norm{i}", nn.LayerNorm(self.dims[i]))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Map an image (B, 3, H, W) to maps (B, C_i, H / s_i, W / s_i)."""
        height, width = image.shape[-2:]
        return super().forward(F.pad(image, (0, -width % self.patch_size, 0, -height % self.patch_size)))
