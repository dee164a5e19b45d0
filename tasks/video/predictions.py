"""Detections of windows as detections of videos, and as files: ActivityNet's json, subtitles, a table."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tasks.core.errors import UserError
from tasks.video.segments import Row

Detections = dict[str, Any]  # "segments" (n, 2) in seconds, "scores" (n,), "labels" (n,): arrays or tensors
Merge = Callable[[str, Detections], Detections]
COLUMNS = ("segments", "scores", "labels")
SHOWN_FROM = 0.3  # score of the detections that people are shown


def window_key(id: str, offset: float) -> str:
    """The name of a window: its video and first frame, so that names sort by time."""
    return f"{id}@{int(offset):08d}"


def merge_windows(records: Mapping[str, Detections], merge: Merge | None = None) -> dict[str, Detections]:
    """Join the detections of the windows of each video, in the order of time, and let `merge` suppress repetitions.

    Args:
        records: Detections by `window_key`.
        merge: Maps a video and the detections of all of its windows to those that remain.

    Returns:
        Detections by video, as arrays: segments (n, 2) float64, scores (n,) float64, labels (n,) int64.
    """
    windows: dict[str, list[str]] = defaultdict(list)
    for key in sorted(records):
        windows[key.rpartition("@")[0]].append(key)
    videos = {}
    for id, keys in windows.items():
        joined = {name: np.concatenate([_array(records[key][name], name) for key in keys]) for name in COLUMNS}
        merged = joined if merge is None else merge(id, joined)
        videos[id] = {name: _array(merged[name], name) for name in COLUMNS}
    return videos


def as_rows(videos: Mapping[str, Detections], class_names: Sequence[str]) -> list[Row]:
    """Rows (video, class, start, end, score) of detections by video."""
    return [
        (id, class_names[label], start, end, score)
        for id, found in videos.items()
        for (start, end), score, label in zip(
            found["segments"].tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True
        )
    ]


def activitynet_json(
    videos: Mapping[str, Detections], class_names: Sequence[str], name: str = "predictions.json", version: str = ""
) -> tuple[str, bytes]:
    """All detections in the layout of ActivityNet's submissions, by falling score."""
    results: dict[str, list[dict[str, Any]]] = {id: [] for id in videos}
    for id, label, start, end, score in as_rows(videos, class_names):
        results[id].append({"label": label, "score": score, "segment": [start, end]})
    for found in results.values():
        found.sort(key=lambda item: -item["score"])
    content = {"version": version, "results": results, "external_data": {}}
    return name, json.dumps(content, indent=1).encode()


def action_csv(id: str, found: Detections, class_names: Sequence[str]) -> tuple[str, bytes]:
    """The detections of one video as a table: start and end in seconds, action, score; by time."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("start", "end", "action", "score"))
    for _, label, start, end, score in _by_time(id, found, class_names):
        writer.writerow((f"{start:.2f}", f"{end:.2f}", label, f"{score:.4f}"))
    return f"{id}.csv", text.getvalue().encode()


def action_srt(
    id: str, found: Detections, class_names: Sequence[str], threshold: float = SHOWN_FROM
) -> tuple[str, bytes]:
    """The detections of one video of at least the score `threshold` as subtitles, which video players show."""
    rows = [row for row in _by_time(id, found, class_names) if row[4] >= threshold]
    blocks = [
        f"{number}\n{_timestamp(start)} --> {_timestamp(end)}\n{label} ({score:.0%})\n"
        for number, (_, label, start, end, score) in enumerate(rows, start=1)
    ]
    return f"{id}.srt", "\n".join(blocks).encode()


def _by_time(id: str, found: Detections, class_names: Sequence[str]) -> list[Row]:
    """Rows by time, without those that a network predicted to end before they start."""
    rows = [row for row in as_rows({id: found}, class_names) if row[3] > row[2]]
    return sorted(rows, key=lambda row: (row[2], row[3], -row[4], row[1]))


def _timestamp(seconds: float) -> str:
    """`01:02:03,450`."""
    milliseconds = max(round(1000 * seconds), 0)
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{rest // 1000:02d},{rest % 1000:03d}"


def _array(values: Any, name: str) -> Any:
    """A column as a float64 or int64 array on the CPU."""
    values = values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
    if name == "segments":
        if values.size % 2 or (values.size and values.shape[-1] != 2):
            raise UserError(f"segments of shape {values.shape}; expected (n, 2)")
        return values.astype(np.float64).reshape(-1, 2)
    return values.astype(np.int64 if name == "labels" else np.float64).reshape(-1)
