"""Figures of the report, drawn with matplotlib's objects: no pyplot, no state shared with the caller."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from tasks.core.report.document import Curve
from tasks.core.report.numbers import format_column

INK = "#3b4252"
COLOURS = ("#2f6fb5", "#d9822b", "#3f9b5f", "#b5477f", "#7a5fc0", "#8a8f98")
MAX_LINES = len(COLOURS)
MAX_BARS = 40
MAX_CLASSES_IN_MATRIX = 30
MAX_LEGEND = 11
MAX_NAME = 45  # letters; a confusion has two names
PANEL_WIDTH = 3.2  # inches


def curve_panels(curves: Mapping[str, Curve]) -> list[tuple[str, bytes]]:
    """One SVG per quantity, loss first and learning rate last: `train/loss` and `val/loss` share a panel.

    Curves of a single point are not drawn. The background is transparent.
    """
    groups: dict[str, dict[str, Curve]] = {}
    for name, points in curves.items():
        if len(points) > 1:
            groups.setdefault(_quantity(name), {})[name] = points
    order = sorted(groups, key=lambda title: (title != "loss", "loss" not in title, title == "learning rate", title))
    return [(title, _curve_panel(groups[title])) for title in order]


def class_bars(values: Mapping[str, float], label: str) -> bytes:
    """Bars of the classes that have a value, largest first, as PNG; of more than 40 the first and last 20."""
    known = [(name, value) for name, value in values.items() if not np.isnan(value)]
    ranked = sorted(known, key=lambda item: -item[1])
    if len(ranked) > MAX_BARS:
        half = MAX_BARS // 2
        ranked = [*ranked[:half], (f"… {len(ranked) - MAX_BARS} more …", float("nan")), *ranked[-half:]]
    figure = Figure(figsize=(6.6, 0.6 + 0.19 * len(ranked)), layout="constrained")
    axes = figure.add_subplot()
    numbers = [value for _, value in ranked]
    bars = axes.barh(range(len(ranked)), numbers, color=COLOURS[0], height=0.72)
    axes.set_yticks(range(len(ranked)), [_short(name) for name, _ in ranked])
    axes.bar_label(
        bars,
        ["" if np.isnan(value) else text for value, text in zip(numbers, format_column(numbers), strict=True)],
        padding=3,
        fontsize=7,
        color=INK,
    )
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.01)
    axes.set_xlabel(label)
    quiet(axes)
    axes.grid(False, axis="y")
    return png(figure)


def confusion_matrix(counts: NDArray[np.integer], classes: Sequence[str]) -> bytes:
    """Counts (K, K) [truth, prediction] as PNG: each row in per cent, or for many classes the largest confusions."""
    if len(classes) > MAX_CLASSES_IN_MATRIX:
        return _top_confusions(_row_shares(counts), classes)
    return _matrix(_row_shares(counts), classes)


def most_confused_matrix(counts: NDArray[np.integer], classes: Sequence[str]) -> bytes:
    """The part of a confusion matrix (K, K) with the 30 classes of its largest confusions; shares are of whole rows."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    pairs = np.argsort(-wrong, axis=None, kind="stable")[: MAX_CLASSES_IN_MATRIX**2]
    involved = dict.fromkeys(np.stack(np.divmod(pairs, len(classes)), axis=1).ravel().tolist())
    chosen = sorted(list(involved)[:MAX_CLASSES_IN_MATRIX])
    return _matrix(_row_shares(counts)[np.ix_(chosen, chosen)], [classes[index] for index in chosen])


def reliability_diagram(bins: NDArray[np.floating]) -> bytes:
    """Accuracy against confidence as PNG (Guo et al. 2017, figure 1), and below it how many samples have which.

    Args:
        bins: (M, 3) samples, hits and mean confidence of M bins of equal width in 0..1.
    """
    samples, hits, confidence = bins.T
    edges = np.linspace(0, 1, len(bins) + 1)
    figure = Figure(figsize=(4.4, 5.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = samples > 0
    left, width, right = edges[:-1][filled], np.diff(edges)[filled], confidence[filled]
    height = hits[filled] / samples[filled]
    upper.bar(left, height, width, align="edge", color=COLOURS[0], edgecolor="white", linewidth=0.8, label="accuracy")
    gap = {"facecolor": "none", "edgecolor": COLOURS[1], "hatch": "////", "linewidth": 0.8}
    label = "gap to the mean confidence"
    upper.bar(left, np.abs(height - right), width, np.minimum(height, right), align="edge", label=label, **gap)
    upper.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--")
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8, labelcolor=INK)
    share = 100 * samples / max(samples.sum(), 1)
    lower.bar(edges[:-1], share, np.diff(edges), align="edge", color=COLOURS[5], edgecolor="white", linewidth=0.8)
    lower.set(xlabel="confidence", ylabel="% of images", xlim=(0, 1))
    for axes in (upper, lower):
        quiet(axes)
        axes.yaxis.label.set(color=INK, fontsize=8)
    return png(figure)


def precision_recall_curves(
    panels: Mapping[str, Mapping[str, NDArray[np.floating]]], recall: NDArray[np.floating]
) -> bytes:
    """Precision at each `recall` (R,) as PNG: lines by label, in a panel by title; NaN where it is not defined.

    Panels have the same labels. One is drawn large, several in rows of four.
    """
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    size = (4.6, 3.5) if len(panels) == 1 else (2.4 * columns, 0.4 + 1.8 * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        for colour, (label, precision) in zip(COLOURS, lines.items(), strict=False):
            axes.plot(recall, precision, color=colour, linewidth=1.5, label=label)
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        axes.set_title(_short(title), fontsize=8, color=INK)
        quiet(axes)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel("recall", fontsize=8, color=INK)
    figure.supylabel("precision", fontsize=8, color=INK)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=6, frameon=False, fontsize=8, labelcolor=INK)
    return png(figure)


def _row_shares(counts: NDArray[np.integer]) -> NDArray[np.floating]:
    """Each row in per cent of its sum; a row of zeros stays."""
    return 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def _matrix(share: NDArray[np.floating], classes: Sequence[str]) -> bytes:
    size = 1.6 + 0.27 * len(classes)
    figure = Figure(figsize=(size + 0.6, size), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    names = [_short(name) for name in classes]
    axes.set_xticks(range(len(classes)), names, rotation=90)
    axes.set_yticks(range(len(classes)), names)
    axes.set_xlabel("predicted", fontsize=8, color=INK)
    axes.set_ylabel("true", fontsize=8, color=INK)
    axes.tick_params(length=0, labelsize=7, colors=INK)
    axes.spines[:].set_visible(False)
    for row, column in np.argwhere(share >= 0.5):
        ink = "white" if share[row, column] > 55 else INK
        axes.text(column, row, f"{share[row, column]:.0f}", ha="center", va="center", fontsize=6, color=ink)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, aspect=30, pad=0.02)
    bar.set_label("% of the true class", fontsize=7, color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=7, colors=INK)
    return png(figure)


def thumbnail(array: NDArray[np.uint8], longest_side: int = 320) -> NDArray[np.uint8]:
    """An RGB image (H, W, 3) or label map (H, W) made small enough to keep; labels are picked, never mixed."""
    height, width = array.shape[:2]
    scale = longest_side / max(height, width)
    if scale >= 1:
        return array.copy()
    size = max(1, round(width * scale)), max(1, round(height * scale))
    method = Image.Resampling.NEAREST if array.ndim == 2 else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(array).resize(size, method))


def overlay(
    image: NDArray[np.uint8], labels: NDArray[np.integer], palette: NDArray[np.uint8], ignore: int = 255
) -> NDArray[np.uint8]:
    """`image` (H, W, 3) tinted by the colour of each label (H, W); pixels labelled `ignore` stay as they are.

    Raises:
        ValueError: A label has no colour in `palette` (K, 3).
    """
    valid = labels != ignore
    if valid.any() and not 0 <= labels[valid].min() <= labels[valid].max() < len(palette):
        raise ValueError(
            f"labels {labels[valid].min()}..{labels[valid].max()}: expected 0..{len(palette) - 1} or {ignore}"
        )
    mixed = image.copy()
    mixed[valid] = (0.4 * image[valid] + 0.6 * palette[labels[valid]]).round().astype(np.uint8)
    return mixed


def side_by_side(
    image: NDArray[np.uint8],
    truth: NDArray[np.integer],
    prediction: NDArray[np.integer],
    palette: NDArray[np.uint8],
    classes: Sequence[str],
    ignore: int = 255,
) -> bytes:
    """Image (H, W, 3), ground truth (H, W) and prediction (H, W) as PNG, with a legend of the largest classes in them.

    Pixels that the ground truth ignores are left out of the legend.
    """
    scored = truth != ignore
    area = np.bincount(np.concatenate([truth[scored], prediction[scored]]), minlength=len(classes))[: len(classes)]
    present = [index for index in np.argsort(-area, kind="stable") if area[index]]
    handles = [Patch(facecolor=palette[index] / 255, label=classes[index][:24]) for index in present[:MAX_LEGEND]]
    if len(present) > MAX_LEGEND:
        handles.append(Patch(facecolor="none", label=f"+ {len(present) - MAX_LEGEND} more"))
    columns = 6
    legend_height = 0.1 + 0.19 * -(-len(handles) // columns)  # inches
    height, width = image.shape[:2]
    panel_height = PANEL_WIDTH * height / width
    figure = Figure(figsize=(3 * PANEL_WIDTH, panel_height + 0.27 + legend_height))
    total = figure.get_figheight()
    for column, (title, pixels) in enumerate(
        {
            "image": image,
            "ground truth": overlay(image, truth, palette, ignore),
            "prediction": overlay(image, prediction, palette, ignore),
        }.items()
    ):
        axes = figure.add_axes((column / 3 + 0.002, legend_height / total, 1 / 3 - 0.004, panel_height / total))
        axes.imshow(pixels)
        axes.set_title(title, fontsize=8.5, color=INK, pad=4)
        axes.set_axis_off()
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=columns,
        frameon=False,
        fontsize=7.5,
        labelcolor=INK,
        handlelength=1,
        handleheight=0.8,
        handletextpad=0.5,
        columnspacing=1.6,
        borderpad=0.2,
        borderaxespad=0,
    )
    return png(figure, dpi=110)


def _quantity(name: str) -> str:
    """The panel of a curve: its name without the stage, step and epoch."""
    if name.startswith(("lr-", "lr/")) or name == "lr":
        return "learning rate"
    quantity = name.split("/", 1)[-1].removesuffix("_step").removesuffix("_epoch")
    return "loss terms" if "loss" in quantity and quantity != "loss" else quantity


def _curve_panel(curves: Mapping[str, Curve]) -> bytes:
    lines: dict[tuple[tuple[int, float], ...], str] = {}
    for name, points in curves.items():
        lines.setdefault(tuple(points), name)  # parameter groups often share one learning rate
    figure = Figure(figsize=(5.2, 2.9), layout="constrained")
    axes = figure.add_subplot()
    for colour, (line, name) in zip(COLOURS, lines.items(), strict=False):
        steps, values = zip(*line, strict=True)
        marker = "o" if len(line) <= 40 else None
        axes.plot(steps, values, color=colour, linewidth=1.5, marker=marker, markersize=3, label=name)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.ticklabel_format(axis="y", scilimits=(-2, 5))
    axes.yaxis.get_offset_text().set(color=INK, fontsize=7)
    quiet(axes)
    title = f"{MAX_LINES} of {len(lines)}, all in report.json" if len(lines) > MAX_LINES else None
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, title=title, title_fontsize=7)
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "report"}):  # equal curves give equal files
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _top_confusions(share: NDArray[np.floating], classes: Sequence[str]) -> bytes:
    wrong = share.copy()
    np.fill_diagonal(wrong, 0)
    pairs = np.dstack(np.unravel_index(np.argsort(-wrong, axis=None, kind="stable")[:20], wrong.shape))[0]
    return class_bars(
        {f"{classes[true]} → {classes[predicted]}": float(wrong[true, predicted]) for true, predicted in pairs},
        "% of the true class predicted as the other",
    )


def _short(name: str) -> str:
    """The beginning of a long name; ImageNet has classes of 121 letters."""
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1].rstrip(' ,')}…"


def quiet(axes: Axes) -> None:
    """Axes that leave the eye to the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b8bec9")
    axes.grid(color="#b8bec9", alpha=0.4, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8, length=0)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=8)


def png(figure: Figure, dpi: int = 132) -> bytes:
    """Draw a figure as PNG, on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()
