"""The json files of ActivityNet's layout: ground truth with `database`, predictions with `results`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tasks.core.errors import UserError
from tasks.video.segments import Row, SegmentTable


def read_ground_truth(path: Path, subset: str) -> SegmentTable:
    """Instances of the videos of `subset` in a file ``{"database": {id: {"subset", "annotations": [...]}}}``."""
    return ground_truth_table(read_json(path), subset, str(path))


def ground_truth_table(data: Any, subset: str, origin: str = "ground truth") -> SegmentTable:
    """The same from what the file holds; `origin` begins the message of an error."""
    database = _field(data, "database", dict, origin)
    of_subset = {}
    for id, video in database.items():
        where = f"{origin}: video {id!r}"
        if _field(video, "subset", str, where) == subset:
            of_subset[id] = _field(video, "annotations", list, where)
    if not of_subset:
        subsets = sorted({str(video["subset"]) for video in database.values()})
        raise UserError(f"{origin}: no video of subset {subset!r}; expected one of {', '.join(subsets) or 'some'}")
    return SegmentTable.from_rows(_rows(of_subset, origin, scored=False), videos=tuple(of_subset))


def read_predictions(path: Path) -> SegmentTable:
    """Detections in a file ``{"results": {id: [{"label", "score", "segment"}]}}``."""
    return predictions_table(read_json(path), str(path))


def predictions_table(data: Any, origin: str = "predictions") -> SegmentTable:
    """The same from what the file holds; `origin` begins the message of an error."""
    results = _field(data, "results", dict, origin)
    return SegmentTable.from_rows(_rows(results, origin, scored=True), videos=tuple(results))


def read_json(path: Path) -> Any:
    """Content of a json file; raises `UserError` for one that cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: file not found") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def segment_of(item: Any, where: str) -> tuple[str, float, float]:
    """Class, start and end of ``{"label", "segment": [start, end]}``; times may be given as strings."""
    label = _field(item, "label", str, where)
    segment = _field(item, "segment", list, where)
    try:
        start, end = (float(time) for time in segment)
    except (TypeError, ValueError):
        raise UserError(f"{where}: segment is {segment!r}; expected [start, end] in seconds") from None
    return label, start, end


def _rows(videos: Mapping[str, Any], origin: str, scored: bool) -> Iterator[Row]:
    for id, items in videos.items():
        where = f"{origin}: video {id!r}"
        if not isinstance(items, list):
            raise UserError(f"{where}: holds {type(items).__name__}; expected a list")
        for item in items:
            label, start, end = segment_of(item, where)
            yield id, label, start, end, _score(item, where) if scored else 1.0


def _score(item: Mapping[str, Any], where: str) -> float:
    try:
        return float(item["score"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where}: score is {item.get('score')!r}; expected a number") from None


def _field(data: Any, name: str, kind: type, where: str) -> Any:
    if not isinstance(data, dict) or not isinstance(data.get(name), kind):
        found = f"{name} is {type(data[name]).__name__}" if isinstance(data, dict) and name in data else f"no {name!r}"
        raise UserError(f"{where}: {found}; expected {name!r}, a {kind.__name__}")
    return data[name]
