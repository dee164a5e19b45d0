"""Training, evaluation and predictions through the command line, with the smallest networks."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tasks.video.evaluate import main as evaluate
from tasks.video.sample import FPS, encode

PROJECT = Path(__file__).parents[2]

TRAINER = {
    "accelerator": "cpu", "max_steps": 2, "val_check_interval": 2, "check_val_every_n_epoch": None,
    "log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip
TINY = {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}


@pytest.fixture
def config(tiny_videos, tmp_path):
    model = {"backbone_options": TINY, "dim": 64, "num_levels": 3}
    data = {"root": str(tiny_videos), "batch_size": 2, "eval_batch_size": 5, "num_workers": 0}
    options = {
        "model": {"class_path": "TemporalActionDetection", "init_args": model},
        "data": {"class_path": "MovingDigits", "init_args": data},
        "trainer": TRAINER,
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


@pytest.mark.slow
def test_fit_validate_predict_test_and_evaluate(run_cli, config, tiny_videos, tmp_path):
    outcome = run_cli("fit", "-c", config)
    assert outcome.code == 0, outcome.err
    assert "val/mAP:" in outcome.out
    (checkpoint,) = tmp_path.rglob("best.ckpt")
    report = json.loads(next(tmp_path.rglob("report.json")).read_text())
    losses = ["loc", "conf", "prop_loc", "prop_conf", "quality", "start", "end"]
    assert {"val/mAP", "val/mAP@0.30"} <= report["metrics"].keys()
    assert {f"train/loss_{name}" for name in losses} <= report["curves"].keys()
    assert "Without" not in " ".join(report["notes"])
    assert report["cost"]["macs"] > 0
    again = run_cli("validate", "-c", config, "--ckpt_path", checkpoint)
    assert again.code == 0, again.err
    score = [line for line in again.out.splitlines() if line.startswith("val/mAP:")]
    assert score == [line for line in outcome.out.splitlines() if line.startswith("val/mAP:")]
    result = run_cli("predict", "-c", config, "--model.weights", checkpoint, "--output", tmp_path / "found")
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "found" / "predictions.json").read_text())["results"]
    assert len(found) == 4
    for kind in ("csv", "srt", "png"):
        assert {path.stem for path in (tmp_path / "found").glob(f"*.{kind}")} == found.keys()

    tested = run_cli("test", "-c", config, "--model.weights", checkpoint)
    assert tested.code == 0, tested.err
    assert f"test/{score[0].removeprefix('val/')}" in tested.out.splitlines()

    (tmp_path / "gt.json").write_text(json.dumps({"database": database(tiny_videos)}))
    files = ["--ground-truth", tmp_path / "gt.json", "--predictions", tmp_path / "found" / "predictions.json"]
    assert evaluate([*map(str, files), "--output", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["metrics"]
    assert scores["mAP"] == pytest.approx(report["metrics"]["val/mAP"], abs=1e-9)


def database(root):
    """The test videos of the sample at `root` as ActivityNet's json has them."""
    with (root / "test_video_info.csv").open() as file:
        videos = {row["video"]: {"subset": "test", "annotations": []} for row in csv.DictReader(file)}
    with (root / "test_Annotation.csv").open() as file:
        for row in csv.DictReader(file):
            action = {"label": row["type"], "segment": [float(row["start"]), float(row["end"])]}
            videos[row["video"]]["annotations"].append(action)
    return videos


@pytest.mark.slow
def test_a_step_with_compressed_activations_and_the_actions_of_one_video(run_cli, config, tiny_videos, tmp_path):
    options = yaml.safe_load(config.read_text())
    options["trainer"] |= {"callbacks": [{"class_path": "efficiency.Mesa"}], "max_steps": 1, "val_check_interval": 1}
    config.write_text(yaml.safe_dump(options))
    outcome = run_cli("fit", "-c", config)
    assert outcome.code == 0, outcome.err
    report = next(tmp_path.rglob("report.md")).read_text()
    assert "all, kept for backward" in report.partition("## Mesa")[2].partition("##")[0]
    (checkpoint,) = tmp_path.rglob("best.ckpt")

    video = next((tiny_videos / "videos").rglob("*.mp4"))
    result = run_cli(
        "predict", "-c", config, "--data.videos", video, "--data.cache", tmp_path / "cache",
        "--model.weights", checkpoint, "--output", tmp_path / "found",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "predictions: 4 files" in result.out
    names = {f"{video.stem}.{kind}" for kind in ("csv", "srt", "png")}
    assert {path.name for path in (tmp_path / "found").iterdir()} == {"predictions.json", *names}


def test_bad_input_is_one_line(fails, config, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    for options, parts in (
        (["--data.videos", "nowhere.mp4"], ["nowhere.mp4", "expected a video, a folder or a pattern"]),
        (["--data.videos", tmp_path / "broken.mp4"], ["broken.mp4"]),
        (["--model.weights", tmp_path / "broken.mp4"], ["broken.mp4"]),
        (["--model.num_levels", "1"], ["model.num_levels", "at least 2"]),
    ):
        fails("predict", "-c", config, *options, parts=parts)
    empty = ["--data", "THUMOS14", "--data.root", tmp_path / "empty"]  # says what belongs there
    fails("predict", "-c", config, *empty, parts=["empty", "Expected layout"], lines=8)


@pytest.mark.slow
def test_a_classifier_starts_a_detector(run_cli, config, tiny_videos, tmp_path):
    videos = sorted((tiny_videos / "videos").rglob("*.mp4"))
    for split, files in (("train", videos[:4]), ("val", videos[4:])):
        for number, file in enumerate(files):
            folder = tmp_path / "clips" / split / ("spin", "zoom")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file.name).symlink_to(file)
    data = {"root": str(tmp_path / "clips"), "batch_size": 2, "eval_batch_size": 2, "num_workers": 0, "clip_length": 16}
    options = {
        "model": {"class_path": "VideoClassification", "init_args": {"backbone_options": TINY}},
        "data": {"class_path": "VideoClips", "init_args": {**data, "frame_size": 32, "crop_size": 32, "num_views": 2}},
        "trainer": TRAINER,
    }
    path = tmp_path / "clips.yaml"
    path.write_text(yaml.safe_dump(options))
    outcome = run_cli("fit", "-c", path)
    assert outcome.code == 0, outcome.err
    assert "val/top1:" in outcome.out
    (checkpoint,) = tmp_path.rglob("best.ckpt")
    result = run_cli("predict", "-c", path, "--model.weights", checkpoint, "--output", tmp_path / "found")
    assert result.code == 0, result.err
    rows = (tmp_path / "found" / "predictions.csv").read_text().splitlines()
    assert len(rows) == 1 + len(videos[4:])
    detector = run_cli("fit", "-c", config, "--model.weights", checkpoint, "--trainer.max_steps", "1")
    assert detector.code == 0, detector.err


PEAKS = """
import resource, sys
from tasks.core.cli import main
from tasks.video import data
from tasks.video.datamodule import VideoDataModule
from tasks.video.module import VideoModule
for video in sys.argv[2:]:
    main(VideoModule, VideoDataModule, ["predict", "-c", sys.argv[1], "--data.videos", video, "--output", video[:-4]])
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_of_predicting_does_not_grow_with_the_video(config, tiny_videos, tmp_path):
    """Two minutes are 45 MB of frames at 112 pixels, 38 MB more than 20 seconds: more than the growth allowed."""
    options = yaml.safe_load(config.read_text())
    options["data"]["init_args"] |= {"frame_size": 112, "cache": str(tmp_path / "cache")}
    config.write_text(yaml.safe_dump(options))
    videos = []
    for seconds in (20, 120):
        videos.append(tmp_path / f"{seconds}.mp4")
        ground = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        encode((np.roll(ground, frame, axis=0) for frame in range(FPS * seconds)), videos[-1])
    command = [sys.executable, "-c", PEAKS, str(config), *map(str, videos)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    short, long = (int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak"))
    assert (tmp_path / "120" / "120.png").exists()
    assert long - short < 25_000  # KiB
