"""PVTv2 and Twins-SVT of timm with EcoFormer attention, and with softmax attention of all tokens to all (MSA).

EcoFormer (arXiv 2209.09004) trains in two stages: all spatial reductions and windows become MSA, then MSA becomes
binary attention in all pyramid stages but the last. Official checkpoints and those of timm load by
`backbones.load_checkpoint`, the latter through `backbones.attention_keys`.
"""

from collections.abc import Callable
from typing import Any, Literal

from timm.models import generate_default_cfgs, pvt_v2, register_model, twins
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from backbones.attention import global_attention
from backbones.ecoformer import hashed_attention
from backbones.registration import build, imagenet_cfg

Kind = Literal["ecoformer", "msa"]
LAST_STAGE = 3  # keeps softmax attention


class _NoInitOnMeta(nn.Module):
    """timm's initial weights take seconds on the meta device, where there are none."""

    def _init_weights(self, module: nn.Module) -> None:
        if not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            super()._init_weights(module)  # type: ignore[misc]


class PVTv2(_NoInitOnMeta, pvt_v2.PyramidVisionTransformerV2):
    """PVTv2 with attention of another kind and no spatial reduction, for images of any size.

    `attention` is ``"ecoformer"`` in all stages but the last, or ``"msa"`` in all; `num_bits` and `num_anchors` are
    those of `EcoFormerAttention`, the other options timm's.
    """

    def __init__(
        self, attention: Kind = "ecoformer", num_bits: int = 16, num_anchors: int = 25, **options: Any
    ) -> None:
        super().__init__(**{**options, "sr_ratios": 1})
        stages: Any = self.stages
        for index, stage in enumerate(stages):
            for block in stage.blocks:
                block.attn = exchanged(block.attn, attention, index, num_bits, num_anchors)

    def no_weight_decay(self) -> set[str]:
        """None but vectors."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Blocks, or with `coarse` stages, in the order of the forward pass."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)"}
        blocks = [
            (r"^stages\.(\d+)\.downsample", (-1,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": blocks}


class TwinsSVT(_NoInitOnMeta, twins.Twins):
    """Twins-SVT with attention of another kind in place of windows and sub-sampling, for images of any size.

    Options are those of `PVTv2`; an ``img_size`` means nothing.
    """

    def __init__(
        self, attention: Kind = "ecoformer", num_bits: int = 16, num_anchors: int = 25, **options: Any
    ) -> None:
        fixed = {"img_size": 224, "sr_ratios": (1, 1, 1, 1), "wss": None, "block_cls": TwinsBlock}
        super().__init__(**{**options, **fixed})
        stages: Any = self.blocks
        for index, stage in enumerate(stages):
            for block in stage:
                block.attn = exchanged(block.attn, attention, index, num_bits, num_anchors)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the activations of blocks again in the backward pass."""
        for module in self.modules():
            if isinstance(module, TwinsBlock):
                module.grad_checkpointing = enable


class TwinsBlock(twins.Block):
    """timm's block, which can be checkpointed."""

    grad_checkpointing = False

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) of a map of height and width `size`."""
        if self.grad_checkpointing:
            return checkpoint(super().forward, x, size)
        return super().forward(x, size)


def exchanged(attention: nn.Module, kind: Kind, stage: int, num_bits: int, num_anchors: int) -> nn.Module:
    """The layer that takes the place of `attention` in pyramid stage `stage` (from 0), with its weights.

    Raises ValueError for another `kind`.
    """
    if kind not in ("ecoformer", "msa"):
        raise ValueError(f"attention={kind!r}: expected 'ecoformer' or 'msa'")
    if kind == "msa" or stage == LAST_STAGE:
        return global_attention(attention)
    return hashed_attention(attention, num_bits, num_anchors)


_B1: dict[str, Any] = {"embed_dims": (64, 128, 320, 512), "num_heads": (1, 2, 5, 8)}
_SVT: dict[str, Any] = {"mlp_ratios": (4, 4, 4, 4)}
SIZES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "pvt_v2_b0": (PVTv2, {"depths": (2, 2, 2, 2), "embed_dims": (32, 64, 160, 256), "num_heads": (1, 2, 5, 8)}),
    "pvt_v2_b1": (PVTv2, {"depths": (2, 2, 2, 2), **_B1}),
    "pvt_v2_b2": (PVTv2, {"depths": (3, 4, 6, 3), **_B1}),
    "pvt_v2_b3": (PVTv2, {"depths": (3, 4, 18, 3), **_B1}),
    "pvt_v2_b4": (PVTv2, {"depths": (3, 8, 27, 3), **_B1}),
    "twins_svt_small": (
        TwinsSVT,
        {"depths": (2, 2, 10, 4), "embed_dims": (64, 128, 256, 512), "num_heads": (2, 4, 8, 16), **_SVT},
    ),
    "twins_svt_base": (
        TwinsSVT,
        {"depths": (2, 2, 18, 2), "embed_dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24), **_SVT},
    ),
    "twins_svt_large": (
        TwinsSVT,
        {"depths": (2, 2, 18, 2), "embed_dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32), **_SVT},
    ),
}
VARIANTS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    f"{name}_{kind}": (cls, {**size, "attention": kind})
    for name, (cls, size) in SIZES.items()
    for kind in ("msa", "ecoformer")
}
FIRST_CONV: dict[type[nn.Module], str] = {PVTv2: "patch_embed.proj", TwinsSVT: "patch_embeds.0.proj"}

default_cfgs = generate_default_cfgs(
    {name: imagenet_cfg(first_conv=FIRST_CONV[cls]) for name, (cls, _) in VARIANTS.items()}
)


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    """The function that timm calls to make the network `name`."""

    def make(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        cls, options = VARIANTS[name]
        return build(cls, name, pretrained, **{**options, **kwargs})

    make.__name__ = name
    return make


for _name in VARIANTS:
    register_model(_entrypoint(_name))
