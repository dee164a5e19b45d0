"""Reads a whole data set of videos and reports what is in it and everything that is wrong with it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from tasks.core.check import Findings
from tasks.core.data import DataError
from tasks.video.annotations import Video

if TYPE_CHECKING:
    from tasks.video.datamodule import DetectionDataModule

LENGTHS = (1, 2, 5, 10, 30, 60, 120)  # seconds; edges of the histogram of durations
TOLERANCE = 0.5  # seconds that an annotation may exceed its video by


@dataclass
class SplitSummary:
    """What one split holds."""

    num_classes: int
    num_videos: int = 0
    seconds: float = 0.0
    windows: int = 0
    lengths: list[float] = field(default_factory=list)  # of the instances, in seconds
    instances: NDArray[np.int64] = field(init=False)  # (K,)
    videos_with: NDArray[np.int64] = field(init=False)  # (K,)

    def __post_init__(self) -> None:
        self.instances, self.videos_with = np.zeros((2, self.num_classes), dtype=np.int64)

    def add(self, video: Video, duration: float) -> None:
        """Take one video into account."""
        counts = np.bincount(video.labels, minlength=self.num_classes)
        self.num_videos += 1
        self.seconds += duration
        self.instances += counts
        self.videos_with += counts > 0
        self.lengths += (video.segments[:, 1] - video.segments[:, 0]).tolist()


@dataclass
class CheckResult(Findings):
    """Everything found in a data set."""

    class_names: list[str] = field(default_factory=list)
    splits: dict[str, SplitSummary] = field(default_factory=dict)


def check_dataset(datamodule: DetectionDataModule) -> CheckResult:
    """Decode every video of `datamodule` and collect all problems, including videos in two splits."""
    result = CheckResult()
    try:
        datamodule.prepare_data()
        result.class_names = datamodule.class_names
        splits = datamodule.splits
    except DataError as error:
        result.problems.append(str(error))
        return result
    split_of: dict[str, str] = {}
    for split in splits:
        listing = datamodule.scan(split)
        result.add_listing(listing)
        summary = result.splits[split] = SplitSummary(datamodule.num_classes)
        files = datamodule.files() if listing.samples else {}
        for opened in datamodule.open_each(listing.samples, files, split):
            if opened.problem is not None:
                result.problems.append(opened.problem)
                continue
            video = opened.video
            duration = video.sampled_seconds
            summary.add(video, duration)
            summary.windows += sum(1 for _ in datamodule.cut(video)) if split == "train" else 0
            messages = result.problems if datamodule.repairable else result.notes
            messages += annotation_messages(video, duration, datamodule.class_names)
            if (other := split_of.setdefault(video.id, split)) != split:
                result.problems.append(f"{video.id}: in {split} and in {other}")
        absent = [result.class_names[k] for k in np.flatnonzero(summary.instances == 0)] if summary.num_videos else []
        if absent:
            result.notes.append(f"{split}: no instance of {', '.join(absent)}")
        if split == "train" and summary.num_videos and not summary.windows:
            result.problems.append(f"train: no window of {datamodule.clip_length} frames holds a whole instance")
    return result


def annotation_messages(video: Video, duration: float, class_names: list[str]) -> list[str]:
    """What is unusual about the instances of a video of `duration` seconds."""
    messages = []
    if video.duration is not None and abs(video.duration - duration) > max(1.0, 0.05 * duration):
        messages.append(f"{video.id}: {duration:.1f} s long, but {video.duration:.1f} s are stated")
    for (start, end), label in zip(video.segments.tolist(), video.labels.tolist(), strict=True):
        if end > duration + TOLERANCE:
            what = f"{class_names[label]} from {start:.1f} to {end:.1f} s"
            messages.append(f"{video.id}: {what}, but the video is {duration:.1f} s long")
    rows = list(zip(map(tuple, video.segments.tolist()), video.labels.tolist(), strict=True))
    repeated = len(rows) - len(set(rows))
    if repeated:
        messages.append(f"{video.id}: {repeated} instances repeat another")
    return messages


def print_result(result: CheckResult) -> None:
    """Print counts, the histograms of classes and durations, notes and problems."""
    console = Console()
    videos = Table("split", "videos", "hours", "instances", "median s", "longest s", "windows", title="Videos")
    for split, summary in result.splits.items():
        lengths = np.array(summary.lengths or [0.0])
        videos.add_row(
            split,
            str(summary.num_videos),
            f"{summary.seconds / 3600:.2f}",
            str(int(summary.instances.sum())),
            f"{np.median(lengths):.1f}",
            f"{lengths.max():.1f}",
            str(summary.windows) if split == "train" else "",
        )
    console.print(videos)
    classes = Table("id", "class", title="Classes: number of instances, of videos with them")
    durations = Table("seconds", title="Durations of instances")
    for split in result.splits:
        for table, column in ((classes, "instances"), (classes, "videos"), (durations, "instances")):
            table.add_column(f"{split} {column}", justify="right")
    for label, name in enumerate(result.class_names):
        cells = [str(n) for s in result.splits.values() for n in (s.instances[label], s.videos_with[label])]
        classes.add_row(str(label), name, *cells)
    console.print(classes)
    edges = np.array([0, *LENGTHS, np.inf])
    names = [f"under {LENGTHS[0]}", *(f"{a} to {b}" for a, b in itertools.pairwise(LENGTHS))]
    counts = [np.histogram(summary.lengths, edges)[0] for summary in result.splits.values()]
    for row, name in enumerate([*names, f"over {LENGTHS[-1]}"]):
        durations.add_row(name, *(str(count[row]) for count in counts))
    console.print(durations)
    result.print_messages(console)
