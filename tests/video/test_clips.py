"""Clips in folders of classes: batches, views, seeds, problems."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.core.data import DataError
from tasks.core.errors import UserError
from tasks.video.clips import MovingDigitClips, VideoClips, check_clips
from tasks.video.decoding import Sampling, decode
from tasks.video.sample import write_clips

SMALL = {"frame_size": 24, "crop_size": 16, "clip_length": 8, "num_workers": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    pytest.importorskip("av")
    root = tmp_path_factory.mktemp("clips")
    write_clips(root, 2, 1)
    return root


def test_training_batch(root):
    datamodule = VideoClips(str(root), batch_size=4, **SMALL)
    datamodule.setup("fit")
    batch = next(iter(datamodule.train_dataloader()))
    assert (batch["clip"].dtype, batch["clip"].shape) == (torch.uint8, (4, 3, 8, 16, 16))
    for id, label in zip(batch["id"], batch["label"].tolist(), strict=True):
        assert id.startswith(f"{datamodule.class_names[label]}/")
    dataset = datamodule.train_dataset()
    assert len(dataset) == 10
    assert torch.equal(dataset[3]["clip"], datamodule.train_dataset()[3]["clip"])
    assert not torch.equal(dataset[3]["clip"], dataset[13]["clip"])


def test_views_are_spread_over_the_video(root):
    datamodule = VideoClips(str(root), num_views=3, eval_batch_size=2, **SMALL)
    dataset = datamodule.val_dataset()
    assert [dataset[i]["view"] for i in range(4)] == [0, 1, 2, 0]
    frames = np.stack(list(decode(dataset.clips[0].path, Sampling(size=24))))[:, 4:20, 4:20]
    assert len(frames) == 32
    for view, first in enumerate((4, 12, 20)):
        sample = dataset[view]
        np.testing.assert_array_equal(sample["clip"].numpy().transpose(1, 2, 3, 0), frames[first : first + 8])
        assert (sample["label"], sample["valid"]) == (0, 8)
    assert datamodule.eval_collate([]) == {"id": [], "view": [], "valid": []}


def test_short_videos_repeat_their_last_frame(root):
    datamodule = VideoClips(str(root), **SMALL | {"clip_length": 40})
    sample = datamodule.val_dataset()[0]
    assert sample["valid"] == 32
    assert all(torch.equal(sample["clip"][:, i], sample["clip"][:, 31]) for i in range(32, 40))


def test_predicts_named_videos(root):
    path = root / "val" / "Spin" / "0000.mp4"
    datamodule = VideoClips(str(root), videos=str(path), **SMALL)
    datamodule.setup("predict")
    (batch,) = datamodule.predict_dataloader()
    assert batch["id"] == ["0000"]
    assert "label" not in batch


def test_problems(root, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    (copy / "train" / "Zoom" / "0001.mp4").write_bytes(b"nothing")
    (copy / "val" / "Jump").mkdir()
    datamodule = VideoClips(str(copy), **SMALL)
    findings, counts = check_clips(datamodule)
    assert counts["train"].tolist() == [2, 2, 2, 2, 1]
    assert len(findings.problems) == 2
    assert "0001.mp4: cannot be decoded" in findings.problems[0]
    assert "Jump: is no class of the training split" in findings.problems[1]
    with pytest.raises(DataError, match="is no class"):
        datamodule.samples("val")
    with pytest.raises(DataError, match="no folders of classes found"):
        VideoClips(str(tmp_path / "nowhere"), **SMALL).setup("fit")
    with pytest.raises(UserError, match=r"data\.num_views: 0 was given"):
        VideoClips(str(root), num_views=0)


def test_check_prints_counts(root, capsys):
    assert VideoClips(str(root), **SMALL).check()
    assert "│ 4  │ Zoom   │     2 │   1 │" in capsys.readouterr().out


def test_sample_is_written_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        datamodule = MovingDigitClips(num_train=1, num_val=1)
        assert datamodule.class_names == ["Bounce", "Circle", "Shake", "Spin", "Zoom"]
        datamodule.prepare_data()
        monkeypatch.setattr("tasks.video.clips.sample.write_clips", None)
    assert len(datamodule.train_dataset()) == 5
