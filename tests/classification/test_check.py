import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.classification.check import check_dataset
from tasks.classification.data import CIFAR10, DigitImages, ImageFolder
from tasks.core.data import DataError


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    data = DigitImages(str(tmp_path_factory.mktemp("check") / "digits"))
    data.prepare_data()
    return Path(data.root)


@pytest.fixture
def digits(written, tmp_path) -> DigitImages:
    """Five images of each digit and split, free to be damaged."""
    for split in ("train", "val"):
        for label in range(10):
            target = tmp_path / "digits" / split / str(label)
            target.mkdir(parents=True)
            for path in sorted((written / split / str(label)).iterdir())[:5]:
                shutil.copy(path, target)
    return DigitImages(str(tmp_path / "digits"))


def test_counts_and_sizes(digits, capsys):
    (Path(digits.root) / "train/3/new.png").write_bytes(png(40, 50))
    result = check_dataset(digits)
    assert result.problems == result.notes == []
    assert result.splits["train"].counts.tolist() == [5, 5, 5, 6, 5, 5, 5, 5, 5, 5]
    assert result.splits["val"].counts.tolist() == [5] * 10
    assert result.splits["train"].sizes.smallest == (32, 32)
    assert result.splits["train"].sizes.largest == (50, 40)
    assert digits.check() is True
    printed = capsys.readouterr().out
    assert "40 x 50" in printed
    assert any(line.replace("│", " ").split() == ["3", "3", "6", "5"] for line in printed.splitlines())


def png(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_every_problem_is_listed(digits, capsys):
    root = Path(digits.root)
    folders = [(split, label) for split in ("train", "val") for label in range(10)]
    files = {(split, label): sorted((root / split / str(label)).iterdir()) for split, label in folders}
    truncated = files["train", 0][0]
    truncated.write_bytes(truncated.read_bytes()[:200])
    shutil.copy(files["train", 1][0], files["val", 1][0])  # leaks into validation
    shutil.copy(files["train", 2][0], files["train", 2][1])
    shutil.rmtree(root / "val/9")
    (root / "train/ten").mkdir()
    files["val", 3][0].write_bytes(png(20, 100))
    files["val", 3][1].write_bytes(png(60, 31))

    result = check_dataset(digits)
    expected = (
        f"{truncated}: cannot be read as an image",
        f"{files['val', 1][0]}: the same file as {files['train', 1][0]}, which is in train",
        f"{root / 'val' / '9'}: folder not found",
        f"{root / 'train' / 'ten'}: a class that is not expected; expected 0, 1, 2, ... (10 classes)",
    )
    assert len(result.problems) == len(expected)
    for part in expected:
        assert sum(problem.startswith(part) for problem in result.problems) == 1
    assert result.notes == [
        f"{files['train', 2][1]}: the same file as {files['train', 2][0]}",
        f"val: 2 of 45 images have a side below 32 pixels, first {files['val', 3][0]} (20 x 100)",
    ]
    assert result.splits["val"].counts.tolist() == [5] * 9 + [0]

    assert digits.check() is False
    printed = capsys.readouterr().out
    for problem in result.problems:
        assert f"problem: {problem}" in printed


def test_missing_split_is_a_problem_with_the_layout_and_a_missing_root_an_error(digits, tmp_path):
    shutil.rmtree(Path(digits.root) / "val")
    result = check_dataset(digits)
    (problem,) = result.problems
    assert "val: folder not found.\nExpected layout" in problem
    with pytest.raises(DataError, match=r"nowhere: folder not found"):
        check_dataset(ImageFolder(str(tmp_path / "nowhere")))


def test_arrays_are_checked_like_files(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    records = np.hstack([np.arange(6, dtype=np.uint8)[:, None], pixels])
    for number in range(1, 6):
        (folder / f"data_batch_{number}.bin").write_bytes(records[number - 1].tobytes())
    (folder / "test_batch.bin").write_bytes(records[4:].tobytes())
    result = check_dataset(CIFAR10(str(tmp_path)))
    assert result.splits["train"].counts.tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    train = f"{folder / 'data_batch_5.bin'}, image 00004 of the split"
    val = f"{folder / 'test_batch.bin'}, image 00000 of the split"
    assert result.problems == [f"{val}: the same file as {train}, which is in train"]


def test_the_sample_is_written_before_it_is_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert DigitImages().check() is True
