"""Pruned DeiT of SPViT (He et al. 2021, arXiv 2111.11802), and the registration of all its pruned networks.

Blocks mix tokens by self-attention, by a convolution made of its heads (`backbones.spvit_layers`) or not at all, and
have feed-forward networks of different widths. What each block is, an `Architecture` says. The Swin Transformers are
in `backbones.spvit_swin`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from backbones.lit_stages import PatchEmbedding
from backbones.registration import build, imagenet_cfg
from backbones.spvit_architecture import (
    DEIT_S,
    PUBLISHED_ARCHITECTURES,
    SWIN_T,
    TAPS,
    Architecture,
    Mixer,
)
from backbones.spvit_layers import BottleneckConv, MixerBlock, Passed, SplitAttention, checkpointed
from backbones.spvit_swin import SPViTSwin
from backbones.staged import StagedClassifier, Stages

EPS = 1e-6
Grid = tuple[int, int]


class TokenAttention(SplitAttention):
    """Self-attention of all tokens."""

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, 1 + L, C) to the same shape."""
        return self.attend(x)


class TokenConv(BottleneckConv):
    """Convolution of the map of patches; the class token passes by."""

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, 1 + L, C) to the same shape, L being the product of `grid`."""
        return torch.cat([x[:, :1], self.convolve(x[:, 1:].unflatten(1, grid)).flatten(1, 2)], dim=1)


class DeiTStages(Stages):
    """Patches, class token and position embedding, then blocks of one resolution; every block counts as a stage.

    Args:
        architecture: What the blocks are: an `Architecture`, what its `to_dict` gives, or the name of its JSON file.
        img_size: Side, or height and width, of the image whose grid of patches the position embedding belongs to; for
            others it is resized bicubically.
        in_chans: Channels of the image.
        drop_path_rate: Stochastic depth of the last block; it rises linearly from 0 at the first.
        official_blocks: Skip a mixer as the official pruned network does (see `SPViTDeiT`).
        collapsed: Convolutions keep their kernels instead of the heads they are made of.
    """

    def __init__(
        self,
        architecture: Architecture | Mapping[str, Any] | str | Path = DEIT_S,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        official_blocks: bool = False,
        collapsed: bool = False,
    ) -> None:
        super().__init__()
        found = self.architecture = Architecture.read(architecture)
        if found.family != "deit":
            raise ValueError(f"architecture of family {found.family!r}: expected that of a DeiT")
        depth, dim, heads = found.depths[0], found.embed_dim, found.num_heads[0]
        self.dims, self.strides = [dim] * depth, [found.patch_size] * depth
        self.stage_names = [f"blocks.{i}" for i in range(depth)]
        self.num_stages = depth
        self.img_size = img_size
        rows, columns = (side // found.patch_size for side in to_2tuple(img_size))
        self.grid: Grid = max(rows, 1), max(columns, 1)
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        length = 1 + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, length, dim), std=0.02))
        self.patch_embed = PatchEmbedding(in_chans, dim, found.patch_size, norm=False)

        def mixer(kind: Mixer) -> nn.Module | None:
            if kind == "skip":
                return Passed() if official_blocks else None
            if kind == "msa":
                return TokenAttention(dim, heads)
            return TokenConv(dim, heads, int(kind[0]), TAPS["deit"], found.alpha, collapsed)

        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            MixerBlock(dim, mixer(block.mixer), block.width, rate, EPS)
            for block, rate in zip(found.blocks, rates, strict=True)
        )
        self.grad_checkpointing = False

    def forward_stages(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Maps (B, H / p, W / p, C) behind the blocks for an image (B, C_in, H, W), and the last block's tokens."""
        x = self.patch_embed(image)
        grid = x.shape[1:3]
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], dim=1)
        positions = self.pos_embed
        if grid != self.grid:
            positions = resample_abs_pos_embed(positions, list(grid), list(self.grid), num_prefix_tokens=1)
        x, maps = x + positions, []
        for block in self.blocks:
            recompute = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpointed(block, x, grid) if recompute else block(x, grid)
            maps.append(x[:, 1:].unflatten(1, grid))
        return maps, x

    def keep_stages(self, count: int) -> None:
        """Drop the blocks behind the first `count`."""
        del self.blocks[count:]
        self.num_stages = count

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Class token and position embedding."""
        return {"cls_token", "pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that number the layers for layer-wise learning rates (timm)."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


class SPViTDeiT(StagedClassifier, DeiTStages):
    """Pruned DeiT for images (B, 3, H, W) of any size of at least a patch; arguments are those of its two bases.

    The class token is classified; features are tokens (B, 1 + L, C), the class token first. A block without mixer adds
    nothing in its place, as in the search, unless `official_blocks`: the official pruned network then adds the layer
    norm of the block's input, and weights trained with it need that.
    """

    pooling = "token"
    norm_eps = EPS

    def pool(self, x: Tensor) -> Tensor:
        """The class token (B, C) of tokens (B, 1 + L, C)."""
        return x[:, 0]


def collapse(network: nn.Module) -> nn.Module:
    """Keep of every convolution in a pruned network its kernel alone, in place; the function stays. Returns `network`.

    Afterwards the state dict is that of a network made with ``collapsed=True``.
    """
    for module in network.modules():
        if isinstance(module, BottleneckConv):
            module.collapse()
    return network


default_cfgs = generate_default_cfgs(
    {
        **{name: imagenet_cfg() for name in ("spvit_deit", "spvit_swin")},
        **{name: imagenet_cfg(crop_pct=0.9 if "swin" in name else 0.875) for name in PUBLISHED_ARCHITECTURES},
    }
)


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    # Published weights were trained with the official blocks.
    published = {"architecture": PUBLISHED_ARCHITECTURES[name], "official_blocks": True}
    cls = SPViTSwin if published["architecture"].family == "swin" else SPViTDeiT  # type: ignore[attr-defined]
    return build(cls, name, pretrained, **{**published, **kwargs})


@register_model
def spvit_deit(pretrained: bool = False, **kwargs: Any) -> SPViTDeiT:
    """A DeiT of any `architecture`; without one, DeiT-S as it is before the search."""
    return build(SPViTDeiT, "spvit_deit", pretrained, **{"architecture": DEIT_S, **kwargs})


@register_model
def spvit_swin(pretrained: bool = False, **kwargs: Any) -> SPViTSwin:
    """A Swin Transformer of any `architecture`; without one, Swin-T as it is before the search."""
    return build(SPViTSwin, "spvit_swin", pretrained, **{"architecture": SWIN_T, **kwargs})


@register_model
def spvit_deit_ti_l200_t10(pretrained: bool = False, **kwargs: Any) -> SPViTDeiT:
    """DeiT-Ti pruned to 1.0 GMACs."""
    return _create("spvit_deit_ti_l200_t10", pretrained, kwargs)


@register_model
def spvit_deit_sm_l30_t32(pretrained: bool = False, **kwargs: Any) -> SPViTDeiT:
    """DeiT-S pruned to 3.3 GMACs."""
    return _create("spvit_deit_sm_l30_t32", pretrained, kwargs)


@register_model
def spvit_deit_bs_l008_t60(pretrained: bool = False, **kwargs: Any) -> SPViTDeiT:
    """DeiT-B pruned to 8.4 GMACs."""
    return _create("spvit_deit_bs_l008_t60", pretrained, kwargs)


@register_model
def spvit_deit_bs_l006_t100(pretrained: bool = False, **kwargs: Any) -> SPViTDeiT:
    """DeiT-B pruned to 11.7 GMACs."""
    return _create("spvit_deit_bs_l006_t100", pretrained, kwargs)


@register_model
def spvit_swin_t_l28_t32(pretrained: bool = False, **kwargs: Any) -> SPViTSwin:
    """Swin-T pruned to 3.3 GMACs."""
    return _create("spvit_swin_t_l28_t32", pretrained, kwargs)


@register_model
def spvit_swin_sm_l04_t55(pretrained: bool = False, **kwargs: Any) -> SPViTSwin:
    """Swin-S pruned to 6.1 GMACs."""
    return _create("spvit_swin_sm_l04_t55", pretrained, kwargs)


@register_model
def spvit_swin_bs_l01_t100(pretrained: bool = False, **kwargs: Any) -> SPViTSwin:
    """Swin-B pruned to 11.4 GMACs."""
    return _create("spvit_swin_bs_l01_t100", pretrained, kwargs)
