"""Training, evaluation and predictions through the command line, with the smallest networks."""

import json

import pytest
import yaml

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
def test_fit_validate_and_predict(run_cli, config, tmp_path):
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
    assert len(list((tmp_path / "found").glob("*.csv"))) == len(list((tmp_path / "found").glob("*.srt"))) == 4


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
