"""`check`: lists everything that is wrong, a histogram of classes and one of durations."""

import json
import shutil
from pathlib import Path

import pytest

from tasks.video.check import check_dataset
from tasks.video.data import MovingDigits, VideoFolder

SMALL = {"frame_size": 32, "crop_size": 24, "clip_length": 32, "clip_stride": 8, "num_workers": 0}


def test_a_sound_data_set(tiny_videos, capsys):
    datamodule = MovingDigits(root=str(tiny_videos), **SMALL)
    assert datamodule.check()
    out = " ".join(capsys.readouterr().out.split())
    assert "problem" not in out
    result = check_dataset(datamodule)
    train = result.splits["train"]
    assert (train.num_videos, train.instances.sum()) == (5, len(datamodule.ground_truth("train")))
    assert train.windows == len(datamodule.train_dataset())
    assert f"train │ 5 │ 0.01 │ {train.instances.sum()}" in out
    assert "2 to 5" in out


@pytest.fixture
def broken(tiny_videos, tmp_path):
    """A user's data with one fault in most videos."""
    shutil.copytree(tiny_videos / "videos" / "validation", tmp_path / "videos")
    names = sorted(path.stem for path in (tmp_path / "videos").iterdir())
    jump = {"label": "jump", "segment": [2.0, 3.5]}
    instances = [
        [jump],
        [jump, {"label": "jump", "segment": [3.0, 60.0]}],
        [jump, jump],
        [jump, {"label": "fly", "segment": [2.0, 3.5]}],
        [jump],
    ]
    database = {
        name: {"subset": "val" if name == names[-1] else "train", "annotations": items}
        for name, items in zip(names, instances, strict=True)
    }
    database[names[0]]["duration"] = 100.0
    database["lost"] = {"subset": "train", "annotations": [jump]}
    (tmp_path / "annotations.json").write_text(json.dumps({"database": database}))
    (tmp_path / "classes.txt").write_text("jump\nrun\n")
    (tmp_path / "videos" / f"{names[-1]}.mp4").write_bytes(b"not a video")
    return tmp_path


def test_all_problems_are_listed(broken, capsys):
    assert not VideoFolder(root=str(broken), **SMALL).check()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("problem:", "note:"))]
    for part in (
        "video 'video_validation_0000004': unknown class 'fly'; expected one of jump, run",
        "lost: annotated, but there is no file of that name",
        "s long, but 100.0 s are stated",
        "video_validation_0000002: jump from 3.0 to 60.0 s, but the video is",
        "video_validation_0000003: 1 instances repeat another",
        "video_validation_0000005.mp4: cannot be decoded as a video",
        "note: train: no instance of run",
    ):
        assert any(part in line for line in lines), part
    assert len(lines) == 7


def test_what_published_annotations_have_wrong_is_a_note(tiny_videos, tmp_path):
    root = Path(shutil.copytree(tiny_videos, tmp_path / "data"))
    with (root / "val_Annotation.csv").open("a") as file:
        file.write("video_validation_0000001,Spin,5,100.0,102.0,2000,2040\n")
    result = check_dataset(MovingDigits(root=str(root), **SMALL))
    assert result.problems == []
    assert any("Spin from 100.0 to 102.0 s, but the video is" in note for note in result.notes)


def test_no_data(tmp_path, capsys):
    assert not VideoFolder(root=str(tmp_path), **SMALL).check()
    assert "annotations.json: file not found" in capsys.readouterr().out


def test_check_command(tiny_videos, run_cli):
    outcome = run_cli(
        "check",
        "--data",
        "MovingDigits",
        "--data.root",
        tiny_videos,
        "--data.num_workers",
        0,
        "--model",
        "TemporalActionDetection",
    )
    assert outcome.code == 0, outcome.err
    assert "Durations of instances" in outcome.out
