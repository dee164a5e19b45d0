from pathlib import Path

import cv2
import numpy as np
import pytest

from tasks.core.sample import cache_folder, digit_images, render_digit, write_folder_once
from tasks.segmentation.data import DigitScenes
from tasks.segmentation.sample import CLASS_NAMES, PALETTE, draw_scene, write_sample


def test_digit_splits_share_no_image():
    train, train_labels = digit_images("train")
    val, val_labels = digit_images("val")
    assert len(train) + len(val) == 1797
    assert {image.tobytes() for image in train}.isdisjoint(image.tobytes() for image in val)
    assert np.bincount(train_labels).min() > 130
    assert np.bincount(val_labels).min() > 30
    assert train.min() == 0
    assert train.max() == 1


def test_rendered_digit_turns_and_stays_in_range():
    image = np.zeros((8, 8), dtype=np.float32)
    image[0:3, 3:5] = 1  # a mark at the top
    for angle, expected in ((0, (0.2, 0.5)), (90, (0.5, 0.8)), (180, (0.8, 0.5)), (270, (0.5, 0.2))):
        ink = render_digit(image, 20, angle)
        assert ink.shape == (60, 60)
        assert 0 <= ink.min() <= ink.max() <= 1
        rows, columns = np.nonzero(ink > 0.5)
        assert (rows.mean() / 59, columns.mean() / 59) == pytest.approx(expected, abs=0.05)


def test_scene_labels_the_drawn_strokes():
    digits, labels = digit_images("val")
    classes = set()
    ignored = []
    for number in range(60):
        image, annotation = draw_scene(np.random.default_rng(number), digits, labels, 64)
        assert image.shape == (64, 64, 3)
        assert annotation.shape == (64, 64)
        assert image.dtype == annotation.dtype == np.uint8
        background = image[annotation == 11].astype(float).mean(axis=0)
        for value in set(np.unique(annotation).tolist()) - {0, 11}:
            classes.add(value)
            stroke = image[annotation == value].astype(float)
            if len(stroke) > 20:
                assert np.abs(stroke.mean(axis=0) - background).max() > 10  # visible
        ignored.append(np.mean(annotation == 0))
    assert classes == set(range(1, 11))
    assert 0 < np.mean(ignored) < 0.05


def test_sample_has_the_layout_of_ade20k_and_is_reproducible(tmp_path):
    write_sample(tmp_path / "a", num_train=4, num_val=2)
    write_sample(tmp_path / "b", num_train=4, num_val=2)
    files = sorted(path.relative_to(tmp_path / "a").as_posix() for path in (tmp_path / "a").rglob("*.*"))
    assert files == [
        *(f"annotations/training/ADE_train_{i:08d}.png" for i in range(1, 5)),
        *(f"annotations/validation/ADE_val_{i:08d}.png" for i in range(1, 3)),
        *(f"images/training/ADE_train_{i:08d}.jpg" for i in range(1, 5)),
        *(f"images/validation/ADE_val_{i:08d}.jpg" for i in range(1, 3)),
        "objectInfo150.txt",
    ]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    annotation = cv2.imread(str(tmp_path / "a" / files[0]), cv2.IMREAD_UNCHANGED)
    assert annotation.ndim == 2
    assert len({path.read_bytes() for path in (tmp_path / "a").rglob("*.jpg")}) == 6
    assert len(CLASS_NAMES) == len(set(PALETTE)) == 11


def test_sample_is_written_to_the_cache_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = DigitScenes(num_train=3, num_val=2, num_workers=0)
    assert Path(data.root).is_relative_to(tmp_path / "frugal")
    data.prepare_data()
    image = Path(data.root, "images/training/ADE_train_00000001.jpg")
    written = image.stat().st_mtime_ns
    data.prepare_data()
    assert image.stat().st_mtime_ns == written
    assert DigitScenes(num_train=4, num_val=2).root != data.root


def test_cache_folder_without_the_variable_is_below_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder("x") == Path("/home/someone/.cache/frugal/x")


def test_interrupted_writing_leaves_nothing(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_folder_once(tmp_path / "target", fail)
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_concurrent_writers_wins(tmp_path):
    target = tmp_path / "target"

    def slow(folder: Path) -> None:
        (folder / "slow").touch()
        write_folder_once(target, lambda other: (other / "fast").touch())

    write_folder_once(target, slow)
    assert [path.name for path in target.iterdir()] == ["fast"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
