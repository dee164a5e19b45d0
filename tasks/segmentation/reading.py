"""Finding and reading images and label maps; whatever is wrong with a file is one `DataError` that names it."""

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tasks.core.data import DataError
from tasks.segmentation.labels import IGNORE

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
INVALID = -1


@dataclass(frozen=True)
class Sample:
    """One image, its label map (None when predicting) and its unique name: the path below the split, no suffix."""

    image: Path
    mask: Path | None
    id: str


@dataclass(frozen=True)
class Listing:
    """The files of a split: its samples in order, what is wrong with the files, and what may be fine but is unusual."""

    samples: list[Sample]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LabelTable:
    """How the values of annotations become train ids.

    `table` (256,) int16 maps a value to 0..K-1, to 255 (ignored) or to -1 (not allowed); `expected` says in words which
    values are allowed.
    """

    table: np.ndarray
    expected: str

    @classmethod
    def from_pairs(cls, pairs: dict[int, int], expected: str) -> "LabelTable":
        """Map the keys of `pairs` to its values; other values are not allowed."""
        table = np.full(256, INVALID, dtype=np.int16)
        table[list(pairs)] = list(pairs.values())
        return cls(table, expected)

    @classmethod
    def train_ids(cls, num_classes: int) -> "LabelTable":
        """Annotations that hold train ids already: 0..K-1, and 255 for pixels to ignore."""
        pairs = {value: value for value in (*range(num_classes), IGNORE)}
        return cls.from_pairs(pairs, f"0 to {num_classes - 1}, or 255 for pixels to ignore")

    def apply(self, values: np.ndarray, path: Path) -> np.ndarray:
        """Map (H, W) uint8 values to train ids; raises `DataError` naming the file and the values not allowed."""
        counts = np.bincount(values.ravel(), minlength=256)
        wrong = np.flatnonzero((counts > 0) & (self.table == INVALID))
        if len(wrong):
            found = ", ".join(str(value) for value in wrong[:5]) + (", ..." if len(wrong) > 5 else "")
            raise DataError(f"{path}: label {found} in {counts[wrong].sum()} pixels; expected {self.expected}")
        return self.table.astype(np.uint8)[values]


def read_image(path: Path) -> np.ndarray:
    """Read an 8-bit image of any colour mode as RGB uint8 (H, W, 3), turned upright as its EXIF data says."""
    with _decoded(path) as image:
        if image.mode.startswith(("I", "F")):
            raise DataError(f"{path}: pixels of 16 or 32 bits (mode {image.mode}); expected an 8-bit image")
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def read_label_values(path: Path) -> np.ndarray:
    """Read a single-channel annotation as uint8 (H, W): grey values, or the indices of a palette image."""
    with _decoded(path) as image:
        if image.mode not in ("1", "L", "P"):
            raise DataError(
                f"{path}: a label map of mode {image.mode}; expected one 8-bit channel (grey or palette PNG)"
                " that holds class numbers, not colours"
            )
        return np.asarray(image, dtype=np.uint8)


@contextmanager
def _decoded(path: Path) -> Iterator[Image.Image]:
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError as error:
        raise DataError(f"{path}: file not found") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image ({error})") from error
    with image:
        yield image


def read_pair(sample: Sample, labels: LabelTable) -> tuple[np.ndarray, np.ndarray]:
    """Read image (H, W, 3) and train ids (H, W), both uint8; raises `DataError` if their sizes differ."""
    assert sample.mask is not None
    image = read_image(sample.image)
    mask = labels.apply(read_label_values(sample.mask), sample.mask)
    if image.shape[:2] != mask.shape:
        (height, width), (mask_height, mask_width) = image.shape[:2], mask.shape
        raise DataError(
            f"{sample.mask}: label map of {mask_width} x {mask_height} pixels; expected {width} x {height},"
            f" the size of {sample.image}"
        )
    return image, mask


def list_images(folder: Path) -> list[Path]:
    """Return the image files below a folder, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def pair_files(images: Path, masks: Path, image_end: str = "", mask_end: str = ".png") -> Listing:
    """Pair `images/**/<id><image_end>.<suffix>` with `masks/**/<id><mask_end>`; file contents are not read."""
    found: dict[str, Sample] = {}
    problems = []
    unused = set(masks.rglob(f"*{mask_end}"))
    for path in list_images(images):
        stem = path.relative_to(images).with_suffix("").as_posix()
        if not stem.endswith(image_end):
            continue
        id = stem.removesuffix(image_end)
        mask = masks / f"{id}{mask_end}"
        if id in found:
            problems.append(f"{path}: has the same name as {found[id].image}; expected one image per label map")
        elif mask not in unused:
            problems.append(f"{path}: has no label map; expected {mask}")
        else:
            found[id] = Sample(path, mask, id)
            unused.remove(mask)
    return Listing(list(found.values()), problems, [f"{mask}: has no image" for mask in sorted(unused)])


def find_images(images: str) -> list[Sample]:
    """Return the images named by a folder, a file or a glob pattern; raises `DataError` if there are none.

    Ids are paths, without suffix, relative to the folder that holds them all.
    """
    path = Path(images)
    if path.is_dir():
        paths = list_images(path)
    elif path.is_file():
        paths = [path]
    else:
        matches = sorted(Path(match) for match in glob.glob(images, recursive=True))
        paths = [match for match in matches if match.is_file() and match.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise DataError(f"images is {images!r}, where no image was found; expected a folder, a file or a glob pattern")
    base = path if path.is_dir() else Path(os.path.commonpath([match.parent for match in paths]))
    samples = [Sample(match, None, match.relative_to(base).with_suffix("").as_posix()) for match in paths]
    _check_unique(samples)
    return samples


def _check_unique(samples: Sequence[Sample]) -> None:
    seen: dict[str, Path] = {}
    for sample in samples:
        if sample.id in seen:
            raise DataError(f"{sample.image} and {seen[sample.id]} would have the same prediction file; rename one")
        seen[sample.id] = sample.image
