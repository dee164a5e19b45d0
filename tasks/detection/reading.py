"""From annotation files to samples: images with their boxes, labels and masks."""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tasks.core.data import DataError
from tasks.core.images import named_images, read_image
from tasks.detection.annotations import Categories, Content
from tasks.detection.instances import Instances
from tasks.detection.masks import rasterize


@dataclass(frozen=True)
class Sample:
    """One image and what training takes from its annotations.

    `boxes` (n, 4) float64 are xyxy as annotated, `labels` (n,) int64 train ids, `segmentations` the n polygons or
    run-length encodings (empty without masks). Crowds, which are regions of many objects, are not among them.
    `annotated` says whether the image has any annotation, crowds included; `size` is (height, width) as annotated.
    """

    image: Path
    id: str
    size: tuple[int, int] | None = None
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    segmentations: tuple[Any, ...] = ()
    annotated: bool = False


@dataclass(frozen=True)
class SampleList:
    """The samples of a file by image id, and the ids of annotations no network could learn from."""

    samples: list[Sample]
    excluded: list[int]


def make_samples(content: Content, folder: Path, categories: Categories, with_masks: bool) -> SampleList:
    """Make samples of an annotation file without problems; excluded is what mmdet excludes.

    That is a box narrower or lower than 1 pixel, without area, or without a part inside its image.
    """
    grouped: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        grouped[annotation["image_id"]].append(annotation)
    samples, excluded = [], []
    for image in sorted(content["images"], key=lambda image: image["id"]):
        height, width = size = image["height"], image["width"]
        kept = []
        for annotation in grouped[image["id"]]:
            if annotation["iscrowd"] or annotation.get("ignore"):
                continue
            if _is_learnable(annotation, height, width):
                kept.append(annotation)
            else:
                excluded.append(annotation["id"])
        boxes = np.array([annotation["bbox"] for annotation in kept], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array(categories.to_train([a["category_id"] for a in kept]), dtype=np.int64)
        segmentations = tuple(_packed(a["segmentation"]) for a in kept) if with_masks else ()
        path = folder / image["file_name"]
        annotated = bool(grouped[image["id"]])
        samples.append(Sample(path, str(image["id"]), size, boxes, labels, segmentations, annotated))
    return SampleList(samples, excluded)


def _is_learnable(annotation: dict[str, Any], height: int, width: int) -> bool:
    x, y, box_width, box_height = annotation["bbox"]
    overlaps = min(x + box_width, width) > max(x, 0) and min(y + box_height, height) > max(y, 0)
    return overlaps and box_width >= 1 and box_height >= 1 and annotation["area"] > 0


def _packed(segmentation: Any) -> Any:
    # Python's floats take four times the memory of an array's.
    return segmentation if isinstance(segmentation, dict) else [np.array(p, dtype=np.float64) for p in segmentation]


def read_sample(sample: Sample, with_masks: bool) -> tuple[np.ndarray, Instances]:
    """Read an image as RGB uint8 (H, W, 3), and what is in it.

    Raises `DataError` if the image cannot be read or is not of the size that its annotations say.
    """
    image = read_image(sample.image)
    height, width = image.shape[:2]
    if sample.size is not None and sample.size != (height, width):
        raise DataError(
            f"{sample.image}: an image of {width} x {height} pixels; expected {sample.size[1]} x {sample.size[0]},"
            " the size in the annotation file"
        )
    masks = rasterize(sample.segmentations, height, width) if with_masks else None
    return image, Instances(sample.boxes, sample.labels, masks).clipped(height, width)


def samples_to_predict(images: str) -> list[Sample]:
    """Return the images named by a folder, a file or a glob pattern; raises `DataError` if there are none."""
    return [Sample(path, id) for id, path in named_images(images).items()]
