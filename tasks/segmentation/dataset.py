"""Reading images and label maps, and the map-style data sets made of them."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from tasks.core.data import DataError, seed_augmentation
from tasks.segmentation.transforms import IGNORE, resize_image, resized_size

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
INVALID = -1


@dataclass(frozen=True)
class Sample:
    """One image, its label map (None when predicting) and its unique name: the path below the split, no suffix."""

    image: Path
    mask: Path | None
    id: str


class Transform(Protocol):
    """An albumentations composition."""

    def __call__(self, *, image: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
        """Transform both."""

    def set_random_state(self, random_generator: np.random.Generator, py_random: random.Random) -> None:
        """Use these generators from now on."""


@dataclass(frozen=True)
class LabelTable:
    """How values of an annotation become train ids.

    `table` (256,) int16 maps a value to 0..K-1, to 255 (ignored) or to -1 (not allowed); `expected` says in words which
    values are allowed.
    """

    table: np.ndarray
    expected: str

    @classmethod
    def from_pairs(cls, pairs: dict[int, int], expected: str) -> "LabelTable":
        """Allow the keys of `pairs` only."""
        table = np.full(256, INVALID, dtype=np.int16)
        table[list(pairs)] = list(pairs.values())
        return cls(table, expected)

    def to_train_ids(self, values: np.ndarray, path: Path) -> np.ndarray:
        """Map (H, W) uint8 values; raises `DataError` naming the file and the first value that is not allowed."""
        counts = np.bincount(values.ravel(), minlength=256)
        wrong = np.flatnonzero((counts > 0) & (self.table == INVALID))
        if len(wrong):
            pixels = int(counts[wrong].sum())
            found = ", ".join(str(value) for value in wrong[:5]) + (", ..." if len(wrong) > 5 else "")
            raise DataError(f"{path}: label {found} in {pixels} pixels; expected {self.expected}")
        return self.table.astype(np.uint8)[values]


def read_image(path: Path) -> np.ndarray:
    """Read an 8-bit image of any colour mode as RGB uint8 (H, W, 3), turned upright as its EXIF data says."""
    with _opened(path) as image:
        if image.mode.startswith(("I", "F")):
            raise DataError(f"{path}: {image.mode} pixels (16 or 32 bits); expected an 8-bit image")
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def read_label_values(path: Path) -> np.ndarray:
    """Read a single-channel annotation as uint8 (H, W): grey values, or the indices of a palette image."""
    with _opened(path) as image:
        if image.mode not in ("L", "P", "1"):
            raise DataError(
                f"{path}: a label map with {image.mode} pixels; expected one 8-bit channel that holds class numbers"
                " (grey or palette PNG), not colours"
            )
        return np.asarray(image, dtype=np.uint8)


class _opened:
    """Open and decode an image file; anything unreadable becomes one `DataError` naming the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Image.Image:
        try:
            self.image = Image.open(self.path)
            self.image.load()
        except FileNotFoundError as error:
            raise DataError(f"{self.path}: file not found") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{self.path}: cannot be read as an image ({error})") from error
        return self.image

    def __exit__(self, *exception: object) -> None:
        self.image.close()


def read_pair(sample: Sample, labels: LabelTable) -> tuple[np.ndarray, np.ndarray]:
    """Read image (H, W, 3) and train ids (H, W), both uint8; raises `DataError` if their sizes differ."""
    assert sample.mask is not None
    image = read_image(sample.image)
    mask = labels.to_train_ids(read_label_values(sample.mask), sample.mask)
    if image.shape[:2] != mask.shape:
        (height, width), (mask_height, mask_width) = image.shape[:2], mask.shape
        raise DataError(
            f"{sample.mask}: label map of {mask_width} x {mask_height} pixels; expected {width} x {height},"
            f" the size of {sample.image}"
        )
    return image, mask


class TrainDataset(Dataset[dict[str, Any]]):
    """Augmented training samples, indexed by virtual indices `index + epoch * len` (see `tasks.core.data`)."""

    def __init__(self, samples: Sequence[Sample], labels: LabelTable, transform: Transform, seed: int) -> None:
        self.samples = samples
        self.labels = labels
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, virtual: int) -> dict[str, Any]:
        epoch, index = divmod(virtual, len(self))
        sample = self.samples[index]
        image, mask = read_pair(sample, self.labels)
        seed_augmentation(self.transform, self.seed, epoch, index)
        result = self.transform(image=image, mask=mask)
        return {"image": _channels_first(result["image"]), "mask": _tensor(result["mask"]), "id": sample.id}


class EvaluationDataset(Dataset[dict[str, Any]]):
    """Images at test size with their label maps at original size; without label maps when `labels` is None."""

    def __init__(
        self, samples: Sequence[Sample], labels: LabelTable | None, short_side: int, max_long_side: int
    ) -> None:
        self.samples = samples
        self.labels = labels
        self.short_side = short_side
        self.max_long_side = max_long_side

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        item: dict[str, Any] = {"id": sample.id}
        if self.labels is None:
            image = read_image(sample.image)
        else:
            image, mask = read_pair(sample, self.labels)
            item["mask"] = _tensor(mask)
        height, width = image.shape[:2]
        size = resized_size(height, width, self.short_side, self.max_long_side)
        return item | {"image": _channels_first(resize_image(image, *size)), "size": (height, width)}


def stack_samples(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate training samples: image (B, 3, H, W), mask (B, H, W), both uint8, and a list of ids."""
    return {
        "image": torch.stack([sample["image"] for sample in samples]),
        "mask": torch.stack([sample["mask"] for sample in samples]),
        "id": [sample["id"] for sample in samples],
    }


def list_samples(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate samples of different sizes: every value becomes a list."""
    return {name: [sample[name] for sample in samples] for name in samples[0]}


def _channels_first(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _tensor(mask: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(mask, dtype=np.uint8))


def identity_labels(num_classes: int) -> LabelTable:
    """Labels that are train ids already: 0..K-1, and 255 for pixels to ignore."""
    pairs = {value: value for value in (*range(num_classes), IGNORE)}
    return LabelTable.from_pairs(pairs, f"0 to {num_classes - 1}, or 255 for pixels to ignore")


Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]
