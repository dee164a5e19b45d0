"""The augmentation recipe of Mask2Former and FASeg for semantic segmentation, as albumentations transforms.

Images are RGB uint8 (H, W, 3), masks uint8 (H, W) with train ids and 255 for pixels to ignore.
"""

from collections.abc import Sequence
from typing import Any

import albumentations as A
import cv2
import numpy as np
from PIL import Image

from tasks.core.images import resized_size
from tasks.segmentation.labels import IGNORE

PAD_VALUE = 128


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize with PIL's antialiased bilinear filter, in uint8."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize to the nearest neighbour `floor(i * in / out)`, as torch's `interpolate(mode="nearest")`."""
    if mask.shape[:2] == (height, width):
        return mask
    rows, columns = (_nearest(before, after) for before, after in zip(mask.shape, (height, width), strict=True))
    return mask[rows][:, columns]


def _nearest(before: int, after: int) -> np.ndarray:
    # The product in double, then its floor in single precision: what torch computes for the double label maps of the
    # published training code. It decides ties, e.g. index 109 of 218 from 4 is 2 and not 1.
    index = (np.arange(after) * (before / after)).astype(np.float32)
    return np.minimum(index.astype(np.int64), before - 1)


class ResizeShortestEdge(A.DualTransform):
    """Resize the shorter side to one of `short_sides`, drawn uniformly; the longer at most `max_long_side` pixels."""

    def __init__(self, short_sides: Sequence[int], max_long_side: int) -> None:
        super().__init__(p=1.0)
        self.short_sides = list(short_sides)
        self.max_long_side = max_long_side

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the short side."""
        height, width = params["shape"][:2]
        size = resized_size(height, width, self.py_random.choice(self.short_sides), self.max_long_side)
        return {"size": size}

    def apply(self, img: np.ndarray, size: tuple[int, int], **params: Any) -> np.ndarray:
        """Resize the image."""
        return resize_image(img, *size)

    def apply_to_mask(self, mask: np.ndarray, size: tuple[int, int], **params: Any) -> np.ndarray:
        """Resize the label map."""
        return resize_mask(mask, *size)


class RandomCropUpTo(A.DualTransform):
    """Crop a window of at most `height` x `width` at a uniformly drawn position; a smaller side is left whole."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__(p=1.0)
        self.height = height
        self.width = width

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the position."""
        height, width = params["shape"][:2]
        top = self.py_random.randint(0, max(height - self.height, 0))
        left = self.py_random.randint(0, max(width - self.width, 0))
        return {"window": (slice(top, top + self.height), slice(left, left + self.width))}

    def apply(self, img: np.ndarray, window: tuple[slice, slice], **params: Any) -> np.ndarray:
        """Crop the image."""
        return img[window]

    def apply_to_mask(self, mask: np.ndarray, window: tuple[slice, slice], **params: Any) -> np.ndarray:
        """Crop the label map."""
        return mask[window]


class SSDColorJitter(A.ImageOnlyTransform):
    """Colour jitter of SSD (arXiv 1512.02325): each operation with probability 1/2, rounded to uint8 after each.

    Brightness +U(-32, 32); then contrast xU(0.5, 1.5), saturation xU(0.5, 1.5) and hue + [-18, 18] (OpenCV's HSV,
    hue modulo 180), where contrast comes first or last with probability 1/2.
    """

    def __init__(self) -> None:
        super().__init__(p=1.0)

    def get_params(self) -> dict[str, Any]:
        """Draw which operations to apply, their strength and their order."""
        draw = self.py_random
        brightness = (1.0, draw.uniform(-32, 32)) if draw.random() < 0.5 else None
        contrast = (draw.uniform(0.5, 1.5), 0.0) if draw.random() < 0.5 else None
        saturation = draw.uniform(0.5, 1.5) if draw.random() < 0.5 else None
        hue = draw.randint(-18, 18) if draw.random() < 0.5 else None
        return {
            "brightness": brightness,
            "contrast": contrast,
            "contrast_first": draw.random() < 0.5,
            "saturation": saturation,
            "hue": hue,
        }

    def apply(
        self,
        img: np.ndarray,
        brightness: tuple[float, float] | None,
        contrast: tuple[float, float] | None,
        contrast_first: bool,
        saturation: float | None,
        hue: int | None,
        **params: Any,
    ) -> np.ndarray:
        """Apply the drawn operations."""
        if brightness is not None:
            img = _scale_and_shift(img, *brightness)
        if contrast is not None and contrast_first:
            img = _scale_and_shift(img, *contrast)
        if saturation is not None:
            hsv = cv2.cvtColor(img, cv2.COLOR_RGB2HSV)
            hsv[..., 1] = _scale_and_shift(hsv[..., 1], saturation, 0.0)
            img = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        if hue is not None:
            hsv = cv2.cvtColor(img, cv2.COLOR_RGB2HSV)
            hsv[..., 0] = cv2.LUT(hsv[..., 0], ((np.arange(256) + hue) % 180).astype(np.uint8))
            img = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        if contrast is not None and not contrast_first:
            img = _scale_and_shift(img, *contrast)
        return img


def _scale_and_shift(image: np.ndarray, scale: float, shift: float) -> np.ndarray:
    table = np.clip(np.arange(256, dtype=np.float32) * scale + shift, 0, 255).astype(np.uint8)
    return cv2.LUT(image, table)


def train_transforms(
    short_sides: Sequence[int],
    max_long_side: int,
    crop_size: tuple[int, int],
    flip: bool,
    color: Sequence[A.BasicTransform],
) -> A.Compose:
    """Compose the training recipe: resize, crop, `color` transforms, flip, pad right and bottom with 128 and ignore."""
    height, width = crop_size
    return A.Compose(
        [
            ResizeShortestEdge(short_sides, max_long_side),
            RandomCropUpTo(height, width),
            *color,
            *([A.HorizontalFlip(p=0.5)] if flip else []),
            A.PadIfNeeded(
                min_height=height,
                min_width=width,
                position="top_left",
                border_mode=cv2.BORDER_CONSTANT,
                fill=PAD_VALUE,
                fill_mask=IGNORE,
            ),
        ]
    )
