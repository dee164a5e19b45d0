"""Reads a whole data set and reports what is in it and everything that is wrong with it."""

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from tasks.classification.reading import LabelledImages
from tasks.core.check import Findings, SizeRange, read_all
from tasks.core.data import DataError

if TYPE_CHECKING:
    from tasks.classification.datamodule import ClassificationDataModule

SMALL = 32  # pixels of the shorter side below which an image shows little


@dataclass
class SplitSummary:
    """What one split holds: images per class, counting those that cannot be read, and the sizes of the others."""

    counts: np.ndarray  # (K,) int64
    sizes: SizeRange = field(default_factory=SizeRange)
    small: list[str] = field(default_factory=list)


@dataclass
class CheckResult(Findings):
    """Everything found in a data set."""

    class_names: list[str] = field(default_factory=list)
    splits: dict[str, SplitSummary] = field(default_factory=dict)


@dataclass(frozen=True)
class _Reading:
    origin: str
    problem: str | None = None
    digest: str = ""
    size: tuple[int, int] = (0, 0)  # height, width


def check_dataset(datamodule: "ClassificationDataModule") -> CheckResult:
    """Read every image of `datamodule` and collect all problems, including images in two splits."""
    result = CheckResult(class_names=datamodule.class_names)
    for split in datamodule.splits:
        listing = datamodule.scan(split)
        result.add_listing(listing)
        samples = listing.samples
        assert samples.labels is not None
        summary = SplitSummary(np.bincount(samples.labels, minlength=datamodule.num_classes))
        result.splits[split] = summary
        read, total = partial(_read, samples), len(samples)
        for reading in read_all(range(total), read, total, datamodule.num_workers, f"Checking {split}"):
            if reading.problem is not None:
                result.problems.append(reading.problem)
                continue
            summary.sizes.add(*reading.size)
            if min(reading.size) < SMALL:
                summary.small.append(f"{reading.origin} ({reading.size[1]} x {reading.size[0]})")
            result.compare(reading.digest, split, reading.origin)
        if summary.small:
            first, number = summary.small[0], len(summary.small)
            result.notes.append(f"{split}: {number} of {total} images have a side below {SMALL} pixels, first {first}")
    return result


def _read(samples: LabelledImages, index: int) -> _Reading:
    origin = samples.origin(index)
    try:
        width, height = samples.image(index).size
    except DataError as error:
        return _Reading(origin, problem=str(error))
    return _Reading(origin, digest=samples.digest(index), size=(height, width))


def print_result(result: CheckResult) -> None:
    """Print counts and sizes, notes and problems."""
    console = Console()
    images = Table("split", "images", "smallest", "largest", title="Images")
    for split, summary in result.splits.items():
        images.add_row(split, str(summary.counts.sum()), *summary.sizes.as_text())
    console.print(images)
    classes = Table("id", "class", title="Classes: number of images")
    for split in result.splits:
        classes.add_column(split, justify="right")
    for label, name in enumerate(result.class_names):
        classes.add_row(str(label), name, *(str(summary.counts[label]) for summary in result.splits.values()))
    console.print(classes)
    result.print_messages(console)
