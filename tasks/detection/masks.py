"""Polygons and run-length encodings of COCO, as masks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as rle_api


def rasterize(segmentations: Sequence[Any], height: int, width: int) -> np.ndarray:
    """Fill polygons or decode run lengths into masks (n, height, width) uint8 of 0 and 1, as pycocotools does."""
    masks = np.zeros((len(segmentations), height, width), dtype=np.uint8)
    for mask, segmentation in zip(masks, segmentations, strict=True):
        mask[:] = rle_api.decode(to_rle(segmentation, height, width))
    return masks


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """The compressed run-length encoding of polygons or of another encoding."""
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            return rle_api.frPyObjects(segmentation, height, width)
        return segmentation
    return rle_api.merge(rle_api.frPyObjects(segmentation, height, width))
