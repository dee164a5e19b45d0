"""What every detector is to this task, whatever library its layers come from: losses in training, records of images."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from pycocotools import mask as rle
from torch import Tensor, nn


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
