"""Mean average precision of temporal action detection by the rules of the official evaluators.

They agree on the algorithm, that of the ActivityNet challenge, and differ in what they count (docs/video.md). Times are
seconds in float64; results equal those of the official programs to rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tasks.core.errors import UserError
from tasks.video.matching import average_precision, match, overlapping_pairs
from tasks.video.segments import Floats, Integers, SegmentTable

THUMOS14_TIOUS = (0.3, 0.4, 0.5, 0.6, 0.7)
ACTIVITYNET_TIOUS = tuple(np.linspace(0.5, 0.95, 10).tolist())
DUPLICATE_TOLERANCE = 1e-3  # seconds


@dataclass(frozen=True)
class Rules:
    """What an official evaluator counts.

    Args:
        drop_other_videos: Ignore detections in videos without instances; else they are false positives.
        drop_duplicates: Ignore instances without length, and those whose class and, to a millisecond, times repeat.
        smallest_union: Length to which a union is raised; None: detections and instances without length, or reversed,
            match where the union is 0.
    """

    drop_other_videos: bool
    drop_duplicates: bool
    smallest_union: float | None


EvaluatorName = Literal["afsd", "opentad", "activitynet"]
RULES: dict[str, Rules] = {
    "afsd": Rules(drop_other_videos=True, drop_duplicates=False, smallest_union=None),
    "opentad": Rules(drop_other_videos=False, drop_duplicates=True, smallest_union=1e-8),
    "activitynet": Rules(drop_other_videos=False, drop_duplicates=False, smallest_union=None),
}


@dataclass(frozen=True)
class Evaluation:
    """Results of T thresholds and K classes, and the tables they were computed from.

    `instances` and `detections` are what was counted; detections are sorted by falling score, and those of an unknown
    class or in a video without instances have the index -1 there. `taken_by` (T, G) is the detection that found each
    instance, or -1.
    """

    tious: Floats  # (T,)
    classes: tuple[str, ...]
    ap: Floats  # (T, K)
    num_instances: Integers  # (K,)
    instances: SegmentTable
    detections: SegmentTable
    taken_by: Integers
    rules: Rules
    warnings: list[str] = field(default_factory=list)

    @property
    def mean_ap(self) -> Floats:
        """Mean over the classes, at each threshold: (T,)."""
        return self.ap.mean(axis=1)

    @property
    def average(self) -> float:
        """Mean over the thresholds of the mean over the classes."""
        return float(self.mean_ap.mean())

    @property
    def found(self) -> NDArray[np.bool_]:
        """Whether a detection found an instance, (T, D)."""
        found = np.zeros((len(self.tious), len(self.detections)), dtype=bool)
        threshold, instance = np.nonzero(self.taken_by >= 0)
        found[threshold, self.taken_by[threshold, instance]] = True
        return found


def evaluate(
    ground_truth: SegmentTable,
    predictions: SegmentTable,
    tious: Sequence[float],
    evaluator: str = "afsd",
    blocked: Iterable[str] = (),
    ties: Literal["last_first", "first_first"] = "last_first",
) -> Evaluation:
    """Compare `predictions` with `ground_truth` by the rules of `evaluator`.

    Of equal scores the later row comes first, as in NumPy's sort of few elements, reversed, which the official programs
    use; for many elements their order depends on the processor. `first_first` is the other order. Videos in
    `blocked` count nowhere. Everything that is left out is named in `warnings`.

    Raises:
        UserError: No instance is left to be found, or a threshold is outside (0, 1].
    """
    if evaluator not in RULES:
        raise UserError(f"evaluator: {evaluator!r} was given, one of {', '.join(RULES)} was expected")
    if not len(tious) or not all(0 < t <= 1 for t in tious):
        raise UserError(f"tious: {list(tious)} was given, thresholds above 0 and at most 1 were expected")
    rules, warnings = RULES[evaluator], list[str]()
    ground_truth, predictions = _without(blocked, ground_truth, predictions, warnings)
    if rules.drop_duplicates:
        ground_truth = _without_duplicates(ground_truth, warnings)
    if not len(ground_truth):
        raise UserError("the ground truth holds no instance; expected at least one in the subset to be evaluated")
    classes = [ground_truth.classes[c] for c in dict.fromkeys(ground_truth.label.tolist())]
    videos = [ground_truth.videos[v] for v in dict.fromkeys(ground_truth.video.tolist())]
    instances = ground_truth.renamed(videos, classes)
    detections = _counted(predictions, instances, rules, warnings)
    _warn_of_degenerate(instances, detections, rules, warnings)
    detections = detections.take(_by_score(detections.score, ties))
    pairs = overlapping_pairs(instances, detections, min(tious), rules.smallest_union)
    thresholds = np.array(tious, dtype=np.float64)
    taken_by = match(pairs, len(instances), thresholds)
    num_instances = np.bincount(instances.label, minlength=len(classes))
    result = Evaluation(
        thresholds,
        tuple(classes),
        np.zeros((len(tious), len(classes))),
        num_instances,
        instances,
        detections,
        taken_by,
        rules,
        warnings,
    )
    result.ap[:] = average_precision(result.found, detections.label, num_instances)
    return result


def _by_score(score: Floats, ties: str) -> Integers:
    """Order of falling score."""
    descending = np.argsort(score)[::-1]
    if (np.diff(score[descending]) == 0).any():  # a stable sort takes several times as long
        stable = np.argsort(score if ties == "last_first" else -score, kind="stable")
        return stable[::-1] if ties == "last_first" else stable
    return descending


def metrics_by_name(result: Evaluation) -> dict[str, float]:
    """``mAP`` (the average over the thresholds) and ``mAP@<tIoU>`` of each threshold, as fractions."""
    at = {f"mAP@{tiou:.2f}": float(value) for tiou, value in zip(result.tious, result.mean_ap, strict=True)}
    return {"mAP": result.average, **at}


def _without(
    blocked: Iterable[str], ground_truth: SegmentTable, predictions: SegmentTable, warnings: list[str]
) -> tuple[SegmentTable, SegmentTable]:
    """Leave out blocked videos."""
    names = set(blocked)
    if not names:
        return ground_truth, predictions
    parts = []
    for table in (ground_truth, predictions):
        kept = np.array([name not in names for name in table.videos], dtype=bool)
        parts.append(table.take(kept[table.video]))
    left_out = [len(before) - len(after) for before, after in zip((ground_truth, predictions), parts, strict=True)]
    warnings.append(f"{left_out[0]} instances and {left_out[1]} predictions are in blocked videos and do not count")
    return parts[0], parts[1]


def _without_duplicates(table: SegmentTable, warnings: list[str]) -> SegmentTable:
    """Leave out instances without length and those that repeat an earlier one of their video."""
    kept_of: dict[tuple[int, int], list[tuple[float, float]]] = {}
    kept = np.ones(len(table), dtype=bool)
    columns = (table.video.tolist(), table.label.tolist(), table.start.tolist(), table.end.tolist())
    for row, (video, label, start, end) in enumerate(zip(*columns, strict=True)):
        earlier = kept_of.setdefault((video, label), [])
        near = (abs(start - s) <= DUPLICATE_TOLERANCE and abs(end - e) <= DUPLICATE_TOLERANCE for s, e in earlier)
        kept[row] = end - start > 0 and not any(near)
        if kept[row]:
            earlier.append((start, end))
    if not kept.all():
        warnings.append(f"{int((~kept).sum())} instances repeat another or have no length and do not count")
    return table.take(kept)


def _counted(predictions: SegmentTable, instances: SegmentTable, rules: Rules, warnings: list[str]) -> SegmentTable:
    """Number videos and classes as `instances` does, and leave out what the rules do not count."""
    detections = predictions.renamed(instances.videos, instances.classes)
    elsewhere = detections.video < 0
    if elsewhere.any():
        names = Counter(predictions.videos[v] for v in predictions.video[elsewhere].tolist())
        effect = "do not count" if rules.drop_other_videos else "count as false positives"
        warnings.append(f"{int(elsewhere.sum())} predictions in {_listed(names, 'video')} without instances {effect}")
    if rules.drop_other_videos and elsewhere.any():
        predictions, detections = predictions.take(~elsewhere), detections.take(~elsewhere)
    unknown = detections.label < 0
    if unknown.any():
        names = Counter(predictions.classes[c] for c in predictions.label[unknown].tolist())
        warnings.append(f"{int(unknown.sum())} predictions of {_listed(names, 'class')} without instances do not count")
        if rules.drop_other_videos:
            detections = detections.take(~unknown)
    return detections


def _warn_of_degenerate(instances: SegmentTable, detections: SegmentTable, rules: Rules, warnings: list[str]) -> None:
    for table, what in ((instances, "instances"), (detections, "predictions")):
        count = int((table.end <= table.start).sum())
        if count:
            effect = "they match where the union is 0" if rules.smallest_union is None else "they match nothing"
            warnings.append(f"{count} {what} do not end after they start; {effect}")


def _listed(names: Counter[str], what: str) -> str:
    """`2 videos (a, b)`, with at most three names."""
    plural = {"class": "classes"}.get(what, what + "s") if len(names) > 1 else what
    shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {plural} ({shown})"
