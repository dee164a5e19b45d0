"""What every detector is to this task, whatever library its layers come from: losses in training, records of images."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as rle
from torch import Tensor, nn

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
SIZE_DIVISOR = 32


class Target(TypedDict, total=False):
    """The objects of one image: boxes (n, 4) xyxy in its pixels, train ids (n,) and, for masks, uint8 (n, h, w)."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor


class Record(TypedDict):
    """What was found in one image, best first, in pixels of the original image.

    Boxes (n, 4) xyxy, float32, scores (n,), float32, and train ids (n,), int64; a COCO run-length encoding per object,
    or None from a detector of boxes alone.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[dict[str, Any]] | None


class DetectionNetwork(nn.Module, abc.ABC):
    """A detector as `detector`, whose parts keep the names of the library it comes from, behind one interface.

    Images are uint8 or float, RGB of 0..255, and keep their size: they are normalised and padded here.
    """

    detector: nn.Module
    with_masks: bool

    @abc.abstractmethod
    def losses(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Terms of the loss, by name, of images (3, h, w); every parameter takes part in their sum."""

    @abc.abstractmethod
    def predict(self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Record]:
        """What is in images (3, h, w) whose original sizes are (H, W)."""

    def forward(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> Any:
        """`losses` with targets, else `predict` at the images' own sizes; what hooks on the network see."""
        if targets is not None:
            return self.losses(images, targets)
        return self.predict(images, [(image.shape[-2], image.shape[-1]) for image in images])


class NormalizeAndPad(nn.Module):
    """Normalise RGB images of 0..255 and pad them right and bottom to one size, with zeros: pixels of the mean colour.

    Args:
        mean: Subtracted from R, G and B.
        std: What they are divided by then.
        size_divisor: Sides grow to multiples of it.
        bgr: Whether the network wants the channels in the order of OpenCV; `mean` and `std` are in the network's order.
        pad_value: Value of padding, after normalisation.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        size_divisor: int = SIZE_DIVISOR,
        bgr: bool = False,
        pad_value: float = 0.0,
    ) -> None:
        super().__init__()
        # Constants of the method, not weights: released checkpoints do not hold them.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.size_divisor = size_divisor
        self.bgr = bgr
        self.pad_value = pad_value

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """Batch (B, 3, H, W) of images (3, h, w), of which there is at least one."""
        height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
        height, width = height + -height % self.size_divisor, width + -width % self.size_divisor
        return torch.stack([self._one(image, height, width) for image in images])

    def _one(self, image: Tensor, height: int, width: int) -> Tensor:
        if self.bgr:
            image = image.flip(0)
        image = (image.to(self.mean.dtype) - self.mean) / self.std
        return F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]), value=self.pad_value)


def record(boxes: Tensor, scores: Tensor, labels: Tensor, masks: Tensor | None) -> Record:
    """The record of one image; `masks` are bool (n, H, W)."""
    order = scores.detach().float().argsort(descending=True, stable=True)
    boxes, scores, labels = (part.detach()[order].cpu() for part in (boxes, scores, labels))
    return {
        "boxes": boxes.float().numpy(),
        "scores": scores.float().numpy(),
        "labels": labels.long().numpy(),
        "masks": None if masks is None else [encode_mask(masks[i]) for i in order.tolist()],
    }


def encode_mask(mask: Tensor) -> dict[str, Any]:
    """COCO's run-length encoding, with its size (H, W), of a mask (H, W)."""
    return rle.encode(np.asfortranarray(mask.detach().cpu().numpy().astype(np.uint8)))
