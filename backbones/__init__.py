"""Backbones: pixels in, a feature pyramid out."""

from backbones import ecoformer_networks, hvt, lit, lit_ti, litv2, spvit  # noqa: F401  (registers networks with timm)
from backbones.checkpoint import CheckpointError, LoadReport, load_checkpoint
from backbones.features import create, create_features
from backbones.token_pooling import pool_tokens

__all__ = ["CheckpointError", "LoadReport", "create", "create_features", "load_checkpoint", "pool_tokens"]
