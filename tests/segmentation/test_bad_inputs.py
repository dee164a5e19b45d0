"""Bad input ends a command with one clear error and leaves nothing half-written."""

import os
import pickle
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch


@pytest.fixture
def fit_fails(fails, tiny_config, tiny_ade20k, tmp_path):
    """`fit` with the tiny configuration, changed, must fail before anything is written."""

    def run(*args, changes=None, root=tiny_ade20k, parts, lines=1):
        error = fails("fit", "-c", tiny_config(root, changes=changes), *args, parts=parts, lines=lines)
        assert not list((tmp_path / "runs").rglob("*"))
        return error

    return run


@pytest.fixture
def damaged(tiny_ade20k, tmp_path):
    """Copies the data and returns (root, first image, first label map) of a split."""

    def copy(split="training"):
        root = tmp_path / "damaged"
        shutil.copytree(tiny_ade20k, root)
        return root, *(min((root / kind / split).iterdir()) for kind in ("images", "annotations"))

    return copy


# -- data -----------------------------------------------------------------------------------------------------------


def test_missing_root(fit_fails):
    changes = {"data.class_path": "ADE20K"}
    fit_fails(
        root="nowhere", changes=changes, lines=8,
        parts=["nowhere/images/training: folder not found", "Expected layout", "http", "configs/sample/faseg.yaml"],
    )  # fmt: skip


def test_wrong_layout(fit_fails, damaged):
    root, *_ = damaged()
    (root / "images").rename(root / "pictures")
    fit_fails(root=root, parts=[f"{root}/images/training: folder not found", "Expected layout"], lines=8)


def test_empty_split(fit_fails, damaged):
    root, *_ = damaged()
    for path in (*(root / "images/validation").iterdir(), *(root / "annotations/validation").iterdir()):
        path.unlink()
    fit_fails(root=root, parts=[f"{root}/images/validation: contains no images"], lines=8)


def test_image_without_label_map(fit_fails, damaged):
    root, image, mask = damaged()
    mask.unlink()
    fit_fails(root=root, parts=[f"{image}: has no label map; expected {mask}"])


@pytest.mark.parametrize(("split", "workers"), [("training", 0), ("validation", 0), ("validation", 1)])
def test_truncated_image(fails, tiny_config, damaged, split, workers):
    root, image, _ = damaged(split)
    image.write_bytes(image.read_bytes()[:-500])
    # two epochs read every image of both splits
    changes = {"data.init_args.num_workers": workers, "trainer.max_steps": 8, "trainer.val_check_interval": 3}
    fails("fit", "-c", tiny_config(root, changes=changes), parts=[f"{image}: cannot be read as an image", "truncated"])


def test_mask_of_another_size(fails, tiny_config, damaged):
    root, image, mask = damaged("validation")
    cv2.imwrite(str(mask), np.ones((10, 20), np.uint8))
    parts = [f"{mask}: label map of 20 x 10 pixels; expected 64 x 64", image]
    fails("validate", "-c", tiny_config(root), parts=parts)


def test_label_out_of_range(fails, tiny_config, damaged):
    root, _, mask = damaged("validation")
    cv2.imwrite(str(mask), np.full((64, 64), 200, np.uint8))
    fails("validate", "-c", tiny_config(root), parts=[f"{mask}: label 200 in 4096 pixels; expected 1 to 11"])


# -- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("modle", 3, ["'modle'", "did you mean 'model'?"]),
        ("trainer.max_step", 3, ["'trainer.max_step'", "did you mean 'trainer.max_steps'?"]),
        ("model.init_args.num_quries", 3, ["'num_quries'", "num_queries'?"]),
        ("model.init_args.optim.warm_up_steps", 3, ["'warm_up_steps'", "warmup_steps'?"]),
        ("data.init_args.batchsize", 3, ["'batchsize'", "batch_size'?"]),
        ("data.init_args.zzzqqq", 3, ["unknown option 'zzzqqq'"]),
        ("model.lr", 3, ["model: expected class_path and init_args, nothing else"]),
        ("model.class_path", "FASegg", ["'FASegg'", "did you mean 'FASeg'?"]),
        ("model.class_path", "DigitScenes", ["model: no class 'DigitScenes'"]),
        ("model", None, ["no model was given"]),
        ("model.init_args.num_queries", "abc", ["num_queries: expected int, got abc"]),
        ("model.init_args.backbone_norm", "group", ["backbone_norm: expected", "'frozen', 'batch'", "got group"]),
        ("model.init_args.optim.lr", "fast", ["lr: expected float, got fast"]),
        ("model.init_args.optim.lr", -1, ["lr: -1.0 was given, a positive number was expected"]),
        ("model.init_args.optim.schedule", "polly", ["schedule: expected", "'poly', 'cosine'", "got polly"]),
        ("data.init_args.crop_size", [1, 2, 3], ["crop_size: expected", "2 elements", "got [1, 2, 3]"]),
        ("trainer.max_steps", "many", ["trainer.max_steps: expected int, got many"]),
        ("trainer.accelerator", "tpux", ["trainer: ", "accelerator='tpux'"]),
        ("model.init_args.backbone", "resnet5o", ["model.backbone: unknown backbone 'resnet5o'", "resnet50"]),
        ("model.init_args.backbone", "test_vit", ["model.backbone: backbone 'test_vit' has no feature pyramid"]),
    ],
)
def test_option_in_file(fit_fails, key, value, parts):
    fit_fails(changes={key: value}, parts=parts)


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("--model.num_quries=3", ["num_quries'", "num_queries'?"]),
        ("--trainer.max_step=3", ["'trainer.max_step'", "did you mean 'trainer.max_steps'?"]),
        ("--model.num_queries=abc", ["num_queries: expected int, got abc"]),
        ("--model.optim.lr=-1", ["lr: -1.0 was given, a positive number was expected"]),
        ("--model=FaSeg2", ["'FaSeg2'", "did you mean 'FASeg'?"]),
        ("--allow-import", ["--allow-import: expected the name"]),
    ],
)
def test_option_on_command_line(fit_fails, argument, parts):
    fit_fails(argument, parts=parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model.init_args.optim.warmup_steps": 10}, ["warmup_steps: 10 is more than the 2 steps of the training"]),
        ({"trainer.max_steps": -1, "trainer.max_epochs": -1}, ["trainer.max_steps and trainer.max_epochs are -1"]),
    ],
)
def test_schedule_that_does_not_fit_the_training(fails, tiny_config, tiny_ade20k, changes, parts):
    fails("fit", "-c", tiny_config(tiny_ade20k, changes=changes), parts=parts)


# -- configurations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["-c {}", "--config {}", "--config={}", "-c{}"])
def test_configuration_that_does_not_exist(fails, flag):
    fails("fit", *flag.format("nope.yaml").split(), parts=["nope.yaml: no such file", "python -m tasks"])


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"a: [1,\nb: {", "not valid YAML"),
        (b"- a\n- b\n", "holds a list; expected options"),
        (b"", "holds nothing; expected options"),
        (bytes(range(256)), "cannot be read"),
    ],
)
def test_configuration_that_holds_something_else(fails, tmp_path, content, part):
    (tmp_path / "bad.yaml").write_bytes(content)
    fails("fit", "-c", "bad.yaml", parts=["bad.yaml", part])


def test_unreadable_configuration(fails, tmp_path, tiny_config, tiny_ade20k):
    fails("fit", "-c", str(tiny_ade20k), parts=[tiny_ade20k, "cannot be read"])
    if os.geteuid() != 0:  # root may read anything
        path = Path(tiny_config(tiny_ade20k))
        path.chmod(0)
        fails("fit", "-c", str(path), parts=[path, "cannot be read"])


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ([], ["subcommand", "fit", "check"]),
        (["fitt"], ["subcommand", "'fitt'", "'fit'"]),
        (["fit"], ["no model and no data was given; name a configuration"]),
        (["fit", "--data=ADE20K", "--data.root=x"], ["no model was given; name a configuration"]),
        (["fit", "-c"], ["-c/--config: expected one argument"]),
    ],
)
def test_incomplete_command(fails, args, parts):
    fails(*args, parts=parts)


# -- imports --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A package on the path whose import leaves a trace; returns the trace."""
    (tmp_path / "stranger.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w').close()\n"
        "from lightning.pytorch import Callback\n"
        "class Note(Callback):\n"
        "    def on_validation_end(self, *args):\n"
        "        print('stranger was here')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "stranger", raising=False)
    yield tmp_path / "imported"
    sys.modules.pop("stranger", None)


@pytest.mark.parametrize(
    ("changes", "args"),
    [
        ({"model.class_path": "stranger.Note"}, []),
        ({"data.class_path": "stranger.Note"}, []),
        ({"trainer.callbacks": [{"class_path": "stranger.Note"}]}, []),
        ({"trainer.logger": {"class_path": "stranger.Note"}}, []),
        ({}, ["--model=stranger.Note"]),
        ({}, ["--trainer.callbacks+=stranger.Note"]),
        ({}, ["--trainer.callbacks+=stranger.Note", "--allow-import", "other"]),
    ],
)
def test_class_of_a_package_that_is_not_allowed(fit_fails, stranger, changes, args):
    fit_fails(*args, changes=changes, parts=["stranger.Note is outside the packages", "--allow-import PACKAGE"])
    assert not stranger.exists()


def test_function_of_the_standard_library(fit_fails, tmp_path):
    callback = {"class_path": "os.system", "init_args": {"command": f"touch {tmp_path}/touched"}}
    fit_fails(changes={"trainer.callbacks": [callback]}, parts=["os.system is outside the packages"])
    assert not (tmp_path / "touched").exists()


def test_allowed_package(run_cli, tiny_config, tiny_ade20k, stranger):
    config = tiny_config(tiny_ade20k, changes={"trainer.callbacks": [{"class_path": "stranger.Note"}]})
    result = run_cli("validate", "-c", config, "--allow-import", "stranger")
    assert result.code == 0
    assert "stranger was here" in result.out


# -- weights and checkpoints ----------------------------------------------------------------------------------------


class Attack:
    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def write_bad_weights(kind, folder):
    """A file that is no weight file of any model, and what the error says of it."""
    path = folder / "bad.pth"
    if kind == "missing":
        return path, "no such"
    if kind == "text":
        path.write_text("hello")
        return path, "is not a weight file"
    if kind == "attack.pkl":
        path = folder / "bad.pkl"
        path.write_bytes(pickle.dumps(Attack(folder / "attacked")))
        return path, "was refused: reading it would call"
    if kind == "attack.pth":
        torch.save({"state_dict": Attack(folder / "attacked"), "pytorch-lightning_version": "2.0.0"}, path)
        return path, "was refused: reading it would call"
    torch.save({"weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:1000])
    return path, "is damaged or incomplete"


@pytest.mark.parametrize("option", ["--model.weights", "--ckpt_path"])
@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "attack.pth", "attack.pkl"])
def test_file_that_holds_no_weights(fit_fails, tmp_path, kind, option):
    path, part = write_bad_weights(kind, tmp_path)
    fit_fails(f"{option}={path}", parts=[path, part])
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_malicious_checkpoint_in_evaluation(fails, tmp_path, tiny_config, tiny_ade20k, subcommand):
    path, part = write_bad_weights("attack.pth", tmp_path)
    fails(subcommand, "-c", tiny_config(tiny_ade20k), "--ckpt_path", path, parts=[path, part])
    assert not (tmp_path / "attacked").exists()


def test_weights_of_another_model(fit_fails, tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    fit_fails("--model.weights=other.pth", parts=["other.pth does not fit: 0 of"])
    fit_fails(
        "--ckpt_path=other.pth", parts=["--ckpt_path other.pth: not the checkpoint of a training", "--model.weights"]
    )


@pytest.fixture
def own_checkpoint(tiny_options, tmp_path):
    """What a training of the tiny configuration would save, without training."""
    from tasks.segmentation.module import FASeg

    options = {**tiny_options("")["model"]["init_args"], "num_classes": 11}
    checkpoint = {
        "state_dict": FASeg(**options).state_dict(), "pytorch-lightning_version": "2.6.0", "epoch": 0,
        "global_step": 2, "optimizer_states": [], "loops": {}, "lr_schedulers": [], "callbacks": {},
    }  # fmt: skip
    torch.save(checkpoint, tmp_path / "own.ckpt")
    return checkpoint


@pytest.mark.parametrize("subcommand", ["fit", "validate"])
def test_checkpoint_of_another_model(fails, own_checkpoint, tmp_path, tiny_config, tiny_ade20k, subcommand):
    wider = tiny_config(tiny_ade20k, changes={"model.init_args.hidden_dim": 64})
    parts = ["own.ckpt: a checkpoint of another model", "(12, 32), in the model (12, 64)", "more"]
    fails(subcommand, "-c", wider, "--ckpt_path=own.ckpt", parts=parts)
    other = {"class_path": "SemanticFPN", "init_args": {"backbone": "test_resnet"}}
    config = tiny_config(tiny_ade20k, changes={"model": other})
    fails(
        subcommand,
        "-c",
        config,
        "--ckpt_path=own.ckpt",
        parts=["own.ckpt: a checkpoint of another model", "is not part of the model"],
    )
    assert not list((tmp_path / "runs").rglob("*"))


def test_resuming_without_the_state_of_the_training(fit_fails, own_checkpoint, tmp_path):
    del own_checkpoint["optimizer_states"]
    torch.save(own_checkpoint, tmp_path / "weights.ckpt")
    fit_fails("--ckpt_path=weights.ckpt", parts=["weights.ckpt: not the checkpoint of a training"])


@pytest.mark.parametrize("name", ["best", "last"])
def test_checkpoint_of_no_run(fit_fails, name):
    fit_fails(f"--ckpt_path={name}", parts=[f"--ckpt_path {name}: no such file"])


# -- predictions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", ["none/*.jpg", "empty"])
def test_no_images_to_predict(fails, tmp_path, tiny_config, tiny_ade20k, images):
    (tmp_path / "empty").mkdir()
    args = ["predict", "-c", tiny_config(tiny_ade20k), f"--data.images={images}", "--output=out"]
    fails(*args, parts=[f"images is '{images}', where no image was found"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", ["taken", "taken/below"])
def test_predictions_into_a_file(fails, tmp_path, tiny_config, tiny_ade20k, output):
    (tmp_path / "taken").write_text("mine")
    fails("predict", "-c", tiny_config(tiny_ade20k), f"--output={output}", parts=[f"{output}: ", "folder"])
    assert (tmp_path / "taken").read_text() == "mine"


def test_damaged_image_to_predict(fails, tmp_path, tiny_config, tiny_ade20k, damaged):
    _, image, _ = damaged("validation")
    image.write_bytes(image.read_bytes()[:-500])
    args = ["predict", "-c", tiny_config(tiny_ade20k), f"--data.images={image.parent}", "--output=out"]
    fails(*args, parts=[f"{image}: cannot be read as an image"])
    assert not list((tmp_path / "out").rglob("*.png"))


def test_all_problems_at_once(run_cli, tiny_config, damaged):
    """`check` lists every problem where the other commands stop at the first."""
    root, image, mask = damaged()
    mask.unlink()
    second = sorted((root / "annotations/training").iterdir())[1]
    cv2.imwrite(str(second), np.full((64, 64), 200, np.uint8))
    result = run_cli("check", "-c", tiny_config(root))
    assert result.code == 1
    problems = [line for line in result.out.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 2
    assert f"{image}: has no label map" in problems[0]
    assert f"{second}: label 200" in problems[1]


def test_check_reads_its_options_like_the_others(fails, tiny_config, tiny_ade20k):
    fails(
        "check", "-c", tiny_config(tiny_ade20k), "--data.batch_size=0", parts=["batch_size is 0; expected at least 1"]
    )
    config = tiny_config(tiny_ade20k, changes={"model.init_args.num_quries": 3})
    fails("check", "-c", config, parts=["'num_quries'"])
