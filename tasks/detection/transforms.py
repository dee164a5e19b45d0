"""The augmentation recipes of mmdet and DETR, as albumentations transforms of images and their `Instances`.

Images are RGB uint8 (H, W, 3). albumentations' own boxes are relative to the image and of single precision; under the
key `instances` these transforms keep pixels and double precision, and boxes, labels and masks together.
"""

from collections.abc import Callable, Sequence
from typing import Any

import albumentations as A
import cv2
import numpy as np

from tasks.core.images import resized_size
from tasks.detection.instances import Instances

DETR_SHORT_SIDES = (400, 500, 600)  # before DETR's crop (arXiv 2005.12872, A.4)
DETR_CROP = (384, 600)  # least and largest side of the window
NO_LIMIT = 2**31 - 1


class InstanceTransform(A.DualTransform):
    """A transform of the targets `image` and `instances`."""

    def __init__(self, p: float = 1.0) -> None:
        super().__init__(p=p)

    @property
    def targets(self) -> dict[str, Callable[..., Any]]:
        """Add `instances` to the targets of albumentations."""
        return super().targets | {"instances": self.apply_to_instances}

    def apply_to_instances(self, instances: Instances, *args: Any, **params: Any) -> Instances:
        """Follow the pixels."""
        raise NotImplementedError


class Resize(InstanceTransform):
    """Resize the shorter side to one of `short_sides`, drawn uniformly; the longer at most `max_long_side` pixels."""

    def __init__(self, short_sides: Sequence[int], max_long_side: int) -> None:
        super().__init__()
        self.short_sides = list(short_sides)
        self.max_long_side = max_long_side

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the short side."""
        height, width = params["shape"][:2]
        return {"size": resized_size(height, width, self.py_random.choice(self.short_sides), self.max_long_side)}

    def apply(self, img: np.ndarray, size: tuple[int, int], **params: Any) -> np.ndarray:
        """Resize the image."""
        return resize_image(img, *size)

    def apply_to_instances(self, instances: Instances, size: tuple[int, int], **params: Any) -> Instances:
        """Follow the pixels."""
        return instances.resized(params["shape"][:2], size)


class JitterScale(Resize):
    """Large-scale jitter (arXiv 2012.07177): fit the image in a square of `size` times U(least, most) pixels."""

    def __init__(self, size: int, scales: tuple[float, float]) -> None:
        super().__init__([size], size)
        self.size = size
        self.scales = scales

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the side of the square."""
        height, width = params["shape"][:2]
        side = max(int(self.size * self.py_random.uniform(*self.scales)), 1)
        return {"size": resized_size(height, width, side, side)}


class Mirror(InstanceTransform):
    """Mirror from left to right with probability `p`."""

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        """Mirror the image."""
        return img[:, ::-1]

    def apply_to_instances(self, instances: Instances, **params: Any) -> Instances:
        """Follow the pixels."""
        return instances.mirrored(params["shape"][1])


class Crop(InstanceTransform):
    """Cut a window at a uniform position, its sides uniform in `least`..`most` but at most those of the image."""

    def __init__(self, least: int, most: int) -> None:
        super().__init__()
        self.least = least
        self.most = most

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw size and position."""
        draw = self.py_random.randint
        (height, width), least, most = params["shape"][:2], self.least, self.most
        window_height = draw(min(height, least), min(height, most))
        window_width = draw(min(width, least), min(width, most))
        top, left = draw(0, height - window_height), draw(0, width - window_width)
        return {"window": (top, left, window_height, window_width)}

    def apply(self, img: np.ndarray, window: tuple[int, int, int, int], **params: Any) -> np.ndarray:
        """Crop the image."""
        top, left, height, width = window
        return img[top : top + height, left : left + width]

    def apply_to_instances(self, instances: Instances, window: tuple[int, int, int, int], **params: Any) -> Instances:
        """Follow the pixels."""
        return instances.cropped(*window)


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize with OpenCV's bilinear filter, as mmdet does."""
    if image.shape[:2] == (height, width):
        return image
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def train_transforms(
    short_sides: Sequence[int], max_long_side: int, flip: bool, crop: bool, jitter: tuple[float, float] | None
) -> A.Compose:
    """Compose a recipe: resize (mmdet), or half of the time resize, crop and resize (DETR), or jitter the scale; flip.

    With `jitter`, (least, most) scale, the image is fitted in a square of `max_long_side` times that scale, and what
    exceeds the square is cut at a uniform position.
    """
    resize = Resize(short_sides, max_long_side)
    geometry: list[Any] = [resize]
    if jitter is not None:
        geometry = [JitterScale(max_long_side, jitter), Crop(max_long_side, max_long_side)]
    elif crop:
        cropped = A.Sequential(
            [Resize(DETR_SHORT_SIDES, NO_LIMIT), Crop(*DETR_CROP), Resize(short_sides, max_long_side)], p=1.0
        )
        geometry = [A.OneOf([A.Sequential([resize], p=1.0), cropped], p=1.0)]
    return A.Compose([*geometry, *([Mirror(p=0.5)] if flip else [])])
