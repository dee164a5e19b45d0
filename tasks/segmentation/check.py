"""Reads a whole data set and reports what is in it and everything that is wrong with it."""

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from tasks.core.check import CheckedImage, CheckResult, SizeRange, digest_of
from tasks.segmentation.labels import IGNORE
from tasks.segmentation.reading import LabelTable, Sample, read_pair

if TYPE_CHECKING:
    from tasks.segmentation.datamodule import SegmentationDataModule


@dataclass
class SplitSummary:
    """What one split holds; `pixels` and `images_with` count per class."""

    num_images: int
    pixels: np.ndarray  # (K,) int64
    images_with: np.ndarray  # (K,) int64
    ignored_pixels: int = 0
    sizes: SizeRange = field(default_factory=SizeRange)


@dataclass(frozen=True)
class _Image(CheckedImage):
    counts: np.ndarray  # (256,) pixels per train id


def check_dataset(datamodule: "SegmentationDataModule") -> CheckResult[SplitSummary]:
    """Read every image and label map of `datamodule` and collect all problems, including images in two splits."""
    result: CheckResult[SplitSummary] = CheckResult(class_names=datamodule.class_names)
    read = partial(_read, labels=datamodule.labels)
    for split in datamodule.splits:
        listing = datamodule.scan(split)
        result.add_listing(listing)
        samples = listing.samples
        summary = SplitSummary(len(samples), *np.zeros((2, datamodule.num_classes), dtype=np.int64))
        result.splits[split] = summary
        for image in result.check_images(split, samples, read, datamodule.num_workers):
            _add(summary, image)
        absent = [result.class_names[k] for k in np.flatnonzero(summary.pixels == 0)] if samples else []
        if absent:
            result.notes.append(f"{split}: no pixel of {', '.join(absent)}")
    return result


def _read(sample: Sample, labels: LabelTable) -> _Image:
    _, mask = read_pair(sample, labels)
    counts = np.bincount(mask.ravel(), minlength=256)
    return _Image(str(sample.image), digest_of(sample.image), mask.shape, counts)


def _add(summary: SplitSummary, image: _Image) -> None:
    counts = image.counts[: len(summary.pixels)]
    summary.pixels += counts
    summary.images_with += counts > 0
    summary.ignored_pixels += int(image.counts[IGNORE])
    summary.sizes.add(*image.size)


def print_result(result: CheckResult[SplitSummary]) -> None:
    """Print counts and sizes, the label histogram, notes and problems."""
    console = Console()
    images = Table("split", "images", "smallest", "largest", "ignored pixels", title="Images")
    for split, summary in result.splits.items():
        total = int(summary.pixels.sum()) + summary.ignored_pixels
        images.add_row(
            split,
            str(summary.num_images),
            *summary.sizes.as_text(),
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
    result.print_messages(console)
