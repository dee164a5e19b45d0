"""Data sets: layouts, batches, seeds, and what is wrong with files named in one error."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tasks.core.data import DataError
from tasks.core.errors import UserError
from tasks.video.annotations import THUMOS14_CLASSES, Video
from tasks.video.data import THUMOS14, ActivityNet, MovingDigits, VideoFolder
from tasks.video.datamodule import inside
from tasks.video.evaluation_files import read_ground_truth

SMALL = {"frame_size": 32, "crop_size": 24, "clip_length": 32, "clip_stride": 8, "eval_stride": 16, "num_workers": 0}


@pytest.fixture(scope="module")
def digits(tiny_videos):
    datamodule = MovingDigits(root=str(tiny_videos), **SMALL | {"batch_size": 3, "eval_batch_size": 4})
    datamodule.setup("fit")
    return datamodule


@pytest.fixture
def writable(tiny_videos, tmp_path):
    """A copy of the tiny data set."""
    return Path(shutil.copytree(tiny_videos, tmp_path / "data"))


def test_training_batch(digits):
    batch = next(iter(digits.train_dataloader()))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items() if torch.is_tensor(value)} == {
        "clip": (torch.uint8, (3, 3, 32, 24, 24)),
        "start_mask": (torch.float32, (3, 32)),
        "end_mask": (torch.float32, (3, 32)),
        "triplet_clip": (torch.uint8, (3, 3, 32, 24, 24)),
        "triplet_segments": (torch.float32, (3, 3, 2)),
        "triplet_valid": (torch.bool, (3,)),
    }
    for segments, labels in zip(batch["segments"], batch["labels"], strict=True):
        assert segments.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert len(segments) == len(labels) >= 1
        assert ((segments >= 0) & (segments <= 32)).all()
        assert ((labels >= 0) & (labels < 5)).all()
    assert batch["fps"] == [10.0] * 3
    assert batch["valid"] == [32] * 3


def test_a_window_shows_its_frames_and_its_instances(digits):
    dataset = digits.train_dataset()
    dataset.flip = False
    sample = dataset[3]
    video, window, _ = dataset.windows[3]
    frames = np.load(Path(digits.root, "decoded", "10fps_32px", f"{video.id}.npy"))[window.offset : window.offset + 32]
    places = [(top, left) for top in range(9) for left in range(9)]
    clip = sample["clip"].numpy().transpose(1, 2, 3, 0)
    assert any(np.array_equal(clip, frames[:, top : top + 24, left : left + 24]) for top, left in places)
    truth = [row for row in digits.ground_truth("train").videos if row == video.id]
    assert truth == [video.id]
    seconds = (sample["segments"].numpy() + sample["offset"]) / sample["fps"]
    for segment in seconds:
        assert np.abs(video.segments - segment).sum(axis=1).min() < 3  # clipped to the window at most


def test_samples_follow_from_seed_epoch_and_index(digits):
    first, again = digits.train_dataset(), digits.train_dataset()
    for virtual in (2, 2 + len(first)):
        a, b = first[virtual], again[virtual]
        assert torch.equal(a["clip"], b["clip"])
        assert torch.equal(a["triplet_clip"], b["triplet_clip"])
    assert not torch.equal(first[2]["clip"], first[2 + len(first)]["clip"])


def test_flips_are_the_same_in_all_frames_and_in_the_spliced_clip(digits):
    dataset = digits.train_dataset()
    mirrored = 0
    for virtual in range(0, 12 * len(dataset), len(dataset)):
        sample = dataset[virtual]
        dataset.flip = False
        plain = dataset[virtual]
        dataset.flip = True
        mirrored += torch.equal(sample["clip"], plain["clip"].flip(-1))
        assert torch.equal(sample["clip"], plain["clip"]) or torch.equal(sample["clip"], plain["clip"].flip(-1))
        frames = {frame.numpy().tobytes() for frame in sample["clip"].unbind(1)}
        if sample["triplet_valid"]:
            assert all(frame.numpy().tobytes() in frames for frame in sample["triplet_clip"].unbind(1))
    assert 2 <= mirrored <= 10


def test_evaluation_windows_cover_the_videos_and_are_padded(digits):
    datamodule = MovingDigits(root=digits.root, **SMALL | {"clip_length": 80, "eval_stride": 40, "eval_batch_size": 4})
    dataset = datamodule.val_dataset()
    for video in datamodule.samples("val"):
        covered = np.zeros(video.num_frames, dtype=bool)
        for other, offset in dataset.windows:
            if other.id == video.id:
                covered[offset : offset + 80] = True
        assert covered.all()
    batch = next(iter(datamodule.val_dataloader()))
    assert batch["clip"].shape == (4, 3, 80, 24, 24)
    short = [sample for sample in dataset if sample["valid"] < 80] or list(
        MovingDigits(root=digits.root, **SMALL | {"clip_length": 128}).val_dataset()
    )
    assert all(not sample["clip"][:, sample["valid"] :].any() for sample in short)
    assert all(sample["clip"][:, sample["valid"] - 1].any() for sample in short)


def test_a_batch_of_no_samples(digits):
    assert digits.eval_collate([]) == {"id": [], "offset": [], "fps": [], "duration": [], "valid": []}


def test_videos_are_decoded_once(writable, monkeypatch):
    options = SMALL | {"cache": str(writable / "frames")}
    MovingDigits(root=str(writable), **options).setup("validate")
    files = sorted((writable / "frames" / "10fps_32px").glob("*.npy"))
    assert len(files) == 4  # those of validation alone
    monkeypatch.setattr("tasks.video.datamodule.decode_to_file", None)
    MovingDigits(root=str(writable), **options).setup("validate")


def test_frames_sampled_before(digits, tmp_path):
    decoded = Path(digits.root, "decoded", "10fps_32px")
    for path in decoded.glob("video_*.npy"):
        (tmp_path / "arrays").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "arrays")
        folder = tmp_path / "folders" / path.stem
        folder.mkdir(parents=True)
        for number, frame in enumerate(np.load(path)[:, :, :]):
            Image.fromarray(frame).save(folder / f"{number:05d}.png", compress_level=1)
    expected = digits.val_dataset()
    for frames in ("arrays", "folders"):
        datamodule = MovingDigits(root=digits.root, frames=str(tmp_path / frames), **SMALL)
        dataset = datamodule.val_dataset()
        assert len(dataset) == len(expected)
        for index in (0, len(dataset) - 1):
            assert torch.equal(dataset[index]["clip"], expected[index]["clip"])


def test_features(digits, tmp_path):
    for video in digits.samples("train") + digits.samples("val"):
        steps = (video.num_frames * 2 - 16) // 4 + 1  # the files have 20 frames per second
        features = np.arange(steps, dtype=np.float32)[:, None] + np.zeros((1, 6), dtype=np.float32)
        np.save(tmp_path / f"{video.id}.npy", features)
    options = {"features": str(tmp_path), "clip_length": 64, "clip_stride": 16, "eval_stride": 32, "num_workers": 0}
    datamodule = MovingDigits(root=digits.root, **options)
    assert (datamodule.feature_dim, datamodule.frames_per_feature) == (6, 4)
    dataset = datamodule.train_dataset()
    sample = dataset[5]
    assert sample["features"].shape == (6, 16)
    assert sample["triplet_features"].shape == (6, 16)
    assert sample["start_mask"].shape == (64,)
    video, window, _ = dataset.windows[5]
    assert sample["features"][0, 0] == window.offset / 4
    assert sample["fps"] == 20
    # The middle of the window's feature i is where the network sees it: at frame 4 (i + 0.5) of the window.
    seconds_of_feature = (4 * 0.5 + sample["offset"]) / sample["fps"]
    assert seconds_of_feature == (window.offset + 16 / 2) / 20
    seconds = (sample["segments"].numpy() + sample["offset"]) / sample["fps"]
    assert np.abs(video.segments[:, None] - seconds).sum(axis=2).min() < 1e-4


def test_predicts_from_features(digits, tmp_path):
    np.save(tmp_path / "new.npy", np.ones((40, 6), dtype=np.float32))
    options = {"features": str(tmp_path), "clip_length": 64, "clip_stride": 16, "eval_stride": 32, "num_workers": 0}
    datamodule = MovingDigits(root=digits.root, videos=str(tmp_path / "*.npy"), feature_fps=30.0, **options)
    datamodule.setup("predict")
    samples = list(datamodule.predict_dataset())
    assert [sample["offset"] for sample in samples] == [6, 38, 70, 102]
    assert samples[0]["fps"] == 30
    assert samples[0]["duration"] == pytest.approx(160 / 30)
    with pytest.raises(DataError, match=r"expected data\.feature_fps"):
        MovingDigits(root=digits.root, videos=str(tmp_path / "*.npy"), **options).setup("predict")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 6)), r"float64 \(4, 6\); expected float32 \(steps, channels\)"),
        (np.zeros(4, dtype=np.float32), r"expected float32 \(steps, channels\)"),
        (np.array([{"a": 1}]), "cannot be read as an array"),
        (np.zeros((9, 7), dtype=np.float32), "features of 6 and 7 channels; expected one number"),
    ],
)
def test_bad_features(digits, tmp_path, array, message):
    videos = digits.samples("val")
    for video in videos:
        np.save(tmp_path / f"{video.id}.npy", np.zeros((9, 6), dtype=np.float32))
    np.save(tmp_path / f"{videos[1].id}.npy", array, allow_pickle=True)
    datamodule = MovingDigits(root=digits.root, features=str(tmp_path), num_workers=0)
    with pytest.raises(DataError, match=message):
        datamodule.samples("val")


def test_optical_flow(digits, tmp_path):
    flow = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 2), dtype=np.uint8)
    for video in digits.samples("val"):
        np.save(tmp_path / f"{video.id}.npy", flow)
    datamodule = MovingDigits(root=digits.root, frames=str(tmp_path), **SMALL)
    clip = datamodule.val_dataset()[1]["clip"]
    np.testing.assert_array_equal(clip.numpy(), flow[16:48, 4:28, 4:28].transpose(3, 0, 1, 2))
    np.save(tmp_path / f"{datamodule.samples('val')[0].id}.npy", flow[..., :1])
    with pytest.raises(DataError, match=r"uint8 \(64, 32, 32, 1\); expected uint8 \(frames, height, width, 3\)"):
        MovingDigits(root=digits.root, frames=str(tmp_path), **SMALL).samples("val")


def test_bad_frames(digits, tmp_path):
    for video in digits.samples("val"):
        np.save(tmp_path / f"{video.id}.npy", np.zeros((9, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(DataError, match=r"frames of \(8, 8\) pixels; expected at least 24"):
        MovingDigits(root=digits.root, frames=str(tmp_path), **SMALL).samples("val")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_size": 200}, "data.crop_size: 200 was given, 1 to 112 pixels"),
        ({"clip_length": 0}, "data.clip_length: 0 was given, at least 1 frame"),
        ({"features": "x", "clip_length": 30}, r"a multiple of feature_stride \(4 frames\)"),
        ({"features": "x", "frames": "y", "clip_stride": 8}, "frames and features were both given"),
        ({"sample_fps": 0.0}, "a rate above 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        THUMOS14(root="nowhere", **options)


# -- THUMOS14 ---------------------------------------------------------------------------------------------------------


def test_missing_data_is_explained(tmp_path):
    with pytest.raises(DataError) as error:
        THUMOS14(root=str(tmp_path)).setup("fit")
    for part in ("val_Annotation.csv: file not found", "Expected layout", "AFSD", "configs/sample"):
        assert part in str(error.value)


def test_damaged_and_missing_videos_are_one_error(writable):
    folder = writable / "videos" / "validation"
    (folder / "video_validation_0000001.mp4").write_bytes(b"nothing")
    (folder / "video_validation_0000003.mp4").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"0000001.mp4: cannot be decoded.*\(and 1 more videos; `check` lists them all\)"
    ):
        MovingDigits(root=str(writable), **SMALL).setup("fit")
    (folder / "video_validation_0000002.mp4").unlink()
    listing = MovingDigits(root=str(writable), **SMALL).scan("train")
    assert listing.notes == ["video_validation_0000002: annotated, but there is no file of that name"]
    shutil.rmtree(writable / "videos" / "test")
    (problem,) = MovingDigits(root=str(writable), **SMALL).scan("val").problems
    assert "holds none of the 4 val videos" in problem


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("Jump,9,1.0,2.0,20,40", "line 2: unknown class 'Jump'; expected one of Shake, Bounce"),
        ("Spin,5,3.0,2.0,60,40", "line 2: from 3.0 to 2.0 s; expected 0 <= start < end"),
        ("Spin,5,x,2.0,60,40", "line 2: start is 'x'; expected a number"),
    ],
)
def test_bad_rows_are_named(writable, row, message):
    path = writable / "val_Annotation.csv"
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, f"video_validation_0000001,{row}", *rows]))
    with pytest.raises(DataError, match=message):
        MovingDigits(root=str(writable), **SMALL).samples("train")


def test_ambiguous_instances_are_left_out_and_frame_columns_can_be_used(writable):
    path = writable / "val_Annotation.csv"
    header, first, *rows = path.read_text().splitlines()
    id, label, index, start, end, *_ = first.split(",")
    shifted = f"{id},{label},{index},{start},{end},{round(float(start) * 20) + 40},{round(float(end) * 20) + 40}"
    path.write_text("\n".join([header, f"{id},Ambiguous,0,1.0,2.0,20,40", shifted, *rows]))
    by_seconds, by_frames = (
        next(v for v in MovingDigits(root=str(writable), frame_columns=columns, **SMALL).samples("train") if v.id == id)
        for columns in (False, True)
    )
    assert by_seconds.frames()[0] == pytest.approx([float(start) * 10, float(end) * 10])
    assert by_frames.frames()[0] == pytest.approx([float(start) * 10 + 20, float(end) * 10 + 20])
    assert len(by_seconds.labels) == len(rows) + 1 - sum(not row.startswith(id) for row in rows)


def test_what_lies_behind_the_end_is_not_trained_on():
    segments = np.array([[1.0, 2.0], [4.0, 9.0], [8.0, 9.0]])
    video = Video("v", segments, np.arange(3), fps=10.0, num_frames=50)
    kept, labels = inside(video)
    assert kept.tolist() == [[10, 20], [40, 50]]
    assert labels.tolist() == [0, 1]


def real_annotations():
    if "FRUGAL_DATA" not in os.environ:
        pytest.skip("FRUGAL_DATA names no real annotations")
    return Path(os.environ["FRUGAL_DATA"], "thumos14")


def test_real_annotations_have_the_official_counts():
    root = real_annotations()
    datamodule = THUMOS14(root=str(root), frame_columns=True)
    videos = datamodule.read_annotations("train").samples
    windows = [window for video in videos for window, _ in datamodule.cut(video)]
    assert len(windows) == 7842
    assert len({video.id for video in videos}) == 200
    assert datamodule.class_names == list(THUMOS14_CLASSES)
    test = datamodule.read_annotations("val").samples
    assert (len(test), sum(len(video.labels) for video in test)) == (210, 3311)
    everything = THUMOS14(root=str(root), excluded=()).read_annotations("val").samples
    assert sum(len(datamodule.offsets(video)) for video in everything) == 3485
    for subset, counts in (("train", (200, 3007)), ("test", (210, 3311))):
        truth = read_ground_truth(root / "thumos_gt.json", subset)
        assert (len(truth.videos), len(truth)) == counts


# -- json layouts -----------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tiny_videos, tmp_path):
    """A user's own data: the training videos of the tiny data set with a json file of some of their instances."""
    root = tmp_path / "own"
    shutil.copytree(tiny_videos / "videos" / "validation", root / "videos")
    database = {
        path.stem: {"subset": "train", "annotations": [{"label": "jump", "segment": [2.0, 3.5]}]}
        for path in sorted((root / "videos").iterdir())
    }
    database["video_validation_0000002"]["annotations"].append({"label": "run", "segment": ["4", "5.5"]})
    write_json(root, database)
    return root


def write_json(root, database):
    (root / "annotations.json").write_text(json.dumps({"database": database}))


def test_own_videos(own):
    datamodule = VideoFolder(root=str(own), **SMALL)
    datamodule.setup("fit")
    assert datamodule.class_names == ["jump", "run"]
    assert datamodule.splits == ("train", "val")
    train, val = datamodule.samples("train"), datamodule.samples("val")
    assert (len(train), len(val)) == (4, 1)
    assert not {video.id for video in train} & {video.id for video in val}
    assert len(datamodule.ground_truth("train")) + len(datamodule.ground_truth("val")) == 6
    (own / "classes.txt").write_text("run\njump\nfly\n")
    assert VideoFolder(root=str(own), **SMALL).class_names == ["run", "jump", "fly"]


def test_own_splits(own):
    database = json.loads((own / "annotations.json").read_text())["database"]
    names = sorted(database)
    for name, subset in zip(names, ("train", "training", "validation", "test", "test"), strict=True):
        database[name]["subset"] = subset
    write_json(own, database)
    datamodule = VideoFolder(root=str(own), **SMALL)
    assert datamodule.splits == ("train", "val", "test")
    assert [[video.id for video in datamodule.samples(split)] for split in datamodule.splits] == [
        names[:2], names[2:3], names[3:],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subset": "dev"}, "subset 'dev'; expected train, val or test"),
        ({"annotations": [{"label": "jump", "segment": [3, 3]}]}, r"segment \[3.0, 3.0\]; expected 0 <= start < end"),
        ({"annotations": [{"label": "jump", "segment": [3]}]}, r"segment is \[3\]; expected \[start, end\] in seconds"),
        ({"annotations": [{"segment": [3, 4]}]}, "no 'label'"),
    ],
)
def test_bad_json_entries_are_named(own, change, message):
    database = json.loads((own / "annotations.json").read_text())["database"]
    database["video_validation_0000001"] |= change
    write_json(own, database)
    with pytest.raises(UserError, match=message):
        VideoFolder(root=str(own), **SMALL).samples("train")


def test_unknown_class_and_bad_files(own):
    (own / "classes.txt").write_text("run\n")
    with pytest.raises(DataError, match="unknown class 'jump'; expected one of run"):
        VideoFolder(root=str(own), **SMALL).samples("train")
    (own / "classes.txt").write_text("run\nrun\n")
    with pytest.raises(DataError, match="expected different class names"):
        VideoFolder(root=str(own), **SMALL).samples("train")
    (own / "annotations.json").write_text("{")
    (own / "classes.txt").unlink()
    with pytest.raises(UserError, match=r"annotations\.json: not valid JSON"):
        VideoFolder(root=str(own), **SMALL).setup("fit")


def test_predicts_named_videos(own, tiny_videos, tmp_path):
    datamodule = VideoFolder(
        root=str(own), videos=str(tiny_videos / "videos" / "test"), cache=str(tmp_path / "cache"), **SMALL
    )
    datamodule.setup("predict")
    dataset = datamodule.predict_dataset()
    assert {sample["id"] for sample in dataset} == {f"video_test_000000{i}" for i in range(1, 5)}


def test_activitynet_videos_are_one_window(own):
    database = json.loads((own / "annotations.json").read_text())["database"]
    for id, entry in database.items():
        entry |= {"subset": "validation" if id.endswith("5") else "training", "duration": 10.0}
    database["gone"] = {"subset": "training", "duration": 10.0, "annotations": []}
    for path in sorted((own / "videos").iterdir()):
        path.rename(path.with_name(f"v_{path.name}"))
    write_json(own, database)
    datamodule = ActivityNet(
        root=str(own), annotations="annotations.json", clip_length=48, frame_size=16, crop_size=16, num_workers=0
    )
    assert [video.num_frames for video in datamodule.samples("train")] == [48] * 4
    dataset = datamodule.train_dataset()
    sample = dataset[0]
    assert (len(dataset), sample["clip"].shape, sample["valid"]) == (4, (3, 48, 16, 16), 48)
    seconds = (sample["segments"].numpy() + sample["offset"]) / sample["fps"]
    np.testing.assert_allclose(seconds, [[2.0, 3.5]], atol=1e-5)
    assert dataset.windows[0].piece == int(1.5 * sample["fps"]) // 4
    assert len(datamodule.val_dataset()) == 1
    assert ActivityNet(str(own), "annotations.json", class_agnostic=True).class_names == ["action"]
