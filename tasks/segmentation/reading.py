"""Finding and reading label maps and their images; whatever is wrong with a file is one `DataError` that names it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.core.data import DataError
from tasks.core.images import decoded_image, list_images, named_images, read_image
from tasks.core.splits import Listing
from tasks.segmentation.labels import IGNORE

INVALID = -1


@dataclass(frozen=True)
class Sample:
    """One image, its label map (None when predicting) and its unique name: the path below the split, no suffix."""

    image: Path
    mask: Path | None
    id: str


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


def read_label_values(path: Path) -> np.ndarray:
    """Read a single-channel annotation as uint8 (H, W): grey values, or the indices of a palette image."""
    with decoded_image(path) as image:
        if image.mode not in ("1", "L", "P"):
            raise DataError(
                f"{path}: a label map of mode {image.mode}; expected one 8-bit channel (grey or palette PNG)"
                " that holds class numbers, not colours"
            )
        return np.asarray(image, dtype=np.uint8)


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


def pair_files(images: Path, masks: Path, image_end: str = "", mask_end: str = ".png") -> Listing[list[Sample]]:
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


def samples_to_predict(images: str) -> list[Sample]:
    """Return the images named by a folder, a file or a glob pattern; raises `DataError` if there are none."""
    return [Sample(path, None, id) for id, path in named_images(images).items()]
