"""What detection shows in the report: AP by class and size, precision and recall, mistakes, best and worst images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from pycocotools import mask as rle
from torch import Tensor

from tasks.core.evaluation import Sample
from tasks.core.report import Picture, ReportParts, Table
from tasks.core.report.figures import class_bars, precision_recall_curves
from tasks.core.report.objects import NO_OBJECT, Objects, truth_and_prediction
from tasks.detection.masks import to_rle
from tasks.detection.matching import KINDS, MIN_SCORE, OBJECTS, Matches, Truth
from tasks.detection.metrics import COCO_NAMES, IOU_50, IOU_75, class_means
from tasks.detection.network import Record

RECALL = np.linspace(0, 1, 101)  # axis R of precision
SIZES = {"all": "", "small": "below 32² pixels", "medium": "32² to 96²", "large": "above 96²"}  # axis A
KIND_NAMES = {official: ours for ours, official in COCO_NAMES.items()}
MAX_PANELS = 20
LONGEST_SIDE = 480
MAX_OBJECTS = 40  # in a picture, of ground truth and of prediction each


@dataclass(frozen=True)
class Case:
    """A small copy of an image (h, w, 3) with its objects and the detections in its pixels."""

    image: NDArray[np.uint8]
    truth: Objects
    predicted: Objects
    counts: dict[int, int]  # of each of `KINDS`


def small_copies(
    image: Tensor,
    size: tuple[int, int],
    record: Record,
    truth: Truth,
    matches: Matches,
) -> Case:
    """A case small enough to keep.

    Args:
        image: (3, h, w) in 0..255, of any size.
        size: Height and width of the original image, in whose pixels boxes and masks are.
        record: What the detector found.
        truth: What there is.
        matches: `match_image(record, truth)`.
    """
    scale = min(1.0, LONGEST_SIDE / max(size))
    height, width = (max(1, round(side * scale)) for side in size)
    resized = F.interpolate(image[None].float(), size=(height, width), mode="bilinear", antialias=True)[0]
    factors = np.array([width / size[1], height / size[0]] * 2)

    there, shown = np.arange(len(truth.boxes))[:MAX_OBJECTS], matches.shown[:MAX_OBJECTS]
    truth_masks = predicted_masks = None
    if truth.segmentations:
        truth_masks = _painted([to_rle(truth.segmentations[i], *size) for i in there], height, width)
    if record["masks"] is not None:
        predicted_masks = _painted([record["masks"][i] for i in shown], height, width)
    counts: dict[int, int] = {}
    for (_, kind), number in matches.counts.items():
        counts[kind] = counts.get(kind, 0) + number
    return Case(
        image=resized.round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy(),
        truth=Objects(
            truth.boxes[there] * factors,
            truth.labels[there],
            ~matches.found[there],
            masks=truth_masks,
        ),
        predicted=Objects(
            record["boxes"][shown] * factors,
            record["labels"][shown],
            matches.kinds[: len(shown)] > 0,
            record["scores"][shown],
            predicted_masks,
        ),
        counts=counts,
    )


def detection_report(
    last: Mapping[str, Any], class_names: Sequence[str], palette: Sequence[tuple[int, int, int]]
) -> ReportParts:
    """Tables and pictures of an evaluation.

    Args:
        last: ``bbox`` and, for masks, ``segm``: the arrays of COCO's evaluation as pycocotools has them, ``precision``
            (T, R, K, A, M) and ``recall`` (T, K, A, M) with -1 where a class has no ground truth; ``errors``, what
            `ErrorCounts.gather` returns; ``best`` and ``worst``, lists of `tasks.core.evaluation.Sample` with a `Case`.
        class_names: The K classes, by train id.
        palette: Their colours.
    """
    kinds = [kind for kind in KIND_NAMES if kind in last]
    tables = [_class_table(last, kinds, class_names), _size_table(last, kinds)]
    tables.append(_error_table(last["errors"], class_names))
    pictures: list[Picture] = []
    for kind in kinds:
        pictures += _figures(last[kind], KIND_NAMES[kind], class_names)
    colours = np.asarray(palette, dtype=np.uint8)
    for title, samples in (("Best images", last["best"]), ("Worst images", last["worst"])):
        pictures += [_case_picture(title, sample, colours, class_names) for sample in samples]
    return ReportParts(tables, pictures)


def _class_table(last: Mapping[str, Any], kinds: Sequence[str], names: Sequence[str]) -> Table:
    columns = ["class", "objects"]
    numbers: list[NDArray[np.floating]] = []
    for kind in kinds:
        precision, recall = last[kind]["precision"][..., 0, -1], last[kind]["recall"][..., 0, -1]
        what = f"{KIND_NAMES[kind]} " if len(kinds) > 1 else ""
        columns += [f"{what}{name} %" for name in ("AP", "AP50", "AP75", "AR")]
        numbers += [class_means(part) for part in (precision, precision[IOU_50], precision[IOU_75], recall)]
    rows = [
        [name, int(last["errors"][c, OBJECTS]), *(100 * float(values[c]) for values in numbers)]
        for c, name in enumerate(names)
    ]
    return Table("Classes", columns, cast(list[list[str | int | float | None]], rows))


def _size_table(last: Mapping[str, Any], kinds: Sequence[str]) -> Table:
    """Mean over the classes, by the area of objects."""
    rows: list[list[str | int | float | None]] = []
    for area, (size, bounds) in enumerate(SIZES.items()):
        row: list[str | int | float | None] = [f"{size} ({bounds})" if bounds else size]
        for kind in kinds:
            for part in ("precision", "recall"):
                values = last[kind][part][..., area, -1]
                known = values[values > -1]
                row.append(100 * float(known.mean()) if known.size else None)
        rows.append(row)
    columns = [f"{KIND_NAMES[kind]} {name} %" for kind in kinds for name in ("AP", "AR")]
    return Table("Size of objects", ["size", *columns], rows)


def _error_table(errors: NDArray[np.integer], names: Sequence[str]) -> Table:
    title = f"Finds and mistakes: detections with a score of at least {MIN_SCORE} at an IoU of 0.5"
    counts = errors[:, : len(KINDS)]
    rows: list[list[str | int | float | None]] = [["all", *counts.sum(axis=0).tolist()]]
    rows += [[name, *row] for name, row in zip(names, counts.tolist(), strict=True)]
    return Table(title, ["class", *KINDS], rows)


def _figures(arrays: Mapping[str, NDArray[np.floating]], what: str, names: Sequence[str]) -> list[Picture]:
    precision = arrays["precision"][..., 0, -1]  # (T, R, K)
    lines = {
        "IoU 0.5": _by_recall(precision[[IOU_50]]),
        "IoU 0.75": _by_recall(precision[[IOU_75]]),
        "mean of 0.5 to 0.95": _by_recall(precision),
    }
    ap = class_means(precision)
    title = f"Precision and recall ({what})"
    known = ~np.isnan(ap)  # without any, the curves of the first class are as empty as all others
    chosen = np.flatnonzero(known) if known.any() else [0]
    mean = {label: values[:, chosen].mean(axis=1) for label, values in lines.items()}
    pictures = [Picture(title, "Mean over the classes", precision_recall_curves({"": mean}, RECALL))]
    ranked = [int(c) for c in np.argsort(-np.nan_to_num(ap, nan=-1), kind="stable") if not np.isnan(ap[c])]
    caption = "Each class"
    if len(ranked) > MAX_PANELS:
        half = MAX_PANELS // 2
        ranked, caption = [*ranked[:half], *ranked[-half:]], f"The {half} classes of highest and of lowest AP"
    if len(names) > 1 and ranked:
        panels = {names[c]: {label: values[:, c] for label, values in lines.items()} for c in ranked}
        pictures.append(Picture(title, caption, precision_recall_curves(panels, RECALL)))
        values = {name: 100 * float(value) for name, value in zip(names, ap, strict=True)}
        pictures.append(Picture(f"AP of classes ({what})", "", class_bars(values, "AP %")))
    return pictures


def _by_recall(precision: NDArray[np.floating]) -> NDArray[np.floating]:
    """Mean precision (R, K) over the thresholds (T, R, K), NaN for a class without ground truth."""
    return np.where((precision > -1).all(axis=0), precision.mean(axis=0), np.nan)


def _painted(encoded: Sequence[dict[str, Any]], height: int, width: int) -> NDArray[np.int16]:
    """Index of the object at every pixel (height, width), the smallest one where several are."""
    owner = np.full((height, width), NO_OBJECT, dtype=np.int16)
    areas = rle.area(list(encoded)) if encoded else []
    for i in np.argsort(-np.asarray(areas, dtype=np.int64), kind="stable"):
        mask = rle.decode(encoded[i])  # (H, W)
        rows = ((np.arange(height) + 0.5) * mask.shape[0] / height).astype(int)
        columns = ((np.arange(width) + 0.5) * mask.shape[1] / width).astype(int)
        owner[mask[np.ix_(rows, columns)].astype(bool)] = i
    return owner


def _case_picture(title: str, sample: Sample, palette: NDArray[np.uint8], names: Sequence[str]) -> Picture:
    case: Case = sample.payload
    counts = [f"{case.counts[kind]} {KINDS[kind]}" for kind in range(len(KINDS)) if kind in case.counts]
    caption = f"{sample.id}: {', '.join(counts)}"
    return Picture(title, caption, truth_and_prediction(case.image, case.truth, case.predicted, palette, names))
