"""Training, evaluation and predictions by several processes (gloo, CPU): real command lines."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

PROJECT = Path(__file__).resolve().parents[2]
PATIENCE = 280  # seconds for one command on a busy machine
TWO_PROCESSES = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
RENDEZVOUS = {"MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def frugal(command, config, *arguments):
    """The output of a command that has to end well."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "SLURM_")) and k not in RENDEZVOUS}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    done = subprocess.run(
        [sys.executable, "-m", "tasks.detection", command, "-c", str(config), *map(str, arguments)],
        cwd=PROJECT,
        env=inherited | {"OMP_NUM_THREADS": "1", "MASTER_PORT": port, "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def report(output):
    """The report whose path was printed, once."""
    assert output.count("report: ") == 1, output
    path = Path(next(line for line in output.splitlines() if line.startswith("report: ")).removeprefix("report: "))
    return json.loads(path.with_suffix(".json").read_text())


@pytest.fixture
def config(tiny_detector_options, tiny_coco, tmp_path):
    """A small Mask R-CNN that finds things from the start, on 13 images; one of them in training has no objects."""

    def write(**model):
        options = tiny_detector_options(tiny_coco)
        options["model"]["init_args"] |= {
            "detector": "mask_rcnn", "levels": [2, 5], "ema_decay": 0.5,
            "options": {"box_score_thresh": 0.01, "box_detections_per_img": 5, "box_batch_size_per_image": 8},
        }  # fmt: skip
        options["model"]["init_args"] |= model
        options["data"]["init_args"] |= {
            "with_masks": True,
            "batch_size": 1,
            "eval_batch_size": 2,
            "filter_empty": False,
        }
        options["trainer"] |= {"max_steps": 4, "val_check_interval": 4, "default_root_dir": str(tmp_path / "runs")}
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(options))
        return path

    return write


def test_two_processes_evaluate_exactly_as_one(config, tmp_path):
    path = config()
    fitted = report(frugal("fit", path, *TWO_PROCESSES))
    last = tmp_path / "runs/tiny/version_0/checkpoints/last.ckpt"
    checkpoint = torch.load(last, map_location="cpu", weights_only=True)
    assert checkpoint["global_step"] == 4
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())

    one = report(frugal("validate", path, "--ckpt_path", last))
    two = report(frugal("validate", path, "--ckpt_path", last, *TWO_PROCESSES))
    assert one["metrics"].keys() >= {"val/box_AP", "val/mask_AP"}
    assert json.dumps(two["metrics"]) == json.dumps(one["metrics"])  # NaN equals NaN
    assert json.dumps(two["tables"]) == json.dumps(one["tables"])
    assert [picture["caption"] for picture in two["pictures"]] == [picture["caption"] for picture in one["pictures"]]
    # Inside the fit both processes evaluated with the averaged weights that the checkpoint holds.
    assert json.dumps({name: fitted["metrics"][name] for name in one["metrics"]}) == json.dumps(one["metrics"])

    predicted = {}
    for name, processes in (("one", []), ("two", TWO_PROCESSES)):
        output = frugal("predict", path, "--ckpt_path", last, "--output", tmp_path / name, *processes)
        assert output.count("predictions: 1 file in") == 1
        content = (tmp_path / name / "predictions.json").read_bytes()
        assert json.loads(content)
        predicted[name] = hashlib.sha256(content).hexdigest()
    assert predicted["two"] == predicted["one"]


def test_more_processes_than_images_to_evaluate(config, tmp_path):
    """A process without images takes part, and trains on images without objects, which touch all parameters."""
    from tasks.detection.sample import write_sample

    root = tmp_path / "scenes"
    write_sample(root, 4, 1, image_size=48)
    annotations = root / "annotations" / "instances_train2017.json"
    content = json.loads(annotations.read_text())
    first = min(image["id"] for image in content["images"])
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == first]
    annotations.write_text(json.dumps(content))
    path = config(detector="retinanet", levels=[3, 5], options={"score_thresh": 0.001})
    output = frugal("fit", path, "--data.root", root, "--data.with_masks", "false", *TWO_PROCESSES)
    assert "val/box_AP" in report(output)["metrics"]
    last = torch.load(tmp_path / "runs/tiny/version_0/checkpoints/last.ckpt", map_location="cpu", weights_only=True)
    assert last["global_step"] == 4
    assert all(value.isfinite().all() for value in last["state_dict"].values())
