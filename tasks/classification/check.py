"""Reads a whole data set and reports what is in it and everything that is wrong with it."""

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from tasks.classification.reading import LabelledImages
from tasks.core.check import CheckedImage, CheckResult, SizeRange

if TYPE_CHECKING:
    from tasks.classification.datamodule import ClassificationDataModule

SMALL = 32  # pixels of the shorter side below which an image shows little


@dataclass
class SplitSummary:
    """What one split holds: images per class, counting those that cannot be read, and the sizes of the others."""

    counts: np.ndarray  # (K,) int64
    sizes: SizeRange = field(default_factory=SizeRange)
    small: list[str] = field(default_factory=list)


def check_dataset(datamodule: "ClassificationDataModule") -> CheckResult[SplitSummary]:
    """Read every image of `datamodule` and collect all problems, including images in two splits."""
    result: CheckResult[SplitSummary] = CheckResult(class_names=datamodule.class_names)
    for split in datamodule.splits:
        listing = datamodule.scan(split)
        result.add_listing(listing)
        samples = listing.samples
        assert samples.labels is not None
        summary = SplitSummary(np.bincount(samples.labels, minlength=datamodule.num_classes))
        result.splits[split] = summary
        total = len(samples)
        for image in result.check_images(split, range(total), partial(_read, samples), datamodule.num_workers):
            summary.sizes.add(*image.size)
            if min(image.size) < SMALL:
                summary.small.append(f"{image.origin} ({image.size[1]} x {image.size[0]})")
        if summary.small:
            first, number = summary.small[0], len(summary.small)
            result.notes.append(f"{split}: {number} of {total} images have a side below {SMALL} pixels, first {first}")
    return result


def _read(samples: LabelledImages, index: int) -> CheckedImage:
    width, height = samples.image(index).size
    return CheckedImage(samples.origin(index), samples.digest(index), (height, width))


def print_result(result: CheckResult[SplitSummary]) -> None:
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
