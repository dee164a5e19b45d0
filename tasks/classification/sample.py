"""Writes the sample data set of this task: real handwritten digits in folders named like their classes."""

from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from tasks.core.sample import DIGIT_NAMES, average_blocks, digit_images, render_digit, textured_background


def write_sample(root: Path, image_size: int = 32, seed: int = 0) -> None:
    """Write 1797 images of `image_size` pixels as ``root/{train,val}/<digit>/<number>.png``; no digit is in both."""
    splits: tuple[Literal["train", "val"], ...] = ("train", "val")
    for split in splits:
        for name in DIGIT_NAMES:
            (root / split / name).mkdir(parents=True, exist_ok=True)
        for number, (digit, label) in enumerate(zip(*digit_images(split), strict=True)):
            generator = np.random.default_rng((seed, split == "val", number))
            image = draw_digit(generator, digit, image_size)
            cv2.imwrite(str(root / split / DIGIT_NAMES[label] / f"{number:04d}.png"), image[..., ::-1])


def draw_digit(generator: np.random.Generator, digit: np.ndarray, size: int) -> np.ndarray:
    """Draw an 8 x 8 digit in a light colour on a dark textured background; returns uint8 (size, size, 3)."""
    coverage = average_blocks(render_digit(digit, size, angle=0.0))[..., None]
    background = textured_background(generator, size, size)
    colour = generator.uniform(150, 255, 3).astype(np.float32)
    return (background + coverage * (colour - background)).round().clip(0, 255).astype(np.uint8)
