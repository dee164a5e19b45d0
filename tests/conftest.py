"""What the tests share: one thread per process, a tiny data set, the smallest configuration and the command line."""

import importlib.util
import logging
import os
import sys
from typing import NamedTuple

import pytest
import yaml

# Tests run side by side, one process per core; subprocesses inherit this.
os.environ["OMP_NUM_THREADS"] = "1"
# Without a GPU Triton's kernels run in its interpreter. Triton decides on import, and so many modules import it that a
# later place is too late.
if importlib.util.find_spec("triton") is not None:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"

NUM_SCENES = NUM_DIGITS = 13  # no multiple of the batch size


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_ade20k(tmp_path_factory):
    """13 training and 13 validation scenes of handwritten digits in the layout of ADE20K; not to be changed."""
    from tasks.segmentation.sample import write_sample

    root = tmp_path_factory.mktemp("data") / "tiny"
    write_sample(root, NUM_SCENES, NUM_SCENES)
    return root


@pytest.fixture(scope="session")
def tiny_digits(tmp_path_factory):
    """13 training and 13 validation digits of 32 pixels in folders named like their classes; not to be changed."""
    import cv2
    import numpy as np

    from tasks.classification.sample import draw_digit
    from tasks.core.sample import digit_images

    root = tmp_path_factory.mktemp("data") / "digits"
    for split in ("train", "val"):
        images, labels = digit_images(split)
        for number in range(NUM_DIGITS):
            label, position = number % 10, number // 10
            folder = root / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            digit = images[np.flatnonzero(labels == label)[position]]
            image = draw_digit(np.random.default_rng((split == "val", number)), digit, 32)
            cv2.imwrite(str(folder / f"{position}.png"), image)
    return root


@pytest.fixture(scope="session")
def tiny_classifier_options():
    """Options, as nested dictionaries, of a small classifier on the data at `root`: two steps on the CPU."""

    def options(root):
        model = {"backbone": "test_vit2", "optim": {"lr": 1e-3}}
        data = {"root": str(root), "batch_size": 6, "eval_batch_size": 5, "num_workers": 0}
        return {
            "model": {"class_path": "Classification", "init_args": model},
            "data": {"class_path": "DigitImages", "init_args": data},
            "trainer": {
                "accelerator": "cpu",
                "max_epochs": 1,
                "log_every_n_steps": 1,
                "enable_progress_bar": False,
                "enable_model_summary": False,
            },
        }

    return options


@pytest.fixture(scope="session")
def tiny_options():
    """Options, as nested dictionaries, of the smallest FASeg on the data at `root`: two steps on the CPU."""

    def options(root):
        network = {
            "backbone": "test_resnet", "backbone_norm": "batch", "hidden_dim": 32, "mask_dim": 32, "num_queries": 8,
            "num_heads": 4, "dim_feedforward": 32, "num_layers": 4, "encoder_layers": 1, "encoder_dim_feedforward": 32,
            "omega_rate": 2, "num_points": 64,
        }  # fmt: skip
        optim = {"lr": 1e-3, "schedule": "poly"}
        data = {"root": str(root), "batch_size": 4, "eval_batch_size": 5, "num_workers": 0}
        return {
            "model": {"class_path": "FASeg", "init_args": {**network, "optim": optim}},
            "data": {"class_path": "DigitScenes", "init_args": data},
            "trainer": {
                "accelerator": "cpu",
                "max_steps": 2,
                "val_check_interval": 2,
                "check_val_every_n_epoch": None,
                "log_every_n_steps": 1,
                "enable_progress_bar": False,
                "enable_model_summary": False,
            },
        }

    return options


def write_options(options, path, changes=None):
    """Write nested `options`, with dotted `changes`, to a YAML file; returns its path."""
    for key, value in (changes or {}).items():
        *groups, leaf = key.split(".")
        inner = options
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[leaf] = value
    path.write_text(yaml.safe_dump(options, sort_keys=False))
    return str(path)


@pytest.fixture
def tiny_config(tiny_options, tmp_path):
    """Writes `tiny_options(root)`, with dotted `changes`, to a YAML file and returns its path."""
    return lambda root, name="tiny", changes=None: write_options(tiny_options(root), tmp_path / f"{name}.yaml", changes)


@pytest.fixture
def tiny_classifier_config(tiny_classifier_options, tmp_path):
    """Writes `tiny_classifier_options(root)`, with dotted `changes`, to a YAML file and returns its path."""
    return lambda root, name="tiny", changes=None: write_options(
        tiny_classifier_options(root), tmp_path / f"{name}.yaml", changes
    )


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


def call_cli(task, args, capture):
    """The command line of a task in this process; `capture` is capsys or the like."""
    from tasks.core.cli import main

    if task == "classification":
        from tasks.classification.data import ClassificationDataModule as DataModule
        from tasks.classification.module import Classification as Module
    elif task == "navigation":
        from tasks.navigation.data import NavigationDataModule as DataModule
        from tasks.navigation.module import NavigationModule as Module
    else:
        from tasks.segmentation.data import SegmentationDataModule as DataModule
        from tasks.segmentation.module import SegmentationModule as Module

    capture.readouterr()
    for name in logging.root.manager.loggerDict:
        for handler in logging.getLogger(name).handlers if name.startswith("lightning") else ():
            handler.stream = sys.stderr  # not the closed one of the test that imported lightning
    code = 0
    try:
        main(Module, DataModule, [str(argument) for argument in args])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    out, err = capture.readouterr()
    return Outcome(code, out, err)


@pytest.fixture(scope="session")
def task():
    """The task whose commands are run; the folder of a task's tests names its own."""
    return "segmentation"


@pytest.fixture
def run_cli(task, tmp_path, monkeypatch, capsys):
    """Runs the command line of the task in `tmp_path` and returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["frugal"])
    return lambda *args: call_cli(task, args, capsys)


@pytest.fixture
def fails(run_cli, tmp_path):
    """Runs a command that must fail with one error, of `lines` lines, that contains `parts`, and leave no `results`."""

    def run(*args, parts, lines=1, results=("*.ckpt", "report*", "*.part", "predictions")):
        before = {path for pattern in results for path in tmp_path.rglob(pattern)}
        result = run_cli(*args)
        assert result.code not in (0, None)
        assert result.err.count("error:") == 1, result.err
        assert "Traceback" not in result.err
        error = result.err[result.err.index("error:") :].rstrip("\n")
        assert error.count("\n") + 1 == lines, error
        for part in parts:
            assert str(part) in error
        assert {path for pattern in results for path in tmp_path.rglob(pattern)} == before
        return error

    return run


PARSED = {}  # by name of the configuration; parsing takes a second


@pytest.fixture
def resolved(run_cli):
    """The configuration `name` as the command line understands it, with every default."""

    def read(name):
        if name not in PARSED:
            outcome = run_cli("fit", "-c", f"configs/{name}.yaml", "--print_config")
            assert outcome.code == 0, outcome.err
            PARSED[name] = yaml.safe_load(outcome.out)
        return PARSED[name]

    return read
