"""The data sets of classification; each docstring shows the layout on disk."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tasks.classification import sample
from tasks.classification.cifar import CIFAR10_ARCHIVE, CIFAR100_ARCHIVE, Archive
from tasks.classification.datamodule import Augmentation, ClassificationDataModule
from tasks.classification.imagenet import imagenet_classes, list_flat_validation
from tasks.classification.reading import (
    ImageArrays,
    ImageFiles,
    LabelledImages,
    class_folders,
    images_below,
    list_classes,
)
from tasks.core.data import DataError
from tasks.core.sample import DIGIT_NAMES, cache_folder, write_folder_once
from tasks.core.splits import Listing, fraction_by_name

VAL_FRACTION = 0.1
# Small turns and shifts; mirror images of digits are no digits.
DIGIT_AUGMENTATION: Augmentation = [
    {"Affine": {"rotate": [-12, 12], "translate_percent": [-0.08, 0.08], "scale": [0.9, 1.1], "shear": [-8, 8]}}
]


class ImageNet(ClassificationDataModule):
    """ImageNet, ILSVRC 2012: 1000 classes, 1,281,167 training and 50,000 validation images.

    Validation images are in folders like the training images, or all in one folder beside the development kit::

        root/train/n01440764/n01440764_10026.JPEG
        root/val/n01440764/ILSVRC2012_val_00000293.JPEG      or      root/val/ILSVRC2012_val_00000293.JPEG
        root/ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt      (for val in one folder)
        root/ILSVRC2012_devkit_t12/data/meta.mat                                    (for val in one folder)

    Labels follow the sorted folder names, as in all published models. As there, images are not turned by their EXIF
    data. `ImageFolder` reads parts of the data set.
    """

    layout = """
root/train/n01440764/n01440764_10026.JPEG                    (1000 folders)
root/val/n01440764/ILSVRC2012_val_00000293.JPEG              (1000 folders)
or, with all validation images in one folder:
root/val/ILSVRC2012_val_00000293.JPEG
root/ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt
root/ILSVRC2012_devkit_t12/data/meta.mat"""
    source = "https://image-net.org (ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, ILSVRC2012_devkit_t12.tar.gz)"

    @property
    def class_names(self) -> list[str]:
        """Words for the classes, by label."""
        return imagenet_classes()[1]

    def scan(self, split: str) -> Listing[LabelledImages]:
        """List the files of "train" or "val"; their contents are not read."""
        folder, wnids = Path(self.root, split), imagenet_classes()[0]
        if not folder.is_dir():
            return Listing(ImageFiles.of(folder, [], []), [self.missing(f"{folder}: folder not found.")])
        if split == "train" or class_folders(folder):
            return Listing(*list_classes(folder, wnids, upright=False))
        names, devkit = images_below(folder), Path(self.root, "ILSVRC2012_devkit_t12")
        for path, what in ((folder, "contains no images."), (devkit, "folder not found.")):
            if (path == folder and not names) or not path.is_dir():
                return Listing(ImageFiles.of(folder, [], []), [self.missing(f"{path}: {what}")])
        return Listing(*list_flat_validation(folder, names, devkit))


class CIFAR10(ClassificationDataModule):
    """CIFAR-10: 10 classes, 50,000 training and 10,000 test images of 32 x 32 pixels, enlarged to `image_size`.

    The archive's "python version" or "binary version", unpacked; the test images are the validation split::

        root/cifar-10-batches-py/{data_batch_1,…,data_batch_5,test_batch}
        root/cifar-10-batches-bin/{data_batch_1.bin,…,data_batch_5.bin,test_batch.bin}
    """

    layout = """
root/cifar-10-batches-py/{data_batch_1,...,data_batch_5,test_batch}
or root/cifar-10-batches-bin/{data_batch_1.bin,...,data_batch_5.bin,test_batch.bin}"""
    source = "https://www.cs.toronto.edu/~kriz/cifar.html (cifar-10-python.tar.gz or -binary.tar.gz, unpacked)"
    archive: Archive = CIFAR10_ARCHIVE

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by label."""
        return list(self.archive.class_names)

    def scan(self, split: str) -> Listing[LabelledImages]:
        """Read the images of "train" or "val"."""
        paths, pickled = self.archive.find(Path(self.root), split)
        if not paths:
            empty = np.zeros((0, 32, 32, 3), dtype=np.uint8)
            problem = self.missing(f"{self.root}: no {split} images of {type(self).__name__} found.")
            return Listing(ImageArrays(empty, [], np.zeros(0), np.zeros(0, dtype=np.int64)), [problem])
        return Listing(self.archive.read(paths, pickled))


class CIFAR100(CIFAR10):
    """CIFAR-100: 100 classes, 50,000 training and 10,000 test images of 32 x 32 pixels, enlarged to `image_size`.

    The archive's "python version" or "binary version", unpacked; the test images are the validation split::

        root/cifar-100-python/{train,test}
        root/cifar-100-binary/{train.bin,test.bin}
    """

    layout = """
root/cifar-100-python/{train,test}
or root/cifar-100-binary/{train.bin,test.bin}"""
    source = "https://www.cs.toronto.edu/~kriz/cifar.html (cifar-100-python.tar.gz or -binary.tar.gz, unpacked)"
    archive: Archive = CIFAR100_ARCHIVE


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
        folders = [root / name for name in ("train", "val", "test")] if self._has_splits else [root]
        folder = next(split for split in folders if split.is_dir())
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
        return list(DIGIT_NAMES)

    def prepare_data(self) -> None:
        """Write the sample unless it is there already."""
        write_folder_once(Path(self.root), sample.write_sample)
