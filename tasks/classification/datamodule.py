"""What the datamodules of classification share: options, data sets, batches."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset

from tasks.classification.check import check_dataset, print_result
from tasks.classification.reading import ImageFiles, LabelledImages
from tasks.classification.transforms import (
    AlbumentationsTransform,
    Interpolation,
    TimmTransform,
    TrainTransform,
    evaluation_transform,
)
from tasks.core.data import DataError
from tasks.core.images import find_images
from tasks.core.splits import SplitDataModule

Augmentation = Literal["timm"] | list[dict[str, dict[str, Any]]]


class TrainDataset(Dataset[dict[str, Any]]):
    """Augmented training samples, indexed by virtual indices `index + epoch * len` (see `tasks.core.data`)."""

    def __init__(self, samples: LabelledImages, transform: TrainTransform, seed: int) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, virtual: int) -> dict[str, Any]:
        epoch, index = divmod(virtual, len(self))
        image = self.transform(self.samples.image(index), self.seed, epoch, index)
        assert self.samples.labels is not None
        return {"image": image, "label": int(self.samples.labels[index]), "id": self.samples.id(index)}


class EvaluationDataset(Dataset[dict[str, Any]]):
    """Images at test size, with their labels where there are any."""

    def __init__(self, samples: LabelledImages, transform: Callable[[Image.Image], Tensor]) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {"image": self.transform(self.samples.image(index)), "id": self.samples.id(index)}
        if self.samples.labels is not None:
            item["label"] = int(self.samples.labels[index])
        return item


def stack_samples(samples: list[dict[str, Any]], image_size: int) -> dict[str, Any]:
    """Collate any number B of samples: image (B, 3, S, S) float32, label (B,) int64 and a list of ids.

    Samples without labels give a batch without; a batch of no samples has one.
    """
    images = [sample["image"] for sample in samples]
    batch = {
        "image": torch.stack(images) if images else torch.zeros(0, 3, image_size, image_size),
        "id": [sample["id"] for sample in samples],
    }
    if all("label" in sample for sample in samples):
        batch["label"] = torch.tensor([sample["label"] for sample in samples], dtype=torch.int64)
    return batch


class ClassificationDataModule(SplitDataModule[LabelledImages]):
    """Base of the datamodules for classification. The defaults are the recipe of DeiT for ImageNet.

    Images become squares of `image_size` pixels, normalised with `mean` and `std` (of values in 0..1).

    In training, `augmentation` is ``timm`` or a list of transforms of albumentations, by name with their arguments,
    e.g. ``[{HorizontalFlip: {p: 0.5}}, {Affine: {rotate: [-10, 10]}}]``, whose result is resized to the square.
    timm's is a random resized crop of `crop_scale` of the area, a mirror image with probability `hflip`, then
    `auto_augment` or, if that is null, `color_jitter`, and a rectangle of noise with probability `random_erasing`;
    a list replaces all of it. `repeats` augmentations of each image come in a row (arXiv 1901.09335); an epoch keeps
    its length and then sees a part of the images.

    In evaluation, the shorter side is resized to ``image_size / crop_pct`` and the centre cut out; with `crop_pct` null
    the whole image is resized to the square. `interpolation` is that of both. `images` names what `predict` reads: a
    folder, a file or a glob pattern; without it, the validation images.
    """

    sample_command = "python -m tasks.classification fit -c configs/sample/litv2.yaml"

    def __init__(
        self,
        root: str,
        images: str | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 128,
        num_workers: int = 8,
        seed: int = 0,
        pin_memory: bool = True,
        image_size: int = 224,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
        interpolation: Interpolation = "bicubic",
        augmentation: Augmentation = "timm",
        crop_scale: tuple[float, float] = (0.08, 1.0),
        hflip: float = 0.5,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        color_jitter: float = 0.4,
        random_erasing: float = 0.25,
        repeats: int = 1,
        crop_pct: float | None = 0.875,
    ) -> None:
        super().__init__(root, batch_size, eval_batch_size, num_workers, seed, pin_memory, repeats)
        if image_size < 1:
            raise DataError(f"image_size is {image_size}; expected at least 1 pixel")
        if min(std) <= 0:
            raise DataError(f"std is {std}; expected positive numbers")
        self.images = images
        self.image_size = image_size
        self.mean = mean
        self.std = std
        self._train_transform: TrainTransform
        if augmentation == "timm":
            self._train_transform = TimmTransform(
                image_size, mean, std, interpolation, crop_scale, hflip, auto_augment, color_jitter, random_erasing
            )
        else:
            self._train_transform = AlbumentationsTransform(augmentation, image_size, mean, std, interpolation)
        self._evaluation_transform = evaluation_transform(image_size, mean, std, interpolation, crop_pct)
        self.train_collate = self.eval_collate = partial(stack_samples, image_size=image_size)

    @property
    def class_names(self) -> list[str]:
        """Names of the K classes, by label."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.class_names)

    def train_dataset(self) -> TrainDataset:
        """Return the augmented training split."""
        return TrainDataset(self.samples("train"), self._train_transform, self.seed)

    def val_dataset(self) -> EvaluationDataset:
        """Return the validation split."""
        return EvaluationDataset(self.samples("val"), self._evaluation_transform)

    def test_dataset(self) -> EvaluationDataset:
        """Return the labelled test split, or the validation split of data sets that publish no test labels."""
        return EvaluationDataset(self.samples(self.splits[-1]), self._evaluation_transform)

    def predict_dataset(self) -> EvaluationDataset:
        """Return the images named by `images`, without labels, or the validation images."""
        if self.images is None:
            return EvaluationDataset(replace(self.samples("val"), labels=None), self._evaluation_transform)
        folder, paths = find_images(self.images)
        names = [path.relative_to(folder).as_posix() for path in paths]
        return EvaluationDataset(ImageFiles.of(folder, names), self._evaluation_transform)

    def check(self) -> bool:
        """Read the whole data set, print what is in it and everything that is wrong; True if nothing is."""
        self.prepare_data()
        result = check_dataset(self)
        print_result(result)
        return not result.problems
