"""What our networks tell timm's registry."""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from torch import nn


def build(cls: type[nn.Module], name: str, pretrained: bool, **options: Any) -> Any:
    """Make the network `name`; with ``features_only`` it gives the maps of four stages."""
    feature_cfg = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}  # timm changes it
    return build_model_with_cfg(cls, name, pretrained, feature_cfg=feature_cfg, **options)


def imagenet_cfg(size: int = 224, crop_pct: float = 0.875, first_conv: str = "patch_embed.proj") -> dict[str, Any]:
    """timm's description of a network for ImageNet at `size` pixels; released files are local, so there is no URL."""
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": "head",
    }


def video_cfg(size: int, first_conv: str, classifier: str) -> dict[str, Any]:
    """timm's description of a network for Kinetics-400 and frames of `size` pixels.

    timm has no place for the number of frames, which is the network's ``num_frames``. Pixels are normalised to -1..1,
    as in I3D (arXiv 1705.07750).
    """
    return {
        "num_classes": 400,
        "input_size": (3, size, size),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": first_conv,
        "classifier": classifier,
    }
