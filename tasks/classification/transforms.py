"""Augmentation and evaluation transforms: timm's, or a list of albumentations; a PIL image becomes a normalised tensor.

What an augmentation draws depends on (seed, epoch, index) only.
"""

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import albumentations as A
import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import functional as TF

from tasks.core.data import seed_augmentation, seeded_generators
from tasks.core.errors import UserError, expect

Interpolation = Literal["bilinear", "bicubic"]


class TrainTransform(Protocol):
    """Augments one RGB image; the result (3, S, S) float32 is determined by (seed, epoch, index)."""

    def __call__(self, image: Image.Image, seed: int, epoch: int, index: int) -> Tensor:
        """Augment one image."""


class TimmTransform:
    """timm's augmentation for ImageNet.

    Random resized crop of `crop_scale` of the area, mirror image with probability `hflip`, the `auto_augment` policy
    (RandAugment, arXiv 1909.13719, of 9 of 10 strengths with noise .5 and rising ("increasing") strengths is
    ``rand-m9-mstd0.5-inc1``) or, without one, `color_jitter`; then one rectangle is filled with noise with probability
    `random_erasing` (arXiv 1708.04896).
    """

    def __init__(
        self,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: Interpolation,
        crop_scale: tuple[float, float],
        hflip: float,
        auto_augment: str | None,
        color_jitter: float,
        random_erasing: float,
    ) -> None:
        expect("crop_scale", crop_scale, 0 < crop_scale[0] <= crop_scale[1] <= 1, "two shares of the area, rising")
        for name, value in (("hflip", hflip), ("random_erasing", random_erasing)):
            expect(name, value, 0 <= value <= 1, "a probability")
        expect("color_jitter", color_jitter, 0 <= color_jitter <= 1, "a strength of 0 to 1")
        try:
            self.transform = create_transform(
                image_size,
                is_training=True,
                scale=crop_scale,
                hflip=hflip,
                color_jitter=color_jitter,
                auto_augment=auto_augment,
                interpolation=interpolation,
                mean=tuple(mean),
                std=tuple(std),
                re_prob=random_erasing,
                re_mode="pixel",
            )
        except (AssertionError, KeyError, ValueError) as error:
            policies = "a policy of timm such as 'rand-m9-mstd0.5-inc1'"
            raise UserError(f"auto_augment: {auto_augment!r} was given, {policies} was expected") from error
        for policy in self.transform.transforms:
            for operation in getattr(policy, "ops", None) or itertools.chain(*getattr(policy, "policy", ())):
                if operation.name.startswith("Posterize"):
                    operation.aug_fn = _posterize

    def __call__(self, image: Image.Image, seed: int, epoch: int, index: int) -> Tensor:
        """Augment one image."""
        with seeded_generators(seed, epoch, index):  # timm and torchvision draw from the global ones
            return self.transform(image)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep some of 8 bits. The strongest Posterize of timm keeps none, which newer releases of Pillow refuse."""
    if bits < 1:
        return Image.new("RGB", image.size)  # black, as before
    return image if bits >= 8 else ImageOps.posterize(image, bits)


class AlbumentationsTransform:
    """Transforms of albumentations by name with their arguments; then the image is resized to the square."""

    def __init__(
        self,
        transforms: Sequence[Mapping[str, Mapping[str, Any]]],
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: Interpolation,
    ) -> None:
        self.compose = A.Compose([_albumentation(transform) for transform in transforms])
        self.size = (image_size, image_size)
        self.resample = Image.Resampling[interpolation.upper()]
        levels = TF.normalize((torch.arange(256) / 255).expand(3, 1, 256), list(mean), list(std))
        self.normalised = levels.permute(1, 2, 0).numpy()  # (1, 256, 3): for each value and channel

    def __call__(self, image: Image.Image, seed: int, epoch: int, index: int) -> Tensor:
        """Augment one image."""
        seed_augmentation(self.compose, seed, epoch, index)
        augmented = self.compose(image=np.asarray(image))["image"]
        if augmented.shape[:2] != self.size:
            augmented = np.asarray(Image.fromarray(augmented).resize(self.size, self.resample))
        # One look-up per value; torch's operations would take most of the time of a small image.
        return torch.from_numpy(cv2.LUT(augmented, self.normalised).transpose(2, 0, 1).copy())


def _albumentation(transform: Mapping[str, Mapping[str, Any]]) -> A.BasicTransform:
    """Make one transform; raises UserError for an unknown name or argument."""
    if len(transform) != 1:
        raise UserError(f"augmentation: {dict(transform)!r} was given, one name with its arguments was expected")
    ((name, arguments),) = transform.items()
    cls: Any = getattr(A, name, None)
    known = isinstance(cls, type) and issubclass(cls, A.ImageOnlyTransform | A.DualTransform)
    expect("augmentation", name, known, "an image transform of albumentations such as Affine")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # albumentations only warns about an argument it does not know
            return cls(**(arguments or {}))
    except (TypeError, ValueError, Warning) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"augmentation.{name}: {dict(arguments)!r} was given; {reason}") from error


def evaluation_transform(
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: Interpolation,
    crop_pct: float | None,
) -> Callable[[Image.Image], Tensor]:
    """Resize the shorter side to ``image_size / crop_pct`` and cut out the centre, antialiased by PIL, and normalise.

    Without `crop_pct` the whole image is resized to the square, whatever its shape.
    """
    expect("crop_pct", crop_pct, crop_pct is None or 0 < crop_pct <= 1, "a share of the side, at most 1, or null")
    return create_transform(
        image_size,
        crop_pct=crop_pct or 1.0,
        crop_mode="center" if crop_pct else "squash",
        interpolation=interpolation,
        mean=tuple(mean),
        std=tuple(std),
    )
