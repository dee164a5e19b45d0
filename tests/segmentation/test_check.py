from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.core.data import DataError
from tasks.segmentation.check import check_dataset
from tasks.segmentation.data import ADE20K, DigitScenes, SegmentationFolder


@pytest.fixture
def sample(tmp_path) -> DigitScenes:
    data = DigitScenes(str(tmp_path / "digits"), num_train=40, num_val=20, num_workers=2)
    data.prepare_data()
    return data


def test_counts_sizes_and_pixels(sample, capsys):
    result = check_dataset(sample)
    assert result.problems == []
    train = result.splits["train"]
    assert (train.num_images, result.splits["val"].num_images) == (40, 20)
    assert train.sizes.smallest == train.sizes.largest == (64, 64)
    assert train.pixels.sum() + train.ignored_pixels == 40 * 64 * 64
    assert train.images_with[10] == 40
    values = [np.asarray(Image.open(path)) for path in Path(sample.root, "annotations/training").iterdir()]
    for digit in range(10):
        assert train.pixels[digit] == sum(int((value == digit + 1).sum()) for value in values)
        assert train.images_with[digit] == sum(bool((value == digit + 1).any()) for value in values)
    assert sample.check() is True
    assert "background" in capsys.readouterr().out


def test_every_problem_is_listed(sample, capsys):
    root = Path(sample.root)
    images, annotations = root / "images", root / "annotations"
    (annotations / "training/ADE_train_00000001.png").unlink()
    Image.new("L", (64, 64), 12).save(annotations / "training/ADE_train_00000002.png")
    Image.new("L", (60, 64), 1).save(annotations / "training/ADE_train_00000003.png")
    broken = images / "training/ADE_train_00000004.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    (images / "validation/ADE_val_00000001.jpg").write_bytes((images / "training/ADE_train_00000005.jpg").read_bytes())
    (images / "training/ADE_train_00000007.jpg").write_bytes((images / "training/ADE_train_00000006.jpg").read_bytes())
    (images / "training/ADE_train_00000008.jpg").unlink()

    result = check_dataset(sample)
    assert len(result.problems) == 5
    for part in (
        "ADE_train_00000001.jpg: has no label map",
        "ADE_train_00000002.png: label 12 in 4096 pixels; expected 1 to 11",
        "ADE_train_00000003.png: label map of 60 x 64 pixels; expected 64 x 64",
        "ADE_train_00000004.jpg: cannot be read",
        "ADE_val_00000001.jpg: the same file as ",
    ):
        assert sum(part in problem for problem in result.problems) == 1
    assert any("ADE_train_00000007.jpg: the same file as" in note for note in result.notes)
    assert any("ADE_train_00000008.png: has no image" in note for note in result.notes)
    assert result.splits["train"].num_images == 38

    assert sample.check() is False
    printed = capsys.readouterr().out
    for problem in result.problems:
        assert f"problem: {problem}" in printed


def test_absent_classes_are_noted(tmp_path):
    (tmp_path / "classes.txt").write_text("ground\nsky\ntree\n")
    for split, value in (("train", 0), ("val", 2)):
        for kind, mode in (("images", "RGB"), ("masks", "L")):
            (tmp_path / kind / split).mkdir(parents=True)
            size = (8, 6 + value)
            Image.new(mode, size, value).save(tmp_path / kind / split / "a.png")
    result = check_dataset(SegmentationFolder(str(tmp_path), num_workers=0))
    assert result.problems == []
    assert "train: no pixel of sky, tree" in result.notes
    assert "val: no pixel of ground, sky" in result.notes
    assert result.splits["val"].sizes.largest == (8, 8)


def test_files_shared_by_both_splits_are_reported_once(tmp_path):
    (tmp_path / "classes.txt").write_text("a\nb\n")
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for name in range(3):
        Image.new("RGB", (4, 4), (name, 0, 0)).save(tmp_path / "images" / f"{name}.png")
    for name in range(2):
        Image.new("L", (4, 4)).save(tmp_path / "masks" / f"{name}.png")
    result = check_dataset(SegmentationFolder(str(tmp_path)))
    assert len(result.problems) == 1
    assert "2.png: has no label map" in result.problems[0]


def test_missing_root_is_a_problem_with_the_layout(tmp_path):
    result = check_dataset(ADE20K(str(tmp_path / "nowhere")))
    assert len(result.problems) == 2
    assert "Expected layout" in result.problems[0]
    with pytest.raises(DataError, match=r"classes.txt: file not found"):
        check_dataset(SegmentationFolder(str(tmp_path)))
