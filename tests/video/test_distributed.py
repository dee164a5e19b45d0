"""Evaluation and predictions by several processes (gloo, CPU): real command lines."""

import contextlib
import hashlib
import io
import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import yaml

from tasks.video.sample import write_sample

NUM_VIDEOS = 13
MODEL = {
    "backbone_options": {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
    "dim": 64, "num_levels": 3,
}  # fmt: skip


def run(folder: str, name: str, *options: str) -> None:
    """Validate and predict; what the commands print goes into a file."""
    from tasks.core.cli import main
    from tasks.video import data  # noqa: F401
    from tasks.video.datamodule import VideoDataModule
    from tasks.video.module import VideoModule

    torch.set_num_threads(1)
    config = str(Path(folder, "tiny.yaml"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(VideoModule, VideoDataModule, ["validate", "-c", config, *options])
        output = str(Path(folder, name))
        main(VideoModule, VideoDataModule, ["predict", "-c", config, "--output", output, *options])
    Path(folder, f"{name}_{os.environ.get('RANK', '0')}.txt").write_text(printed.getvalue())


def run_process(rank: int, folder: str, port: int) -> None:
    """One of two processes, as a launcher would start it."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in (address | {"TORCHELASTIC_RUN_ID": "test"}).items()}
    run(folder, "two", "--trainer.devices", "2", "--trainer.strategy", "ddp")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_two_processes_evaluate_and_predict_exactly_as_one(tmp_path, monkeypatch):
    write_sample(tmp_path / "videos", num_train=1, num_val=NUM_VIDEOS, seconds=10)
    data = {"root": str(tmp_path / "videos"), "eval_batch_size": 1, "num_workers": 0}
    runs = {"accelerator": "cpu", "default_root_dir": str(tmp_path / "runs"), "enable_progress_bar": False}
    options = {
        "model": {"class_path": "TemporalActionDetection", "init_args": MODEL},
        "data": {"class_path": "MovingDigits", "init_args": data},
        "trainer": runs,
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(options))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    run(str(tmp_path), "one")
    mp.spawn(run_process, (str(tmp_path), free_port()), nprocs=2)

    one, two = (report((tmp_path / f"{name}_0.txt").read_text()) for name in ("one", "two"))
    assert "report: " not in (tmp_path / "two_1.txt").read_text()
    assert one["metrics"].keys() >= {"val/mAP", "val/mAP@0.70", "val/AR@100"}
    assert one["metrics"]["val/AR@100"] > 0
    assert two["metrics"] == one["metrics"]
    assert two["tables"] == one["tables"]
    assert two["pictures"] == one["pictures"]
    predicted = {name: digests(tmp_path / name) for name in ("one", "two")}
    assert len(predicted["one"]) == 3 * NUM_VIDEOS + 1  # a table, subtitles and a picture each, and all as json
    assert predicted["two"] == predicted["one"]
    found = json.loads((tmp_path / "two" / "predictions.json").read_text())["results"]
    assert len(found) == NUM_VIDEOS
    assert all(found.values())


def report(printed: str) -> dict:
    """The report whose path was printed, once."""
    (path,) = [line.removeprefix("report: ") for line in printed.splitlines() if line.startswith("report: ")]
    return json.loads(Path(path).with_suffix(".json").read_text())


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
