"""Reads a whole data set and reports what is in it and everything that is wrong with it."""

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from tasks.core.check import CheckedImage, CheckResult, SizeRange, digest_of
from tasks.detection.instances import Instances
from tasks.detection.reading import Sample, read_sample

if TYPE_CHECKING:
    from tasks.detection.datamodule import DetectionDataModule

# Sides of the areas into which COCO's metrics divide objects.
SMALL, MEDIUM = 32, 96


@dataclass
class SplitSummary:
    """What one split holds; `objects` and `images_with` count per class."""

    num_images: int
    objects: np.ndarray  # (K,) int64
    images_with: np.ndarray  # (K,) int64
    num_empty: int = 0
    areas: np.ndarray = field(default_factory=lambda: np.zeros(3, dtype=np.int64))  # small, medium, large
    sizes: SizeRange = field(default_factory=SizeRange)


@dataclass(frozen=True)
class _Image(CheckedImage):
    annotated: bool
    instances: Instances


def check_dataset(datamodule: "DetectionDataModule") -> CheckResult[SplitSummary]:
    """Read every image and annotation of `datamodule` and collect all problems, including images in two splits."""
    result: CheckResult[SplitSummary] = CheckResult(class_names=datamodule.class_names)
    read = partial(_read, with_masks=datamodule.with_masks)
    for split in datamodule.splits:
        listing = datamodule.scan(split)
        result.add_listing(listing)
        samples = listing.samples
        summary = SplitSummary(len(samples), *np.zeros((2, datamodule.num_classes), dtype=np.int64))
        result.splits[split] = summary
        for image in result.check_images(split, samples, read, datamodule.num_workers):
            _add(summary, image)
        absent = [result.class_names[k] for k in np.flatnonzero(summary.objects == 0)] if samples else []
        if absent:
            result.notes.append(f"{split}: no {', no '.join(absent)}")
    return result


def _read(sample: Sample, with_masks: bool) -> _Image:
    image, instances = read_sample(sample, with_masks)
    size = (image.shape[0], image.shape[1])
    return _Image(str(sample.image), digest_of(sample.image), size, sample.annotated, instances)


def _add(summary: SplitSummary, image: _Image) -> None:
    counts = np.bincount(image.instances.labels, minlength=len(summary.objects))
    summary.objects += counts
    summary.images_with += counts > 0
    summary.num_empty += not image.annotated
    sides = np.sqrt((image.instances.boxes[:, 2:] - image.instances.boxes[:, :2]).prod(axis=1))
    summary.areas += np.bincount(np.digitize(sides, (SMALL, MEDIUM)), minlength=3)
    summary.sizes.add(*image.size)


def print_result(result: CheckResult[SplitSummary]) -> None:
    """Print counts and sizes, the class histogram, notes and problems."""
    console = Console()
    columns = ("split", "images", "empty", "smallest", "largest", "boxes", "small", "medium", "large")
    images = Table(*columns, title=f"Images; boxes small below {SMALL}², large from {MEDIUM}² pixels")
    for split, summary in result.splits.items():
        boxes = int(summary.areas.sum())
        images.add_row(
            split,
            str(summary.num_images),
            str(summary.num_empty),
            *summary.sizes.as_text(),
            str(boxes),
            *(f"{area / max(boxes, 1):.1%}" for area in summary.areas),
        )
    console.print(images)
    classes = Table("id", "class", title="Classes: number of objects, of images with them")
    for split in result.splits:
        classes.add_column(f"{split} objects", justify="right")
        classes.add_column(f"{split} images", justify="right")
    for label, name in enumerate(result.class_names):
        cells = []
        for summary in result.splits.values():
            cells += [str(summary.objects[label]), str(summary.images_with[label])]
        classes.add_row(str(label), name, *cells)
    console.print(classes)
    result.print_messages(console)
