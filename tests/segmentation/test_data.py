import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tasks.core.data import DataError
from tasks.core.images import read_image
from tasks.core.splits import fraction_by_name
from tasks.segmentation.data import (
    ADE20K,
    CITYSCAPES_CLASSES,
    Cityscapes,
    DigitScenes,
    SegmentationFolder,
    read_classes,
)
from tasks.segmentation.reading import read_label_values, samples_to_predict

SMALL = {
    "num_workers": 0,
    "train_short_sides": [24, 32],
    "max_long_side": 64,
    "crop_size": (24, 28),
    "test_short_side": 16,
    "test_max_long_side": 64,
}


def save(path: Path, array: np.ndarray | Image.Image, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(path, **options)
    return path


def picture(height: int = 20, width: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def label_map(values: list[int], height: int = 20, width: int = 30) -> np.ndarray:
    return np.resize(np.array(values, dtype=np.uint8), (height, width))


@pytest.fixture
def ade(tmp_path) -> Path:
    for folder, prefix, count in (("training", "ADE_train", 3), ("validation", "ADE_val", 2)):
        for number in range(1, count + 1):
            name = f"{prefix}_{number:08d}"
            save(tmp_path / "images" / folder / f"{name}.jpg", picture(seed=number + 10 * (count == 2)))
            save(tmp_path / "annotations" / folder / f"{name}.png", label_map([0, 1, 2, 150]))
    return tmp_path


def test_batches_follow_the_contract(ade):
    data = ADE20K(str(ade), batch_size=2, **SMALL)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 24, 28)
    assert batch["mask"].shape == (2, 24, 28)
    assert batch["image"].dtype == batch["mask"].dtype == torch.uint8
    assert set(batch["id"]) <= {f"ADE_train_{number:08d}" for number in (1, 2, 3)}
    assert set(batch["mask"].unique().tolist()) <= {0, 1, 149, 255}

    batch = next(iter(data.val_dataloader()))
    assert batch["id"] == ["ADE_val_00000001"]
    assert batch["image"][0].shape == (3, 16, 24)
    assert batch["mask"][0].shape == (20, 30)
    assert batch["mask"][0][0, :4].tolist() == [255, 0, 1, 149]
    assert batch["size"] == [(20, 30)]

    batch = next(iter(data.predict_dataloader()))
    assert set(batch) == {"image", "id", "size"}


def test_training_batches_are_the_same_for_any_number_of_workers(ade):
    batches = []
    for workers in (0, 2):
        data = ADE20K(str(ade), **SMALL | {"num_workers": workers})
        loader = data.train_dataloader()
        epochs = []
        for epoch in range(3):
            loader.sampler.set_epoch(epoch)
            epochs += [batch["image"] for batch in loader]
        batches.append(torch.cat(epochs))
    assert torch.equal(*batches)
    assert len({image.numpy().tobytes() for image in batches[0]}) == len(batches[0])


def test_ade20k_knows_its_classes_and_exports_official_values(tmp_path):
    data = ADE20K(str(tmp_path))
    assert data.num_classes == len(set(data.class_names)) == len(data.palette) == 150
    assert (data.class_names[0], data.class_names[12], data.class_names[149]) == ("wall", "person", "flag")
    assert data.palette[0] == (120, 120, 120)
    exported = data.to_official(np.array([[0, 149]], dtype=np.uint8))
    assert exported.dtype == np.uint8
    assert exported.tolist() == [[1, 150]]
    assert data.prediction_name("ADE_val_00000001") == "ADE_val_00000001.png"


def test_missing_root_says_layout_source_and_sample(tmp_path):
    with pytest.raises(DataError) as error:
        ADE20K(str(tmp_path / "nowhere")).setup("fit")
    message = str(error.value)
    assert "nowhere/images/training: folder not found" in message
    assert "root/annotations/validation/ADE_val_00000001.png" in message
    assert "ADEChallengeData2016.zip" in message
    assert "python -m tasks.segmentation fit -c configs/sample/faseg.yaml" in message


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_a_missing_split_stops_every_stage_that_needs_it(ade, stage):
    for path in (ade / "images/validation").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="images/validation: contains no images"):
        ADE20K(str(ade)).setup(stage)


def test_missing_label_maps_are_counted_and_the_first_named(ade):
    for number in (2, 3):
        (ade / f"annotations/training/ADE_train_{number:08d}.png").unlink()
    with pytest.raises(DataError, match=r"ADE_train_00000002.jpg: has no label map; .* \(and 1 more problems"):
        ADE20K(str(ade)).setup("fit")


def test_two_images_for_one_label_map_are_refused(ade):
    save(ade / "images/training/ADE_train_00000001.png", picture())
    with pytest.raises(DataError, match=r"ADE_train_00000001.png: has the same name as .*ADE_train_00000001.jpg"):
        ADE20K(str(ade)).setup("fit")


def first(data: ADE20K) -> dict:
    return data.val_dataset()[0]


def test_label_out_of_range(ade):
    save(ade / "annotations/validation/ADE_val_00000001.png", label_map([1, 151, 255]))
    with pytest.raises(DataError, match=r"ADE_val_00000001.png: label 151, 255 in 400 pixels; expected 1 to 150, or 0"):
        first(ADE20K(str(ade)))


def test_label_map_of_another_size(ade):
    save(ade / "annotations/validation/ADE_val_00000001.png", label_map([1], 30, 20))
    with pytest.raises(
        DataError, match=r"ADE_val_00000001.png: label map of 20 x 30 pixels; expected 30 x 20, the size"
    ):
        first(ADE20K(str(ade)))


def test_truncated_image(ade):
    path = ade / "images/validation/ADE_val_00000001.jpg"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match=r"ADE_val_00000001.jpg: cannot be read as an image"):
        first(ADE20K(str(ade)))


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"])
def test_file_that_is_no_image(ade, content):
    path = ade / "annotations/validation/ADE_val_00000001.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"ADE_val_00000001.png: cannot be read as an image"):
        first(ADE20K(str(ade)))


def test_file_removed_after_the_start(ade):
    data = ADE20K(str(ade))
    dataset = data.val_dataset()
    (ade / "images/validation/ADE_val_00000001.jpg").unlink()
    with pytest.raises(DataError, match=r"ADE_val_00000001.jpg: file not found"):
        dataset[0]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
def test_label_maps_with_colours_or_16_bits_are_refused(tmp_path, mode):
    array = np.zeros((4, 4), dtype=np.uint16) if mode == "I;16" else None
    image = Image.fromarray(array) if array is not None else Image.new(mode, (4, 4))
    path = save(tmp_path / "mask.png", image)
    with pytest.raises(DataError, match=rf"mask.png: a label map of mode {mode}; expected one 8-bit channel"):
        read_label_values(path)


def test_palette_label_maps_are_read_as_indices(tmp_path):
    image = Image.fromarray(label_map([0, 1, 2])).convert("P")
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0] + [0] * 759)
    image.putdata(label_map([0, 1, 2]).ravel().tolist())
    np.testing.assert_array_equal(read_label_values(save(tmp_path / "p.png", image)), label_map([0, 1, 2]))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_images_of_any_colour_mode_become_rgb(tmp_path, mode):
    image = Image.fromarray(picture()).convert(mode)
    path = save(tmp_path / ("x.jpg" if mode == "CMYK" else "x.png"), image)
    array = read_image(path)
    assert array.shape == (20, 30, 3)
    assert array.dtype == np.uint8
    with Image.open(path) as saved:
        np.testing.assert_array_equal(array, np.asarray(saved.convert("RGB")))


def test_16_bit_images_are_refused(tmp_path):
    path = save(tmp_path / "x.png", np.zeros((4, 4), dtype=np.uint16))
    with pytest.raises(DataError, match=r"x.png: pixels of 16 or 32 bits .*; expected an 8-bit image"):
        read_image(path)


def test_images_are_turned_upright_before_sizes_are_compared(ade):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 270 degrees to display
    sideways = np.zeros((30, 20, 3), dtype=np.uint8)
    sideways[:, :5] = 255
    save(ade / "images/validation/ADE_val_00000001.jpg", sideways, exif=exif)
    item = ADE20K(str(ade), **SMALL | {"test_short_side": 20}).val_dataset()[0]
    assert item["size"] == (20, 30)
    assert item["image"][:, :4].float().mean() > 240  # the left edge is now the top


def test_predict_reads_a_folder_a_file_or_a_pattern(tmp_path):
    save(tmp_path / "in" / "b.png", picture())
    save(tmp_path / "in" / "deep" / "a.JPG", picture())
    (tmp_path / "in" / "notes.txt").write_text("no image")
    data = ADE20K("nowhere", images=str(tmp_path / "in"), **SMALL)
    data.setup("predict")  # needs no annotated data
    assert [batch["id"] for batch in data.predict_dataloader()] == [["b"], ["deep/a"]]
    assert [sample.id for sample in samples_to_predict(str(tmp_path / "in" / "b.png"))] == ["b"]
    assert [sample.id for sample in samples_to_predict(str(tmp_path / "in" / "**" / "*"))] == ["b", "deep/a"]


def test_predict_refuses_nothing_and_ambiguous_names(tmp_path):
    with pytest.raises(DataError, match=r"images is 'nothing\*'"):
        samples_to_predict("nothing*")
    save(tmp_path / "a.png", picture())
    save(tmp_path / "a.jpg", picture())
    with pytest.raises(DataError, match="would have the same prediction file"):
        samples_to_predict(str(tmp_path))


@pytest.fixture
def cityscapes(tmp_path) -> Path:
    for split, city in (("train", "aachen"), ("val", "frankfurt")):
        name = f"{city}_000000_000019"
        save(tmp_path / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", picture(16, 32))
        save(tmp_path / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", label_map([0, 7, 33, 29], 16, 32))
        save(tmp_path / "gtFine" / split / city / f"{name}_gtFine_color.png", picture(16, 32))
    return tmp_path


def test_cityscapes_maps_label_ids(cityscapes):
    data = Cityscapes(str(cityscapes))
    data.setup("fit")
    item = data.val_dataset()[0]
    assert item["id"] == "frankfurt/frankfurt_000000_000019"
    assert item["mask"][0, :4].tolist() == [255, 0, 18, 255]
    assert item["image"].shape == (3, 1024, 2048)
    assert data.prediction_name(item["id"]) == "frankfurt_000000_000019_pred.png"


def test_cityscapes_prefers_train_ids(cityscapes):
    for path in list((cityscapes / "gtFine").rglob("*_labelIds.png")):
        save(path.with_name(path.name.replace("labelIds", "labelTrainIds")), label_map([255, 0, 18], 16, 32))
    assert Cityscapes(str(cityscapes)).val_dataset()[0]["mask"][0, :3].tolist() == [255, 0, 18]


def test_cityscapes_refuses_other_values_and_exports_label_ids(cityscapes):
    path = next((cityscapes / "gtFine" / "val").rglob("*labelIds.png"))
    save(path, label_map([34], 16, 32))
    data = Cityscapes(str(cityscapes))
    with pytest.raises(DataError, match=r"label 34 .*; expected label ids 0 to 33"):
        data.val_dataset()[0]
    every = np.arange(19, dtype=np.uint8)[None]
    assert data.to_official(every)[0].tolist() == [value for _, value, _ in CITYSCAPES_CLASSES]
    assert data.num_classes == len(set(data.class_names)) == len(set(data.palette)) == 19
    assert data.crop_size == (512, 1024)
    assert data.train_short_sides[0] == 512
    assert data.train_short_sides[-1] == 2048


def folder(root: Path, *names: str, splits: bool = True) -> Path:
    (root / "classes.txt").write_text("background\nroad sign #0080ff\n\n")
    for seed, name in enumerate(names):
        save(root / "images" / f"{name}.png", picture(seed=seed))
        save(root / "masks" / f"{name}.png", label_map([0, 1, 255]))
    return root


def test_folder_with_splits(tmp_path):
    data = SegmentationFolder(str(folder(tmp_path, "train/a", "train/sub/b", "val/c")), **SMALL)
    data.setup("fit")
    assert [sample.id for sample in data.samples("train")] == ["a", "sub/b"]
    assert [sample.id for sample in data.samples("val")] == ["c"]
    assert data.val_dataset()[0]["mask"][0, :3].tolist() == [0, 1, 255]
    assert data.class_names == ["background", "road sign"]
    assert data.palette[1] == (0, 128, 255)
    assert [sample.id for sample in data.test_dataset().samples] == ["c"]
    assert data.to_official(np.array([[1]], dtype=np.uint8)).tolist() == [[1]]


def test_folder_tests_on_its_test_split(tmp_path):
    data = SegmentationFolder(str(folder(tmp_path, "train/a", "val/b", "test/c")), **SMALL)
    data.setup("test")
    assert [sample.id for sample in data.test_dataset().samples] == ["c"]


def test_folder_without_splits_holds_out_a_stable_tenth(tmp_path):
    data = SegmentationFolder(str(folder(tmp_path, *(f"{i:02d}" for i in range(20)))), **SMALL)
    train, val = ({sample.id for sample in data.samples(split)} for split in ("train", "val"))
    assert len(val) == 2
    assert train | val == {f"{i:02d}" for i in range(20)}
    assert train.isdisjoint(val)
    before = fraction_by_name([str(i) for i in range(100)], 0.1)
    after = fraction_by_name([str(i) for i in range(110)], 0.1)
    assert len(before - after) <= 2


def test_folder_problems(tmp_path):
    with pytest.raises(DataError, match=r"classes.txt: file not found(.|\n)*one class per line"):
        SegmentationFolder(str(tmp_path)).num_classes  # noqa: B018
    folder(tmp_path, "only")
    with pytest.raises(DataError, match="holds one image; expected at least two"):
        SegmentationFolder(str(tmp_path)).setup("fit")
    save(tmp_path / "images" / "more.png", picture())
    save(tmp_path / "masks" / "more.png", label_map([2]))
    data = SegmentationFolder(str(tmp_path))
    with pytest.raises(DataError, match="label 2 in 600 pixels; expected 0 to 1, or 255"):
        [data.val_dataset()[0], data.train_dataset()[0]]


@pytest.mark.parametrize(
    ("text", "message"), [("", "0 classes; expected 1 to 255"), ("a\nb\na\n", "class 'a' twice; expected different")]
)
def test_bad_class_lists(tmp_path, text, message):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_classes(path)


def test_missing_colours_are_distinct(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(f"class {i}" for i in range(30)))
    names, palette = read_classes(path)
    assert len(names) == len(set(palette)) == 30


@pytest.mark.parametrize(
    "options", [{"train_short_sides": []}, {"crop_size": (0, 4)}, {"test_short_side": 0}, {"max_long_side": -1}]
)
def test_impossible_sizes_are_refused(options):
    with pytest.raises(DataError, match=f"^{next(iter(options))}"):
        ADE20K("root", **options)


def test_digit_scenes_train_on_fresh_variations(tmp_path):
    data = DigitScenes(str(tmp_path / "digits"), num_train=4, num_val=2, batch_size=4, num_workers=0)
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    seen = set()
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            assert batch["image"].shape == (4, 3, 64, 64)
            assert set(batch["mask"].unique().tolist()) <= {*range(11), 255}
            seen |= {image.numpy().tobytes() for image in batch["image"]}
    assert len(seen) == 12
    assert data.num_classes == len(data.palette) == 11
    assert data.to_official(np.array([[10]], dtype=np.uint8)).tolist() == [[11]]


@pytest.mark.skipif("FRUGAL_DATA" not in os.environ, reason="FRUGAL_DATA names no folder with photos")
def test_real_photographs_are_read_and_resized():
    photos = Path(os.environ["FRUGAL_DATA"]) / "photos"
    data = ADE20K("nowhere", images=str(photos), num_workers=0)
    batches = list(data.predict_dataloader())
    assert len(batches) == len(list(photos.glob("*.jpg"))) > 0
    for batch in batches:
        assert min(batch["image"][0].shape[1:]) == 512
        assert 20 < batch["image"][0].float().mean() < 235
