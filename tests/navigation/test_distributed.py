"""Training, evaluation and prediction by two processes (gloo, CPU): real command lines, 13 unseen episodes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tasks.navigation.sample import write_sample

PROJECT = Path(__file__).resolve().parents[2]
TWO_PROCESSES = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A configuration that trains the smallest ORIST for three updates, with 13 unseen episodes and 9 others."""
    root = tmp_path_factory.mktemp("two")
    write_sample(root / "houses", num_train=1, num_unseen=1)
    for split, count in (("val_unseen", 13), ("val_seen", 9)):
        path = root / "houses" / f"R2R_{split}.json"
        entries = json.loads(path.read_text())
        kept, instructions = [], 0
        for entry in entries:
            entry["instructions"] = entry["instructions"][: count - instructions]
            instructions += len(entry["instructions"])
            kept.append(entry)
            if instructions == count:
                break
        path.write_text(json.dumps(kept))
    network = {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "feedforward_dim": 24, "max_positions": 40}
    optim = {"lr": 1e-3, "schedule": "poly", "power": 1.0, "warmup_steps": 1, "clip_grad": 2.0}
    options = {
        "model": {"class_path": "ORIST", "init_args": {**network, "max_actions": 4, "optim": optim}},
        "data": {
            "class_path": "SampleHouses",
            "init_args": {"root": str(root / "houses"), "batch_size": 2, "eval_batch_size": 4},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 3,
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "default_root_dir": str(root / "runs"),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        },
    }
    path = root / "tiny.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def navigation(command, config, *arguments):
    """What a command prints; it has to end well."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "SLURM_"))}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    done = subprocess.run(
        [sys.executable, "-m", "tasks.navigation", command, "-c", config, *map(str, arguments)],
        cwd=PROJECT,
        env=inherited | {"OMP_NUM_THREADS": "1", "MASTER_PORT": port, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def report(output):
    assert output.count("report: ") == 1, output
    path = next(line for line in output.splitlines() if line.startswith("report: ")).removeprefix("report: ")
    return json.loads(Path(path).with_suffix(".json").read_text())


def test_two_processes_train_and_evaluate_exactly_as_one(config, tmp_path):
    fitted = report(navigation("fit", config, *TWO_PROCESSES))
    assert 0 <= fitted["metrics"]["val_unseen/SR"] <= 1
    last = config.parent / "runs" / "tiny" / "version_0" / "checkpoints" / "last.ckpt"

    one = report(navigation("validate", config, "--ckpt_path", last))
    two = report(navigation("validate", config, "--ckpt_path", last, *TWO_PROCESSES))
    assert one["metrics"].keys() >= {"val_unseen/SR", "val_unseen/NE", "val_seen/SPL"}
    assert two["metrics"] == one["metrics"]
    assert two["tables"] == one["tables"]
    assert two["pictures"] == one["pictures"]

    submissions = []
    for name, processes in (("one", []), ("two", TWO_PROCESSES)):
        folder = tmp_path / name
        output = navigation("predict", config, "--ckpt_path", last, "--output", folder, *processes)
        assert "predictions: 1 file" in output
        (file,) = folder.glob("*.json")
        submissions.append(json.loads(file.read_text()))
    assert len(submissions[0]) == 13
    assert submissions[0] == submissions[1]
