"""The sample: real video files in the layout of THUMOS14, the same on every machine, classes told by motion."""

import csv
import itertools

import numpy as np
import pytest

from tasks.video.data import MovingDigits
from tasks.video.decoding import Sampling, decode
from tasks.video.sample import CLASS_NAMES, Action, choose_actions, draw_video, write_sample

SQUARE = {"frame_size": 32, "crop_size": 32, "num_workers": 0}


def test_layout(tiny_videos):
    names = sorted(path.relative_to(tiny_videos).as_posix() for path in tiny_videos.iterdir() if path.is_file())
    assert names == [
        "Class Index_Detection.txt",
        "test_Annotation.csv",
        "test_video_info.csv",
        "val_Annotation.csv",
        "val_video_info.csv",
    ]
    with (tiny_videos / "val_video_info.csv").open() as file:
        info = {row["video"]: row for row in csv.DictReader(file)}
    videos = MovingDigits(root=str(tiny_videos), **SQUARE).samples("train")
    assert [video.num_frames for video in videos] == [int(info[video.id]["sample_count"]) for video in videos]
    for video in videos:
        assert (video.segments[:, 0] >= 1).all()
        assert (video.segments[:, 1] <= video.sampled_seconds - 1).all()
        assert (video.segments[1:, 0] - video.segments[:-1, 1] >= 0.99).all()


def test_is_the_same_every_time(tiny_videos, tmp_path):
    write_sample(tmp_path, 1, 0, seconds=10)
    expected = (tiny_videos / "val_Annotation.csv").read_text()
    assert expected.startswith((tmp_path / "val_Annotation.csv").read_text())
    name = "videos/validation/video_validation_0000001.mp4"
    frames = [np.stack(list(decode(root / name, Sampling(size=32)))) for root in (tiny_videos, tmp_path)]
    assert np.array_equal(*frames)


def test_is_written_to_the_cache_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        datamodule = MovingDigits(num_train=1, num_val=1)
        datamodule.prepare_data()
        monkeypatch.setattr("tasks.video.data.sample.write_sample", None)
    assert (tmp_path / "frugal" / "video-v1-1-1" / "val_Annotation.csv").is_file()


def moments(frames):
    """Centre (x, y), size and direction of the light pixels in each frame."""
    light = (frames.astype(float).mean(axis=3) - frames.mean(axis=3).min()).clip(60) - 60
    weight = light / light.sum(axis=(1, 2), keepdims=True)
    rows, columns = np.mgrid[:32, :32]
    x, y = (weight * columns).sum(axis=(1, 2)), (weight * rows).sum(axis=(1, 2))
    return x, y, light.sum(axis=(1, 2))


@pytest.mark.parametrize("label", range(5))
def test_motion_tells_the_class(label):
    from tasks.core.sample import digit_images

    generator = np.random.default_rng(label)
    frames = np.stack(list(draw_video(generator, digit_images("train")[0][7], [Action(label, 10, 40)], 100)))
    x, y, mass = moments(frames[22:78])
    moving = {"x": np.ptp(x) > 5, "y": np.ptp(y) > 5, "mass": mass.max() > 2 * mass.min()}
    assert moving == {
        "x": CLASS_NAMES[label] in ("Shake", "Circle"),
        "y": CLASS_NAMES[label] in ("Bounce", "Circle"),
        "mass": CLASS_NAMES[label] == "Zoom",
    }
    if CLASS_NAMES[label] == "Spin":
        still = np.abs(np.diff(frames[:18].astype(float), axis=0)).mean()
        assert np.abs(np.diff(frames[22:78].astype(float), axis=0)).mean() > 3 * still


def test_actions_are_apart_and_of_one_to_four_seconds():
    for seed in range(10):
        actions = choose_actions(np.random.default_rng(seed), 300)
        assert 4 <= len(actions) <= 14
        assert all(10 <= end - start <= 40 for _, start, end in actions)
        assert all(later.start - earlier.end >= 10 for earlier, later in itertools.pairwise(actions))
