"""Backbones: pixels in, a feature pyramid out."""

from backbones.checkpoint import CheckpointError, LoadReport, load_checkpoint
from backbones.features import create, create_features

__all__ = ["CheckpointError", "LoadReport", "create", "create_features", "load_checkpoint"]
