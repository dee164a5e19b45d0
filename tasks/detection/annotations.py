"""COCO's annotation files: reading them, what may be wrong with them, and which images they name.

https://cocodataset.org/#format-data
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any

from pycocotools.mask import area as mask_area

from tasks.core.data import DataError
from tasks.detection.masks import to_rle

PARTS = ("images", "annotations", "categories")
Content = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Categories:
    """The categories of a data set in the order of their ids; a category's place in it is its train id 0..K-1."""

    ids: tuple[int, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, categories: Sequence[dict[str, Any]]) -> "Categories":
        """Take `id` and `name` of the records of an annotation file."""
        ordered = sorted(categories, key=lambda category: category["id"])
        return cls(tuple(category["id"] for category in ordered), tuple(category["name"] for category in ordered))

    def to_official(self, labels: Sequence[int]) -> list[int]:
        """Category ids of train ids."""
        return [self.ids[label] for label in labels]

    def to_train(self, category_ids: Sequence[int]) -> list[int]:
        """Train ids of category ids."""
        return [self._train_ids[category_id] for category_id in category_ids]

    @cached_property
    def _train_ids(self) -> dict[int, int]:
        return {category_id: label for label, category_id in enumerate(self.ids)}


def read_content(path: Path) -> Content:
    """Read images, annotations and categories of a file; raises `DataError` if it does not hold these three lists."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}; expected an object with {', '.join(PARTS)}")
    for part in PARTS:
        if not isinstance(content.get(part), list):
            found = f"holds a {type(content[part]).__name__}" if part in content else "is missing"
            raise DataError(f"{path}: {part!r} {found}; expected a list of objects")
        for position, record in enumerate(content[part]):
            if not isinstance(record, dict):
                raise DataError(f"{path}: {part}[{position}] is a {type(record).__name__}; expected an object")
    return {part: content[part] for part in PARTS}


def category_problems(path: Path, content: Content) -> list[str]:
    """Return everything wrong with the categories of a file."""
    if not content["categories"]:
        return [f"{path}: no categories; expected at least one"]
    return _check(path, content["categories"], "category", _category_problem)[1]


def check_content(path: Path, content: Content, folder: Path, with_masks: bool) -> tuple[Content, list[str]]:
    """Return the images and annotations of a file that can be used, and everything wrong with the others.

    The files of images are looked for below `folder`; with masks, every object needs a segmentation.
    """
    found = ImageFolder(folder)

    def image_problem(record: dict[str, Any]) -> str | None:
        return _image_problem(record) or found.problem(record["file_name"])

    images, problems = _check(path, content["images"], "image", image_problem)
    categories = {category["id"] for category in content["categories"]}
    known = {record["id"] for record in content["images"] if type(record.get("id")) is int}
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}

    def annotation_problem(record: dict[str, Any]) -> str | None:
        for key, ids, part in (("image_id", known, "images"), ("category_id", categories, "categories")):
            if type(record.get(key)) is not int or record[key] not in ids:
                return f"{key!r} is {_short(record.get(key))}; expected the id of one of the {part}"
        return _annotation_problem(record, sizes.get(record["image_id"]), with_masks)

    annotations, more = _check(path, content["annotations"], "annotation", annotation_problem)
    annotations = [completed(a, *sizes[a["image_id"]]) for a in annotations if a["image_id"] in sizes]
    return {"images": images, "annotations": annotations, "categories": content["categories"]}, problems + more


def _check(
    path: Path, records: list[dict[str, Any]], name: str, problem_of: Callable[[dict[str, Any]], str | None]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the records without a problem, and a message for each of the others."""
    seen: set[int] = set()
    good, problems = [], []
    for position, record in enumerate(records):
        id = record.get("id")
        if type(id) is not int:
            problems.append(f"{path}: {name} number {position}: 'id' is {_short(id)}; expected a whole number")
        elif id in seen:
            problems.append(f"{path}: {name} {id}: a second one with this id; expected unique ids")
        elif problem := problem_of(record):
            problems.append(f"{path}: {name} {id}: {problem}")
        else:
            good.append(record)
        if type(id) is int:
            seen.add(id)
    return good, problems


def _category_problem(record: dict[str, Any]) -> str | None:
    name = record.get("name")
    return None if isinstance(name, str) and name else f"'name' is {_short(name)}; expected a text"


def _image_problem(record: dict[str, Any]) -> str | None:
    name = record.get("file_name")
    if not isinstance(name, str) or not name or "\0" in name:
        return f"'file_name' is {_short(name)}; expected the name of a file"
    for key in ("height", "width"):
        if type(record.get(key)) is not int or record[key] < 1:
            return f"{key!r} is {_short(record.get(key))}; expected a whole number of at least 1"
    return None


def _annotation_problem(record: dict[str, Any], size: tuple[int, int] | None, with_masks: bool) -> str | None:
    box = record.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box)) and box[2] >= 0 and box[3] >= 0):
        return f"'bbox' is {_short(box)}; expected [x, y, width, height], finite, width and height at least 0"
    if not (_is_finite(record.get("area", 0)) and record.get("area", 0) >= 0):
        return f"'area' is {_short(record.get('area'))}; expected a number of at least 0"
    if record.get("iscrowd", 0) not in (0, 1):
        return f"'iscrowd' is {_short(record.get('iscrowd'))}; expected 0 or 1"
    segmentation = record.get("segmentation")
    if not segmentation:
        return "'segmentation' is missing; expected polygons or RLE" if with_masks else None
    problem = segmentation_problem(segmentation, *size) if size else None  # else its image is a problem already
    return f"'segmentation' {problem}" if problem else None


def completed(annotation: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """Add what COCO's files always have and those of others often lack: `iscrowd`, 0, and `area`.

    The area is that of the segmentation, or of the box where there is none.
    """
    missing: dict[str, Any] = {}
    if "iscrowd" not in annotation:
        missing["iscrowd"] = 0
    if "area" not in annotation:
        segmentation = annotation.get("segmentation")
        box_area = annotation["bbox"][2] * annotation["bbox"][3]
        missing["area"] = float(mask_area(to_rle(segmentation, height, width)) if segmentation else box_area)
    return {**annotation, **missing} if missing else annotation


def segmentation_problem(segmentation: Any, height: int, width: int) -> str | None:
    """Say what is wrong with polygons or a run-length encoding, as the end of a sentence; None if nothing is.

    pycocotools takes a polygon of four numbers for a box, and memory in proportion to coordinates.
    """
    if isinstance(segmentation, dict):
        return _rle_problem(segmentation, height, width)
    if not isinstance(segmentation, list):
        return f"is {_short(segmentation)}; expected polygons or RLE"
    reach = max(height, width)
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return f"has the polygon {_short(polygon)}; expected [x, y, x, y, ...] of at least three points"
        try:
            finite = math.isfinite(sum(polygon))
        except (TypeError, OverflowError):
            finite = False
        if not finite or min(polygon) < -reach or max(polygon) > 2 * reach:
            return f"has the polygon {_short(polygon)}; expected numbers in or near the image of {width} x {height}"
    return None


def _rle_problem(rle: dict[str, Any], height: int, width: int) -> str | None:
    if rle.get("size") != [height, width]:
        return f"has the size {_short(rle.get('size'))}; expected [{height}, {width}], those of the image"
    counts: Any = rle.get("counts")
    if isinstance(counts, str):
        counts = run_lengths(counts)
    valid = isinstance(counts, list) and all(type(count) is int and count >= 0 for count in counts)
    if valid and sum(counts) == height * width:
        return None
    return f"has counts {_short(rle.get('counts'))}; expected runs of {height * width} pixels in all"


def run_lengths(counts: str) -> list[int] | None:
    """Decode COCO's compressed counts, as pycocotools does without noticing when they are cut; None if they are.

    A character holds five bits, the least significant first, and whether more follow; from the fourth run on a number
    is the difference to the run before the last.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits >> 4 & 1) << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs if shift == 0 else None


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


def _short(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class ImageFolder:
    """Finds the image files that an annotation file names, none of them outside of one folder.

    Each folder is listed once, which is faster than asking for each file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._listed: dict[str, dict[str, bool]] = {}  # folder: file: is it inside

    def problem(self, file_name: str) -> str | None:
        """Say what is wrong with a file name; None if there is such a file in the folder."""
        parts = PureWindowsPath(file_name)  # knows both kinds of slashes, and drives
        if parts.anchor or parts.drive or ".." in parts.parts or os.path.isabs(file_name):
            return f"'file_name' is {file_name!r}; expected a path below {self.folder}"
        parent, _, name = file_name.rpartition("/")
        if parent not in self._listed:
            self._listed[parent] = dict(self._list(self.folder / parent))
        inside = self._listed[parent].get(name)
        if inside is None:
            return f"{self.folder / file_name}: file not found"
        return None if inside else f"{self.folder / file_name}: a link to a file outside of {self.folder}"

    def _list(self, folder: Path) -> Iterator[tuple[str, bool]]:
        root = self.folder.resolve()
        try:
            inside = folder.resolve().is_relative_to(root)
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        yield entry.name, Path(entry.path).resolve().is_relative_to(root)
                    elif entry.is_file():
                        yield entry.name, inside
        except OSError:
            return
