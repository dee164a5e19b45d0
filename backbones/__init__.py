"""Backbones: pixels or clips in, a feature pyramid out."""

from backbones import ecoformer_networks, hvt, i3d, lit, lit_ti, litv2, spvit, stpt  # noqa: F401  (registers networks with timm)
from backbones.checkpoint import CheckpointError, LoadReport, load_checkpoint
from backbones.features import create, create_features
from backbones.token_pooling import pool_tokens
from backbones.video_features import create_video_features

__all__ = [
    "CheckpointError",
    "LoadReport",
    "create",
    "create_features",
    "create_video_features",
    "load_checkpoint",
    "pool_tokens",
]
