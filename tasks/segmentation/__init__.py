"""Semantic segmentation: FASeg, Mask2Former and Semantic FPN."""
