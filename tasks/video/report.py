"""What temporal action detection shows in the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from tasks.core.errors import UserError
from tasks.core.report import Picture, ReportParts, Table
from tasks.core.report.figures import COLOURS, INK, class_bars, png, quiet
from tasks.video.evaluators import Evaluation, evaluate
from tasks.video.false_positives import KINDS, FalsePositives, false_positives
from tasks.video.recall import average_recall
from tasks.video.segments import Floats, SegmentTable

if TYPE_CHECKING:
    from tasks.video.metrics import TemporalDetectionMetric

NUM_CASES = 3  # best and worst videos
BARS_PER_INSTANCE = 2  # detections drawn of a video, per instance of it
KIND_COLOURS = ("#3f9b5f", "#7a5fc0", "#b5477f", "#d9822b", "#e0b04c", "#8a8f98")
GREY = "#b8bec9"


def detection_report(metric: TemporalDetectionMetric) -> ReportParts:
    """Tables and pictures of the last evaluation of `metric`."""
    if metric.last is None:
        raise UserError("nothing was evaluated yet; expected a computed metric")
    result = metric.last
    errors = false_positives(result)
    mean = dict(zip(result.classes, result.ap.mean(axis=0).tolist(), strict=True))
    pictures = [
        Picture("Mean AP over tIoU", "", _over_tiou(metric, result)),
        Picture("AP per class", "", class_bars(mean, "AP, mean over the thresholds")),
        Picture("Kinds of detections", _caption(errors), _kinds(errors)),
        Picture("Durations", "", _durations(result)),
    ]
    pictures += _cases(result)
    return ReportParts([_classes(result), _errors(errors), *_warnings(result)], pictures)


# -- tables -----------------------------------------------------------------------------------------------------------


def _classes(result: Evaluation) -> Table:
    detections = np.bincount(result.detections.label[result.detections.label >= 0], minlength=len(result.classes))
    rows: list[list[str | int | float | None]] = [
        [
            name,
            int(result.num_instances[c]),
            int(detections[c]),
            float(100 * result.ap[:, c].mean()),
            *(100 * result.ap[:, c]).tolist(),
        ]
        for c, name in enumerate(result.classes)
    ]
    columns = ["class", "instances", "detections", "AP %", *(f"AP@{tiou:g} %" for tiou in result.tious)]
    return Table("Classes", columns, rows)


def _errors(errors: FalsePositives) -> Table:
    rows: list[list[str | int | float | None]] = [
        [f"{multiple} G", *errors.counts[multiple - 1].tolist()] for multiple in (1, 2, 5, 10)
    ]
    return Table(f"Kinds of the best detections at tIoU {errors.tiou:.2f} (G instances)", ["best", *KINDS], rows)


def _warnings(result: Evaluation) -> list[Table]:
    rows = [[warning] for warning in result.warnings]
    return [Table("What the evaluator left out", ["warning"], rows)] if rows else []


# -- pictures ---------------------------------------------------------------------------------------------------------


def _over_tiou(metric: TemporalDetectionMetric, result: Evaluation) -> bytes:
    """Mean AP at thresholds from 0.1 to 0.95, and recall with 100 detections per video; the metric's are marked."""
    tious = np.arange(0.1, 0.96, 0.05)
    table = SegmentTable(
        result.instances.videos,
        result.instances.classes,
        result.detections.video,
        result.detections.label,
        result.detections.start,
        result.detections.end,
        result.detections.score,
    ).take((result.detections.video >= 0) & (result.detections.label >= 0))
    # Rows come sorted by falling score, so the first of equal scores is to stay first.
    curve = evaluate(result.instances, table, tious.tolist(), metric.evaluator, ties="first_first").mean_ap
    figure = Figure(figsize=(5.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(tious, 100 * curve, color=COLOURS[0], label="mean AP")
    axes.plot(result.tious, 100 * result.mean_ap, "o", color=COLOURS[0], markersize=4)
    recall = average_recall(result, tious.tolist()).recall[:, -1]
    axes.plot(tious, 100 * recall, color=COLOURS[1], label="recall, 100 detections per video")
    axes.set(xlabel="temporal IoU", ylabel="%", ylim=(0, 102))
    quiet(axes)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return png(figure)


def _caption(errors: FalsePositives) -> str:
    return (
        f"Of the G best, 2 G best, ... detections per class (G instances), at tIoU {errors.tiou:.2f}: double detections"
        " repeat a found instance, wrong labels lie on one of another class, localization errors overlap one of their"
        " class too little, confusions one of another class, background overlaps none by a tenth."
    )


def _kinds(errors: FalsePositives) -> bytes:
    figure = Figure(figsize=(6.6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    share = 100 * errors.counts / np.maximum(errors.counts.sum(axis=1, keepdims=True), 1)
    bottom = np.zeros(len(share))
    for kind, name in enumerate(KINDS):
        axes.bar(np.arange(1, len(share) + 1), share[:, kind], 0.8, bottom, color=KIND_COLOURS[kind], label=name)
        bottom += share[:, kind]
    axes.set_xticks(range(1, len(share) + 1), [f"{multiple} G" for multiple in range(1, len(share) + 1)])
    axes.set(ylabel="% of the best detections", ylim=(0, 100))
    quiet(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, labelcolor=INK)
    return png(figure)


def _durations(result: Evaluation) -> bytes:
    """Histogram of the durations of instances, those found at the middle threshold apart."""
    row = len(result.tious) // 2
    lengths = result.instances.end - result.instances.start
    found = result.taken_by[row] >= 0
    edges = np.histogram_bin_edges(lengths, bins=min(30, max(5, len(lengths) // 10)))
    figure = Figure(figsize=(5.4, 2.8), layout="constrained")
    axes = figure.add_subplot()
    labels = [f"found at tIoU {result.tious[row]:.2f}", "missed"]
    axes.hist(
        [lengths[found], lengths[~found]], edges.tolist(), stacked=True, color=[KIND_COLOURS[0], GREY], label=labels
    )
    axes.set(xlabel="duration in seconds", ylabel="instances")
    quiet(axes)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return png(figure)


def _cases(result: Evaluation) -> list[Picture]:
    """Timelines of the videos with the highest and lowest mean AP of their own."""
    scores = video_scores(result)
    ranked = sorted(range(len(scores)), key=lambda v: (-scores[v], result.instances.videos[v]))
    best = ranked[:NUM_CASES]
    worst = ranked[NUM_CASES:][::-1][:NUM_CASES]
    pictures = []
    for title, videos in (("Best videos", best), ("Worst videos", worst)):
        for video in videos:
            caption = f"{result.instances.videos[video]}: mean AP {100 * scores[video]:.1f} %"
            pictures.append(Picture(title, caption, timeline(result, video)))
    return pictures


def video_scores(result: Evaluation) -> Floats:
    """Mean AP (V,) of each video alone, over its classes and the thresholds."""
    scores = np.zeros(len(result.instances.videos))
    order = np.argsort(result.detections.video, kind="stable")
    bounds = np.searchsorted(result.detections.video[order], np.arange(len(scores) + 1))
    found = result.found
    for video in range(len(scores)):
        rows = order[bounds[video] : bounds[video + 1]]
        labels = result.instances.label[result.instances.video == video]
        values = []
        for label in np.unique(labels):
            hits = found[:, rows[result.detections.label[rows] == label]]
            number = int((labels == label).sum())
            precision = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
            to_come = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            values.append((hits * to_come).sum(axis=1) / number)
        scores[video] = np.mean(values)
    return scores


def timeline(result: Evaluation, video: int) -> bytes:
    """Instances above, detections below, one colour per class; detections fade with their score."""
    row = len(result.tious) // 2
    instances = np.flatnonzero(result.instances.video == video)
    detections = np.flatnonzero(result.detections.video == video)[: BARS_PER_INSTANCE * len(instances)]
    classes = list(dict.fromkeys(result.instances.label[instances].tolist()))
    classes += [c for c in dict.fromkeys(result.detections.label[detections].tolist()) if c not in classes and c >= 0]
    figure = Figure(figsize=(9.6, 0.9 + 0.5 * len(classes)), layout="constrained")
    axes = figure.add_subplot()
    matched = result.found[row]
    for position, label in enumerate(classes):
        colour = COLOURS[position % len(COLOURS)]
        for i in instances[result.instances.label[instances] == label]:
            start, end = result.instances.start[i], result.instances.end[i]
            axes.barh(position - 0.2, end - start, 0.34, start, color=colour)
        for d in detections[result.detections.label[detections] == label][::-1]:
            start, end = result.detections.start[d], result.detections.end[d]
            alpha = 0.15 + 0.85 * min(max(float(result.detections.score[d]), 0), 1)
            edge = {"edgecolor": INK, "linewidth": 0.8} if matched[d] else {"edgecolor": "none"}
            axes.barh(position + 0.2, end - start, 0.34, start, color=(colour, alpha), **edge)
    axes.set_yticks(range(len(classes)), [_name(result.classes, label) for label in classes])
    axes.set_ylim(len(classes) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel(
        f"seconds; above: ground truth, below: the best {len(detections)} detections,"
        f" framed if they find an instance at tIoU {result.tious[row]:.2f}"
    )
    quiet(axes)
    axes.grid(False, axis="y")
    return png(figure, dpi=100)


def _name(classes: Sequence[str], label: int) -> str:
    return classes[label][:30]
