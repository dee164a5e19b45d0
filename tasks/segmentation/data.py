"""The data sets of segmentation; each docstring shows the layout on disk.

Every batch holds RGB uint8 images and train ids 0..K-1 with 255 for pixels to ignore.
"""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tasks.core.data import DataError
from tasks.core.images import distinct_colour
from tasks.core.sample import cache_folder, write_folder_once
from tasks.core.splits import Listing, fraction_by_name
from tasks.segmentation import sample
from tasks.segmentation.datamodule import Palette, SegmentationDataModule
from tasks.segmentation.labels import IGNORE
from tasks.segmentation.reading import LabelTable, Sample

# Name, value in *_labelIds.png, colour of the 19 evaluated classes of Cityscapes, by train id.
CITYSCAPES_CLASSES = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
CITYSCAPES_SHORT_SIDES = tuple(1024 * tenths // 10 for tenths in range(5, 21))  # 512, 614, 716, 819, … 2048
VAL_FRACTION = 0.1


class ADE20K(SegmentationDataModule):
    """ADE20K scene parsing: 150 classes, 20,210 training and 2,000 validation images.

    Annotations hold 1..150, and 0 for other pixels, which are ignored::

        root/images/training/ADE_train_00000001.jpg
        root/images/validation/ADE_val_00000001.jpg
        root/annotations/training/ADE_train_00000001.png
        root/annotations/validation/ADE_val_00000001.png
    """

    layout = """
root/images/training/ADE_train_00000001.jpg
root/images/validation/ADE_val_00000001.jpg
root/annotations/training/ADE_train_00000001.png
root/annotations/validation/ADE_val_00000001.png"""
    source = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip (root is the folder inside it)"

    @cached_property
    def _classes(self) -> dict[str, Any]:
        return json.loads((Path(__file__).parent / "ade20k_classes.json").read_text())

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by train id."""
        return self._classes["names"]

    @property
    def palette(self) -> Palette:
        """RGB colours of the classes, by train id: those of MIT's scene parsing benchmark."""
        return [tuple(colour) for colour in self._classes["palette"]]

    @property
    def labels(self) -> LabelTable:
        """Value c is train id c - 1; 0 is ignored."""
        pairs = {0: IGNORE} | {train_id + 1: train_id for train_id in range(self.num_classes)}
        return LabelTable.from_pairs(pairs, f"1 to {self.num_classes}, or 0 for other pixels")

    def scan(self, split: str) -> Listing[list[Sample]]:
        """List the files of "train" or "val"; their contents are not read."""
        folder = {"train": "training", "val": "validation"}[split]
        return self._pairs(Path(self.root, "images", folder), Path(self.root, "annotations", folder))

    def to_official(self, label_map: np.ndarray) -> np.ndarray:
        """Map (H, W) train ids to 1..K."""
        return (label_map + 1).astype(np.uint8)


class DigitScenes(ADE20K):
    """The sample data set: scenes of real handwritten digits in the layout of ADE20K, with 11 classes.

    It is written to `root` if that folder does not exist; by default to a folder in the user's cache.
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 16,
        num_workers: int = 2,
        train_short_sides: Sequence[int] = (56, 64, 72, 80),
        crop_size: tuple[int, int] = (64, 64),
        test_short_side: int = 64,
        flip: bool = False,
        num_train: int = 6000,
        num_val: int = 200,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root=root or str(cache_folder(f"segmentation-v1-{num_train}-{num_val}")),
            batch_size=batch_size,
            num_workers=num_workers,
            train_short_sides=train_short_sides,
            crop_size=crop_size,
            test_short_side=test_short_side,
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

    def prepare_data(self) -> None:
        """Write the sample unless it is there already."""
        write_folder_once(Path(self.root), lambda folder: sample.write_sample(folder, self.num_train, self.num_val))


class Cityscapes(SegmentationDataModule):
    """Cityscapes, fine annotations: 19 classes, 2,975 training and 500 validation images of 2048 x 1024 pixels.

    `*_labelTrainIds.png` (0..18, 255) is read where the data set has it, else `*_labelIds.png` (0..33)::

        root/leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png
        root/leftImg8bit/val/frankfurt/frankfurt_000000_000294_leftImg8bit.png
        root/gtFine/train/aachen/aachen_000000_000019_gtFine_labelTrainIds.png
        root/gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelTrainIds.png
    """

    layout = """
root/leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png
root/leftImg8bit/val/frankfurt/frankfurt_000000_000294_leftImg8bit.png
root/gtFine/train/aachen/aachen_000000_000019_gtFine_labelTrainIds.png (or _labelIds.png)
root/gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelTrainIds.png (or _labelIds.png)"""
    source = "https://www.cityscapes-dataset.com: leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip"

    def __init__(
        self,
        root: str,
        train_short_sides: Sequence[int] = CITYSCAPES_SHORT_SIDES,
        max_long_side: int = 4096,
        crop_size: tuple[int, int] = (512, 1024),
        test_short_side: int = 1024,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root=root,
            train_short_sides=train_short_sides,
            max_long_side=max_long_side,
            crop_size=crop_size,
            test_short_side=test_short_side,
            **kwargs,
        )

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by train id."""
        return [name for name, _, _ in CITYSCAPES_CLASSES]

    @property
    def palette(self) -> Palette:
        """RGB colours of the classes, by train id."""
        return [colour for _, _, colour in CITYSCAPES_CLASSES]

    @cached_property
    def _annotation(self) -> str:
        has_train_ids = any(Path(self.root, "gtFine").glob("*/*/*_gtFine_labelTrainIds.png"))
        return "labelTrainIds" if has_train_ids else "labelIds"

    @property
    def labels(self) -> LabelTable:
        """Train ids as they are, or label ids 0..33 of which 19 are evaluated and the others ignored."""
        if self._annotation == "labelTrainIds":
            return LabelTable.train_ids(self.num_classes)
        pairs = dict.fromkeys(range(34), IGNORE)
        pairs |= {label_id: train_id for train_id, (_, label_id, _) in enumerate(CITYSCAPES_CLASSES)}
        return LabelTable.from_pairs(pairs, "label ids 0 to 33")

    def scan(self, split: str) -> Listing[list[Sample]]:
        """List the files of "train" or "val"; their contents are not read."""
        images, masks = Path(self.root, "leftImg8bit", split), Path(self.root, "gtFine", split)
        return self._pairs(images, masks, "_leftImg8bit", f"_gtFine_{self._annotation}.png")

    def to_official(self, label_map: np.ndarray) -> np.ndarray:
        """Map (H, W) train ids to label ids, which the evaluation server expects."""
        return np.array([label_id for _, label_id, _ in CITYSCAPES_CLASSES], dtype=np.uint8)[label_map]

    def prediction_name(self, id: str) -> str:
        """Return `<city>_<sequence>_<frame>_pred.png`, without the city's folder."""
        return f"{Path(id).name.removesuffix('_leftImg8bit')}_pred.png"


class SegmentationFolder(SegmentationDataModule):
    """Your own data: images of any common format, and label maps as single-channel PNG (grey or palette).

    A label map has the name of its image and holds the line number in `classes.txt`, counted from 0, or 255 for
    pixels to ignore. `classes.txt` has one class per line, optionally with its colour: `road #804080`::

        root/classes.txt
        root/images/train/a.jpg      root/masks/train/a.png
        root/images/val/b.jpg        root/masks/val/b.png
        root/images/test/c.jpg       root/masks/test/c.png     (optional; else `test` evaluates the val split)

    Without these split folders (`root/images/a.jpg`, `root/masks/a.png`) a tenth of the images, chosen by a hash of
    their names, is for validation: the same images on every machine, and mostly the same after adding some.
    """

    layout = """
root/classes.txt             one class per line
root/images/train/a.jpg      root/masks/train/a.png
root/images/val/b.jpg        root/masks/val/b.png
(or, to have a tenth chosen for validation: root/images/a.jpg, root/masks/a.png)"""
    source = "your own data"

    @cached_property
    def _classes(self) -> tuple[list[str], Palette]:
        path = Path(self.root, "classes.txt")
        if not path.is_file():
            raise DataError(self.missing(f"{path}: file not found."))
        return read_classes(path)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by train id."""
        return self._classes[0]

    @property
    def palette(self) -> Palette:
        """RGB colours of the classes, by train id."""
        return self._classes[1]

    @property
    def labels(self) -> LabelTable:
        """Train ids as they are."""
        return LabelTable.train_ids(self.num_classes)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the annotated splits."""
        return ("train", "val", "test") if Path(self.root, "images", "test").is_dir() else ("train", "val")

    def scan(self, split: str) -> Listing[list[Sample]]:
        """List the files of a split; their contents are not read."""
        images, masks = Path(self.root, "images"), Path(self.root, "masks")
        if any((images / name).is_dir() for name in ("train", "val", "test")):
            return self._pairs(images / split, masks / split)
        listing = self._pairs(images, masks)
        if len(listing.samples) == 1 and not listing.problems:
            listing.problems.append(f"{images}: holds one image; expected at least two, one of them for validation")
        held_out = fraction_by_name([sample.id for sample in listing.samples], VAL_FRACTION)
        chosen = [sample for sample in listing.samples if (sample.id in held_out) == (split == "val")]
        return Listing(chosen, listing.problems, listing.notes)


def read_classes(path: Path) -> tuple[list[str], Palette]:
    """Read class names and colours from lines like `road` or `road #804080`; missing colours are chosen."""
    names: list[str] = []
    palette: list[tuple[int, int, int]] = []
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if not line.strip():
            continue
        match = re.fullmatch(r"(.*?)(?:\s+#([0-9a-fA-F]{6}))?", line.strip())
        assert match is not None  # the pattern matches any line
        name, colour = match.groups()
        if name in names:
            raise DataError(f"{path}: class {name!r} twice; expected different names")
        palette.append(_hex_colour(colour) if colour else distinct_colour(len(names)))
        names.append(name)
    if not 1 <= len(names) <= IGNORE:
        raise DataError(f"{path}: {len(names)} classes; expected 1 to {IGNORE}, one name per line")
    return names, palette


def _hex_colour(digits: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(digits)
    return red, green, blue
