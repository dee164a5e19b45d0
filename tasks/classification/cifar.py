"""The archives of CIFAR-10 and CIFAR-100: pickled batches ("python version") or records of bytes ("binary version")."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backbones.checkpoint import CheckpointError, read_content
from tasks.classification.reading import ImageArrays
from tasks.core.data import DataError

PIXELS = 3 * 32 * 32  # bytes per image: red, green and blue, each in rows


@dataclass(frozen=True)
class Archive:
    """Where one of the two data sets keeps its images; the label is the last of `label_bytes` before the pixels."""

    python_folder: str
    python_files: dict[str, Sequence[str]]
    binary_folder: str
    binary_files: dict[str, Sequence[str]]
    label_key: str
    label_bytes: int
    class_names: Sequence[str]

    def find(self, root: Path, split: str) -> tuple[list[Path], bool]:
        """Return the files of a split and whether they are pickles; no files where there is neither version.

        `root` is the folder of the archive or the one it was unpacked in.
        """
        versions = ((self.python_folder, self.python_files, True), (self.binary_folder, self.binary_files, False))
        for name, files, pickled in versions:
            for folder in (root, root / name):
                paths = [folder / file for file in files[split]]
                if any(path.is_file() for path in paths):
                    return paths, pickled
        return [], False

    def read(self, paths: Sequence[Path], pickled: bool) -> ImageArrays:
        """Read the files of a split; raises `DataError` for one that is missing, damaged or something else."""
        parts = [(self._read_pickle if pickled else self._read_binary)(path) for path in paths]
        for path, (_, labels) in zip(paths, parts, strict=True):
            if labels.min() < 0 or labels.max() >= len(self.class_names):
                wrong = labels.min() if labels.min() < 0 else labels.max()
                raise DataError(f"{path}: label {wrong}; expected 0 to {len(self.class_names) - 1}")
        pixels = np.concatenate([pixels for pixels, _ in parts]).reshape(-1, 3, 32, 32)
        file = np.repeat(np.arange(len(parts)), [len(labels) for _, labels in parts])
        images = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
        return ImageArrays(images, paths, file, np.concatenate([labels for _, labels in parts]))

    def _read_pickle(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        if not path.is_file():
            raise DataError(f"{path}: file not found")
        try:
            content = read_content(path)  # constructs arrays and plain values only
            pixels, labels = content["data"], np.asarray(content[self.label_key], dtype=np.int64)
            if pixels.dtype != np.uint8 or pixels.shape != (len(labels), PIXELS) or not len(labels):
                raise ValueError(f"{pixels.dtype} {pixels.shape} and {len(labels)} labels")
        except (CheckpointError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: cannot be read as a batch of CIFAR ({error})") from error
        return pixels, labels

    def _read_binary(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        if not path.is_file():
            raise DataError(f"{path}: file not found")
        values = np.fromfile(path, dtype=np.uint8)
        record = self.label_bytes + PIXELS
        if not len(values) or len(values) % record:
            raise DataError(f"{path}: {len(values)} bytes; expected a multiple of {record}, the size of one image")
        records = values.reshape(-1, record)
        return records[:, self.label_bytes :], records[:, self.label_bytes - 1].astype(np.int64)


CIFAR100_CLASSES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
    "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
    "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
    "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
    "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
    "willow_tree", "wolf", "woman", "worm",
)  # fmt: skip
CIFAR10_ARCHIVE = Archive(
    "cifar-10-batches-py",
    {"train": [f"data_batch_{number}" for number in range(1, 6)], "val": ["test_batch"]},
    "cifar-10-batches-bin",
    {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "val": ["test_batch.bin"]},
    label_key="labels",
    label_bytes=1,
    class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
)
CIFAR100_ARCHIVE = Archive(
    "cifar-100-python",
    {"train": ["train"], "val": ["test"]},
    "cifar-100-binary",
    {"train": ["train.bin"], "val": ["test.bin"]},
    label_key="fine_labels",
    label_bytes=2,  # the coarse label comes first
    class_names=CIFAR100_CLASSES,
)
