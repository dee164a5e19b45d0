"""Backbones: pixels in, a feature pyramid out."""
