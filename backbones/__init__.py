"""Backbones: pixels in, a feature pyramid out."""

from backbones.features import create, create_features

__all__ = ["create", "create_features"]
