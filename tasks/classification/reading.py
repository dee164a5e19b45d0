"""Labelled images on disk or in memory, and finding them in folders named like their classes."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tasks.core.images import IMAGE_SUFFIXES, open_rgb


@dataclass(frozen=True)
class ImageFiles:
    """Image files below `folder`; `labels` (N,) int64 is None where there are none.

    A million paths are kept as one array, not as a million objects: loader processes would copy those while they count
    references to them.
    """

    folder: Path
    names: np.ndarray  # (N,) bytes, UTF-8, relative to the folder, with / between folders
    labels: np.ndarray | None = None
    upright: bool = True  # turn images as their EXIF data says

    @classmethod
    def of(
        cls, folder: Path, names: Sequence[str], labels: Sequence[int] | None = None, upright: bool = True
    ) -> "ImageFiles":
        """Make the arrays from lists."""
        encoded = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        return cls(folder, encoded, None if labels is None else np.array(labels, dtype=np.int64), upright)

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> Image.Image:
        """Read one image as RGB."""
        return open_rgb(self.path(index), self.upright)

    def id(self, index: int) -> str:
        """Return the path below the folder, with its suffix."""
        return os.fsdecode(self.names[index])

    def path(self, index: int) -> Path:
        """Return the whole path."""
        return self.folder / self.id(index)

    def origin(self, index: int) -> str:
        """Return the whole path as text."""
        return str(self.path(index))

    def digest(self, index: int) -> str:
        """Hash the bytes of the file."""
        return hashlib.sha256(self.path(index).read_bytes()).hexdigest()


@dataclass(frozen=True)
class ImageArrays:
    """Images (N, H, W, 3) uint8 in memory; `file` (N,) says from which of `paths` each was read."""

    images: np.ndarray
    paths: Sequence[Path]
    file: np.ndarray
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image.Image:
        """Return one image."""
        return Image.fromarray(self.images[index])

    def id(self, index: int) -> str:
        """Return the number of the image, counted from 0."""
        return f"{index:05d}"

    def origin(self, index: int) -> str:
        """Say in which file the image is."""
        return f"{self.paths[self.file[index]]}, image {self.id(index)} of the split"

    def digest(self, index: int) -> str:
        """Hash the pixels."""
        return hashlib.sha256(self.images[index].tobytes()).hexdigest()


LabelledImages = ImageFiles | ImageArrays


def class_folders(folder: Path) -> list[str]:
    """Return the names of the folders in `folder`, sorted as Python sorts text; hidden ones are left out."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def images_below(folder: Path) -> list[str]:
    """Return the images at any depth below `folder`, relative to it with ``/``, sorted; hidden files are left out."""
    found: list[str] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inner = Path(parent).relative_to(folder).as_posix()
        prefix = "" if inner == "." else f"{inner}/"
        found += [
            prefix + name
            for name in files
            if name[name.rfind(".") :].lower() in IMAGE_SUFFIXES and not name.startswith(".")
        ]
    return sorted(found)


def list_classes(folder: Path, classes: Sequence[str], upright: bool = True) -> tuple[ImageFiles, list[str]]:
    """List the images of ``folder/<class>/**`` for each of `classes`, and what is wrong.

    The label is the place of the class in `classes`. Ids are ``<class>/<path>``.
    """
    present = class_folders(folder)
    problems = [
        f"{folder / name}: a class that is not expected; expected {_few(classes)}"
        for name in present
        if name not in set(classes)
    ]
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = images_below(folder / name)
        if not found:
            what = "contains no images" if name in set(present) else "folder not found"
            problems.append(f"{folder / name}: {what}; expected images of every class in every split")
        names += [f"{name}/{path}" for path in found]
        labels += [label] * len(found)
    return ImageFiles.of(folder, names, labels, upright), problems


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names)} classes)" if len(names) > 3 else "")
