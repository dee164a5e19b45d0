"""Finding and reading images; whatever is wrong with a file is one `DataError` that names it."""

import colorsys
import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tasks.core.data import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def read_image(path: Path) -> np.ndarray:
    """Read an 8-bit image of any colour mode as RGB uint8 (H, W, 3), turned upright as its EXIF data says."""
    return np.asarray(open_rgb(path))


def open_rgb(path: Path, upright: bool = True) -> Image.Image:
    """Read an 8-bit image of any colour mode as RGB; turned upright as its EXIF data says, or as it is stored."""
    with decoded_image(path) as image:
        if image.mode.startswith(("I", "F")):
            raise DataError(f"{path}: pixels of 16 or 32 bits (mode {image.mode}); expected an 8-bit image")
        return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")


@contextmanager
def decoded_image(path: Path) -> Iterator[Image.Image]:
    """Open and decode an image file; raises `DataError` for one that is missing, damaged or something else."""
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError as error:
        raise DataError(f"{path}: file not found") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image ({error})") from error
    with image:
        yield image


def list_images(folder: Path) -> list[Path]:
    """Return the image files below a folder, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def find_images(images: str) -> tuple[Path, list[Path]]:
    """Return the images named by a folder, a file or a glob pattern, and the folder that holds them all.

    Raises `DataError` if there are none.
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
    return path if path.is_dir() else Path(os.path.commonpath([match.parent for match in paths])), paths


def named_images(images: str) -> dict[str, Path]:
    """Return the images named by a folder, a file or a glob pattern by their unique ids, in order.

    Ids are paths, without suffix, relative to the folder that holds them all. Raises `DataError` if there are none or
    two have the same id.
    """
    folder, paths = find_images(images)
    named: dict[str, Path] = {}
    for path in paths:
        first = named.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
        if first != path:
            raise DataError(f"{path} and {first} would have the same prediction file; rename one")
    return named


def resized_size(height: int, width: int, short_side: int, max_long_side: int) -> tuple[int, int]:
    """Return (height, width) with the shorter side at `short_side`, unless the longer would exceed `max_long_side`."""
    scale = short_side / min(height, width)
    if max(height, width) * scale > max_long_side:
        scale = max_long_side / max(height, width)
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def distinct_colour(index: int) -> tuple[int, int, int]:
    """Return the RGB colour of a class that has none of its own."""
    # Steps of the golden ratio keep any number of hues apart.
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.75 if index % 2 else 0.55, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)
