"""Bad data and options end a command of classification with one clear error and leave nothing half-written."""

import os
import pickle
import shutil

import pytest
from PIL import Image


@pytest.fixture
def fails(fails):
    """As everywhere; besides, the run folder is not even made, unless `results` says otherwise."""

    def run(*args, results=("*.ckpt", "report*", "*.part", "predictions*", "runs"), **expected):
        return fails(*args, results=results, **expected)

    return run


@pytest.fixture
def damaged(tiny_digits, tmp_path):
    """A copy of the data, free to be damaged."""
    return shutil.copytree(tiny_digits, tmp_path / "damaged")


@pytest.fixture
def config_on(tiny_classifier_config):
    """Writes the tiny configuration for another datamodule at `root`."""

    def write(root, kind="ImageFolder", **options):
        changes = {"data.class_path": kind} | {f"data.init_args.{name}": value for name, value in options.items()}
        return tiny_classifier_config(root, changes={"data.init_args.image_size": 32} | changes)

    return write


# -- data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "lines", "parts"),
    [
        ("ImageFolder", 7, ["nowhere: folder not found", "root/train/<class>/a.jpg", "your own data"]),
        ("ImageNet", 10, ["train: folder not found", "ILSVRC2012_devkit_t12", "https://image-net.org"]),
        ("CIFAR10", 6, ["nowhere: no train images of CIFAR10 found", "cifar-10-batches-py", "cs.toronto.edu"]),
        ("CIFAR100", 6, ["nowhere: no train images of CIFAR100 found", "cifar-100-python", "cs.toronto.edu"]),
    ],
)
def test_missing_root(fails, config_on, kind, lines, parts):
    sample = "python -m tasks.classification fit -c configs/sample/litv2.yaml"
    fails("fit", "-c", config_on("nowhere", kind), parts=[*parts, "Expected layout", sample], lines=lines)


def test_class_in_one_split_only(fails, config_on, damaged):
    shutil.rmtree(damaged / "val" / "3")
    fails("fit", "-c", config_on(damaged), parts=[f"{damaged / 'val' / '3'}: folder not found; expected images of"])
    (damaged / "val" / "3").mkdir()
    fails("fit", "-c", config_on(damaged), parts=[f"{damaged / 'val' / '3'}: contains no images"])
    (damaged / "val" / "3").rename(damaged / "val" / "three")
    parts = [f"{damaged / 'val' / 'three'}: a class that is not expected; expected 0, 1, 2, ... (10 classes)"]
    fails("validate", "-c", config_on(damaged), parts=[*parts, "(and 1 more problems; `check` lists them all)"])


def test_a_file_instead_of_class_folders(fails, config_on, tmp_path):
    (tmp_path / "flat" / "train").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "flat" / "train" / "a.png")
    fails("fit", "-c", config_on(tmp_path / "flat"), parts=["train: contains no folders of classes"], lines=7)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("command", "split"), [("fit", "train"), ("validate", "val")])
def test_truncated_image(fails, config_on, damaged, command, split, workers):
    image = damaged / split / "1" / "0.png"
    image.write_bytes(image.read_bytes()[:-300])
    config = config_on(damaged, num_workers=workers, batch_size=13)  # one batch reads every image
    parts = [f"{image}: cannot be read as an image"]
    fails(command, "-c", config, parts=parts, results=("*.ckpt", "report*", "*.part", "predictions*"))


def test_malicious_cifar(fails, config_on, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps({"data": Attack(), "labels": [0]}, protocol=2))
    parts = [f"{folder / 'data_batch_1'}: cannot be read as a batch of CIFAR", "was refused"]
    fails("fit", "-c", config_on(tmp_path, "CIFAR10"), parts=parts)
    assert not (tmp_path / "attacked").exists()


# -- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "parts"),
    [
        ("image_size", 0, ["image_size is 0; expected at least 1 pixel"]),
        ("image_size", "big", ["image_size: expected int, got big"]),
        ("repeats", 0, ["repeats is 0; expected at least 1"]),
        ("crop_pct", 87.5, ["crop_pct: 87.5 was given"]),
        ("crop_scale", [0.5, 0.1], ["crop_scale: (0.5, 0.1) was given, two shares of the area, rising"]),
        ("interpolation", "cubic", ["interpolation: expected", "'bilinear', 'bicubic'", "got cubic"]),
        ("auto_augment", "randd", ["auto_augment: 'randd' was given, a policy of timm"]),
        ("augmentation", [{"Afine": {}}], ["augmentation: 'Afine' was given, an image transform of albumentations"]),
        ("augmentation", [{"Affine": {"rotat": 3}}], ["augmentation.Affine: {'rotat': 3} was given", "not valid"]),
        ("augmentation", "tim", ["augmentation: expected", "tim"]),
        ("std", [0.1, 0.0, 0.1], ["std is (0.1, 0.0, 0.1); expected positive numbers"]),
        ("batchsize", 4, ["'batchsize'", "batch_size'?"]),
        ("hflipp", 0.5, ["'hflipp'", "hflip'?"]),
    ],
)
def test_option_of_the_data(fails, config_on, tiny_digits, option, value, parts):
    options = {"augmentation": "timm"} | {option: value}
    fails("fit", "-c", config_on(tiny_digits, **options), parts=parts)


# -- check and predict ----------------------------------------------------------------------------------------------


def test_all_problems_at_once(run_cli, config_on, damaged):
    """`check` lists every problem where the other commands stop at the first."""
    assert run_cli("check", "-c", config_on(damaged)).code == 0
    truncated = damaged / "train" / "1" / "0.png"
    truncated.write_bytes(truncated.read_bytes()[:-300])
    shutil.rmtree(damaged / "val" / "3")
    shutil.copy(damaged / "train" / "5" / "0.png", damaged / "val" / "5" / "0.png")
    result = run_cli("check", "-c", config_on(damaged))
    assert result.code == 1
    problems = [line for line in result.out.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 3
    assert f"{truncated}: cannot be read as an image" in problems[0]
    assert f"{damaged / 'val' / '3'}: folder not found" in problems[1]
    assert "0.png: the same file as" in problems[2]


def test_check_of_a_missing_root_and_of_bad_options(fails, config_on, tiny_digits):
    fails("check", "-c", config_on("nowhere"), parts=["nowhere: folder not found"], lines=7)
    config = config_on(tiny_digits, batch_size=0)
    fails("check", "-c", config, parts=["batch_size is 0; expected at least 1"])


@pytest.mark.parametrize("images", ["none/*.jpg", "empty"])
def test_no_images_to_predict(fails, tmp_path, config_on, tiny_digits, images):
    (tmp_path / "empty").mkdir()
    args = ["predict", "-c", config_on(tiny_digits), f"--data.images={images}", "--output=out"]
    fails(*args, parts=[f"images is '{images}', where no image was found"])
    assert not (tmp_path / "out").exists()


def test_damaged_image_to_predict(fails, tmp_path, config_on, damaged):
    image = damaged / "val" / "1" / "0.png"
    image.write_bytes(image.read_bytes()[:-300])
    args = ["predict", "-c", config_on(damaged), f"--data.images={image.parent}", "--output=out"]
    fails(*args, parts=[f"{image}: cannot be read as an image"], results=("*.ckpt", "report*", "*.part"))
    assert not list((tmp_path / "out").rglob("*.csv"))
