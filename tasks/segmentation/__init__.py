"""Semantic segmentation: FASeg, Mask2Former, Semantic FPN and segmentors of mmsegmentation."""
