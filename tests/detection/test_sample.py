import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as rle_api

from tasks.core.images import read_image
from tasks.core.sample import digit_images
from tasks.detection.data import DigitScenes
from tasks.detection.masks import rasterize, to_rle
from tasks.detection.sample import CATEGORY_IDS, categories, draw_scene, write_sample


@pytest.fixture(scope="module")
def scenes():
    digits, labels = digit_images("val")
    return [draw_scene(np.random.default_rng(number), digits, labels, 96) for number in range(300)]


def test_scenes_have_crowds_and_empty_images_of_three_shapes(scenes):
    shapes = [image.shape for image, _ in scenes]
    assert set(shapes) == {(72, 96, 3), (96, 72, 3), (96, 96, 3)}
    assert min(shapes.count(shape) for shape in set(shapes)) > 70
    assert 3 <= sum(not objects for _, objects in scenes) <= 30
    assert 3 <= sum(any(record["iscrowd"] for record in objects) for _, objects in scenes) <= 30
    assert {record["category_id"] for _, objects in scenes for record in objects} == set(CATEGORY_IDS)


def test_annotations_say_where_the_strokes_are(scenes):
    for image, objects in scenes:
        height, width = image.shape[:2]
        covered = np.zeros((height, width), dtype=int)
        for record in objects:
            x, y, box_width, box_height = record["bbox"]
            assert x >= 0
            assert y >= 0
            assert x + box_width <= width
            assert y + box_height <= height
            rle = to_rle(record["segmentation"], height, width)
            assert record["area"] == rle_api.area(rle) > 20
            np.testing.assert_allclose(rle_api.toBbox(rle), record["bbox"], rtol=0, atol=1.01)
            covered += rasterize([record["segmentation"]], height, width)[0]
        assert np.count_nonzero(covered > 1) < 0.02 * covered.size  # holes of digits are covered, strokes hardly
        if objects:
            inside = image[covered > 0].max(axis=1).astype(float).mean()
            assert inside > image[covered == 0].max(axis=1).astype(float).mean() + 10


def test_sample_has_the_layout_of_coco_and_is_reproducible(tmp_path):
    for name in "ab":
        write_sample(tmp_path / name, num_train=4, num_val=2, image_size=48)
    files = sorted(path.relative_to(tmp_path / "a").as_posix() for path in (tmp_path / "a").rglob("*.*"))
    assert files == [
        "annotations/instances_train2017.json",
        "annotations/instances_val2017.json",
        *(f"train2017/{number:012d}.jpg" for number in range(1, 5)),
        *(f"val2017/{number:012d}.jpg" for number in (500001, 500002)),
    ]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    content = json.loads((tmp_path / "a" / files[0]).read_text())
    assert content["categories"] == categories()
    for image in content["images"]:
        assert read_image(tmp_path / "a/train2017" / image["file_name"]).shape == (image["height"], image["width"], 3)
    assert {annotation["image_id"] for annotation in content["annotations"]} <= {1, 2, 3, 4}
    assert len({path.read_bytes() for path in (tmp_path / "a").rglob("*.jpg")}) == 6
    assert len(set(DigitScenes().palette)) == len(CATEGORY_IDS) == 10
    assert max(np.diff(CATEGORY_IDS)) > 1


def test_sample_is_written_to_the_cache_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = DigitScenes(num_train=3, num_val=2, num_workers=0)
    assert Path(data.root).is_relative_to(tmp_path / "frugal")
    data.prepare_data()
    image = Path(data.root, "train2017/000000000001.jpg")
    written = image.stat().st_mtime_ns
    data.prepare_data()
    assert image.stat().st_mtime_ns == written
    assert DigitScenes(num_train=4, num_val=2).root != data.root
