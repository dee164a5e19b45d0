"""What the tests share: one thread per process, a tiny data set, the smallest configuration and the command line."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
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

ROOT = Path(__file__).parents[1]
NUM_SCENES = NUM_DIGITS = 13  # no multiple of the batch size
TRAINER = {
    "accelerator": "cpu",
    "log_every_n_steps": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
TWO_STEPS = {**TRAINER, "max_steps": 2, "val_check_interval": 2, "check_val_every_n_epoch": None}


def autograd_runs_in_forks() -> bool:
    """Whether autograd has not started threads in this process: in its forks it would refuse to run then."""
    import torch

    child = os.fork()
    if child == 0:
        try:
            torch.ones(1, requires_grad=True).sum().backward()
        except RuntimeError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run a test that forks in a process of its own where those before it have started autograd's threads."""
    if pyfuncitem.get_closest_marker("forks") is None or autograd_runs_in_forks():
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-5000:]
    return True


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
def tiny_videos(tmp_path_factory):
    """5 training and 4 validation videos of ten seconds with moving digits, like THUMOS14; not to be changed."""
    pytest.importorskip("av")
    from tasks.video.sample import write_sample

    root = tmp_path_factory.mktemp("data") / "videos"
    write_sample(root, 5, 4, seconds=10)
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
            "trainer": {**TRAINER, "max_epochs": 1},
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
            "trainer": {**TWO_STEPS},
        }

    return options


@pytest.fixture(scope="session")
def tiny_detector_options():
    """Options, as nested dictionaries, of a small RetinaNet of torchvision on the data at `root`: two steps on the CPU.

    Untrained detectors are sure of nothing; a low threshold makes them find things.
    """

    def options(root):
        model = {
            "detector": "retinanet", "backbone": "test_resnet", "backbone_norm": "batch", "fpn_channels": 16,
            "levels": [3, 5], "anchor_scale": 2.0, "head_convs": 1, "head_norm": True,
            "options": {"score_thresh": 0.001, "detections_per_img": 20}, "optim": {"lr": 1e-3},
        }  # fmt: skip
        data = {
            "root": str(root), "batch_size": 4, "eval_batch_size": 5, "num_workers": 0,
            "train_short_sides": [36, 40], "max_long_side": 64, "test_short_side": 40, "test_max_long_side": 64,
        }  # fmt: skip
        return {
            "model": {"class_path": "TorchvisionDetection", "init_args": model},
            "data": {"class_path": "DigitScenes", "init_args": data},
            "trainer": {**TWO_STEPS},
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


def config_writer(options, folder):
    """Writes `options(root)`, with dotted `changes`, to a YAML file in `folder` and returns its path."""
    return lambda root, name="tiny", changes=None: write_options(options(root), folder / f"{name}.yaml", changes)


@pytest.fixture
def tiny_config(tiny_options, tmp_path):
    return config_writer(tiny_options, tmp_path)


@pytest.fixture
def tiny_classifier_config(tiny_classifier_options, tmp_path):
    return config_writer(tiny_classifier_options, tmp_path)


@pytest.fixture
def tiny_detector_config(tiny_detector_options, tmp_path):
    return config_writer(tiny_detector_options, tmp_path)


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
    elif task == "detection":
        from tasks.detection.data import DetectionDataModule as DataModule
        from tasks.detection.module import DetectionModule as Module
    elif task == "video":
        from tasks.video import clips, data  # noqa: F401
        from tasks.video.datamodule import VideoDataModule as DataModule
        from tasks.video.module import VideoModule as Module
    elif task == "navigation":
        from tasks.navigation.data import NavigationDataModule as DataModule
        from tasks.navigation.module import NavigationModule as Module
    else:
        import tasks.segmentation.mmseg_module  # noqa: F401  (its classes can be named, as in __main__)
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


@pytest.fixture
def fit_sample(tmp_path):
    """Trains a configuration of `configs/sample` as a user would, in `tmp_path`; its run folder and final metrics."""

    def fit(task, name, *options, timeout=1700):
        command = [
            sys.executable,
            "-m",
            f"tasks.{task}",
            "fit",
            "-c",
            str(ROOT / f"configs/sample/{name}.yaml"),
            *options,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, done.stderr[-3000:]
        last = done.stdout.strip().splitlines()[-1]
        assert last.startswith("report: ")
        folder = (tmp_path / last.removeprefix("report: ")).parent
        return folder, json.loads((folder / "report.json").read_text())["metrics"]

    return fit
