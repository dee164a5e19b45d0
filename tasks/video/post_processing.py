"""Suppression of overlapping detections of a video, and class labels from a video classifier."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tasks.core.errors import expect

# Detections of a video: "segments" (n, 2) in seconds, "scores" (n,) and "labels" (n,), classes from 0.
Record = Mapping[str, np.ndarray]
SHORTEST = 1e-5  # length of a chosen segment of none, which would overlap nothing


@dataclass
class PostProcessingConfig:
    """What happens to the detections of a video; the defaults are AFSD's for THUMOS14.

    AFSD on ActivityNet-1.3 has `score_threshold` 1e-9, `sigma` 0.85 and `floor` 1e-9 (0 and 1e-18 for two streams).
    ActionFormer and OpenTAD have a `sigma` of 0.5 to 0.9, `max_per_video` and, without `per_class`, `voting`.

    Args:
        score_threshold: Detections must score more than this to be considered.
        method: ``soft`` lowers scores by exp(-IoU² / sigma), ``hard`` drops what overlaps, ``none`` keeps everything.
        per_class: Detections suppress those of their own class alone.
        sigma: Width of ``soft``.
        floor: Score below which ``soft`` drops a detection.
        overlap: IoU from which on ``hard`` drops a detection.
        max_per_class: Detections kept per class; per video without `per_class`.
        max_per_video: Detections kept per video, the best ones; None for all.
        voting: IoU from which on all detections, weighted by score, are averaged into a kept one; None for none.
        keep_last: Keep the last detection ``soft`` is left with. The official code of AFSD always loses it, also
            where it is the only one of its class.
    """

    score_threshold: float = 0.01
    method: Literal["soft", "hard", "none"] = "soft"
    per_class: bool = True
    sigma: float = 0.5
    floor: float = 0.001
    overlap: float = 0.5
    max_per_class: int = 5000
    max_per_video: int | None = None
    voting: float | None = None
    keep_last: bool = True

    def __post_init__(self) -> None:
        expect("method", self.method, self.method in ("soft", "hard", "none"), "soft, hard or none")
        expect("sigma", self.sigma, self.sigma > 0, "a positive number")
        expect("max_per_class", self.max_per_class, self.max_per_class >= 1, "at least 1")
        most = self.max_per_video
        expect("max_per_video", most, most is None or most >= 1, "at least 1, or null")
        voting = self.voting
        expect("voting", voting, voting is None or 0 < voting <= 1, "an IoU above 0 and up to 1, or null")
        expect("voting", voting, voting is None or not self.per_class, "null where per_class is true")


def soft_nms(
    segments: np.ndarray,
    scores: np.ndarray,
    sigma: float = 0.5,
    top_k: int = 5000,
    floor: float = 0.001,
    keep_last: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian soft-NMS (arXiv 1704.04503) of segments (N, 2) with scores (N,).

    The best detection is chosen again and again, the first on ties, and the scores of the others are multiplied by
    exp(-IoU² / sigma); those below `floor` are dropped. Ends with `top_k` chosen or, without `keep_last`, one left.
    Returns the numbers of the chosen ones and their scores, in the order of choice.
    """
    left, right = segments.astype(np.float64).reshape(-1, 2).T
    scores = scores.astype(np.float64)
    alive = np.flatnonzero(scores >= floor)
    left, right, scores = left[alive], right[alive], scores[alive]
    chosen: list[int] = []
    kept: list[float] = []
    while len(alive) > (0 if keep_last else 1) and len(chosen) < top_k:
        best = int(scores.argmax())
        start, end = left[best], right[best]
        chosen.append(int(alive[best]))
        kept.append(float(scores[best]))
        intersection = np.maximum(np.minimum(right, end) - np.maximum(left, start), 0)
        iou = intersection / (max(end - start, SHORTEST) + (right - left) - intersection)
        scores = scores * np.exp(-(iou**2) / sigma)
        scores[best] = -np.inf
        staying = scores >= floor
        alive, left, right, scores = alive[staying], left[staying], right[staying], scores[staying]
    return np.array(chosen, dtype=np.int64), np.array(kept)


def hard_nms(segments: np.ndarray, scores: np.ndarray, overlap: float = 0.5, top_k: int = 1000) -> np.ndarray:
    """Numbers of the segments (N, 2) that no better one overlaps by `overlap` or more, best first.

    Only the `top_k` best are considered; on ties the later one comes first.
    """
    left, right = segments.astype(np.float64).reshape(-1, 2).T
    order = np.argsort(scores, kind="stable")[::-1][:top_k]
    chosen = []
    while len(order):
        best, order = order[0], order[1:]
        chosen.append(int(best))
        intersection = np.maximum(np.minimum(right[order], right[best]) - np.maximum(left[order], left[best]), 0)
        union = (right - left)[order] + (right[best] - left[best]) - intersection
        order = order[intersection < overlap * np.maximum(union, 1e-12)]
    return np.array(chosen, dtype=np.int64)


def vote(kept: np.ndarray, segments: np.ndarray, scores: np.ndarray, overlap: float) -> np.ndarray:
    """Replace segments `kept` (n, 2) by means of all `segments` (N, 2) that overlap them, weighted by `scores` (N,)."""
    kept, segments = kept.astype(np.float64), segments.astype(np.float64)
    inside = np.minimum(kept[:, None, 1], segments[:, 1]) - np.maximum(kept[:, None, 0], segments[:, 0])
    inside = np.maximum(inside, 0)
    union = (kept[:, 1] - kept[:, 0])[:, None] + (segments[:, 1] - segments[:, 0]) - inside
    weights = (inside >= overlap * np.maximum(union, 1e-12)) * scores.astype(np.float64)
    sums = weights.sum(axis=1, keepdims=True)
    means = weights @ segments / np.where(sums > 0, sums, 1)
    return np.where(sums > 0, means, kept)  # nothing overlaps a segment of no length


def suppress(record: Record, config: PostProcessingConfig) -> dict[str, np.ndarray]:
    """The detections of a video that are left, by class and in their order; the best first with `max_per_video`."""
    candidates = np.flatnonzero(record["scores"] > config.score_threshold)
    segments, scores, labels = (record[name][candidates] for name in ("segments", "scores", "labels"))
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)] if config.per_class else []
    kept, kept_scores = [], []
    for group in groups or [np.arange(len(labels))]:
        chosen, values = _suppress_group(segments[group], scores[group], config)
        kept.append(group[chosen])
        kept_scores.append(values)
    index, values = np.concatenate(kept), np.concatenate(kept_scores)
    left = segments[index]
    if config.voting is not None:
        left = vote(left, segments, scores, config.voting)
    if config.max_per_video is not None:
        best = np.argsort(-values, kind="stable")[: config.max_per_video]
        index, values, left = index[best], values[best], left[best]
    return {"segments": left, "scores": values, "labels": labels[index]}


def _suppress_group(
    segments: np.ndarray, scores: np.ndarray, config: PostProcessingConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers, ascending, and scores of what is left of detections that may suppress each other."""
    if config.method == "soft":
        options = (config.sigma, config.max_per_class, config.floor, config.keep_last)
        chosen, values = soft_nms(segments, scores, *options)
    elif config.method == "hard":
        chosen = hard_nms(segments, scores, config.overlap, len(scores))[: config.max_per_class]
        values = scores[chosen]
    else:
        chosen = np.argsort(-scores, kind="stable")[: config.max_per_class]
        values = scores[chosen]
    order = np.argsort(chosen)
    return chosen[order], values[order]


def label_by_video(
    record: Record, class_scores: Sequence[float] | np.ndarray, classes: int = 1
) -> dict[str, np.ndarray]:
    """Give detections without classes those of a video classifier, as on ActivityNet-1.3.

    `class_scores` are probabilities of all classes for the video. Each detection is repeated for the `classes` most
    probable ones and its score multiplied by their probability.
    """
    probabilities = np.asarray(class_scores, dtype=np.float64)
    best = np.argsort(-probabilities, kind="stable")[:classes]
    return {
        "segments": np.tile(record["segments"], (len(best), 1)),
        "scores": np.concatenate([record["scores"] * probabilities[label] for label in best]),
        "labels": np.repeat(best, len(record["scores"])),
    }


def clip_to_video(record: Record, duration: float) -> dict[str, np.ndarray]:
    """Cut detections at the ends of a video of `duration` seconds and drop those that nothing is left of."""
    segments = np.clip(record["segments"], 0, duration)
    inside = segments[:, 1] > segments[:, 0]
    return {"segments": segments[inside], "scores": record["scores"][inside], "labels": record["labels"][inside]}
