"""Reads a whole data set and reports what is in it and everything that is wrong with it."""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tasks.core.data import DataError
from tasks.segmentation.labels import IGNORE
from tasks.segmentation.reading import LabelTable, Sample, read_pair

if TYPE_CHECKING:
    from tasks.segmentation.datamodule import SegmentationDataModule


@dataclass
class SplitSummary:
    """What one split holds: sizes are (height, width); `pixels` and `images_with` count per class."""

    num_images: int
    pixels: np.ndarray  # (K,) int64
    images_with: np.ndarray  # (K,) int64
    ignored_pixels: int = 0
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None


@dataclass
class CheckResult:
    """Everything found in a data set; `problems` must be repaired, `notes` may be fine."""

    class_names: list[str]
    splits: dict[str, SplitSummary] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Reading:
    sample: Sample
    problem: str | None = None
    digest: str = ""
    size: tuple[int, int] = (0, 0)
    counts: np.ndarray | None = None  # (256,) pixels per train id


def check_dataset(datamodule: "SegmentationDataModule") -> CheckResult:
    """Read every image and label map of `datamodule` and collect all problems, including images in two splits."""
    result = CheckResult(datamodule.class_names)
    first_with: dict[str, tuple[str, Path]] = {}  # split and path of the first image with these bytes
    for split in datamodule.splits:
        listing = datamodule.scan(split)
        # Without split folders every split lists the same files; each message is kept once.
        result.problems += [problem for problem in listing.problems if problem not in result.problems]
        result.notes += [note for note in listing.notes if note not in result.notes]
        samples = listing.samples
        summary = SplitSummary(len(samples), *np.zeros((2, datamodule.num_classes), dtype=np.int64))
        result.splits[split] = summary
        for reading in _read_all(samples, datamodule.labels, datamodule.num_workers, f"Checking {split}"):
            if reading.problem is not None:
                result.problems.append(reading.problem)
                continue
            _add(summary, reading)
            other, path = first_with.setdefault(reading.digest, (split, reading.sample.image))
            if other != split:
                result.problems.append(f"{reading.sample.image}: the same file as {path}, which is in {other}")
            elif path != reading.sample.image:
                result.notes.append(f"{reading.sample.image}: the same file as {path}")
        absent = [result.class_names[k] for k in np.flatnonzero(summary.pixels == 0)] if samples else []
        if absent:
            result.notes.append(f"{split}: no pixel of {', '.join(absent)}")
    return result


def _read_all(samples: list[Sample], labels: LabelTable, num_workers: int, title: str) -> Iterable[_Reading]:
    # Decoding releases the interpreter lock, so threads are enough.
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        readings: Iterator[_Reading] = pool.map(lambda sample: _read(sample, labels), samples)
        yield from track(readings, title, len(samples), console=Console(stderr=True), transient=True)


def _read(sample: Sample, labels: LabelTable) -> _Reading:
    try:
        _, mask = read_pair(sample, labels)
    except DataError as error:
        return _Reading(sample, problem=str(error))
    digest = hashlib.sha256(sample.image.read_bytes()).hexdigest()
    return _Reading(sample, digest=digest, size=mask.shape, counts=np.bincount(mask.ravel(), minlength=256))


def _add(summary: SplitSummary, reading: _Reading) -> None:
    assert reading.counts is not None
    counts = reading.counts[: len(summary.pixels)]
    summary.pixels += counts
    summary.images_with += counts > 0
    summary.ignored_pixels += int(reading.counts[IGNORE])
    area = reading.size[0] * reading.size[1]
    if summary.smallest is None or area < summary.smallest[0] * summary.smallest[1]:
        summary.smallest = reading.size
    if summary.largest is None or area > summary.largest[0] * summary.largest[1]:
        summary.largest = reading.size


def print_result(result: CheckResult) -> None:
    """Print counts and sizes, the label histogram, notes and problems."""
    console = Console()
    images = Table("split", "images", "smallest", "largest", "ignored pixels", title="Images")
    for split, summary in result.splits.items():
        total = int(summary.pixels.sum()) + summary.ignored_pixels
        images.add_row(
            split,
            str(summary.num_images),
            _size(summary.smallest),
            _size(summary.largest),
            f"{summary.ignored_pixels / max(total, 1):.2%}",
        )
    console.print(images)
    classes = Table("id", "class", title="Classes: share of labelled pixels, number of images")
    for split in result.splits:
        classes.add_column(f"{split} pixels", justify="right")
        classes.add_column(f"{split} images", justify="right")
    for train_id, name in enumerate(result.class_names):
        cells = []
        for summary in result.splits.values():
            share = summary.pixels[train_id] / max(int(summary.pixels.sum()), 1)
            cells += [f"{share:.3%}", str(summary.images_with[train_id])]
        classes.add_row(str(train_id), name, *cells)
    console.print(classes)
    for title, lines in (("note", result.notes), ("problem", result.problems)):
        for line in lines:
            console.print(f"{title}: {line}", markup=False, highlight=False, soft_wrap=True)


def _size(size: tuple[int, int] | None) -> str:
    return "-" if size is None else f"{size[1]} x {size[0]}"
