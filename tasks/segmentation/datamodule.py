"""What the datamodules of segmentation share: options, data sets, batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tasks.core.data import DataError, list_samples, seed_augmentation
from tasks.core.images import read_image, resized_size
from tasks.core.splits import Listing, SplitDataModule
from tasks.segmentation.check import check_dataset, print_result
from tasks.segmentation.reading import LabelTable, Sample, pair_files, read_pair, samples_to_predict
from tasks.segmentation.transforms import SSDColorJitter, resize_image, train_transforms

ADE20K_SHORT_SIDES = tuple(512 * tenths // 10 for tenths in range(5, 21))  # 256, 307, 358, 409, … 1024
Palette = Sequence[tuple[int, int, int]]


class TrainDataset(Dataset[dict[str, Any]]):
    """Augmented training samples, indexed by virtual indices `index + epoch * len` (see `tasks.core.data`)."""

    def __init__(self, samples: Sequence[Sample], labels: LabelTable, transform: A.Compose, seed: int) -> None:
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
        return {"image": _image_tensor(result["image"]), "mask": _mask_tensor(result["mask"]), "id": sample.id}


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
            item["mask"] = _mask_tensor(mask)
        height, width = image.shape[:2]
        size = resized_size(height, width, self.short_side, self.max_long_side)
        return item | {"image": _image_tensor(resize_image(image, *size)), "size": (height, width)}


def stack_samples(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate training samples: image (B, 3, H, W), mask (B, H, W), both uint8, and a list of ids."""
    return {
        "image": torch.stack([sample["image"] for sample in samples]),
        "mask": torch.stack([sample["mask"] for sample in samples]),
        "id": [sample["id"] for sample in samples],
    }


def _image_tensor(image: np.ndarray) -> Tensor:
    # (H, W, 3) -> (3, H, W); copied, because arrays that view PIL's memory are read-only
    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def _mask_tensor(mask: np.ndarray) -> Tensor:
    return torch.from_numpy(mask.copy())


class SegmentationDataModule(SplitDataModule[list[Sample]]):
    """Base of the datamodules for segmentation. The defaults are the recipe of Mask2Former and FASeg for ADE20K.

    In training, the shorter image side is resized to one of `train_short_sides` (the longer at most to
    `max_long_side`), then a window of `crop_size` (height, width) is cut; `flip` mirrors half of the images,
    `color_jitter` is that of SSD. `test_short_side` and `test_max_long_side` are the sizes for evaluation.
    `images` names what `predict` reads: a folder, a file or a glob pattern; without it, the validation images.
    """

    sample_command = "python -m tasks.segmentation fit -c configs/sample/faseg.yaml"
    train_collate = staticmethod(stack_samples)
    eval_collate = staticmethod(list_samples)

    def __init__(
        self,
        root: str,
        images: str | None = None,
        batch_size: int = 2,
        eval_batch_size: int = 1,
        num_workers: int = 4,
        seed: int = 0,
        pin_memory: bool = True,
        train_short_sides: Sequence[int] = ADE20K_SHORT_SIDES,
        max_long_side: int = 2048,
        crop_size: tuple[int, int] = (512, 512),
        test_short_side: int = 512,
        test_max_long_side: int = 2048,
        flip: bool = True,
        color_jitter: bool = True,
    ) -> None:
        super().__init__(root, batch_size, eval_batch_size, num_workers, seed, pin_memory)
        sizes = {
            "train_short_sides": min(train_short_sides, default=0),
            "max_long_side": max_long_side,
            "crop_size": min(crop_size),
            "test_short_side": test_short_side,
            "test_max_long_side": test_max_long_side,
        }
        for name, size in sizes.items():
            if size < 1:
                raise DataError(f"{name} is {getattr(self, name, size)}; expected sizes of at least 1 pixel")
        self.images = images
        self.train_short_sides = train_short_sides
        self.max_long_side = max_long_side
        self.crop_size = crop_size
        self.test_short_side = test_short_side
        self.test_max_long_side = test_max_long_side
        self.flip = flip
        self.color_jitter = color_jitter

    @property
    def class_names(self) -> list[str]:
        """Names of the K classes, by train id."""
        raise NotImplementedError

    @property
    def palette(self) -> Palette:
        """RGB colours of the K classes, by train id."""
        raise NotImplementedError

    @property
    def labels(self) -> LabelTable:
        """How the values of annotations become train ids."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.class_names)

    def to_official(self, label_map: np.ndarray) -> np.ndarray:
        """Map (H, W) train ids to the uint8 values that the data set's own annotations and evaluation use."""
        return label_map.astype(np.uint8)

    def prediction_name(self, id: str) -> str:
        """Return the file, possibly below folders, in which the prediction for a sample is written."""
        return f"{id}.png"

    def color_transforms(self) -> list[A.BasicTransform]:
        """Return the training transforms that change colours only."""
        return [SSDColorJitter()] if self.color_jitter else []

    def train_dataset(self) -> TrainDataset:
        """Return the augmented training split."""
        transform = train_transforms(
            self.train_short_sides, self.max_long_side, self.crop_size, self.flip, self.color_transforms()
        )
        return TrainDataset(self.samples("train"), self.labels, transform, self.seed)

    def val_dataset(self) -> EvaluationDataset:
        """Return the validation split."""
        return self._evaluation_dataset(self.samples("val"), self.labels)

    def test_dataset(self) -> EvaluationDataset:
        """Return the annotated test split, or the validation split of data sets that publish no test annotations."""
        return self._evaluation_dataset(self.samples(self.splits[-1]), self.labels)

    def predict_dataset(self) -> EvaluationDataset:
        """Return the images named by `images`, or the validation images, without label maps."""
        samples = self.samples("val") if self.images is None else samples_to_predict(self.images)
        return self._evaluation_dataset(samples, None)

    def check(self) -> bool:
        """Read the whole data set, print what is in it and everything that is wrong; True if nothing is."""
        result = check_dataset(self)
        print_result(result)
        return not result.problems

    def _evaluation_dataset(self, samples: Sequence[Sample], labels: LabelTable | None) -> EvaluationDataset:
        return EvaluationDataset(samples, labels, self.test_short_side, self.test_max_long_side)

    def _pairs(self, images: Path, masks: Path, image_end: str = "", mask_end: str = ".png") -> Listing[list[Sample]]:
        for folder in (images, masks):
            if not folder.is_dir():
                return Listing([], [self.missing(f"{folder}: folder not found.")])
        listing = pair_files(images, masks, image_end, mask_end)
        if not listing.samples and not listing.problems:
            listing.problems.append(self.missing(f"{images}: contains no images."))
        return listing
