"""Writes the sample data set of this task: moving handwritten digits as real video files in the layout of THUMOS14.

The action is how a digit moves, never which digit it is; background is a digit that stands still or drifts. Two videos
of a split may show the same digit image, but no image occurs in both splits.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from tasks.core.sample import average_blocks, digit_images, render_digit, textured_background
from tasks.video.decoding import import_av

CLASS_NAMES = ("Shake", "Bounce", "Circle", "Zoom", "Spin")
FPS = 20  # of the files; every other frame is sampled
SAMPLE_FPS = 10
SECONDS = 30
FRAME_SIZE = 32
CLIP_TENTHS = 32
ENCODER = "mpeg4"  # part of FFmpeg itself, and so of every build
BIT_RATE = 300_000


class Action(NamedTuple):
    """One instance: the digit moves like `label` from `start` to `end`, in tenths of a second."""

    label: int
    start: int
    end: int


def write_sample(
    root: str | Path, num_train: int = 60, num_val: int = 20, seconds: int = SECONDS, seed: int = 0
) -> None:
    """Write `num_train` and `num_val` videos of about `seconds` seconds below `root`, and their annotations."""
    root = Path(root)
    classes = "".join(f"{index} {name}\n" for index, name in enumerate(CLASS_NAMES, start=1))
    (root / "videos").mkdir(parents=True, exist_ok=True)
    (root / "Class Index_Detection.txt").write_text(classes)
    for split, name, part, count in (("train", "validation", "val", num_train), ("val", "test", "test", num_val)):
        digits, _ = digit_images(split)
        annotations: list[Sequence[object]] = [("video", "type", "type_idx", "start", "end", "startFrame", "endFrame")]
        infos: list[Sequence[object]] = [("video", "fps", "sample_fps", "count", "sample_count")]
        title = f"Writing sample videos ({name})"
        for number in track(range(1, count + 1), title, console=Console(stderr=True), transient=True):
            generator = np.random.default_rng((seed, split == "val", number))
            id = f"video_{name}_{number:07d}"
            length = int(generator.integers(8 * seconds, 12 * seconds + 1))  # tenths of a second
            actions = choose_actions(generator, length)
            digit = digits[int(generator.integers(len(digits)))]
            frames = draw_video(generator, digit, actions, length * FPS // 10)
            encode(frames, root / "videos" / name / f"{id}.mp4")
            for label, start, end in actions:
                times = (start / 10, end / 10, start * FPS // 10, end * FPS // 10)
                annotations.append((id, CLASS_NAMES[label], label + 1, *times))
            infos.append((id, float(FPS), float(SAMPLE_FPS), float(length * FPS // 10), length * SAMPLE_FPS // 10))
        for rows, end_of_name in ((annotations, "Annotation"), (infos, "video_info")):
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(rows)
            (root / f"{part}_{end_of_name}.csv").write_text(text.getvalue())


def choose_actions(generator: np.random.Generator, length: int) -> list[Action]:
    """Actions of 1 to 4 seconds with 1 to 3 seconds of background around each, in a video of `length` tenths."""
    actions = []
    start = int(generator.integers(10, 31))
    while (end := start + int(generator.integers(10, 41))) <= length - 10:
        actions.append(Action(int(generator.integers(len(CLASS_NAMES))), start, end))
        start = end + int(generator.integers(10, 31))
    return actions


def draw_video(
    generator: np.random.Generator, digit: NDArray[np.float32], actions: Sequence[Action], num_frames: int
) -> Iterator[NDArray[np.uint8]]:
    """Draw frames (32, 32, 3) of a light digit on a dark textured ground."""
    ground = textured_background(generator, FRAME_SIZE, FRAME_SIZE)
    colour = generator.uniform(170, 255, 3).astype(np.float32)
    ink = average_blocks(render_digit(digit, 64, generator.uniform(-15, 15)))
    size = generator.uniform(0.22, 0.3)  # pixels of the frame per pixel of the ink
    for x, y, scale, angle in _motion(generator, actions, num_frames):
        matrix = np.asarray(cv2.getRotationMatrix2D((31.5, 31.5), angle, size * scale), dtype=np.float64)
        matrix[:, 2] += np.array([x, y]) - 31.5
        # Drawn twice as large and averaged, so that small movements show.
        coverage = average_blocks(cv2.warpAffine(ink, 2 * matrix, (2 * FRAME_SIZE, 2 * FRAME_SIZE)), 2)[..., None]
        yield (ground + coverage * (colour - ground)).round().clip(0, 255).astype(np.uint8)


def _motion(
    generator: np.random.Generator, actions: Sequence[Action], num_frames: int
) -> Iterator[tuple[float, float, float, float]]:
    """Centre in pixels, scale and angle in degrees of the digit in every frame."""
    x, y = generator.uniform(12, 19, 2)
    drift = np.zeros(2)
    of_frame = {f: a for a in actions for f in range(a.start * FPS // 10, a.end * FPS // 10)}
    phase, frequency, sign = 0.0, 0.0, 1.0
    for frame in range(num_frames):
        action = of_frame.get(frame)
        if action is None:
            if frame % FPS == 0 or of_frame.get(frame - 1) is not None:
                # Half of the time it stands; it stays in the middle.
                moves = generator.random() < 0.5
                drift = generator.uniform(-2, 2, 2) / FPS if moves else np.zeros(2)
            x, y = np.clip(x + drift[0], 12, 19), np.clip(y + drift[1], 12, 19)
            yield x, y, 1, 0
            continue
        if of_frame.get(frame - 1) is not action:
            phase, frequency = 0.0, generator.uniform(1.0, 1.6)
            sign = generator.choice([-1.0, 1.0])
        phase += 2 * np.pi * frequency / FPS
        wave, turn = sign * np.sin(phase), np.cos(phase)
        yield (
            (x + 6 * wave, y, 1, 0),
            (x, y + 6 * wave, 1, 0),
            (x + 4 * wave, y + 4 * (turn - 1), 1, 0),
            (x, y, 1 + 0.45 * wave, 0),
            (x, y, 1, sign * np.degrees(phase)),
        )[action.label]


def encode(frames: Iterator[NDArray[np.uint8]], path: Path) -> None:
    """Write frames (H, W, 3) as an mp4 file."""
    av = import_av()
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(ENCODER, rate=Fraction(FPS))
        stream.width = stream.height = FRAME_SIZE
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = BIT_RATE
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_clips(root: str | Path, num_train: int = 80, num_val: int = 20, seed: int = 0) -> None:
    """Write `num_train` and `num_val` clips per class, each of one motion, in folders named like the classes."""
    root = Path(root)
    for split, count in (("train", num_train), ("val", num_val)):
        digits, _ = digit_images(split)
        title = f"Writing sample clips ({split})"
        numbers = [(label, number) for label in range(len(CLASS_NAMES)) for number in range(count)]
        for label, number in track(numbers, title, console=Console(stderr=True), transient=True):
            generator = np.random.default_rng((seed, 2 + (split == "val"), label, number))
            digit = digits[int(generator.integers(len(digits)))]
            frames = draw_video(generator, digit, [Action(label, 0, CLIP_TENTHS)], CLIP_TENTHS * FPS // 10)
            encode(frames, root / split / CLASS_NAMES[label] / f"{number:04d}.mp4")
