"""Frames of videos: the official sampling rule, files that appear complete, damaged files."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.core.data import DataError
from tasks.core.errors import UserError
from tasks.video import decoding
from tasks.video.decoding import Sampling, decode, decode_to_file, decoded_before, probe
from tasks.video.reading import Crop, FrameArray, find_videos

av = pytest.importorskip("av")


def write_video(path, num_frames, fps=25, size=(48, 64), codec="mpeg4", options=None):
    """A video whose frame i, from 0, is grey of the level 20 + 7 (i % 32)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        for i in range(num_frames):
            image = np.full((*size, 3), 20 + 7 * (i % 32), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def kept_numbers(fps, num_frames, sample_fps=10.0):
    """Numbers, from 0, of the frames that are kept: a counter against the ratio of the rates."""
    step, counter, kept = fps / sample_fps, 0.0, []
    for number in range(num_frames):
        counter += 1
        if counter >= step:
            counter -= step
            kept.append(number)
    return kept


@pytest.mark.parametrize("fps", [30, 25, Fraction(30000, 1001), 10])
def test_official_sampling_rule(tmp_path, fps):
    path = write_video(tmp_path / "a.mp4", 120, fps)
    kept = kept_numbers(float(fps), 120)
    numbers = [round((frame.mean() - 20) / 7) for frame in decode(path, Sampling(size=16))]
    assert numbers == [number % 32 for number in kept]
    assert kept[0] == int(np.ceil(fps / 10)) - 1
    assert probe(path).fps == pytest.approx(float(fps))


def test_slow_videos_keep_all_frames(tmp_path):
    path = write_video(tmp_path / "a.mp4", 24, 8)
    decoded = decode_to_file(path, tmp_path / "a.npy", Sampling(size=16))
    assert (decoded.fps, decoded.num_frames, decoded.duration) == (8, 24, 3)


@pytest.mark.parametrize(("num_frames", "kept"), [(100, 32), (20, 20)])
def test_a_fixed_number_of_frames(tmp_path, num_frames, kept):
    path = write_video(tmp_path / "a.mp4", num_frames)
    decoded = decode_to_file(path, tmp_path / "a.npy", Sampling(max_frames=32, size=16))
    assert decoded.num_frames == kept
    assert decoded.fps == pytest.approx(25 * kept / num_frames)


def test_frames_are_resized_whatever_their_shape(tmp_path):
    path = write_video(tmp_path / "a.avi", 9, 30, size=(32, 80))
    decode_to_file(path, tmp_path / "a.npy", Sampling(size=20))
    frames = np.load(tmp_path / "a.npy")
    assert (frames.dtype, frames.shape) == (np.uint8, (3, 20, 20, 3))
    with av.open(str(path)) as container:
        image = [frame.to_image() for frame in container.decode(video=0)][2]
    np.testing.assert_array_equal(frames[0], np.asarray(image.resize((20, 20), Image.Resampling.BICUBIC)))


def test_decoded_frames_are_used_until_the_video_changes(tmp_path):
    path, target = write_video(tmp_path / "a.mp4", 30), tmp_path / "cache" / "a.npy"
    assert decoded_before(path, target) is None
    decoded = decode_to_file(path, target, Sampling(size=16))
    assert decoded_before(path, target) == decoded
    assert sorted(os.listdir(target.parent)) == ["a.json", "a.npy"]
    write_video(path, 40)
    assert decoded_before(path, target) is None


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 30)

    def stop(*args):
        yield np.zeros((16, 16, 3), dtype=np.uint8)
        raise KeyboardInterrupt

    monkeypatch.setattr(decoding, "decode", stop)
    with pytest.raises(KeyboardInterrupt):
        decode_to_file(path, tmp_path / "cache" / "a.npy", Sampling(size=16))
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "share", "message"),
    [
        ("a.mp4", 0.6, "cannot be decoded as a video"),
        ("a.avi", 0.5, "the file is damaged or cut off"),
        ("a.mp4", 0, "cannot be decoded as a video"),
    ],
)
def test_damaged_videos_are_named(tmp_path, name, share, message):
    path = write_video(tmp_path / name, 100)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=rf"{name}: .*{message}"):
        decode_to_file(path, tmp_path / "a.npy", Sampling(size=16))
    assert sorted(os.listdir(tmp_path)) == [name]


def test_cut_off_behind_its_index(tmp_path):
    path = write_video(tmp_path / "a.mp4", 100, options={"movflags": "faststart"})
    content = path.read_bytes()
    path.write_bytes(content[: int(0.6 * len(content))])
    with pytest.raises(DataError, match=r"a\.mp4: (ends after|cannot be decoded)"):
        decode_to_file(path, tmp_path / "a.npy", Sampling(size=16))


def test_missing_file_and_file_without_video(tmp_path):
    with pytest.raises(DataError, match=r"a\.mp4: file not found"):
        probe(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_text("text")
    with pytest.raises(DataError, match=r"b\.mp4: cannot be decoded as a video"):
        probe(tmp_path / "b.mp4")


def test_says_which_extra_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="needs PyAV: install the extra 'video'"):
        probe(tmp_path / "a.mp4")


def test_find_videos(tmp_path):
    for name in ("a.mp4", "b/c.avi", "notes.txt", "d/a.mov"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(find_videos(str(tmp_path / "b"))) == ["c"]
    assert list(find_videos(str(tmp_path / "a.mp4"))) == ["a"]
    assert list(find_videos(str(tmp_path / "*" / "*.avi"))) == ["c"]
    with pytest.raises(DataError, match="no such file was found; expected a video"):
        find_videos(str(tmp_path / "nowhere*"))
    with pytest.raises(DataError, match="has the same name as"):
        find_videos(str(tmp_path))


def test_real_videos(tmp_path):
    if "FRUGAL_DATA" not in os.environ:
        pytest.skip("FRUGAL_DATA names no real videos")
    for path in sorted(Path(os.environ["FRUGAL_DATA"], "video").iterdir()):
        info = probe(path)
        decoded = decode_to_file(path, tmp_path / f"{path.stem}.npy", Sampling())
        assert decoded.num_frames == len(kept_numbers(info.fps, info.num_frames))
        assert len(FrameArray(tmp_path / f"{path.stem}.npy").read(5, 9, Crop(8, 8, 96))[0]) == 4


MEMORY = """
import resource, sys
from pathlib import Path
from tasks.video.decoding import Sampling, decode_to_file
decode_to_file(Path(sys.argv[1]), Path(sys.argv[2]), Sampling())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_video(tmp_path):
    """Four minutes decode to 90 MB of frames, more than the difference allowed."""
    peaks = []
    for seconds in (20, 240):
        path = write_video(tmp_path / f"{seconds}.mp4", 25 * seconds, size=(32, 32))
        run = [sys.executable, "-c", MEMORY, str(path), str(tmp_path / f"{seconds}.npy")]
        peaks.append(int(subprocess.run(run, capture_output=True, text=True, check=True).stdout))
    assert np.load(tmp_path / "240.npy", mmap_mode="r").nbytes > 90e6
    assert peaks[1] - peaks[0] < 40_000  # KiB
