import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from tasks.classification.cifar import CIFAR10_ARCHIVE, CIFAR100_ARCHIVE
from tasks.classification.data import CIFAR10, CIFAR100, DigitImages, ImageFolder, ImageNet
from tasks.classification.imagenet import imagenet_classes
from tasks.core.data import DataError
from tasks.core.errors import UserError

SMALL = {"num_workers": 0, "image_size": 32, "batch_size": 4, "eval_batch_size": 4}


def save(path: Path, seed: int = 0, size: tuple[int, int] = (40, 30), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def tree(root: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        save(root / name, seed)
    return root


@pytest.fixture
def pets(tmp_path) -> Path:
    return tree(
        tmp_path / "pets", "train/cat/a.jpg", "train/cat/b.jpg", "train/cat/c.PNG", "train/dog/a.jpg",
        "train/dog/park/b.jpeg", "val/cat/d.jpg", "val/dog/e.webp", "val/dog/f.jpg",
    )  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    data = DigitImages(str(tmp_path_factory.mktemp("digits") / "sample"))
    data.prepare_data()
    return Path(data.root)


# -- batches --------------------------------------------------------------------------------------------------------


def test_batches_follow_the_contract(pets):
    data = ImageFolder(str(pets), **SMALL)
    data.setup("fit")
    assert (data.num_classes, data.class_names) == (2, ["cat", "dog"])
    (batch,) = data.train_dataloader()
    assert batch["image"].shape == (4, 3, 32, 32)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].dtype == torch.int64
    for id, label in zip(batch["id"], batch["label"].tolist(), strict=True):
        assert id.split("/")[0] == ["cat", "dog"][label]

    (batch,) = data.val_dataloader()
    assert batch["id"] == ["cat/d.jpg", "dog/e.webp", "dog/f.jpg"]
    assert batch["label"].tolist() == [0, 1, 1]
    assert batch["image"].shape == (3, 3, 32, 32)
    (batch,) = data.predict_dataloader()
    assert set(batch) == {"image", "id"}


def test_a_batch_of_no_samples(pets):
    batch = ImageFolder(str(pets), **SMALL).eval_collate([])
    assert batch["image"].shape == (0, 3, 32, 32)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].shape == (0,)
    assert batch["label"].dtype == torch.int64
    assert batch["id"] == []


def test_values_are_normalised_with_the_given_statistics(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "grey").mkdir(parents=True)
        Image.new("RGB", (40, 40), (51, 102, 204)).save(tmp_path / split / "grey" / "a.png")
    options = SMALL | {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 0.1)}
    image = ImageFolder(str(tmp_path), **options).val_dataset()[0]["image"]
    torch.testing.assert_close(image.mean((1, 2)), torch.tensor([0.2, 0.8, 5.0]))


def all_epochs(data, epochs: int = 3) -> torch.Tensor:
    random.seed()  # the state of the process must not matter
    loader = data.train_dataloader()
    images = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        images += [batch["image"] for batch in loader]
    return torch.cat(images)


@pytest.mark.parametrize("name", ["timm", "albumentations"])
def test_training_batches_are_the_same_for_any_number_of_workers(name, pets, digits):
    def make(workers):
        options = SMALL | {"num_workers": workers}
        if name == "timm":
            return ImageFolder(str(pets), **options | {"repeats": 2, "batch_size": 2})
        return DigitImages(str(digits), **options | {"batch_size": 16})

    alone, workers = (all_epochs(make(number), 3 if name == "timm" else 1) for number in (0, 2))
    assert torch.equal(alone, workers)
    assert len({image.numpy().tobytes() for image in alone}) == len(alone)  # nothing is drawn twice


@pytest.mark.parametrize("augmentation", ["timm", [{"Affine": {"rotate": [-10, 10]}}]])
def test_data_sets_can_be_sent_to_other_processes(pets, augmentation):
    """Loader workers on macOS and Windows get a pickled copy."""
    data = ImageFolder(str(pets), **SMALL, augmentation=augmentation)
    for dataset in (data.train_dataset(), data.val_dataset()):
        copy = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(copy[2]["image"], dataset[2]["image"])
    assert pickle.loads(pickle.dumps(data.train_collate))([dataset[0]])["image"].shape == (1, 3, 32, 32)


def test_another_seed_draws_other_augmentations_and_another_order(pets):
    first, again, other = (all_epochs(ImageFolder(str(pets), **SMALL, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_repeated_augmentation(pets):
    data = ImageFolder(str(pets), **SMALL, repeats=3)
    (batch,) = data.train_dataloader()  # as many batches as without
    assert len(set(batch["id"])) == 2
    assert batch["id"][:3] == batch["id"][:1] * 3
    assert len({image.numpy().tobytes() for image in batch["image"]}) == 4
    assert batch["label"].tolist() == [["cat", "dog"].index(id.split("/")[0]) for id in batch["id"]]


@pytest.mark.parametrize(
    "options",
    [{"image_size": 0}, {"batch_size": 0}, {"repeats": 0}, {"std": (0.2, 0.0, 0.2)}, {"crop_pct": 2.0}, {"hflip": -1}],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=f"^{next(iter(options))}"):
        ImageFolder("root", **options)


# -- class folders --------------------------------------------------------------------------------------------------


def test_folders_below_a_class_and_suffixes_in_capitals_are_read(pets):
    (pets / "train/cat/notes.txt").write_text("no image")
    (pets / "train/cat/._a.jpg").write_text("made by a Mac")
    save(pets / "train/.cache/x.jpg")
    samples = ImageFolder(str(pets)).samples("train")
    ids = [samples.id(index) for index in range(len(samples))]
    assert ids == ["cat/a.jpg", "cat/b.jpg", "cat/c.PNG", "dog/a.jpg", "dog/park/b.jpeg"]
    assert samples.labels.tolist() == [0, 0, 0, 1, 1]


def test_names_of_any_language(tmp_path):
    root = tree(tmp_path, "train/été/été 1.png", "train/猫/a.png", "val/été/b.png", "val/猫/c.png")
    data = ImageFolder(str(root), **SMALL)
    assert data.class_names == ["été", "猫"]
    assert [data.val_dataset()[index]["id"] for index in range(2)] == ["été/b.png", "猫/c.png"]
    assert data.train_dataset()[0]["id"] == "été/été 1.png"


def test_tests_on_the_test_split_if_there_is_one(pets):
    assert len(ImageFolder(str(pets)).test_dataset()) == 3
    tree(pets, "test/cat/x.jpg", "test/dog/y.jpg")
    data = ImageFolder(str(pets))
    data.setup("test")
    assert data.test_dataset()[1]["id"] == "dog/y.jpg"


def test_evaluates_without_a_training_split(tmp_path):
    data = ImageFolder(str(tree(tmp_path, "val/b/1.png", "val/a/2.png")), **SMALL)
    data.setup("validate")
    assert data.class_names == ["a", "b"]
    assert data.val_dataset()[0]["label"] == 0


def test_without_splits_a_tenth_of_each_class_is_held_out(tmp_path):
    root = tree(tmp_path, *(f"{name}/{i:02d}.png" for name in ("a", "b") for i in range(20)))
    data = ImageFolder(str(root))
    train, val = (data.samples(split) for split in ("train", "val"))
    assert np.bincount(val.labels).tolist() == [2, 2]
    assert np.bincount(train.labels).tolist() == [18, 18]
    ids = {split: {samples.id(i) for i in range(len(samples))} for split, samples in (("t", train), ("v", val))}
    assert ids["t"].isdisjoint(ids["v"])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda root: (root / "val/cat/d.jpg").unlink(),
            r"val/cat: contains no images; expected images of",
        ),
        (lambda root: [(root / "val/cat/d.jpg").unlink(), (root / "val/cat").rmdir()], r"val/cat: folder not found"),
        (lambda root: save(root / "val/bird/x.jpg"), r"val/bird: a class that is not expected; expected cat, dog"),
        (lambda root: (root / "train").rename(root / "training"), r"train: folder not found.\nExpected layout"),
    ],
)
def test_classes_that_differ_between_splits_and_missing_splits(pets, change, problem):
    change(pets)
    with pytest.raises(DataError, match=problem):
        ImageFolder(str(pets)).setup("fit")


def test_missing_root_says_layout_source_and_sample(tmp_path):
    with pytest.raises(DataError) as error:
        ImageFolder(str(tmp_path / "nowhere")).class_names  # noqa: B018
    for part in ("nowhere: folder not found", "root/train/<class>/a.jpg", "configs/sample/litv2.yaml"):
        assert part in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: contains no folders of classes"):
        ImageFolder(str(tmp_path / "empty")).class_names  # noqa: B018


def test_images_that_cannot_be_read(pets):
    path = pets / "val/cat/d.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=r"val/cat/d.jpg: cannot be read as an image"):
        ImageFolder(str(pets), **SMALL).val_dataset()[0]
    path.unlink()
    data = ImageFolder(str(pets), **SMALL)
    dataset = data.train_dataset()
    (pets / "train/cat/a.jpg").unlink()
    with pytest.raises(DataError, match=r"train/cat/a.jpg: file not found"):
        dataset[0]


def test_photos_are_turned_upright(pets):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 270 degrees to display
    sideways = np.zeros((40, 40, 3), dtype=np.uint8)
    sideways[:, :5] = 255
    Image.fromarray(sideways).save(pets / "val/cat/d.jpg", exif=exif, quality=95)
    image = ImageFolder(str(pets), **SMALL | {"crop_pct": None}).val_dataset()[0]["image"]
    assert image[:, :3].mean() > image[:, -3:].mean() + 3  # the left edge is now the top


def test_predict_reads_a_folder_a_file_or_a_pattern(tmp_path):
    tree(tmp_path, "in/b.png", "in/deep/a.JPG", "in/deep/a.png")
    for images in ("in", "in/**/*"):
        data = ImageNet("nowhere", images=str(tmp_path / images), **SMALL)
        data.setup("predict")  # needs no labelled data
        (batch,) = data.predict_dataloader()
        assert batch["id"] == ["b.png", "deep/a.JPG", "deep/a.png"]
        assert "label" not in batch
    with pytest.raises(DataError, match="where no image was found"):
        ImageNet("nowhere", images=str(tmp_path / "none")).setup("predict")


# -- ImageNet -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    """One image per class, the validation images in folders."""
    root = tmp_path_factory.mktemp("imagenet")
    content = save(root / "one.JPEG").read_bytes()
    for label, wnid in enumerate(imagenet_classes()[0]):
        for path in (f"train/{wnid}/{wnid}_{label}.JPEG", f"val/{wnid}/ILSVRC2012_val_{label + 1:08d}.JPEG"):
            (root / path).parent.mkdir(parents=True)
            (root / path).write_bytes(content)
    return root


def test_imagenet_in_folders(imagenet):
    data = ImageNet(str(imagenet), **SMALL)
    data.setup("fit")
    assert data.num_classes == len(data.class_names) == 1000
    assert data.class_names[0] == "tench, Tinca tinca"
    train, val = data.samples("train"), data.samples("val")
    assert train.labels.tolist() == val.labels.tolist() == list(range(1000))
    assert train.id(0) == "n01440764/n01440764_0.JPEG"
    assert val.id(999) == "n15075141/ILSVRC2012_val_00001000.JPEG"
    assert data.val_dataset()[7]["label"] == 7


def write_devkit(root: Path, ids_of_truth: list[int]) -> Path:
    """A kit whose numbering of the classes is the reverse of the sorted one, followed by inner nodes."""
    wnids, words = imagenet_classes()
    rows = [(id, wnid, word, 0) for id, (wnid, word) in enumerate(zip(wnids[::-1], words[::-1], strict=True), 1)]
    rows.append((1001, "n00001740", "entity", 3))
    kind = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    data = root / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    savemat(data / "meta.mat", {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{id}\n" for id in ids_of_truth))
    return data


def flat_imagenet(root: Path, ids_of_truth: list[int], numbers: list[int]) -> ImageNet:
    write_devkit(root, ids_of_truth)
    tree(root, *(f"val/ILSVRC2012_val_{number:08d}.JPEG" for number in numbers))
    return ImageNet(str(root), **SMALL)


def test_imagenet_with_all_validation_images_in_one_folder(tmp_path):
    data = flat_imagenet(tmp_path, [1000, 1, 999], [1, 2, 3])
    data.setup("validate")
    (batch,) = data.val_dataloader()
    # the kit's 1000 is the first of the sorted classes
    assert dict(zip(batch["id"], batch["label"].tolist(), strict=True)) == {
        "ILSVRC2012_val_00000001.JPEG": 0,
        "ILSVRC2012_val_00000002.JPEG": 999,
        "ILSVRC2012_val_00000003.JPEG": 1,
    }


@pytest.mark.parametrize(
    ("ids", "numbers", "problem"),
    [
        ([1, 2, 3], [1, 3], r"val: 2 images; expected 3, as .*ground_truth.txt has lines"),
        ([1], [1, 2], r"ILSVRC2012_val_00000002.JPEG: expected ILSVRC2012_val_00000001.JPEG to 00000001.JPEG"),
        ([1001], [1], r"ground_truth.txt: 1001 in it; expected one ILSVRC2012_ID of 1 to 1000 per line"),
        ([], [], r"val: folder not found.\nExpected layout(.|\n)*ILSVRC2012_devkit_t12"),
    ],
)
def test_validation_images_that_do_not_fit_the_ground_truth(tmp_path, ids, numbers, problem):
    with pytest.raises(DataError, match=problem):
        flat_imagenet(tmp_path, ids, numbers).setup("validate")


def test_validation_images_in_one_folder_without_or_with_a_damaged_kit(tmp_path):
    tree(tmp_path, "val/ILSVRC2012_val_00000001.JPEG")
    data = ImageNet(str(tmp_path))
    with pytest.raises(DataError, match=r"ILSVRC2012_devkit_t12: folder not found.\nExpected layout"):
        data.setup("validate")
    kit = write_devkit(tmp_path, [1])
    content = (kit / "meta.mat").read_bytes()
    for damaged in (b"", b"no matlab file", content[:1000]):
        (kit / "meta.mat").write_bytes(damaged)
        with pytest.raises(DataError, match=r"meta.mat: cannot be read as the class list of ILSVRC 2012"):
            data.setup("validate")
    (kit / "meta.mat").write_bytes(content)
    (kit / "ILSVRC2012_validation_ground_truth.txt").unlink()
    with pytest.raises(DataError, match=r"ground_truth.txt: cannot be read \(No such file or directory\)"):
        data.setup("validate")


def test_imagenet_is_all_of_imagenet(pets):
    with pytest.raises(DataError, match=r"train/cat: a class that is not expected; .*\(1000 classes\) \(and 1001 more"):
        ImageNet(str(pets)).setup("fit")
    with pytest.raises(DataError) as error:
        ImageNet("nowhere").setup("fit")
    for part in ("nowhere/train: folder not found", "image-net.org", "n01440764_10026.JPEG", "ILSVRC2012_devkit_t12"):
        assert part in str(error.value).replace(os.sep, "/")


def test_imagenet_is_not_turned_by_exif_data(imagenet):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = imagenet / "val/n01440764/ILSVRC2012_val_00000001.JPEG"
    before = path.read_bytes()
    try:
        sideways = np.zeros((40, 40, 3), dtype=np.uint8)
        sideways[:, :5] = 255
        Image.fromarray(sideways).save(path, exif=exif, quality=95)
        image = ImageNet(str(imagenet), **SMALL | {"crop_pct": None}).val_dataset()[0]["image"]
    finally:
        path.write_bytes(before)
    assert image[:, :, :3].mean() > image[:, :, -3:].mean() + 3


# -- CIFAR ----------------------------------------------------------------------------------------------------------


def write_cifar(root: Path, kind: type[CIFAR10], pickled: bool, images_per_file: int = 4) -> dict[str, list]:
    """Write an archive like the authors', and return the labels and the red channels of each split."""
    archive = kind.archive
    folder = root / (archive.python_folder if pickled else archive.binary_folder)
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    written = {}
    for split, files in (archive.python_files if pickled else archive.binary_files).items():
        labels, red = [], []
        for name in files:
            pixels = generator.integers(0, 256, (images_per_file, 3072), dtype=np.uint8)
            own = generator.integers(0, len(archive.class_names), images_per_file).tolist()
            if pickled:
                batch = {"data": pixels, archive.label_key: own, "filenames": ["x.png"] * images_per_file}
                if kind is CIFAR100:
                    batch["coarse_labels"] = [0] * images_per_file
                (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
            else:
                head = [[label] if kind is CIFAR10 else [19, label] for label in own]
                (folder / name).write_bytes(np.hstack([np.array(head, dtype=np.uint8), pixels]).tobytes())
            labels += own
            red += pixels[:, :1024].reshape(-1, 32, 32).tolist()
        written[split] = (labels, red)
    return written


@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize("kind", [CIFAR10, CIFAR100])
def test_cifar(tmp_path, kind, pickled):
    written = write_cifar(tmp_path, kind, pickled)
    data = kind(str(tmp_path), **SMALL)
    data.setup("fit")
    for split, (labels, red) in written.items():
        samples = data.samples(split)
        assert samples.labels.tolist() == labels
        assert samples.images[..., 0].tolist() == red
    assert data.num_classes == len(set(data.class_names)) == (10 if kind is CIFAR10 else 100)
    batch = next(iter(data.val_dataloader()))
    assert batch["id"] == ["00000", "00001", "00002", "00003"]
    assert batch["label"].tolist() == written["val"][0]
    assert next(iter(data.train_dataloader()))["image"].shape == (4, 3, 32, 32)
    inner = next(path for path in tmp_path.iterdir())
    assert len(kind(str(inner)).samples("val")) == 4  # the folder of the archive itself


def test_cifar_written_by_python_2(tmp_path):
    """The official files hold Python 2 strings: the pixels too are one, in numpy's own state."""
    write_cifar(tmp_path, CIFAR100, True)
    path = tmp_path / "cifar-100-python" / "test"
    pixels = bytes(range(256)) * 12
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR(I1\n(I1\nI3072\nt"
        b"cnumpy\ndtype\n(U\x02u1I0\nI1\ntR(I3\nU\x01|NNNI-1\nI-1\nI0\ntbI00\nT\x00\x0c\x00\x00" + pixels + b"tb"
    )
    path.write_bytes(b"\x80\x02}(U\x04data" + array + b"U\x0bfine_labels](K*eU\x0dcoarse_labels](K\x03eu.")
    samples = CIFAR100(str(tmp_path)).samples("val")
    assert samples.labels.tolist() == [42]
    assert samples.images[0].transpose(2, 0, 1).tobytes() == pixels


class Attack:
    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def test_cifar_batches_run_no_code(tmp_path):
    write_cifar(tmp_path, CIFAR10, True)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(pickle.dumps({"data": Attack(tmp_path / "attacked"), "labels": []}, protocol=2))
    with pytest.raises(DataError, match=r"data_batch_2: cannot be read as a batch of CIFAR \(.*was refused"):
        CIFAR10(str(tmp_path)).setup("fit")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("test_batch", b"", "test_batch: cannot be read as a batch of CIFAR"),
        ("test_batch", pickle.dumps({"labels": [1]}, protocol=2), "test_batch: cannot be read as a batch .*'data'"),
        (
            "test_batch",
            pickle.dumps({"data": np.zeros((2, 3072), dtype=np.uint8), "labels": [1]}, protocol=2),
            r"uint8 \(2, 3072\) and 1 labels",
        ),
        (
            "test_batch",
            pickle.dumps({"data": np.zeros((1, 3072), dtype=np.uint8), "labels": [10]}, protocol=2),
            "test_batch: label 10; expected 0 to 9",
        ),
        ("data_batch_3", None, "data_batch_3: file not found"),
    ],
)
def test_damaged_cifar(tmp_path, file, content, problem):
    write_cifar(tmp_path, CIFAR10, True)
    path = tmp_path / "cifar-10-batches-py" / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match=problem):
        CIFAR10(str(tmp_path)).setup("fit")


def test_damaged_binary_cifar_and_no_cifar(tmp_path):
    with pytest.raises(DataError, match=r"no train images of CIFAR100 found.\nExpected layout(.|\n)*cs.toronto.edu"):
        CIFAR100(str(tmp_path)).setup("fit")
    write_cifar(tmp_path, CIFAR100, False)
    path = tmp_path / "cifar-100-binary" / "test.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"test.bin: 12295 bytes; expected a multiple of 3074"):
        CIFAR100(str(tmp_path)).setup("validate")


def test_cifar_classes_are_in_the_order_of_the_labels():
    assert CIFAR10_ARCHIVE.class_names[3] == "cat"
    assert list(CIFAR100_ARCHIVE.class_names) == sorted(CIFAR100_ARCHIVE.class_names)
    assert len(CIFAR100_ARCHIVE.class_names) == 100
