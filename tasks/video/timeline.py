"""A picture of what was found in one video: the actions along time, below some of its frames."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tasks.core.report.figures import COLOURS, INK, png
from tasks.video.predictions import SHOWN_FROM, Detections

FRAMES = 12  # above the timeline
MAX_CLASSES = 20
MAX_NAME = 30  # letters
MIN_LABELLED = 0.03  # of the width, for a score to fit into a bar
GREY = "#b8bec9"


def action_timeline(
    id: str,
    found: Detections,
    class_names: Sequence[str],
    duration: float,
    frames: NDArray[np.uint8] | None = None,
    threshold: float = SHOWN_FROM,
) -> tuple[str, bytes]:
    """The detections of one video of `duration` seconds that score at least `threshold`, one row per class.

    `frames` (n, H, W, 3) are from the middles of n equal parts of the video. Of more than 20 classes those of the
    highest scores are drawn.
    """
    shown = found["scores"] >= threshold
    segments, scores, labels = (np.asarray(found[name])[shown] for name in ("segments", "scores", "labels"))
    order = np.argsort(-scores, kind="stable")
    classes = list(dict.fromkeys(labels[order].tolist()))[:MAX_CLASSES]
    heights = [0.0 if frames is None else 1.0, 0.35 + 0.32 * max(len(classes), 1)]
    figure = Figure(figsize=(12, sum(heights) + 0.75), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[max(heights[0], 1e-3), heights[1]])
    axes = figure.add_subplot(grid[1])
    if frames is not None:
        _strip(figure.add_subplot(grid[0], sharex=axes), frames, duration)
    for label_row, label in enumerate(classes):
        colour = COLOURS[label_row % len(COLOURS)]
        for i in order[::-1]:  # the best on top
            if labels[i] == label:
                _bar(axes, label_row, segments[i].tolist(), float(scores[i]), colour, duration)
    if not classes:
        axes.text(duration / 2, 0, f"no action scores {threshold:.0%}", ha="center", va="center", color=INK)
    axes.set_xlim(0, duration)
    axes.set_ylim(max(len(classes), 1) - 0.5, -0.5)
    axes.set_yticks(range(len(classes)), [class_names[label][:MAX_NAME] for label in classes])
    axes.set_xlabel("seconds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.grid(axis="x", color=GREY, alpha=0.4, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.xaxis.label.set(color=INK, fontsize=8)
    figure.suptitle(id, fontsize=10, color=INK)
    return f"{id}.png", png(figure, dpi=110)


def _bar(axes: Axes, row: int, segment: Sequence[float], score: float, colour: str, duration: float) -> None:
    start, end = segment
    axes.barh(row, end - start, 0.7, start, color=(colour, 0.25 + 0.6 * min(score, 1)), edgecolor=colour)
    if end - start >= MIN_LABELLED * duration:
        middle = (start + end) / 2
        axes.text(middle, row, f"{score:.0%}", ha="center", va="center", fontsize=7, color=INK, clip_on=True)


def _strip(axes: Axes, frames: NDArray[np.uint8], duration: float) -> None:
    """The frames side by side, each in the middle of its part of the time axis."""
    width = duration / len(frames)
    for i, frame in enumerate(frames):
        axes.imshow(frame, extent=(i * width, (i + 1) * width, 0, 1), aspect="auto", interpolation="nearest")
    axes.set_ylim(0, 1)
    axes.axis("off")
