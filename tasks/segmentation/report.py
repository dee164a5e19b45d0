"""What segmentation shows in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tasks.core.evaluation import Sample
from tasks.core.report import Picture, ReportParts, Table
from tasks.core.report.figures import class_bars, confusion_matrix, side_by_side, thumbnail


class Case(NamedTuple):
    """An image (h, w, 3) and its label maps (h, w), all uint8."""

    image: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    predicted: NDArray[np.uint8]


def small_copies(image: Tensor, truth: Tensor, predicted: Tensor) -> Case:
    """Copies of an image (3, h, w) and of label maps (H, W), small enough to keep and of one size."""
    truth_map, predicted_map = (thumbnail(labels.cpu().numpy().astype(np.uint8)) for labels in (truth, predicted))
    resized = F.interpolate(image[None].float(), size=truth_map.shape, mode="bilinear", antialias=True)[0]
    return Case(resized.round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy(), truth_map, predicted_map)


def segmentation_report(
    results: Mapping[str, Any], names: Sequence[str], palette: Sequence[tuple[int, int, int]]
) -> ReportParts:
    """Tables and pictures of `SegmentationMetrics.compute()` with the samples ``best`` and ``worst``."""
    iou, accuracy, confusion = results["IoU"], results["Acc"], results["confusion"]
    share = confusion.sum(axis=1) / max(confusion.sum(), 1)
    rows: list[list[str | int | float | None]] = [
        [name, 100 * float(iou[c]), 100 * float(accuracy[c]), 100 * float(share[c])] for c, name in enumerate(names)
    ]
    pictures = [
        Picture("Per-class IoU", "", class_bars(dict(zip(names, iou.tolist(), strict=True)), "IoU")),
        Picture("Confusion matrix", "", confusion_matrix(confusion, names)),
    ]
    colours = np.asarray(palette, dtype=np.uint8)
    for title, samples in (("Best images", results["best"]), ("Worst images", results["worst"])):
        pictures += [_case_picture(title, sample, colours, names) for sample in samples]
    return ReportParts([Table("Classes", ["class", "IoU %", "accuracy %", "pixels %"], rows)], pictures)


def _case_picture(title: str, sample: Sample, palette: NDArray[np.uint8], names: Sequence[str]) -> Picture:
    case: Case = sample.payload
    caption = f"{sample.id}: mean IoU {100 * sample.score:.1f} %"
    return Picture(title, caption, side_by_side(case.image, case.truth, case.predicted, palette, names))
