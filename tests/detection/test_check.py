import numpy as np
import pytest
from PIL import Image

from tasks.core.data import DataError
from tasks.detection.check import check_dataset
from tasks.detection.data import COCO, CocoDetection, DigitScenes

OPTIONS = {"num_workers": 2, "with_masks": True}


def test_counts_sizes_and_classes(tiny_coco, capsys):
    data = DigitScenes(str(tiny_coco), **OPTIONS)
    result = check_dataset(data)
    assert result.problems == []
    for split in ("train", "val"):
        summary = result.splits[split]
        labels = [sample.labels.tolist() for sample in data.samples(split)]
        assert summary.num_images == 13
        assert summary.objects.sum() == summary.areas.sum() == sum(map(len, labels)) > 10
        for digit in range(10):
            assert summary.objects[digit] == sum(found.count(digit) for found in labels)
            assert summary.images_with[digit] == sum(digit in found for found in labels)
        assert summary.num_empty == sum(not sample.annotated for sample in data.samples(split))
        absent = [str(digit) for digit in np.flatnonzero(summary.objects == 0)]
        assert (f"{split}: no {', no '.join(absent)}" in result.notes) == bool(absent)
    assert result.splits["val"].sizes.largest == (48, 48)
    assert data.check() is True
    printed = capsys.readouterr().out
    assert "train objects" in printed
    assert "problem" not in printed


def test_objects_are_counted_by_the_area_of_their_boxes(damaged):
    def change(content):
        image = content["images"][0]
        image |= {"width": 200, "height": 200}
        template = {"image_id": image["id"], "category_id": 1, "area": 5, "iscrowd": 0}
        sizes = [(31, 31), (32, 32), (16, 40), (90, 102), (96, 96)]
        content["annotations"] = [
            template | {"id": number, "bbox": [0, 0, *size]} for number, size in enumerate(sizes, start=1)
        ]

    root, _ = damaged(change)
    Image.new("RGB", (200, 200)).save(root / "val2017" / "000000500001.jpg")
    result = check_dataset(DigitScenes(str(root)))
    assert result.problems == []
    assert result.splits["val"].areas.tolist() == [2, 2, 1]
    assert result.splits["val"].num_empty == 12
    assert result.splits["val"].sizes.largest == (200, 200)


def test_every_problem_is_listed(damaged, capsys):
    def change(content):
        content["images"][0]["height"] += 1
        content["images"][5]["file_name"] = "../x.jpg"
        content["images"][6]["file_name"] = "y.jpg"
        content["annotations"] = [
            {"id": 1, "image_id": 500_008, "category_id": 1, "bbox": [1, 2, float("nan"), 4], "area": 5, "iscrowd": 0},
            {"id": 2, "image_id": 500_008, "category_id": 3, "bbox": [1, 2, 3, 4], "area": 5, "iscrowd": 0},
            {"id": 3, "image_id": 500_006, "category_id": 1, "bbox": [1, 2, 3, 4], "area": 5, "iscrowd": 0},
        ]

    root, path = damaged(change)
    images = root / "val2017"
    broken = images / "000000500002.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    (images / "000000500003.jpg").write_bytes(b"no image")
    copy = images / "000000500013.jpg"
    twin = next(path for path in sorted((root / "train2017").iterdir()) if _size(path) == _size(copy))
    copy.write_bytes(twin.read_bytes())
    data = DigitScenes(str(root), num_workers=2)
    result = check_dataset(data)
    expected = (
        f"{path}: image 500006: 'file_name' is '../x.jpg'; expected a path below {images}",
        f"{path}: image 500007: {images}/y.jpg: file not found",
        f"{path}: annotation 1: 'bbox' is [1, 2, nan, 4]; expected",
        f"{path}: annotation 2: 'category_id' is 3; expected the id of one of the categories",
        f"{images}/000000500001.jpg: an image of ",
        f"{images}/000000500002.jpg: cannot be read as an image",
        f"{images}/000000500003.jpg: cannot be read as an image",
        f"{copy}: the same file as {twin}, which is in train",
    )
    assert len(result.problems) == len(expected)
    for problem, beginning in zip(result.problems, expected, strict=True):
        assert problem.startswith(beginning)
    assert data.check() is False
    printed = capsys.readouterr().out
    for problem in result.problems:
        assert f"problem: {problem}" in printed


def _size(path):
    with Image.open(path) as image:
        return image.size


def test_missing_data_is_a_problem_with_the_layout(tmp_path):
    result = check_dataset(COCO(str(tmp_path / "nowhere")))
    assert len(result.problems) == 2
    assert all("Expected layout" in problem for problem in result.problems)
    with pytest.raises(DataError, match=r"val.json: file not found"):
        check_dataset(CocoDetection(str(tmp_path)))
