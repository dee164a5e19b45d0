"""Pictures of the objects in an image: boxes and masks with names and scores, ground truth beside prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from tasks.core.report.figures import INK, png

PANEL_WIDTH = 4.8  # inches
MAX_PANEL_HEIGHT = 6.4
NAME_HEIGHT = 0.13  # inches
NO_OBJECT = -1
DASHED = (0, (3, 1.6))


@dataclass(frozen=True)
class Objects:
    """Objects in the pixels of an image (h, w).

    Attributes:
        boxes: (n, 4) xyxy.
        labels: (n,) class indices.
        wrong: (n,) bool: objects that were not found, or detections of nothing; drawn with dashed lines.
        scores: (n,) confidence, or None for ground truth.
        masks: (h, w) int16, index of the object that a pixel belongs to or `NO_OBJECT`; None without masks.
    """

    boxes: NDArray[np.floating]
    labels: NDArray[np.integer]
    wrong: NDArray[np.bool_]
    scores: NDArray[np.floating] | None = None
    masks: NDArray[np.int16] | None = None


def truth_and_prediction(
    image: NDArray[np.uint8],
    truth: Objects,
    predicted: Objects,
    palette: NDArray[np.uint8],
    classes: Sequence[str],
) -> bytes:
    """Draw the objects of `image` (h, w, 3) and what was predicted as PNG, in the colours (K, 3) of their classes."""
    height, width = image.shape[:2]
    panel_height = min(PANEL_WIDTH * height / width, MAX_PANEL_HEIGHT)
    title_height, legend_height = 0.27, 0.24
    total = panel_height + title_height + legend_height
    figure = Figure(figsize=(2 * PANEL_WIDTH, total))
    panels = {"ground truth": truth, "prediction": predicted}
    for column, (title, objects) in enumerate(panels.items()):
        place = (column / 2 + 0.002, legend_height / total, 1 / 2 - 0.004, panel_height / total)
        axes = figure.add_axes(place)
        pixels_per_inch = max(width / PANEL_WIDTH, height / panel_height)
        _draw(axes, image, objects, palette, classes, pixels_per_inch)
        axes.set_title(title, fontsize=8.5, color=INK, pad=4)
    lines = [
        Line2D([], [], color=INK, linestyle="-", label="found, correct"),
        Line2D([], [], color=INK, linestyle=DASHED, label="not found, false"),
    ]
    figure.legend(
        handles=lines, loc="lower center", ncols=2, frameon=False, fontsize=7.5, labelcolor=INK, borderaxespad=0
    )
    return png(figure, dpi=110)


def _draw(
    axes: Axes,
    image: NDArray[np.uint8],
    objects: Objects,
    palette: NDArray[np.uint8],
    classes: Sequence[str],
    pixels_per_inch: float,
) -> None:
    axes.imshow(_tinted(image, objects, palette))
    axes.set_axis_off()
    line = NAME_HEIGHT * pixels_per_inch
    height, width = image.shape[:2]
    taken: list[tuple[float, float, float]] = []  # left, right and top of the names drawn so far
    for i in range(len(objects.boxes))[::-1]:  # the best detection is drawn last, above the others
        left, top, right, bottom = (float(side) for side in objects.boxes[i])
        colour = palette[objects.labels[i]] / 255
        # A light rim shows the line on any ground.
        for edge, thickness in (("white", 2.6), (colour, 1.5)):
            axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=edge, lw=thickness))
        if objects.wrong[i]:
            axes.patches[-1].set_linestyle(DASHED)
    for i in range(len(objects.boxes)):
        left, top = (float(side) for side in objects.boxes[i][:2])
        text = classes[objects.labels[i]][:20].rstrip()
        if objects.scores is not None:
            text += f" {100 * objects.scores[i]:.0f}"
        extent = 0.43 * line * len(text)
        left = min(max(left, 0), max(width - extent, 0))
        top = _free_place(taken, left, left + extent, top - line if top >= line else top, line, height)
        taken.append((left, left + extent, top))
        colour = palette[objects.labels[i]] / 255
        axes.text(
            left, top, text, fontsize=6.5, va="top", ha="left", color=_ink_on(colour),
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.9},
        )  # fmt: skip
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def _free_place(
    taken: list[tuple[float, float, float]], left: float, right: float, top: float, line: float, height: int
) -> float:
    """The first place for a name, from `top` down, where it covers no other; `top` if there is none in the image."""
    place = top
    while any(left < end and start < right and abs(place - y) < line for start, end, y in taken):
        place += line
        if place > height - line:
            return top
    return place


def _tinted(image: NDArray[np.uint8], objects: Objects, palette: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if objects.masks is None:
        return image
    inside = objects.masks != NO_OBJECT
    tinted = image.copy()
    colours = palette[objects.labels[objects.masks[inside]]]
    tinted[inside] = (0.5 * image[inside] + 0.5 * colours).round().astype(np.uint8)
    return tinted


def _ink_on(colour: NDArray[np.floating]) -> str:
    """Black or white, whichever is legible on `colour` (3,) in 0..1."""
    return "white" if colour @ np.array([0.299, 0.587, 0.114]) < 0.6 else "black"
