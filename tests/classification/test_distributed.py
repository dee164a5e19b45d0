"""Evaluation and prediction by two processes (gloo, CPU) equal those by one, exactly: real command lines."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parents[2]
PATIENCE = 280  # seconds for one command on a busy machine
RENDEZVOUS = {"MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"}
TWO_PROCESSES = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def frugal(command, config, *arguments):
    """What ``python -m tasks.classification`` printed; it has to end well, and leaves no process behind."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "SLURM_")) and k not in RENDEZVOUS}
    process = subprocess.Popen(
        [sys.executable, "-m", "tasks.classification", command, "-c", config, *map(str, arguments)],
        cwd=PROJECT, env=inherited | {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(port), "NO_COLOR": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output = process.communicate(timeout=PATIENCE)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, output
    return output


def report(output):
    """The report whose path was printed, once."""
    assert output.count("report: ") == 1, output
    path = Path(next(line for line in output.splitlines() if line.startswith("report: ")).removeprefix("report: "))
    return json.loads(path.with_suffix(".json").read_text())


def pictures(report):
    return [(picture["title"], picture["caption"]) for picture in report["pictures"]]


@pytest.fixture
def config(tiny_classifier_config, tiny_digits, tmp_path):
    """A network whose outputs depend, in the last bit, on the size of the batch; batches of 5, 5 and 3 images."""
    changes = {
        "model.init_args.backbone": "litv2_s",
        "model.init_args.backbone_options": {"embed_dim": 32, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]},
        "model.init_args.ema_decay": 0.5, "model.init_args.mixup": 0.8, "model.init_args.optim.warmup_epochs": 0.5,
        "model.init_args.optim.reference_batch_size": 16,
        "data.init_args.batch_size": 2, "trainer.max_epochs": 2, "trainer.default_root_dir": str(tmp_path / "runs"),
    }  # fmt: skip
    return tiny_classifier_config(tiny_digits, changes=changes)


def test_two_processes_evaluate_and_predict_exactly_as_one(config, tmp_path):
    fitted = frugal("fit", config, *TWO_PROCESSES)
    assert fitted.count("learning rate 2.5e-04 for a global batch of 4") == 1
    best = next((tmp_path / "runs").rglob("best.ckpt"))
    weights = torch.load(best, weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in weights.values())

    one = report(frugal("validate", config, "--ckpt_path", best))
    two = report(frugal("validate", config, "--ckpt_path", best, *TWO_PROCESSES))
    assert len([name for name in one["metrics"] if name.startswith("val/")]) == 6
    assert two["metrics"] == one["metrics"]
    assert two["tables"] == one["tables"]
    assert len(one["tables"][0]["rows"]) == 10
    assert pictures(two) == pictures(one)
    assert len([title for title, _ in pictures(one) if title.endswith(" images")]) == 13
    # The fit, by two processes, ended with the evaluation of these weights.
    inside = report(fitted)["metrics"]
    assert {name: inside[name] for name in one["metrics"]} == one["metrics"]

    files = {}
    for name, processes in (("one", []), ("two", TWO_PROCESSES)):
        output = frugal("predict", config, "--ckpt_path", best, "--output", tmp_path / name, *processes)
        assert output.count("predictions: 1 file") == 1
        files[name] = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    assert files["one"]["predictions.csv"].count(b"\n") == 14
    assert files["two"] == files["one"]


def test_a_process_without_images_to_evaluate(config, tmp_path):
    """All 13 images are one batch: the second process has none."""
    arguments = ["--data.eval_batch_size", "20", *TWO_PROCESSES]
    assert sum(row[3] for row in report(frugal("validate", config, *arguments))["tables"][0]["rows"]) == 13
    output = frugal("predict", config, *arguments, "--output", tmp_path / "out")
    assert output.count("predictions: 1 file") == 1
    assert (tmp_path / "out" / "predictions.csv").read_bytes().count(b"\n") == 14
