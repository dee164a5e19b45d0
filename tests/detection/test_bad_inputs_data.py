"""Each kind of broken annotation file gives one error that names the file, the record and what was expected."""

import json
import math
import os
import re
from copy import deepcopy

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_api

from tasks.core.data import DataError
from tasks.detection.annotations import ImageFolder, run_lengths, segmentation_problem
from tasks.detection.data import CocoDetection, DigitScenes

RLE = {"size": [48, 48], "counts": [0, 48 * 48]}
PACKED = rle_api.frPyObjects(RLE, 48, 48)["counts"].decode()


@pytest.fixture
def fails(tmp_path):
    """Sets up a split of two images with one object each, changed, which must fail with one line that has `parts`."""

    def run(change, *parts, with_masks=True):
        content = {
            "images": [{"id": n, "file_name": f"{n}.png", "height": 48, "width": 48} for n in (1, 2)],
            "annotations": [
                {
                    "id": n, "image_id": n, "category_id": 7, "bbox": [1, 2, 10, 20], "area": 200.0, "iscrowd": 0,
                    "segmentation": [[1, 2, 11, 2, 11, 22]],
                }
                for n in (1, 2)
            ],
            "categories": [{"id": 7, "name": "a"}],
        }  # fmt: skip
        for split in ("train", "val"):
            (tmp_path / split).mkdir(exist_ok=True)
            for n in (1, 2):
                Image.new("RGB", (48, 48)).save(tmp_path / split / f"{n}.png")
            (tmp_path / f"{split}.json").write_text(json.dumps(content))
        CocoDetection(str(tmp_path), with_masks=with_masks, num_workers=0).setup("fit")
        path = tmp_path / "train.json"
        changed = change(deepcopy(content))
        path.write_text(changed if isinstance(changed, str) else json.dumps(changed or content))
        with pytest.raises(DataError) as error:
            CocoDetection(str(tmp_path), with_masks=with_masks, num_workers=0).setup("fit")
        message = str(error.value)
        assert message.startswith(str(path))
        assert "\n" not in message
        for part in parts:
            assert part in message

    return run


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "not valid JSON"),
        ('{"images": [', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "holds a list; expected an object with images, annotations, categories"),
        ('{"images": []}', "'annotations' is missing; expected a list"),
        ('{"images": 3, "annotations": [], "categories": []}', "'images' holds a int"),
        ('{"images": [3], "annotations": [], "categories": []}', "images[0] is a int; expected an object"),
        ('{"images": [], "annotations": [], "categories": []}', "no categories"),
    ],
)
def test_content(fails, text, part):
    fails(lambda content: text, part)


def test_bytes_that_are_no_text(tiny_coco, damaged):
    root, path = damaged()
    path.write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match=rf"{path}: not valid JSON"):
        DigitScenes(str(root)).setup("validate")


def changed(part, **values):
    def change(content):
        content[part][1] |= values
        for name in [name for name, value in values.items() if value is ...]:
            del content[part][1][name]
        return content

    return change


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("images", {"id": 1}, "image 1: a second one with this id"),
        ("images", {"id": "2"}, "image number 1: 'id' is '2'; expected a whole number"),
        ("images", {"id": True}, "image number 1: 'id' is True"),
        ("images", {"id": ...}, "image number 1: 'id' is missing"),
        ("images", {"file_name": ...}, "image 2: 'file_name' is missing"),
        ("images", {"file_name": "a\0b"}, "image 2: 'file_name' is 'a\\x00b'"),
        ("images", {"file_name": "3.png"}, "3.png: file not found"),
        ("images", {"height": 0}, "image 2: 'height' is 0; expected a whole number of at least 1"),
        ("images", {"width": 48.5}, "image 2: 'width' is 48.5"),
        ("annotations", {"id": 1}, "annotation 1: a second one"),
        ("annotations", {"id": [1]}, "annotation number 1: 'id' is [1]"),
        ("annotations", {"image_id": 3}, "annotation 2: 'image_id' is 3; expected the id of one of the images"),
        ("annotations", {"image_id": ...}, "annotation 2: 'image_id' is missing"),
        ("annotations", {"category_id": 0}, "annotation 2: 'category_id' is 0; expected the id of one of the categ"),
        ("annotations", {"bbox": [1, 2, 3]}, "annotation 2: 'bbox' is [1, 2, 3]; expected [x, y, width, height]"),
        ("annotations", {"bbox": [1, 2, -3, 4]}, "annotation 2: 'bbox' is [1, 2, -3, 4]"),
        ("annotations", {"bbox": [1, math.nan, 3, 4]}, "annotation 2: 'bbox' is [1, nan, 3, 4]"),
        ("annotations", {"bbox": [1, 2, math.inf, 4]}, "annotation 2: 'bbox' is [1, 2, inf, 4]"),
        ("annotations", {"bbox": [1, 2, "3", 4]}, "annotation 2: 'bbox'"),
        ("annotations", {"bbox": [1, 2, 10**400, 4]}, "annotation 2: 'bbox'"),
        ("annotations", {"bbox": ...}, "annotation 2: 'bbox' is missing"),
        ("annotations", {"area": -1}, "annotation 2: 'area' is -1"),
        ("annotations", {"area": math.nan}, "annotation 2: 'area' is nan"),
        ("annotations", {"iscrowd": 2}, "annotation 2: 'iscrowd' is 2; expected 0 or 1"),
        ("annotations", {"segmentation": ...}, "annotation 2: 'segmentation' is missing; expected polygons or RLE"),
        ("annotations", {"segmentation": [[1, 2, 3, 4]]}, "annotation 2: 'segmentation' has the polygon [1, 2, 3, 4]"),
    ],
)
def test_records(fails, part, values, message):
    fails(changed(part, **values), message)


@pytest.mark.parametrize(
    ("category", "message"),
    [
        ({"id": 7, "name": "b"}, "category 7: a second one with this id"),
        ({"id": "8", "name": "b"}, "category number 1: 'id' is '8'"),
        ({"id": 8}, "category 8: 'name' is missing; expected a text"),
        ({"id": 8, "name": 3}, "category 8: 'name' is 3"),
        ({"id": 8, "name": "b"}, "other categories than expected: they differ in 8 'b'"),
    ],
)
def test_categories(fails, category, message):
    fails(lambda content: content | {"categories": [*content["categories"], category]}, message)


def test_several_problems_are_counted(fails):
    def change(content):
        for annotation in content["annotations"]:
            annotation["iscrowd"] = None
        return content

    fails(change, "annotation 1", "(and 1 more problems; `check` lists them all)")


@pytest.mark.parametrize(
    "segmentation",
    [
        3,
        "text",
        [3],
        [[]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[1, 2, 3, 4, math.nan, 6]],
        [[1, 2, 3, 4, 5, math.inf]],
        [[1, 2, 3, 4, 5, "6"]],
        [[1, 2, 3, 4, 5, 10**400]],
        [[1, 2, 3, 4, 5, 1e9]],  # would fill the memory
        [[1, 2, 3, 4, 5, -1e9]],
        [[1, 2, 3, 4, 5, [6]]],
        RLE | {"size": [48, 47]},
        RLE | {"size": ...},
        RLE | {"counts": ...},
        RLE | {"counts": [1, 2]},
        RLE | {"counts": [-1, 48 * 48 + 1]},
        RLE | {"counts": [48 * 48 + 1]},
        RLE | {"counts": [0.5, 48 * 48 - 0.5]},
        RLE | {"counts": "zzzz"},
        RLE | {"counts": ""},
        RLE | {"counts": "é"},
        RLE | {"counts": PACKED[:-1]},
        RLE | {"counts": PACKED + "1"},
    ],
)
def test_segmentations(segmentation):
    if isinstance(segmentation, dict):
        segmentation = {name: value for name, value in segmentation.items() if value is not ...}
    assert "; expected" in segmentation_problem(segmentation, 48, 48)


@pytest.mark.parametrize(
    "segmentation", [[[1, 2, 3, 4, 5, 6]], [[-3, 2, 50, 4, 5, 60.5], [0, 0, 1, 1, 2, 2]], RLE, RLE | {"counts": PACKED}]
)
def test_segmentations_that_are_fine(segmentation):
    assert segmentation_problem(segmentation, 48, 48) is None


def test_compressed_run_lengths_are_those_of_pycocotools():
    draw = np.random.default_rng(0)
    for _ in range(50):
        mask = (draw.random((60, 80)) < draw.uniform(0, 1)) | (draw.random((60, 1)) < 0.5)
        counts = rle_api.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode()
        edges = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False))
        assert run_lengths(counts) == np.diff(edges, prepend=0, append=mask.size).tolist()


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "data" / "images"
    (inside / "sub").mkdir(parents=True)
    for path in (inside / "a.jpg", inside / "sub" / "b.jpg", tmp_path / "data" / "secret.jpg"):
        path.write_bytes(b"")
    (inside / "link.jpg").symlink_to(inside / "a.jpg")
    (inside / "out.jpg").symlink_to(tmp_path / "data" / "secret.jpg")
    (inside / "away").symlink_to(tmp_path / "data")
    return inside


@pytest.mark.parametrize("name", ["a.jpg", "sub/b.jpg", "./a.jpg", "link.jpg"])
def test_files_inside_of_the_folder(folder, name):
    assert ImageFolder(folder).problem(name) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret.jpg", "expected a path below"),
        ("sub/../../secret.jpg", "expected a path below"),
        ("/etc/passwd", "expected a path below"),
        ("C:\\secret.jpg", "expected a path below"),
        ("..\\secret.jpg", "expected a path below"),
        ("out.jpg", "a link to a file outside of"),
        ("away/secret.jpg", "a link to a file outside of"),
        ("c.jpg", "file not found"),
        ("sub", "file not found"),
        ("none/a.jpg", "file not found"),
        ("a.jpg/b.jpg", "file not found"),
    ],
)
def test_files_that_are_missing_or_outside_of_the_folder(folder, name, message):
    assert message in ImageFolder(folder).problem(name)


def test_images_that_are_missing_altogether(damaged):
    root, path = damaged()
    for image in (root / "val2017").iterdir():
        image.unlink()
    with pytest.raises(DataError, match=rf"{root}/val2017: contains no image of {path}(.|\n)*Expected layout"):
        DigitScenes(str(root)).setup("validate")


def test_folder_without_permission(damaged):
    root, path = damaged()
    path.chmod(0)
    if os.geteuid() != 0:  # root may read anything
        with pytest.raises(DataError, match=f"{path}: cannot be read"):
            DigitScenes(str(root)).setup("validate")


def test_size_that_disagrees_with_the_file(damaged):
    def change(content):
        content["images"][0] |= {"height": 100, "width": 200}

    root, _ = damaged(change)
    pattern = r"000000500001.jpg: an image of \d+ x \d+ pixels; expected 200 x 100, the size in the annotation file"
    with pytest.raises(DataError, match=pattern):
        DigitScenes(str(root)).val_dataset()[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_image(damaged, workers):
    root, _ = damaged()
    path = root / "val2017" / "000000500001.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    loader = DigitScenes(str(root), num_workers=workers).val_dataloader()
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: cannot be read as an image"):
        next(iter(loader))
