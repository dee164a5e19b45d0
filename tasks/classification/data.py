"""The data sets of classification; each docstring shows the layout on disk."""

from functools import cached_property
from pathlib import Path
from typing import Any

from tasks.classification import sample
from tasks.classification.datamodule import Augmentation, ClassificationDataModule
from tasks.classification.reading import ImageFiles, LabelledImages, class_folders, list_classes
from tasks.core.data import DataError
from tasks.core.sample import cache_folder, write_folder_once
from tasks.core.splits import Listing, fraction_by_name

VAL_FRACTION = 0.1
# Small turns and shifts; mirror images of digits are no digits.
DIGIT_AUGMENTATION: Augmentation = [
    {"Affine": {"rotate": [-12, 12], "translate_percent": [-0.08, 0.08], "scale": [0.9, 1.1], "shear": [-8, 8]}}
]


class ImageFolder(ClassificationDataModule):
    """Your own images, in folders named like their classes; folders below a class are read too.

    Classes are numbered in the order of their sorted names. Every class needs images in every split::

        root/train/cat/a.jpg     root/train/dog/park/b.jpg
        root/val/cat/c.jpg       root/val/dog/d.jpg
        root/test/cat/e.jpg      root/test/dog/f.jpg       (optional; else `test` evaluates the val split)

    Without these split folders (`root/cat/a.jpg`, `root/dog/b.jpg`) a tenth of the images of each class, chosen by a
    hash of their names, is for validation: the same images on every machine, and mostly the same after adding some.
    """

    layout = """
root/train/<class>/a.jpg
root/val/<class>/b.jpg
(or, to have a tenth of each class chosen for validation: root/<class>/a.jpg)"""
    source = "your own data"

    @cached_property
    def _has_splits(self) -> bool:
        return any(Path(self.root, name).is_dir() for name in ("train", "val", "test"))

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the folders in the first split there is, sorted."""
        root = Path(self.root)
        if not root.is_dir():
            raise DataError(self.missing(f"{root}: folder not found."))
        splits = [root / name for name in ("train", "val", "test")] if self._has_splits else [root]
        folder = next(split for split in splits if split.is_dir())
        names = class_folders(folder)
        if not names:
            raise DataError(self.missing(f"{folder}: contains no folders of classes."))
        return names

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the labelled splits."""
        return ("train", "val", "test") if Path(self.root, "test").is_dir() else ("train", "val")

    def scan(self, split: str) -> Listing[LabelledImages]:
        """List the files of a split; their contents are not read."""
        folder = Path(self.root, split) if self._has_splits else Path(self.root)
        if not folder.is_dir():
            return Listing(ImageFiles.of(folder, [], []), [self.missing(f"{folder}: folder not found.")])
        files, problems = list_classes(folder, self.class_names)
        return Listing(files if self._has_splits else self._held_out(files, split), problems)

    def _held_out(self, files: ImageFiles, split: str) -> ImageFiles:
        assert files.labels is not None
        ids = [files.id(index) for index in range(len(files))]
        held_out: set[str] = set()
        for label in range(self.num_classes):
            own = [ids[index] for index in (files.labels == label).nonzero()[0]]
            held_out |= fraction_by_name(own, VAL_FRACTION)
        chosen = [index for index, id in enumerate(ids) if (id in held_out) == (split == "val")]
        return ImageFiles(files.folder, files.names[chosen], files.labels[chosen])


class DigitImages(ImageFolder):
    """The sample data set: 1797 real handwritten digits of 10 classes, a fifth of them for validation.

    It is written to `root` if that folder does not exist; by default to a folder in the user's cache.
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 64,
        num_workers: int = 2,
        image_size: int = 32,
        augmentation: Augmentation = DIGIT_AUGMENTATION,
        crop_pct: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root=root or str(cache_folder("classification-v1")),
            batch_size=batch_size,
            num_workers=num_workers,
            image_size=image_size,
            augmentation=augmentation,
            crop_pct=crop_pct,
            **kwargs,
        )

    @cached_property
    def class_names(self) -> list[str]:
        """The ten digits."""
        return list(sample.CLASS_NAMES)

    def prepare_data(self) -> None:
        """Write the sample unless it is there already."""
        write_folder_once(Path(self.root), sample.write_sample)
