"""What classification shows in the report."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tasks.core.evaluation import Sample
from tasks.core.report import Picture, ReportParts, Table
from tasks.core.report.figures import (
    MAX_CLASSES_IN_MATRIX,
    class_bars,
    confusion_matrix,
    most_confused_matrix,
    reliability_diagram,
    thumbnail,
)

PAIRS = 20
PICTURE_SIDE = 192


@dataclass(frozen=True)
class Case:
    """An image (H, W, 3) uint8, its label, the predicted class and that one's probability."""

    image: NDArray[np.uint8]
    label: int
    predicted: int
    probability: float


def distinct(names: Sequence[str]) -> list[str]:
    """Class names, those that occur more than once (ImageNet has two cranes) with their number."""
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({number})" for number, name in enumerate(names)]


def restored(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.uint8]:
    """A small uint8 copy (H, W, 3) of an image (3, H, W) that was normalised with `mean` and `std` of 0..1."""
    shape = (3, 1, 1)
    pixels = image.float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    return thumbnail((255 * pixels).round().clamp(0, 255).byte().permute(1, 2, 0).numpy(), PICTURE_SIDE)


def classification_report(results: Mapping[str, Any], names: Sequence[str]) -> ReportParts:
    """Tables and pictures of `ClassificationMetrics.compute()` with the samples ``best`` and ``worst``."""
    confusion, accuracy, f1 = results["confusion"], results["accuracy"], results["f1"]
    rows: list[list[str | int | float | None]] = [
        [name, 100 * float(accuracy[c]), 100 * float(f1[c]), int(confusion[c].sum())] for c, name in enumerate(names)
    ]
    tables = [Table("Classes", ["class", "accuracy %", "F1 %", "images"], rows)]
    if pairs := _confused_pairs(confusion, names):
        tables.append(Table("Most confused pairs", ["true", "predicted", "images", "% of the true class"], pairs))
    chart = class_bars({name: 100 * float(accuracy[c]) for c, name in enumerate(names)}, "accuracy %")
    calibration = f"Expected calibration error {100 * float(results['ece']):.2f} %"
    pictures = [
        Picture("Reliability", calibration, reliability_diagram(results["bins"])),
        Picture("Per-class accuracy", "", chart),
    ]
    if len(names) > MAX_CLASSES_IN_MATRIX:
        caption = f"The {MAX_CLASSES_IN_MATRIX} classes of the most frequent confusions"
        pictures.append(Picture("Confusion matrix", caption, most_confused_matrix(confusion, names)))
    else:
        pictures.append(Picture("Confusion matrix", "", confusion_matrix(confusion, names)))
    for title, samples in (("Best images", results["best"]), ("Worst images", results["worst"])):
        pictures += [_case_picture(title, sample, names) for sample in samples]
    return ReportParts(tables, pictures)


def _confused_pairs(confusion: NDArray[np.integer], names: Sequence[str]) -> list[list[str | int | float | None]]:
    """The most frequent wrong predictions: label, prediction, their number and its share of the label's images."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    found: list[list[str | int | float | None]] = []
    for place in np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]:
        true, predicted = divmod(int(place), len(names))
        count = int(wrong[true, predicted])
        if count:
            found.append([names[true], names[predicted], count, 100 * count / int(confusion[true].sum())])
    return found


def _case_picture(title: str, sample: Sample, names: Sequence[str]) -> Picture:
    case: Case = sample.payload
    caption = f"{sample.id}: {names[case.label]} with probability {sample.score:.3f}"
    if case.predicted != case.label:
        caption += f"; predicted {names[case.predicted]} with {case.probability:.3f}"
    height, width = case.image.shape[:2]
    factor = max(1, PICTURE_SIDE // max(height, width))
    buffer = io.BytesIO()
    Image.fromarray(case.image).resize((width * factor, height * factor), Image.Resampling.NEAREST).save(buffer, "PNG")
    return Picture(title, caption, buffer.getvalue())
