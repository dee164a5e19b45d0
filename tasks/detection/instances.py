"""The objects of one image, and what moving its pixels does to them."""

from dataclasses import dataclass, replace

import cv2
import numpy as np

MIN_SIDE = 1.0  # pixels


@dataclass(frozen=True)
class Instances:
    """Boxes (n, 4) float64 as x1, y1, x2, y2 in pixels, labels (n,) int64 and masks (n, H, W) uint8, or None.

    Pixel i spans i to i + 1, so an image of width W ends at x = W. `dropped` counts the objects that were cut away.
    """

    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None = None
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def resized(self, before: tuple[int, int], after: tuple[int, int]) -> "Instances":
        """Follow an image of (height, width) `before` to `after`; masks take the nearest pixel."""
        scale = np.array([after[1] / before[1], after[0] / before[0]] * 2)
        masks = None if self.masks is None else _resize_masks(self.masks, after)
        return replace(self, boxes=self.boxes * scale, masks=masks)

    def mirrored(self, width: int) -> "Instances":
        """Follow an image mirrored from left to right: x becomes width - x."""
        boxes = self.boxes.copy()
        boxes[:, [0, 2]] = width - self.boxes[:, [2, 0]]
        return replace(self, boxes=boxes, masks=None if self.masks is None else self.masks[:, :, ::-1])

    def cropped(self, top: int, left: int, height: int, width: int) -> "Instances":
        """Follow a window; objects without a part in it are dropped, those with a mask if no pixel of it remains."""
        masks = None if self.masks is None else self.masks[:, top : top + height, left : left + width]
        cropped = replace(self, boxes=self.boxes - [left, top, left, top], masks=masks).clipped(height, width)
        visible = np.all(cropped.boxes[:, 2:] > cropped.boxes[:, :2], axis=1)
        if masks is not None:
            visible &= np.any(masks, axis=(1, 2))
        return cropped._kept(visible)

    def clipped(self, height: int, width: int) -> "Instances":
        """Cut boxes at the borders of the image."""
        return replace(self, boxes=self.boxes.clip(0, [width, height, width, height]))

    def without_tiny(self) -> "Instances":
        """Drop boxes with a side below one pixel."""
        return self._kept(np.all(self.boxes[:, 2:] - self.boxes[:, :2] >= MIN_SIDE, axis=1))

    def _kept(self, keep: np.ndarray) -> "Instances":
        if keep.all():
            return self
        masks = None if self.masks is None else self.masks[keep]
        dropped = self.dropped + int(np.count_nonzero(~keep))
        return Instances(self.boxes[keep], self.labels[keep], masks, dropped)


def _resize_masks(masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    resized = np.empty((len(masks), *size), dtype=np.uint8)
    for before, after in zip(masks, resized, strict=True):
        cv2.resize(before, size[::-1], dst=after, interpolation=cv2.INTER_NEAREST)
    return resized
