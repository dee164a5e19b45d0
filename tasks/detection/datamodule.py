"""What the datamodules of detection share: options, data sets, batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import torch
from rich.console import Console
from torch.utils.data import Dataset

from tasks.core.data import DataError, list_samples, seed_augmentation
from tasks.core.errors import expect
from tasks.core.images import resized_size
from tasks.core.splits import Listing, SplitDataModule
from tasks.detection.annotations import Categories, Content, category_problems, check_content, read_content
from tasks.detection.check import check_dataset, print_result
from tasks.detection.instances import Instances
from tasks.detection.reading import Sample, make_samples, read_sample, samples_to_predict
from tasks.detection.transforms import resize_image, train_transforms

Palette = Sequence[tuple[int, int, int]]


class TrainDataset(Dataset[dict[str, Any]]):
    """Augmented training samples, indexed by virtual indices `index + epoch * len` (see `tasks.core.data`)."""

    def __init__(self, samples: Sequence[Sample], transform: A.Compose, seed: int, with_masks: bool) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed
        self.with_masks = with_masks

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, virtual: int) -> dict[str, Any]:
        epoch, index = divmod(virtual, len(self))
        sample = self.samples[index]
        image, instances = read_sample(sample, self.with_masks)
        seed_augmentation(self.transform, self.seed, epoch, index)
        result = self.transform(image=image, instances=instances)
        return _item(sample.id, image, result["image"], result["instances"])


class EvaluationDataset(Dataset[dict[str, Any]]):
    """Images at test size; with the objects in them, in its pixels, unless `annotated` is False."""

    def __init__(
        self, samples: Sequence[Sample], short_side: int, max_long_side: int, with_masks: bool, annotated: bool = True
    ) -> None:
        self.samples = samples
        self.short_side = short_side
        self.max_long_side = max_long_side
        self.with_masks = with_masks
        self.annotated = annotated

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        image, instances = read_sample(sample, self.with_masks and self.annotated)
        before = (image.shape[0], image.shape[1])
        after = resized_size(*before, self.short_side, self.max_long_side)
        resized = resize_image(image, *after)
        return _item(sample.id, image, resized, instances.resized(before, after) if self.annotated else None)


def _item(id: str, original: np.ndarray, image: np.ndarray, instances: Instances | None) -> dict[str, Any]:
    """What a batch holds of one sample (see `DetectionDataModule`)."""
    item: dict[str, Any] = {
        "id": id,
        "image": torch.from_numpy(image.transpose(2, 0, 1).copy()),  # copied: PIL's memory is read-only
        "size": (original.shape[0], original.shape[1]),
    }
    if instances is not None:
        instances = instances.without_tiny()
        item["boxes"] = torch.from_numpy(instances.boxes.astype(np.float32))
        item["labels"] = torch.from_numpy(instances.labels.copy())
        item["dropped"] = instances.dropped
        if instances.masks is not None:
            item["masks"] = torch.from_numpy(np.ascontiguousarray(instances.masks))
    return item


class DetectionDataModule(SplitDataModule[list[Sample]]):
    """Base of the datamodules for detection. The defaults are mmdet's 1x recipe for COCO.

    Every batch maps names to lists with one entry per image:

    - `id`: str, the image's id in the annotation file (when predicting, its path without suffix)
    - `image`: uint8 (3, h, w), RGB
    - `size`: (height, width) of the original image
    - `boxes`: float32 (n, 4), xyxy in pixels of the transformed image; `labels`: int64 (n,), train ids 0..K-1;
      `dropped`: int, the objects that the transforms cut away; `masks`: uint8 (n, h, w), only if `with_masks`.
      All absent when predicting

    In training, the shorter image side is resized to one of `train_short_sides`, the longer at most to `max_long_side`;
    with `crop` half of the images are cropped before as DETR does; with `jitter` (least and most scale) the image is
    instead fitted in a square of `max_long_side` times a uniform scale and cropped to `max_long_side` pixels. `flip`
    mirrors half of the images. `filter_empty` leaves out images without annotations. `group_by_aspect_ratio` makes
    batches of wide or of high images. `test_short_side` and `test_max_long_side` are the sizes for evaluation.
    `images` names what `predict` reads: a folder, a file or a glob pattern; without it, the validation images.
    """

    sample_command = "python -m tasks.detection fit -c configs/sample/retinanet_litv2.yaml"
    train_collate = eval_collate = staticmethod(list_samples)

    def __init__(
        self,
        root: str,
        images: str | None = None,
        batch_size: int = 2,
        eval_batch_size: int = 1,
        num_workers: int = 4,
        seed: int = 0,
        pin_memory: bool = True,
        with_masks: bool = False,
        train_short_sides: Sequence[int] = (800,),
        max_long_side: int = 1333,
        test_short_side: int = 800,
        test_max_long_side: int = 1333,
        flip: bool = True,
        crop: bool = False,
        jitter: tuple[float, float] | None = None,
        filter_empty: bool = True,
        group_by_aspect_ratio: bool = True,
    ) -> None:
        super().__init__(root, batch_size, eval_batch_size, num_workers, seed, pin_memory)
        sizes = {"max_long_side": max_long_side, "test_short_side": test_short_side}
        sizes |= {"test_max_long_side": test_max_long_side}
        for name, size in sizes.items():
            expect(name, size, size >= 1, "a size of at least 1 pixel")
        valid = min(train_short_sides, default=0) >= 1
        expect("train_short_sides", train_short_sides, valid, "one or more sizes of at least 1 pixel")
        expect("jitter", jitter, jitter is None or 0 < jitter[0] <= jitter[1], "0 < least <= most")
        expect("crop", crop, not (crop and jitter), "false beside jitter")
        self.images = images
        self.with_masks = with_masks
        self.train_short_sides = train_short_sides
        self.max_long_side = max_long_side
        self.test_short_side = test_short_side
        self.test_max_long_side = test_max_long_side
        self.flip = flip
        self.crop = crop
        self.jitter = jitter
        self.filter_empty = filter_empty
        self.group_by_aspect_ratio = group_by_aspect_ratio
        self._truths: dict[str, Content] = {}

    @property
    def categories(self) -> Categories:
        """The categories, in the order of train ids."""
        raise NotImplementedError

    @property
    def class_names(self) -> list[str]:
        """Names of the K classes, by train id."""
        return list(self.categories.names)

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.categories.ids)

    @property
    def palette(self) -> Palette:
        """RGB colours of the K classes, by train id."""
        raise NotImplementedError

    def files(self, split: str) -> tuple[Path, Path]:
        """Return the annotation file and the folder of images of a split."""
        raise NotImplementedError

    def ground_truth(self, split: str) -> Content:
        """Return images, annotations and categories of "val" or "test", with official ids, as the files have them."""
        split = self.splits[-1] if split == "test" else split
        self.samples(split)
        return self._truths[split]

    def scan(self, split: str) -> Listing[list[Sample]]:
        """Read the annotations of a split and look for its images, which are not read."""
        path, folder = self.files(split)
        if not path.is_file():
            return Listing([], [self.missing(f"{path}: file not found.")])
        if not folder.is_dir():
            return Listing([], [self.missing(f"{folder}: folder not found.")])
        with Console(stderr=True).status(f"Reading {path.name}"):
            try:
                content = read_content(path)
            except DataError as error:
                return Listing([], [str(error)])
            return self._listing(split, content)

    def _listing(self, split: str, content: Content) -> Listing[list[Sample]]:
        path, folder = self.files(split)
        if problems := category_problems(path, content) or self._differing_categories(path, content):
            return Listing([], problems)
        valid, problems = check_content(path, content, folder, self.with_masks)
        if not valid["images"] and all(problem.endswith("file not found") for problem in problems):
            return Listing([], [self.missing(f"{folder}: contains no image of {path}.")])
        made = make_samples(valid, folder, self.categories, self.with_masks)
        if split != "train":
            self._truths[split] = valid
        notes = []
        if made.excluded:
            ids = ", ".join(map(str, made.excluded[:5])) + (", ..." if len(made.excluded) > 5 else "")
            notes.append(
                f"{path}: {len(made.excluded)} boxes below 1 pixel, without area or outside of their image are not"
                f" trained on (annotation {ids})"
            )
        return Listing(made.samples, problems, notes)

    def train_dataset(self) -> TrainDataset:
        """Return the augmented training split."""
        transform = train_transforms(self.train_short_sides, self.max_long_side, self.flip, self.crop, self.jitter)
        return TrainDataset(self._train_samples(), transform, self.seed, self.with_masks)

    def train_groups(self) -> list[int] | None:
        """Say of each training sample whether it is wider than high, so that batches need little padding."""
        if not self.group_by_aspect_ratio:
            return None
        return [int(sample.size is not None and sample.size[1] >= sample.size[0]) for sample in self._train_samples()]

    def val_dataset(self) -> EvaluationDataset:
        """Return the validation split."""
        return self._evaluation_dataset(self.samples("val"))

    def test_dataset(self) -> EvaluationDataset:
        """Return the annotated test split, or the validation split of data sets that publish no test annotations."""
        return self._evaluation_dataset(self.samples(self.splits[-1]))

    def predict_dataset(self) -> EvaluationDataset:
        """Return the images named by `images`, or the validation images, without annotations."""
        samples = self.samples("val") if self.images is None else samples_to_predict(self.images)
        return self._evaluation_dataset(samples, annotated=False)

    def check(self) -> bool:
        """Read the whole data set, print what is in it and everything that is wrong; True if nothing is."""
        self.prepare_data()
        result = check_dataset(self)
        print_result(result)
        return not result.problems

    def _evaluation_dataset(self, samples: Sequence[Sample], annotated: bool = True) -> EvaluationDataset:
        return EvaluationDataset(samples, self.test_short_side, self.test_max_long_side, self.with_masks, annotated)

    def _train_samples(self) -> list[Sample]:
        samples = self.samples("train")
        if self.filter_empty:
            samples = [sample for sample in samples if sample.annotated]
        if not samples:
            raise DataError(f"{self.files('train')[0]}: no image has an annotation; expected some to train on")
        return samples

    def _differing_categories(self, path: Path, content: Content) -> list[str]:
        found, expected = Categories.of(content["categories"]), self.categories
        if found == expected:
            return []
        here, there = (set(zip(some.ids, some.names, strict=True)) for some in (found, expected))
        differing = [f"{id} {name!r}" for id, name in sorted(here ^ there)]
        listed = ", ".join(differing[:3]) + (", ..." if len(differing) > 3 else "")
        return [f"{path}: other categories than expected: they differ in {listed}"]
