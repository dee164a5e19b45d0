"""HVT (Pan et al. 2021, "Scalable Vision Transformers with Hierarchical Pooling", arXiv 2103.10619).

A plain Vision Transformer without class token whose sequence of tokens is max-pooled between blocks
(:mod:`backbones.token_pooling`); the classifier reads the mean of the tokens. Parameter names are the released ones.
"""

from typing import Any

from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor

from backbones.attention import GlobalAttention
from backbones.registration import imagenet_cfg
from backbones.token_pooling import PooledVisionTransformer, add_pooling


class HVT(PooledVisionTransformer):
    """Hierarchical Visual Transformer for images of any size (of one patch at least).

    Block i with ``i % pool_block_width == 0`` ends in max-pooling of the sequence with kernel `pool_kernel_size` and
    stride 2; ``pool_block_width=0`` pools nowhere (HVT-S-0). Rows and columns of pixels that fill no patch are left
    out. Position embeddings belong to `img_size`, an int or (H, W); for images of another size the first one is resized
    bicubically as a map and those of pooled sequences linearly. `drop_path_rate` is the stochastic depth of the last
    block (linear from 0 at the first), `drop_rate` the dropout before the classifier.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        pool_block_width: int = 12,
        pool_kernel_size: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,  # type: ignore[arg-type]
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            class_token=False,
            fc_norm=False,  # the norm comes before the mean over the tokens
            dynamic_img_size=True,
            embed_layer=FlooringPatchEmbed,
            attn_layer=GlobalAttention,
        )
        if pool_block_width:
            add_pooling(self, pool_block_width, pool_kernel_size, stride=2)


class FlooringPatchEmbed(PatchEmbed):
    """timm's patch embedding for any image size: rows and columns that fill no patch are left out."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, H // p, W // p, D)."""
        height, width = (size // patch * patch for size, patch in zip(x.shape[-2:], self.patch_size, strict=True))
        return super().forward(x[..., :height, :width])


_NAMES = ("hvt_ti_1", "hvt_s_0", "hvt_s_1", "hvt_s_2", "hvt_s_3", "scale_hvt_ti_4")
default_cfgs = generate_default_cfgs({name: imagenet_cfg() for name in _NAMES})


def _create_hvt(name: str, pretrained: bool, **options: Any) -> HVT:
    # Tokens are no maps; as of timm's ViT, `features_only` gives the last three blocks.
    features = {"out_indices": 3, "feature_cls": "getter", "output_fmt": "NLC"}
    return build_model_with_cfg(HVT, name, pretrained, feature_cfg=features, **options)


@register_model
def hvt_ti_1(pretrained: bool = False, **kwargs: Any) -> HVT:
    """HVT-Ti-1: width 192, pooled once (after the first block)."""
    return _create_hvt("hvt_ti_1", pretrained, **{"embed_dim": 192, "num_heads": 3, **kwargs})


@register_model
def hvt_s_0(pretrained: bool = False, **kwargs: Any) -> HVT:
    """HVT-S-0: never pooled; DeiT-S with the mean of the tokens in place of the class token."""
    return _create_hvt("hvt_s_0", pretrained, **{"pool_block_width": 0, **kwargs})


@register_model
def hvt_s_1(pretrained: bool = False, **kwargs: Any) -> HVT:
    """HVT-S-1: width 384, pooled once (after the first block)."""
    return _create_hvt("hvt_s_1", pretrained, **kwargs)


@register_model
def hvt_s_2(pretrained: bool = False, **kwargs: Any) -> HVT:
    """HVT-S-2: width 384, pooled after blocks 0 and 6."""
    return _create_hvt("hvt_s_2", pretrained, **{"pool_block_width": 6, **kwargs})


@register_model
def hvt_s_3(pretrained: bool = False, **kwargs: Any) -> HVT:
    """HVT-S-3: width 384, pooled after blocks 0, 4 and 8."""
    return _create_hvt("hvt_s_3", pretrained, **{"pool_block_width": 4, **kwargs})


@register_model
def scale_hvt_ti_4(pretrained: bool = False, **kwargs: Any) -> HVT:
    """Scale HVT-Ti-4, also called HVT-S-4: width 384, pooled after blocks 0, 3, 6 and 9."""
    return _create_hvt("scale_hvt_ti_4", pretrained, **{"pool_block_width": 3, **kwargs})
