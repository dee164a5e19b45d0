"""The data sets of detection; each docstring shows the layout on disk."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tasks.core.data import DataError
from tasks.core.images import distinct_colour
from tasks.core.sample import DIGIT_PALETTE, cache_folder, write_folder_once
from tasks.detection import sample
from tasks.detection.annotations import Categories, category_problems, read_content
from tasks.detection.datamodule import DetectionDataModule, Palette


class COCO(DetectionDataModule):
    """COCO 2017: 80 categories, 118,287 training and 5,000 validation images.

    ::

        root/annotations/instances_train2017.json
        root/annotations/instances_val2017.json
        root/train2017/000000000009.jpg
        root/val2017/000000000139.jpg
    """

    layout = """
root/annotations/instances_train2017.json
root/annotations/instances_val2017.json
root/train2017/000000000009.jpg
root/val2017/000000000139.jpg"""
    source = "https://cocodataset.org/#download: train2017.zip, val2017.zip, annotations_trainval2017.zip"

    @cached_property
    def _table(self) -> list[dict[str, Any]]:
        return json.loads((Path(__file__).parent / "coco_categories.json").read_text())

    @cached_property
    def categories(self) -> Categories:
        """The categories, in the order of train ids: official ids are 1 to 90, with gaps."""
        return Categories.of(self._table)

    @property
    def palette(self) -> Palette:
        """RGB colours of the K classes, by train id: those of COCO's panoptic annotations."""
        return [tuple(category["colour"]) for category in self._table]

    def files(self, split: str) -> tuple[Path, Path]:
        """Return the annotation file and the folder of images of a split."""
        root = Path(self.root)
        return root / "annotations" / f"instances_{split}2017.json", root / f"{split}2017"


class DigitScenes(COCO):
    """The sample data set: scenes of real handwritten digits in the layout of COCO, with ten categories.

    It is written to `root` if that folder does not exist; by default to a folder in the user's cache.
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 16,
        num_workers: int = 2,
        train_short_sides: Sequence[int] = (64, 72, 80),
        max_long_side: int = 128,
        test_short_side: int = 72,
        test_max_long_side: int = 128,
        flip: bool = False,
        num_train: int = 4000,
        num_val: int = 200,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root=root or str(cache_folder(f"detection-v1-{num_train}-{num_val}")),
            batch_size=batch_size,
            num_workers=num_workers,
            train_short_sides=train_short_sides,
            max_long_side=max_long_side,
            test_short_side=test_short_side,
            test_max_long_side=test_max_long_side,
            flip=flip,
            **kwargs,
        )
        self.num_train = num_train
        self.num_val = num_val

    @cached_property
    def _table(self) -> list[dict[str, Any]]:
        return sample.categories()

    @property
    def palette(self) -> Palette:
        """RGB colours of the K classes, by train id."""
        return DIGIT_PALETTE

    def prepare_data(self) -> None:
        """Write the sample unless it is there already."""
        write_folder_once(Path(self.root), lambda folder: sample.write_sample(folder, self.num_train, self.num_val))


class CocoDetection(DetectionDataModule):
    """Your own data in COCO's format: for each split a JSON file and a folder of images, both below `root`.

    All files have the same categories, of any ids; the order of the ids is that of the classes. Every annotation has
    `id`, `image_id`, `category_id`, `bbox` and, for masks, `segmentation`, and may have `area` and `iscrowd`::

        root/train.json     root/train/a.jpg
        root/val.json       root/val/b.jpg
        root/test.json      root/test/c.jpg     (if `test_annotations` names it; else `test` evaluates the val split)
    """

    layout = """
root/train.json     images, annotations and categories as in COCO's instances_train2017.json
root/train/a.jpg    the images, by their file_name
root/val.json
root/val/b.jpg
(other names: --data.train_annotations, --data.train_images, --data.val_annotations, --data.val_images)"""
    source = "your own data"

    def __init__(
        self,
        root: str,
        train_annotations: str = "train.json",
        train_images: str = "train",
        val_annotations: str = "val.json",
        val_images: str = "val",
        test_annotations: str | None = None,
        test_images: str = "test",
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, **kwargs)
        self.train_annotations, self.train_images = train_annotations, train_images
        self.val_annotations, self.val_images = val_annotations, val_images
        self.test_annotations, self.test_images = test_annotations, test_images

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the annotated splits."""
        return ("train", "val") if self.test_annotations is None else ("train", "val", "test")

    @cached_property
    def categories(self) -> Categories:
        """The categories of the validation annotations, in the order of train ids."""
        path, _ = self.files("val")
        if not path.is_file():
            raise DataError(self.missing(f"{path}: file not found."))
        content = read_content(path)
        if problems := category_problems(path, content):
            raise DataError(problems[0])
        return Categories.of(content["categories"])

    @property
    def palette(self) -> Palette:
        """RGB colours of the K classes, by train id."""
        return [distinct_colour(label) for label in range(self.num_classes)]

    def files(self, split: str) -> tuple[Path, Path]:
        """Return the annotation file and the folder of images of a split."""
        root = Path(self.root)
        return root / getattr(self, f"{split}_annotations"), root / getattr(self, f"{split}_images")
