"""Writes the sample data set of this task: scenes of real handwritten digits in the layout of ADE20K."""

from pathlib import Path

import cv2
import numpy as np
from rich.console import Console
from rich.progress import track

from tasks.core.sample import (
    DIGIT_NAMES,
    DIGIT_PALETTE,
    INK,
    average_blocks,
    digit_images,
    paint,
    render_digit,
    textured_background,
)

CLASS_NAMES = (*DIGIT_NAMES, "background")
PALETTE = (*DIGIT_PALETTE, (90, 90, 90))
BACKGROUND = len(CLASS_NAMES)  # as written to the annotation: train id + 1, where 0 means "other"


def write_sample(
    root: str | Path, num_train: int = 6000, num_val: int = 200, image_size: int = 64, seed: int = 0
) -> None:
    """Write `num_train` and `num_val` scenes of `image_size` pixels below `root`, as ADE20K does.

    Annotations hold 1..10 for the digits 0..9, 11 for background and 0 (other, ignored) on the antialiased borders.
    Digit images of the training scenes never occur in validation scenes.
    """
    root = Path(root)
    for folder, prefix, split, count in (
        ("training", "ADE_train", "train", num_train),
        ("validation", "ADE_val", "val", num_val),
    ):
        images, annotations = root / "images" / folder, root / "annotations" / folder
        images.mkdir(parents=True, exist_ok=True)
        annotations.mkdir(parents=True, exist_ok=True)
        digits, labels = digit_images(split)
        title = f"Writing sample scenes ({folder})"
        for number in track(range(1, count + 1), title, console=Console(stderr=True), transient=True):
            generator = np.random.default_rng((seed, split == "val", number))
            image, annotation = draw_scene(generator, digits, labels, image_size)
            name = f"{prefix}_{number:08d}"
            cv2.imwrite(str(images / f"{name}.jpg"), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
            cv2.imwrite(str(annotations / f"{name}.png"), annotation)
    rows = "".join(f"{number}\t{name}\n" for number, name in enumerate(CLASS_NAMES, start=1))
    (root / "objectInfo150.txt").write_text(f"Idx\tName\n{rows}")


def draw_scene(
    generator: np.random.Generator, digits: np.ndarray, labels: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw 2 to 4 light digits on a dark textured background.

    Returns image (size, size, 3) and annotation (size, size), uint8.
    """
    image = textured_background(generator, size, size)
    annotation = np.full((size, size), BACKGROUND, dtype=np.uint8)
    for _ in range(generator.integers(2, 5)):
        choice = int(generator.integers(len(labels)))
        side = int(generator.integers(size * 24 // 64, size * 36 // 64 + 1))
        ink = render_digit(digits[choice], side, generator.uniform(-15, 15), generator.uniform(-0.15, 0.15))
        coverage = average_blocks(ink > INK)  # (side, side), share of each pixel inside the digit
        top, left = (int(v) for v in generator.integers(0, size - side + 1, 2))
        _paste(generator, image, annotation, coverage, int(labels[choice]) + 1, (top, left))
    return image.round().clip(0, 255).astype(np.uint8), annotation


def _paste(
    generator: np.random.Generator,
    image: np.ndarray,
    annotation: np.ndarray,
    coverage: np.ndarray,
    value: int,
    position: tuple[int, int],
) -> None:
    """Paint one digit in a random light colour, unless it would hide much of an earlier digit."""
    top, left = position
    side = coverage.shape[0]
    window = (slice(top, top + side), slice(left, left + side))
    inside = coverage >= 0.75
    covered = annotation[window][inside]
    if np.count_nonzero((covered != BACKGROUND) & (covered != 0)) > 0.1 * covered.size:
        return
    paint(generator, image, coverage, top, left)
    annotation[window][(coverage > 0.25) & ~inside] = 0
    annotation[window][inside] = value
