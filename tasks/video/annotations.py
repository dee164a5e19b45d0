"""Annotations of the data sets of videos: the csv files of THUMOS14 and json files in ActivityNet's layout.

Times in seconds are the truth. The frame columns of THUMOS14 drift by up to 50 frames in most videos at 29.97 frames
per second and are two minutes off in one, but AFSD was trained on them.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tasks.core.data import DataError
from tasks.core.splits import Listing
from tasks.video.evaluation_files import read_json, segment_of
from tasks.video.segments import Floats, Integers, SegmentTable

# In the order of their original indices, which label AFSD's networks.
THUMOS14_CLASSES = {
    "BaseballPitch": 7,
    "BasketballDunk": 9,
    "Billiards": 12,
    "CleanAndJerk": 21,
    "CliffDiving": 22,
    "CricketBowling": 23,
    "CricketShot": 24,
    "Diving": 26,
    "FrisbeeCatch": 31,
    "GolfSwing": 33,
    "HammerThrow": 36,
    "HighJump": 40,
    "JavelinThrow": 45,
    "LongJump": 51,
    "PoleVault": 68,
    "Shotput": 79,
    "SoccerPenalty": 85,
    "TennisSwing": 92,
    "ThrowDiscus": 93,
    "VolleyballSpiking": 97,
}
AMBIGUOUS = "Ambiguous"
SAMPLE_FPS = 10.0


@dataclass(frozen=True)
class Video:
    """A video and its instances.

    Attributes:
        id: Its unique name.
        segments: (n, 2) start and end in seconds.
        labels: (n,) classes, from 0.
        duration: Seconds; None until its file was opened, unless the annotations say it.
        native_fps: Frames per second of its file, where the annotations say it.
        fps: Frames per second of what is sampled from it.
        num_frames: Frames sampled from it.
        first_frame: Where, in such frames, the first sample stands for; features cover several frames each.
        official_frames: (n, 2) start and end in sampled frames by THUMOS14's frame columns, where these are wanted.
    """

    id: str
    segments: Floats
    labels: Integers
    duration: float | None = None
    native_fps: float | None = None
    fps: float | None = None
    num_frames: int | None = None
    first_frame: float = 0.0
    official_frames: Floats | None = None

    @property
    def sampled_seconds(self) -> float:
        """How long what is sampled from it lasts."""
        assert self.num_frames is not None
        assert self.fps is not None
        return self.num_frames / self.fps

    def frames(self) -> Floats:
        """Start and end of the instances (n, 2) in sampled frames."""
        if self.official_frames is not None:
            return self.official_frames
        assert self.fps is not None
        return self.segments * self.fps - self.first_frame


@dataclass
class _Collected:
    segments: list[tuple[float, float]] = field(default_factory=list)
    frames: list[tuple[float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


def instance_table(videos: Iterable[Video], class_names: Sequence[str]) -> SegmentTable:
    """The instances of `videos` as ground truth for the evaluators."""
    videos = list(videos)
    rows = [
        (video.id, class_names[label], start, end, 1.0)
        for video in videos
        for label, (start, end) in zip(video.labels.tolist(), video.segments.tolist(), strict=True)
    ]
    return SegmentTable.from_rows(rows, videos=[video.id for video in videos], classes=class_names)


# -- THUMOS14 ---------------------------------------------------------------------------------------------------------


def read_thumos_classes(path: Path) -> dict[str, int]:
    """Names and original indices in lines like ``7 BaseballPitch``."""
    classes = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        index, _, name = line.strip().partition(" ")
        if line.strip():
            if not index.isdigit() or not name:
                raise DataError(f"{path}, line {number}: {line!r}; expected an index and a name like '7 BaseballPitch'")
            classes[name.strip()] = int(index)
    return classes


def read_thumos_split(
    root: Path, split: str, classes: dict[str, int], frame_columns: bool = False, excluded: Sequence[str] = ()
) -> Listing[list[Video]]:
    """The videos and instances of THUMOS14's validation ("train") or test set ("val").

    Ambiguous instances are left out. The rates of ``<set>_video_info.csv`` are taken where there is that file.

    Raises:
        DataError: A csv file is missing or not laid out as expected.
    """
    part = {"train": "val", "val": "test"}[split]
    path = next((p for p in (root / f"{part}_Annotation{end}.csv" for end in ("_ours", "")) if p.is_file()), None)
    if path is None:
        raise DataError(f"{root / part}_Annotation.csv: file not found")
    info_path = root / f"{part}_video_info.csv"
    info = {row["video"]: row for row in _csv(info_path, ("video", "fps", "count"))} if info_path.is_file() else {}
    if frame_columns and not info:
        raise DataError(f"{info_path}: file not found; the frame columns need its counts")
    numbers, problems = {name: i for i, name in enumerate(classes)}, []
    collected: dict[str, _Collected] = {}
    for line, row in enumerate(_csv(path, ("video", "type", "start", "end")), start=2):
        if row["video"] in excluded:
            continue
        label = numbers.get(row["type"])
        if label is None:
            if row["type"] != AMBIGUOUS:
                problems.append(f"{path}, line {line}: unknown class {row['type']!r}; expected {_some(classes)}")
            continue
        start, end = _number(row, "start", path, line), _number(row, "end", path, line)
        if not 0 <= start < end:
            problems.append(f"{path}, line {line}: from {start} to {end} s; expected 0 <= start < end")
            continue
        of_video = collected.setdefault(row["video"], _Collected())
        of_video.segments.append((start, end))
        of_video.labels.append(label)
        if frame_columns:
            of_video.frames.append((_number(row, "startFrame", path, line), _number(row, "endFrame", path, line)))
    videos = []
    for id, instances in collected.items():
        row = info.get(id, {})
        if info and not row:
            problems.append(f"{info_path}: no row for {id}, which {path.name} annotates")
            continue
        videos.append(_thumos_video(id, instances, row, info_path))
    return Listing(videos, problems)


def _thumos_video(id: str, instances: _Collected, row: dict[str, str], path: Path) -> Video:
    segments, labels = np.array(instances.segments).reshape(-1, 2), np.array(instances.labels, dtype=np.int64)
    if not row:
        return Video(id, segments, labels)
    fps, count = _number(row, "fps", path), _number(row, "count", path)
    sample_fps = min(_number(row, "sample_fps", path) if "sample_fps" in row else SAMPLE_FPS, fps)
    sampled = int(_number(row, "sample_count", path)) if "sample_count" in row else int(count * sample_fps / fps)
    frames = np.array(instances.frames) * (sampled / count) if instances.frames else None
    return Video(id, segments, labels, count / fps, fps, sample_fps, sampled, official_frames=frames)


def _csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise DataError(f"{path}: no column {missing[0]!r}; expected {', '.join(columns)}")
        return list(reader)


def _number(row: dict[str, str], column: str, path: Path, line: int | None = None) -> float:
    try:
        return float(row[column])
    except (KeyError, TypeError, ValueError):
        where = f"{path}, line {line}" if line else f"{path}, video {row['video']}"
        raise DataError(f"{where}: {column} is {row.get(column)!r}; expected a number") from None


# -- json -------------------------------------------------------------------------------------------------------------


def read_json_classes(path: Path) -> list[str]:
    """The labels that occur in a file in ActivityNet's layout, sorted."""
    return sorted({item["label"] for _, _, items in _database(path) for item in items if "label" in item})


def read_json_split(
    path: Path, subsets: Sequence[str], class_names: Sequence[str], prefix: str = ""
) -> Listing[list[Video]]:
    """The videos of `subsets` in a file in ActivityNet's layout; `prefix` comes before their names."""
    numbers, problems, videos = {name: i for i, name in enumerate(class_names)}, [], []
    for id, entry, items in _database(path):
        if entry.get("subset") not in subsets:
            continue
        segments, labels = [], []
        for item in items:
            label, start, end = segment_of(item, f"{path}: video {id!r}")
            if label not in numbers:
                problems.append(f"{path}: video {id!r}: unknown class {label!r}; expected {_some(numbers)}")
            elif not 0 <= start < end:
                problems.append(f"{path}: video {id!r}: segment [{start}, {end}]; expected 0 <= start < end")
            else:
                segments.append((start, end))
                labels.append(numbers[label])
        duration, fps = entry.get("duration"), entry.get("fps")
        videos.append(
            Video(
                prefix + id,
                np.array(segments, dtype=np.float64).reshape(-1, 2),
                np.array(labels, dtype=np.int64),
                None if duration is None else float(duration),
                None if fps is None else float(fps),
            )
        )
    return Listing(videos, problems)


def subsets_of(path: Path) -> list[str]:
    """The names of the subsets in a file in ActivityNet's layout, sorted."""
    return sorted({str(entry.get("subset")) for _, entry, _ in _database(path)})


def _database(path: Path) -> list[tuple[str, dict, list]]:
    data = read_json(path)
    database = data.get("database") if isinstance(data, dict) else None
    if not isinstance(database, dict) or not all(isinstance(entry, dict) for entry in database.values()):
        raise DataError(f"{path}: no 'database' of videos; expected ActivityNet's layout")
    return [(id, entry, entry.get("annotations", [])) for id, entry in database.items()]


def _some(names: Iterable[str]) -> str:
    """`a, b, c or another`, with at most eight names."""
    names = list(names)
    return f"one of {', '.join(names[:8])}" + (f" ({len(names)} in all)" if len(names) > 8 else "")
