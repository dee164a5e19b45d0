"""Decoding videos through PyAV into arrays on disk, in memory that does not grow with their length."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tasks.core.data import DataError
from tasks.core.errors import UserError
from tasks.core.files import write_atomically

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv")
# Headers, above all of old files, give the number of frames roughly; a file that was cut off lacks more.
COMPLETE = 0.95


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video are kept, and at which size.

    Args:
        fps: Frames per second to keep; a video of a lower rate keeps all.
        max_frames: Frames to keep of any video, whatever its length; replaces `fps` (ActivityNet: 768).
        size: Height and width; the aspect ratio is not kept.
    """

    fps: float = 10.0
    max_frames: int | None = None
    size: int = 112

    def rate(self, native_fps: float, num_frames: int) -> float:
        """Frames per second that are kept of a video of `num_frames` at `native_fps`."""
        if self.max_frames is not None:
            return native_fps * min(self.max_frames / max(num_frames, 1), 1)
        return min(self.fps, native_fps)

    def counter(self, native_fps: float, num_frames: int) -> tuple[float, float]:
        """By how much a counter grows per frame, and the value at which a frame is kept; whole numbers stay exact."""
        if self.max_frames is not None:
            return min(self.max_frames, max(num_frames, 1)), max(num_frames, 1)
        return 1, native_fps / self.rate(native_fps, num_frames)

    @property
    def name(self) -> str:
        """Names the folder of decoded frames."""
        return f"{f'{self.max_frames}frames' if self.max_frames else f'{self.fps:g}fps'}_{self.size}px"


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says of itself; `num_frames` is what its header states."""

    fps: float
    num_frames: int
    duration: float


@dataclass(frozen=True)
class Decoded:
    """What was decoded from a video file, and from which one."""

    fps: float
    duration: float
    num_frames: int
    source_bytes: int
    source_modified_ns: int


def import_av() -> Any:
    """PyAV, or a `UserError` that says how to install it."""
    try:
        import av
    except ImportError:
        raise UserError("reading and writing videos needs PyAV: install the extra 'video' of frugal-vision") from None
    return av


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Container and video stream of a file; whatever goes wrong inside is a `DataError` that names it."""
    av = import_av()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: holds no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except FileNotFoundError:
        raise DataError(f"{path}: file not found") from None
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be decoded as a video ({reason})") from error


def probe(path: Path) -> VideoInfo:
    """Read the header of a video; raises `DataError` if there is none or it states no rate."""
    with opened(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise DataError(f"{path}: states no frame rate")
        fps = float(rate)
        if stream.duration is not None:
            duration = float(stream.duration * stream.time_base)
        else:
            duration = (container.duration or 0) / 1e6
        return VideoInfo(fps, stream.frames or round(duration * fps), duration)


def decode(path: Path, sampling: Sampling, first: int = 0, last: int | None = None) -> Iterator[NDArray[np.uint8]]:
    """The kept frames (size, size, 3) of a video, RGB, one at a time; of these, `first` .. `last` - 1.

    A counter grows by one per frame; when it reaches the native rate over the kept one, the frame is kept and the
    counter is lowered by as much. AFSD's frames were made so: the k-th kept frame is the last of the k-th interval.

    Raises:
        DataError: The file cannot be decoded, or ends long before its header says.
    """
    info = probe(path)
    increment, step = sampling.counter(info.fps, info.num_frames)
    counter, count, kept = 0.0, 0, 0
    with opened(path) as (container, stream):
        for frame in container.decode(stream):
            count += 1
            counter += increment
            if counter >= step:
                counter -= step
                if kept >= first:
                    image = frame.to_image()
                    yield np.asarray(image.resize((sampling.size, sampling.size), Image.Resampling.BICUBIC))
                kept += 1
                if kept == last:
                    return
    if count < COMPLETE * info.num_frames:
        raise DataError(f"{path}: ends after {count} of {info.num_frames} frames; the file is damaged or cut off")


def decode_to_file(path: Path, target: Path, sampling: Sampling) -> Decoded:
    """Write the kept frames as an array (n, size, size, 3) uint8 to `target`, a .npy file, while they are decoded.

    `target` appears when it is complete, followed by a .json file of the same name with what `Decoded` holds.
    """
    info = probe(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem[:64]}.", suffix=".part")
    try:
        number = 0
        with os.fdopen(handle, "wb") as file:
            file.write(_npy_header(0, sampling.size))
            for frame in decode(path, sampling):
                file.write(frame.tobytes())
                number += 1
            file.seek(0)
            file.write(_npy_header(number, sampling.size))
        if number == 0:
            raise DataError(f"{path}: no frame could be decoded")
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    status = path.stat()
    fps = sampling.rate(info.fps, info.num_frames)
    decoded = Decoded(fps, info.duration, number, status.st_size, status.st_mtime_ns)
    write_atomically(target.with_suffix(".json"), json.dumps(asdict(decoded)))
    return decoded


def decoded_before(path: Path, target: Path) -> Decoded | None:
    """What an earlier call wrote for this file; None if there is nothing or the video has changed since."""
    try:
        decoded = Decoded(**json.loads(target.with_suffix(".json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    status = path.stat()
    same = (decoded.source_bytes, decoded.source_modified_ns) == (status.st_size, status.st_mtime_ns)
    return decoded if same and target.is_file() else None


def _npy_header(number: int, size: int) -> bytes:
    """Header of an array of `number` frames; NumPy leaves room in it for the first axis to grow."""
    header = io.BytesIO()
    shape = (number, size, size, 3)
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()
