"""Datamodules for semantic segmentation; each docstring shows the layout on disk.

Every batch holds RGB uint8 images and train ids 0..K-1 with 255 for pixels to ignore.
"""

import glob
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import albumentations as A
import numpy as np

from tasks.core.data import DataError, TaskDataModule, missing_data_message
from tasks.core.sample import cache_folder, write_folder_once
from tasks.segmentation import sample
from tasks.segmentation.dataset import (
    IMAGE_SUFFIXES,
    EvaluationDataset,
    LabelTable,
    Sample,
    TrainDataset,
    identity_labels,
    list_samples,
    stack_samples,
)
from tasks.segmentation.transforms import IGNORE, SSDColorJitter, train_transforms

ADE20K_SHORT_SIDES = (256, 307, 358, 409, 460, 512, 563, 614, 665, 716, 768, 819, 870, 921, 972, 1024)
CITYSCAPES_SHORT_SIDES = tuple(2 * side for side in ADE20K_SHORT_SIDES)
SAMPLE_COMMAND = "python -m tasks.segmentation fit -c configs/sample/faseg.yaml"
Palette = Sequence[tuple[int, int, int]]


class SegmentationDataModule(TaskDataModule):
    """What the datamodules of this task share. The defaults are the recipe of Mask2Former and FASeg for ADE20K.

    `train_short_sides` are the sizes of the shorter image side to draw from in training, `max_long_side` bounds the
    longer; `crop_size` is (height, width). `test_short_side` and `test_max_long_side` are the same for evaluation.
    `flip` mirrors half of the training images, `color_jitter` is that of SSD. `images` names what `predict` reads: a
    folder, a file or a glob pattern; without it the validation images are predicted.
    """

    layout: ClassVar[str]
    source: ClassVar[str]

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
        sizes = (*train_short_sides, max_long_side, *crop_size, test_short_side, test_max_long_side)
        if not train_short_sides or min(sizes) < 1:
            raise DataError(f"train_short_sides, crop_size and the other sizes are {sizes}; expected at least 1 pixel")
        self.images = images
        self.train_short_sides = train_short_sides
        self.max_long_side = max_long_side
        self.crop_size = crop_size
        self.test_short_side = test_short_side
        self.test_max_long_side = test_max_long_side
        self.flip = flip
        self.color_jitter = color_jitter

    train_collate = staticmethod(stack_samples)
    eval_collate = staticmethod(list_samples)

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
        """How the annotations' values become train ids."""
        raise NotImplementedError

    def scan(self, split: str) -> tuple[list[Sample], list[str]]:
        """List the pairs of a split ("train", "val") in order, and what is wrong with its files."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.class_names)

    def to_official(self, label_map: np.ndarray) -> np.ndarray:
        """Map (H, W) train ids to the values that the data set's own annotations and evaluation use."""
        return label_map.astype(np.uint8)

    def prediction_name(self, id: str) -> str:
        """Return the file name, possibly below folders, under which the prediction of a sample is written."""
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
        """Return the split with public annotations that results are reported on: the validation split."""
        return self.val_dataset()

    def predict_dataset(self) -> EvaluationDataset:
        """Return the images named by `images`, or the validation images, without label maps."""
        samples = self.samples("val") if self.images is None else find_images(self.images)
        return self._evaluation_dataset(samples, None)

    def setup(self, stage: str) -> None:
        """Find the files of the splits that `stage` needs; raises `DataError` before any training if some lack."""
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("val",)}.get(stage, ()):
            self.samples(split)

    def samples(self, split: str) -> list[Sample]:
        """Return the samples of a split ("train", "val"); raises `DataError` if the data set is missing or malformed."""
        if split not in self._samples:
            found, problems = self.scan(split)
            if problems:
                more = f" (and {len(problems) - 1} more problems in {self.root})" if len(problems) > 1 else ""
                raise DataError(problems[0] + more)
            self._samples[split] = found
        return self._samples[split]

    @cached_property
    def _samples(self) -> dict[str, list[Sample]]:
        return {}

    def _evaluation_dataset(self, samples: Sequence[Sample], labels: LabelTable | None) -> EvaluationDataset:
        return EvaluationDataset(samples, labels, self.test_short_side, self.test_max_long_side)

    def _missing(self, what: str) -> str:
        return missing_data_message(what, self.layout, self.source, SAMPLE_COMMAND)

    def _pairs(self, split: str, images: Path, masks: Path, image_end: str = "", mask_end: str = ".png") -> tuple:
        """Pair `images/**/<id><image_end>.<suffix>` with `masks/**/<id><mask_end>`."""
        for folder in (images, masks):
            if not folder.is_dir():
                return [], [self._missing(f"{folder}: folder not found")]
        found, problems, seen = [], [], set()
        for path in list_images(images):
            id = path.relative_to(images).with_suffix("").as_posix().removesuffix(image_end)
            mask = masks / f"{id}{mask_end}"
            if id in seen:
                problems.append(f"{path}: a second image named {id}; expected unique names")
            elif not mask.is_file():
                problems.append(f"{path}: has no label map; expected {mask}")
            else:
                found.append(Sample(path, mask, id))
            seen.add(id)
        if not found and not problems:
            problems.append(self._missing(f"{images}: holds no images"))
        return found, problems


class ADE20K(SegmentationDataModule):
    """ADE20K scene parsing: 150 classes, 20,210 training and 2,000 validation images.

    Annotations hold 1..150, and 0 for other pixels, which are ignored::

        root/
            images/training/ADE_train_00000001.jpg
            images/validation/ADE_val_00000001.jpg
            annotations/training/ADE_train_00000001.png
            annotations/validation/ADE_val_00000001.png
    """

    layout = """
{root}/images/training/ADE_train_00000001.jpg
{root}/images/validation/ADE_val_00000001.jpg
{root}/annotations/training/ADE_train_00000001.png
{root}/annotations/validation/ADE_val_00000001.png"""
    source = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip (root is its top folder)"

    @cached_property
    def _classes(self) -> dict[str, Any]:
        return json.loads((Path(__file__).parent / "ade20k_classes.json").read_text())

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by train id."""
        return self._classes["names"]

    @property
    def palette(self) -> Palette:
        """RGB colours of the classes, by train id."""
        return [tuple(colour) for colour in self._classes["palette"]]

    @property
    def labels(self) -> LabelTable:
        """Value c is train id c - 1; 0 is ignored."""
        pairs = {0: IGNORE} | {train_id + 1: train_id for train_id in range(self.num_classes)}
        return LabelTable.from_pairs(pairs, f"1 to {self.num_classes}, or 0 for other pixels")

    def scan(self, split: str) -> tuple[list[Sample], list[str]]:
        """List the pairs of a split ("train", "val") in order, and what is wrong with its files."""
        folder = {"train": "training", "val": "validation"}[split]
        root = Path(self.root)
        return self._pairs(split, root / "images" / folder, root / "annotations" / folder)

    def to_official(self, label_map: np.ndarray) -> np.ndarray:
        """Map (H, W) train ids to 1..150."""
        return (label_map + 1).astype(np.uint8)


class DigitScenes(ADE20K):
    """The sample data set: scenes of real handwritten digits in the layout of ADE20K, with 11 classes.

    It is written to `root` when that folder does not exist; by default a folder in the user's cache.
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 16,
        num_workers: int = 2,
        train_short_sides: Sequence[int] = (56, 64, 72, 80),
        max_long_side: int = 256,
        crop_size: tuple[int, int] = (64, 64),
        test_short_side: int = 64,
        test_max_long_side: int = 256,
        flip: bool = False,
        num_train: int = 6000,
        num_val: int = 200,
        **kwargs: Any,
    ) -> None:
        name = f"segmentation-v1-{num_train}-{num_val}"
        super().__init__(
            root=str(cache_folder(name)) if root is None else root,
            batch_size=batch_size,
            num_workers=num_workers,
            train_short_sides=train_short_sides,
            max_long_side=max_long_side,
            crop_size=crop_size,
            test_short_side=test_short_side,
            test_max_long_side=test_max_long_side,
            flip=flip,
            **kwargs,
        )
        self.num_train = num_train
        self.num_val = num_val

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by train id."""
        return list(sample.CLASS_NAMES)

    @property
    def palette(self) -> Palette:
        """RGB colours of the classes, by train id."""
        return sample.PALETTE

    def color_transforms(self) -> list[A.BasicTransform]:
        """Return colour jitter, and transforms after which a digit is still the same digit."""
        return [*super().color_transforms(), A.ChannelShuffle(p=0.5), A.InvertImg(p=0.5)]

    def prepare_data(self) -> None:
        """Write the sample unless it is there already."""
        write_folder_once(
            Path(self.root), lambda folder: sample.write_sample(folder, num_train=self.num_train, num_val=self.num_val)
        )


def list_images(folder: Path) -> list[Path]:
    """Return the image files below a folder, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def find_images(images: str) -> list[Sample]:
    """Return the images named by a folder, a file or a glob pattern; raises `DataError` if there are none."""
    path = Path(images)
    if path.is_dir():
        base, paths = path, list_images(path)
    elif path.is_file():
        base, paths = path.parent, [path]
    else:
        paths = sorted(Path(match) for match in glob.glob(images, recursive=True) if Path(match).is_file())
        base = Path(glob.escape("")) if not paths else paths[0].parent
    if not paths:
        raise DataError(f"images is {images!r}: no image found; expected a folder, a file or a glob pattern")
    return [Sample(path, None, path.relative_to(base).with_suffix("").as_posix()) for path in paths]


def fraction_by_name(ids: Sequence[str], fraction: float) -> set[str]:
    """Choose a fixed share of names (at least one) by their hashes, so that adding files moves few others."""
    ranked = sorted(ids, key=lambda id: hashlib.md5(id.encode()).hexdigest())
    return set(ranked[: max(1, round(fraction * len(ids)))])
