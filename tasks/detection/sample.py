"""Writes the sample data set of this task: scenes of real handwritten digits in the layout of COCO 2017."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle_api
from rich.console import Console
from rich.progress import track

from tasks.core.sample import (
    DIGIT_NAMES,
    INK,
    SUPERSAMPLING,
    average_blocks,
    digit_images,
    paint,
    render_digit,
    textured_background,
)

CATEGORY_IDS = (1, 2, 4, 7, 13, 27, 44, 65, 70, 90)  # of the digits 0 to 9; with gaps, as COCO's
EMPTY_SHARE = 0.05  # of the images, without any digit
CROWD_SHARE = 0.05  # of the images, with one region of many digits of one category
FIRST_IMAGE_ID = {"train": 1, "val": 500_001}


def categories() -> list[dict[str, Any]]:
    """The categories as annotation files hold them."""
    return [
        {"id": category_id, "name": name, "supercategory": "digit"}
        for name, category_id in zip(DIGIT_NAMES, CATEGORY_IDS, strict=True)
    ]


def write_sample(
    root: str | Path, num_train: int = 4000, num_val: int = 200, image_size: int = 96, seed: int = 0
) -> None:
    """Write `num_train` and `num_val` scenes below `root`, as COCO 2017 does.

    The longer side of a scene has `image_size` pixels, the shorter three quarters of it or as many. Digit images of the
    training scenes never occur in validation scenes.
    """
    root = Path(root)
    for split, count in (("train", num_train), ("val", num_val)):
        folder = root / f"{split}2017"
        folder.mkdir(parents=True, exist_ok=True)
        digits, labels = digit_images("train" if split == "train" else "val")
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        title = f"Writing sample scenes ({split})"
        for number in track(range(count), title, console=Console(stderr=True), transient=True):
            generator = np.random.default_rng((seed, split == "val", number))
            image, objects = draw_scene(generator, digits, labels, image_size)
            image_id = FIRST_IMAGE_ID[split] + number
            name = f"{image_id:012d}.jpg"
            cv2.imwrite(str(folder / name), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
            height, width = image.shape[:2]
            images.append({"id": image_id, "file_name": name, "height": height, "width": width})
            for record in objects:
                annotations.append({"id": len(annotations) + 1, "image_id": image_id} | record)
        content = {"images": images, "annotations": annotations, "categories": categories()}
        path = root / "annotations" / f"instances_{split}2017.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))


def draw_scene(
    generator: np.random.Generator, digits: np.ndarray, labels: np.ndarray, image_size: int
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Draw up to 5 light digits, and in a few scenes a crowd, on a dark textured background.

    Returns the image (height, width, 3) uint8 and the annotations, without `id` and `image_id`.
    """
    short = image_size * 3 // 4
    height, width = ((short, image_size), (image_size, short), (image_size, image_size))[generator.integers(3)]
    image = textured_background(generator, height, width)
    taken = np.zeros((height, width), dtype=bool)
    objects: list[dict[str, Any]] = []
    kind = generator.random()
    if kind < CROWD_SHARE:
        objects.append(_draw_crowd(generator, image, taken, digits, labels))
    if kind < 1 - EMPTY_SHARE:
        for _ in range(generator.integers(1, 6)):
            choice = int(generator.integers(len(labels)))
            side = int(generator.integers(short // 4, short * 3 // 4 + 1))
            top, left = int(generator.integers(height - side + 1)), int(generator.integers(width - side + 1))
            fine = _draw_digit(generator, image, taken, digits[choice], side, (top, left))
            if fine is not None:
                objects.append(_annotate(fine, (top, left), (height, width), int(labels[choice])))
    return image.round().clip(0, 255).astype(np.uint8), objects


def _draw_digit(
    generator: np.random.Generator,
    image: np.ndarray,
    taken: np.ndarray,
    digit: np.ndarray,
    side: int,
    position: tuple[int, int],
) -> np.ndarray | None:
    """Draw one digit unless it would hide another; returns its ink, `SUPERSAMPLING` times finer than pixels."""
    fine = render_digit(digit, side, generator.uniform(-15, 15), generator.uniform(-0.15, 0.15)) > INK
    coverage = average_blocks(fine)
    top, left = position
    window = taken[top : top + side, left : left + side]
    if (window & (coverage > 0.25)).any():
        return None
    paint(generator, image, coverage, top, left)
    window |= coverage > 0
    return fine


def _draw_crowd(
    generator: np.random.Generator, image: np.ndarray, taken: np.ndarray, digits: np.ndarray, labels: np.ndarray
) -> dict[str, Any]:
    """Draw many small digits of one category; returns one annotation of the region that they cover, as COCO does."""
    height, width = taken.shape
    label = int(generator.integers(10))
    side = min(height, width) // 7
    rows, columns = (int(v) for v in generator.integers(2, 4, 2))
    top, left = (int(generator.integers(limit - 3 * side + 1)) for limit in (height, width))
    region = np.zeros_like(taken)
    region[top : top + rows * side, left : left + columns * side] = True
    for row in range(rows):
        for column in range(columns):
            digit = digits[generator.choice(np.flatnonzero(labels == label))]
            _draw_digit(generator, image, taken, digit, side, (top + row * side, left + column * side))
    taken |= region
    runs = np.flatnonzero(np.diff(region.ravel(order="F"), prepend=False, append=False))
    counts = np.diff(runs, prepend=0, append=region.size)
    return {
        "category_id": CATEGORY_IDS[label],
        "iscrowd": 1,
        "bbox": [left, top, columns * side, rows * side],
        "area": rows * columns * side * side,
        "segmentation": {"size": [height, width], "counts": counts.tolist()},
    }


def _annotate(fine: np.ndarray, position: tuple[int, int], size: tuple[int, int], label: int) -> dict[str, Any]:
    """Annotate a digit by the polygons around its strokes; holes are not cut out, as in COCO."""
    outlines, _ = cv2.findContours(fine.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    # The outline joins the centres of fine pixels.
    corner = np.array(position[::-1])
    polygons = [((outline[:, 0] + 0.5) / SUPERSAMPLING + corner).round(2) for outline in outlines if len(outline) > 2]
    points = np.concatenate(polygons)
    least, most = points.min(axis=0), points.max(axis=0)
    segmentation = [polygon.ravel().tolist() for polygon in polygons]
    rle = rle_api.merge(rle_api.frPyObjects(segmentation, *size))
    return {
        "category_id": CATEGORY_IDS[label],
        "iscrowd": 0,
        "bbox": [*least.tolist(), *(most - least).round(2).tolist()],
        "area": float(rle_api.area(rle)),
        "segmentation": segmentation,
    }
