"""Training and evaluation by several processes (gloo, CPU), and training that was killed: real command lines."""

import csv
import hashlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml

from tasks.segmentation.sample import write_sample

PROJECT = Path(__file__).resolve().parents[2]
PATIENCE = 280  # seconds for one command on a busy machine
TWO_PROCESSES = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def write_config(path: Path, root: Path, model: dict[str, Any], trainer: dict[str, Any], batch_size: int = 2) -> Path:
    """A network small enough to start in a second, on 64-pixel scenes below `root`."""
    network = {
        "backbone": "test_resnet",
        "backbone_norm": "batch",
        "hidden_dim": 32,
        "mask_dim": 32,
        "num_queries": 8,
        "num_heads": 4,
        "dim_feedforward": 32,
        "num_layers": 4,
        "encoder_layers": 1,
        "encoder_dim_feedforward": 32,
        "omega_rate": 2,
        "num_points": 64,
        "optim": {"lr": 3e-3, "schedule": "poly", "warmup_steps": 3, "clip_grad": 1.0},
    }
    config = {
        "model": {"class_path": "FASeg", "init_args": network | model},
        "data": {
            "class_path": "DigitScenes",
            "init_args": {"root": str(root), "batch_size": batch_size, "num_workers": 0},
        },
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": str(path.parent / "runs"),
            "enable_progress_bar": False,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 1,
        }
        | trainer,
    }
    path.write_text(yaml.safe_dump(config))
    return path


def start(arguments: Sequence[str | Path], **environment: str) -> subprocess.Popen[str]:
    """Start ``python <arguments>`` as the leader of a new process group."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "SLURM_")) and k not in RENDEZVOUS}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=PROJECT,
        env=inherited | {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port()), "NO_COLOR": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


RENDEZVOUS = {"MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"}


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    """The outputs of processes that all have to end well; if one does not, none is left behind."""
    deadline = time.monotonic() + PATIENCE
    try:
        outputs = [process.communicate(timeout=deadline - time.monotonic())[0] for process in processes]
    finally:
        for process in processes:
            kill(process)
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def kill(process: subprocess.Popen[str]) -> None:
    """End a process and what it started, at once."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def frugal(command: str, config: Path, *arguments: str | Path) -> str:
    return finish(start(["-m", "tasks.segmentation", command, "-c", config, *arguments]))[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def report(output: str) -> dict[str, Any]:
    """The report whose path was printed, once."""
    assert output.count("report: ") == 1, output
    path = Path(next(line for line in output.splitlines() if line.startswith("report: ")).removeprefix("report: "))
    return json.loads(path.with_suffix(".json").read_text())


def checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.png"))}


def test_two_processes_evaluate_exactly_as_one(tmp_path):
    write_sample(tmp_path / "scenes", num_train=12, num_val=13)
    trainer = {"max_steps": 4, "val_check_interval": 2}
    config = write_config(tmp_path / "tiny.yaml", tmp_path / "scenes", {"ema_decay": 0.5}, trainer)

    # 3 batches per epoch and process: validation, of 7 and 6 images, in mid-epoch
    fitted = frugal("fit", config, *TWO_PROCESSES)
    assert report(fitted)["metrics"]["val/mIoU"] > 0
    run = tmp_path / "runs" / "tiny" / "version_0"
    last = run / "checkpoints" / "last.ckpt"
    assert checkpoint(last)["global_step"] == 4

    one = report(frugal("validate", config, "--ckpt_path", last))
    two = report(frugal("validate", config, "--ckpt_path", last, *TWO_PROCESSES))
    assert one["metrics"].keys() >= {"val/mIoU", "val/fwIoU", "val/mAcc", "val/pAcc"}
    assert two["metrics"] == one["metrics"]
    assert two["tables"] == one["tables"]
    assert len(one["tables"][0]["rows"]) == 11
    assert [picture["caption"] for picture in two["pictures"]] == [picture["caption"] for picture in one["pictures"]]
    assert len({picture["caption"] for picture in one["pictures"] if "ADE_val" in picture["caption"]}) == 8

    # Inside the fit, both processes evaluated with the averaged running statistics that the checkpoint holds.
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    inside, _ = [row for row in rows if row["val/mIoU"]][1:]  # then comes the evaluation of best.ckpt
    for name, value in one["metrics"].items():
        assert float(inside[name]) == value, name

    predicted = {}
    for name, processes in (("one", []), ("two", TWO_PROCESSES)):
        output = frugal("predict", config, "--ckpt_path", last, "--output", tmp_path / name, *processes)
        assert output.count("predictions: 13 files") == 1
        predicted[name] = digests(tmp_path / name)
    assert len(predicted["one"]) == 13
    assert predicted["two"] == predicted["one"]


def test_two_processes_train_without_windows_targets_or_images_to_evaluate(tmp_path):
    """In each case some parameters have no influence on the loss, and DDP must not wait for their gradients."""
    scenes = tmp_path / "scenes"
    write_sample(scenes, num_train=4, num_val=1)
    for path in sorted(scenes.glob("annotations/training/*.png"))[1:]:  # nothing but "other" in three of four
        cv2.imwrite(str(path), np.zeros((64, 64), dtype=np.uint8))
    model = {"omega_rate": 32, "ema_decay": 0.9}  # 64 pixels are 4 cells: no window
    trainer = {"max_steps": 4, "val_check_interval": 2}
    config = write_config(tmp_path / "tiny.yaml", scenes, model, trainer, batch_size=1)
    output = frugal("fit", config, *TWO_PROCESSES)
    assert report(output)["metrics"]["val/pAcc"] >= 0
    last = checkpoint(tmp_path / "runs" / "tiny" / "version_0" / "checkpoints" / "last.ckpt")
    assert last["global_step"] == 4
    assert all(value.isfinite().all() for value in last["state_dict"].values())


def test_a_killed_training_resumes_to_the_weights_of_an_uninterrupted_one(tmp_path):
    """That two trainings with one seed are equal follows: the uninterrupted one shares no step with the other."""
    write_sample(tmp_path / "scenes", num_train=48, num_val=3)
    # 12 batches per epoch and process: the first checkpoint is in mid-epoch, the second in the next epoch
    trainer = {"max_steps": 16, "val_check_interval": 8}
    straight, killed = (
        write_config(tmp_path / f"{name}.yaml", tmp_path / "scenes", {"ema_decay": 0.9}, trainer)
        for name in ("straight", "killed")
    )
    frugal("fit", straight, *TWO_PROCESSES)

    last = tmp_path / "runs" / "killed" / "version_0" / "checkpoints" / "last.ckpt"
    process = start(["-m", "tasks.segmentation", "fit", "-c", killed, *TWO_PROCESSES])
    try:
        deadline = time.monotonic() + PATIENCE
        while not last.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        kill(process)
    assert process.returncode == -signal.SIGKILL
    interrupted = checkpoint(last)
    assert (interrupted["epoch"], interrupted["global_step"]) == (0, 8)

    output = frugal("fit", killed, "--ckpt_path", last, *TWO_PROCESSES)
    message = next(line for line in output.splitlines() if "resuming" in line)
    assert "last.ckpt" in message
    assert re.search(r"epoch 0\b.*\b8\b", message)

    expected = checkpoint(tmp_path / "runs" / "straight" / "version_0" / "checkpoints" / "last.ckpt")
    resumed = checkpoint(tmp_path / "runs" / "killed" / "version_1" / "checkpoints" / "last.ckpt")
    assert resumed["global_step"] == expected["global_step"] == 16
    for weights in ("state_dict", "current_model_state"):  # the average and what the optimizer moves
        assert resumed[weights].keys() == expected[weights].keys()
        for name, value in expected[weights].items():
            torch.testing.assert_close(resumed[weights][name], value, rtol=0, atol=0, msg=f"{weights}: {name}")
    assert resumed["lr_schedulers"] == expected["lr_schedulers"]
    groups = [[group["lr"] for group in ckpt["optimizer_states"][0]["param_groups"]] for ckpt in (resumed, expected)]
    assert groups[0] == groups[1]


def test_two_torchrun_agents_train_with_the_documented_commands(tmp_path):
    write_sample(tmp_path / "scenes", num_train=8, num_val=3)
    trainer = {"max_steps": 4, "val_check_interval": 4}
    config = write_config(tmp_path / "tiny.yaml", tmp_path / "scenes", {}, trainer, batch_size=1)
    text = (PROJECT / "docs" / "distributed.md").read_text().replace("\\\n", "")
    commands = [shlex.split(line) for line in text.splitlines() if "torchrun" in line and "127.0.0.1" in line]
    assert [command[:3] for command in commands] == [["uv", "run", "torchrun"]] * 2
    port = str(free_port())
    agents = []
    for command in commands:
        words = [{"29500": port, "configs/sample/faseg.yaml": str(config)}.get(word, word) for word in command[3:]]
        assert port in words
        assert str(config) in words
        agents.append(start(["-m", "torch.distributed.run", *words]))
    outputs = finish(*agents)
    assert report("".join(outputs))["metrics"]["val/pAcc"] >= 0
    assert checkpoint(tmp_path / "runs" / "tiny" / "version_0" / "checkpoints" / "last.ckpt")["global_step"] == 4
