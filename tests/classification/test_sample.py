from pathlib import Path

import numpy as np
from PIL import Image

from tasks.classification.data import DigitImages
from tasks.classification.sample import draw_digit, write_sample
from tasks.core.sample import digit_images


def test_sample_has_class_folders_and_is_reproducible(tmp_path):
    write_sample(tmp_path / "a")
    write_sample(tmp_path / "b")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.png"))
    assert len(files) == 1797
    for name in files[::50]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for split, number in (("train", 1433), ("val", 364)):
        images, labels = digit_images(split)
        assert len(images) == number
        for label in range(10):
            written = sorted(path.stem for path in (tmp_path / "a" / split / str(label)).iterdir())
            assert written == [f"{place:04d}" for place in np.flatnonzero(labels == label)]
    with Image.open(tmp_path / "a" / files[0]) as image:
        assert (image.size, image.mode) == ((32, 32), "RGB")


def test_ink_is_drawn_where_the_digit_has_it():
    images, _ = digit_images("train")
    for number in range(20):
        drawn = draw_digit(np.random.default_rng(number), images[number], 32)
        assert drawn.dtype == np.uint8
        small = drawn.mean(2).reshape(8, 4, 8, 4).mean((1, 3))
        assert np.corrcoef(small.ravel(), images[number].ravel())[0, 1] > 0.8


def test_sample_is_written_to_the_cache_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = DigitImages(num_workers=0)
    assert Path(data.root).is_relative_to(tmp_path / "frugal")
    assert data.num_classes == 10  # known before anything is written
    data.prepare_data()
    image = next(Path(data.root, "train/0").iterdir())
    written = image.stat().st_mtime_ns
    data.prepare_data()
    assert image.stat().st_mtime_ns == written
    data.setup("fit")
    assert (len(data.samples("train")), len(data.samples("val"))) == (1433, 364)
    assert DigitImages(root=str(tmp_path / "own")).root == str(tmp_path / "own")


def test_digits_are_turned_and_shifted_but_never_mirrored(tmp_path):
    """A mark at the right edge stays on the right, also after all turns and shifts."""
    for split in ("train", "val"):
        (tmp_path / split / "0").mkdir(parents=True)
        pixels = np.zeros((32, 32, 3), dtype=np.uint8)
        pixels[12:20, 22:28] = 255
        Image.fromarray(pixels).save(tmp_path / split / "0" / "mark.png")
    for label in range(1, 10):
        for split in ("train", "val"):
            (tmp_path / split / str(label)).mkdir()
            Image.new("RGB", (32, 32)).save(tmp_path / split / str(label) / "a.png")
    dataset = DigitImages(str(tmp_path), num_workers=0).train_dataset()
    places = []
    for epoch in range(50):
        image = dataset[epoch * len(dataset)]["image"][0]
        rows, columns = (image > image.mean() + image.std()).nonzero(as_tuple=True)
        places.append((float(rows.float().mean()), float(columns.float().mean())))
    rows, columns = np.array(places).T
    assert columns.min() > 16
    assert columns.std() > 0.5
    assert rows.std() > 0.5
