"""Parts of the embedded sample data sets: real handwritten digits, drawing primitives, a cache written atomically.

The digits are the 1797 test images of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak; UCI),
8 x 8 pixels with 17 grey levels, shipped with scikit-learn.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

SUPERSAMPLING = 3
INK = 0.45  # an upscaled digit is solid where its ink exceeds this share of the maximum

DIGIT_NAMES = tuple(str(digit) for digit in range(10))
DIGIT_PALETTE = (
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (0, 130, 200),
    (245, 130, 48),
    (145, 30, 180),
    (70, 240, 240),
    (240, 50, 230),
    (170, 110, 40),
    (0, 128, 128),
)


@cache
def digit_images(split: Literal["train", "val"]) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, 8, 8) float32 in [0, 1] and labels (N,) int64 of one split.

    A fixed fifth of the images of each digit is for validation; no image is in both splits.
    """
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    shuffled = np.random.default_rng(0).permutation(len(digits.target))
    # Position of each image among the shuffled images of its own class.
    position = np.empty(len(digits.target), dtype=np.int64)
    for label in range(10):
        members = shuffled[digits.target[shuffled] == label]
        position[members] = np.arange(len(members))
    chosen = (position % 5 == 0) == (split == "val")
    return (digits.images[chosen] / 16).astype(np.float32), digits.target[chosen]


def render_digit(image: np.ndarray, size: int, angle: float, shear: float = 0.0) -> np.ndarray:
    """Draw an 8 x 8 digit in a square of `size` pixels, turned by `angle` degrees; returns float32 ink in [0, 1].

    The result is `SUPERSAMPLING` times larger than asked for in both directions, so that thresholding it and
    `average_blocks` give antialiased shapes. What turns out of the square is cut.
    """
    # Enlarging by cubic interpolation and then warping bilinearly costs a fifth of a cubic warp.
    enlarge = _cubic_weights(image.shape[0], 64)
    smooth = enlarge @ image @ enlarge.T
    side = size * SUPERSAMPLING
    cosine, sine = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    matrix = side / smooth.shape[0] * np.array([[cosine, -sine + shear], [sine, cosine]])
    centre_before, centre_after = (smooth.shape[0] - 1) / 2, (side - 1) / 2
    offset = centre_after - matrix @ np.array([centre_before, centre_before])
    drawn = cv2.warpAffine(smooth, np.column_stack([matrix, offset]), (side, side), flags=cv2.INTER_LINEAR)
    return drawn.clip(0, 1)


@cache
def _cubic_weights(before: int, after: int) -> np.ndarray:
    """Matrix (after, before) that resizes one axis by cubic interpolation; for small images faster than OpenCV."""
    return cv2.resize(np.eye(before, dtype=np.float32), (before, after), interpolation=cv2.INTER_CUBIC)


def average_blocks(image: np.ndarray, factor: int = SUPERSAMPLING) -> np.ndarray:
    """Shrink (H, W) by averaging `factor` x `factor` blocks."""
    height, width = image.shape[0] // factor, image.shape[1] // factor
    return cv2.resize(image.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)


def paint(generator: np.random.Generator, image: np.ndarray, coverage: np.ndarray, top: int, left: int) -> None:
    """Paint a shape of one random light colour, with grain, into (H, W, 3); `coverage` (h, w) is each pixel's share."""
    height, width = coverage.shape
    window = image[top : top + height, left : left + width]
    colour = generator.uniform(150, 255, 3)
    grain = 6 * generator.standard_normal((height, width, 1), dtype=np.float32)
    window += coverage[..., None] * (colour.astype(np.float32) + grain - window)


def textured_background(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw a smooth field of a dark random colour with grain; float32 (height, width, 3) in [0, 255]."""
    cells = int(generator.integers(2, 6))
    colour = generator.uniform(20, 110, 3)
    field = colour + generator.normal(0, generator.uniform(5, 30), (cells, cells, 3))
    rows = (_cubic_weights(cells, height) @ field.astype(np.float32).reshape(cells, -1)).reshape(height, cells, 3)
    smooth = _cubic_weights(cells, width) @ rows
    grain = generator.standard_normal((height, width, 1), dtype=np.float32) * generator.uniform(2, 12)
    return np.clip(smooth + grain, 0, 255).astype(np.float32)


def cache_folder(name: str) -> Path:
    """Return `$XDG_CACHE_HOME/frugal/<name>` (or below `~/.cache`); nothing is created."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "frugal" / name


def write_folder_once(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder that then becomes `target`; do nothing if `target` exists.

    Safe with several processes: each writes its own folder and the first to finish wins.
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write(temporary)
        temporary.chmod(0o755)
        os.replace(temporary, target)
    except OSError:
        if not target.exists():  # otherwise another process was first, with the same content
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
