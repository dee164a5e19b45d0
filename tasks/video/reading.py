"""What windows are cut from: arrays of frames, folders of frames, arrays of features; always read piece by piece."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tasks.core.data import DataError
from tasks.core.images import IMAGE_SUFFIXES, open_rgb
from tasks.video.decoding import VIDEO_SUFFIXES


class Crop(NamedTuple):
    """A square of pixels, mirrored or not."""

    top: int
    left: int
    size: int
    flip: bool = False


class FrameArray:
    """Frames (n, H, W, 3), uint8 RGB, or (n, H, W, 2), optical flow, in a .npy file that is mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        frames = self._frames()
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] not in (2, 3) or not len(frames):
            raise DataError(
                f"{path}: {frames.dtype} {frames.shape}; expected uint8 (frames, height, width, 3), for flow 2"
            )
        self.shape: tuple[int, int, int] = frames.shape[:3]

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, first: int, last: int, crop: Crop) -> NDArray[np.uint8]:
        """Frames first .. last - 1 of the crop, (3 or 2, n, size, size); flow keeps its sign when it is mirrored."""
        rows, columns = slice(crop.top, crop.top + crop.size), slice(crop.left, crop.left + crop.size)
        return _channels_first(self._frames()[first:last, rows, columns], crop.flip)

    def _frames(self) -> NDArray[Any]:
        return load_array(self.path)


class FrameFolder:
    """Frames as image files in the order of their names, each resized to `size` pixels square."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        if not self._files:
            raise DataError(f"{path}: contains no images; expected the frames of a video")
        self.shape = (len(self._files), size, size)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, first: int, last: int, crop: Crop) -> NDArray[np.uint8]:
        """Frames first .. last - 1 of the crop, (3, n, size, size)."""
        box = (crop.left, crop.top, crop.left + crop.size, crop.top + crop.size)
        frames = [
            np.asarray(open_rgb(path).resize((self.size, self.size), Image.Resampling.BICUBIC).crop(box))
            for path in self._files[first:last]
        ]
        return _channels_first(np.stack(frames), crop.flip)

    @cached_property
    def _files(self) -> Sequence[Path]:
        return sorted(path for path in self.path.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


class FeatureArray:
    """Features (T, C), float32, in a .npy file that is mapped into memory when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        features = load_array(path)
        if features.dtype != np.float32 or features.ndim != 2 or not features.size:
            raise DataError(f"{path}: {features.dtype} {features.shape}; expected float32 (steps, channels)")
        self.shape: tuple[int, int] = features.shape

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, first: int, last: int) -> NDArray[np.float32]:
        """Steps first .. last - 1, (C, n)."""
        return np.ascontiguousarray(load_array(self.path)[first:last].T)


def load_array(path: Path) -> NDArray[Any]:
    """Map a .npy file into memory; raises `DataError` if it is missing, damaged or holds Python objects."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: file not found") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as an array ({error})") from error


def files_by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Files, at any depth below `folder`, by their names without suffix; raises `DataError` for a name twice."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in suffixes or path.name.startswith(".") or not path.is_file():
            continue
        if path.stem in found:
            raise DataError(f"{path}: has the same name as {found[path.stem]}; expected one file per video")
        found[path.stem] = path
    return found


def frame_sources(folder: Path) -> dict[str, Path]:
    """Arrays of frames and folders of images, at any depth below `folder`, by the names of their videos."""
    found = files_by_stem(folder, (".npy",))
    images = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return found | {parent.name: parent for parent in dict.fromkeys(path.parent for path in images)}


def open_frames(path: Path, size: int) -> FrameArray | FrameFolder:
    """The frames at `path`, a .npy file or a folder of images that are to be resized to `size`."""
    return FrameFolder(path, size) if path.is_dir() else FrameArray(path)


def find_videos(videos: str, suffixes: Sequence[str] = VIDEO_SUFFIXES) -> dict[str, Path]:
    """The files named by a folder, a file or a glob pattern, by their names; raises `DataError` for none."""
    path = Path(videos)
    if path.is_file():
        return {path.stem: path}
    if path.is_dir():
        found = files_by_stem(path, suffixes)
    else:
        matches = [Path(match) for match in sorted(glob.glob(videos, recursive=True))]
        found = {}
        for match in matches:
            if match.suffix.lower() in suffixes and found.setdefault(match.stem, match) != match:
                raise DataError(f"{match}: has the same name as {found[match.stem]}; expected different names")
    if not found:
        kinds = "a video" if suffixes is VIDEO_SUFFIXES else f"a {' or '.join(suffixes)} file"
        raise DataError(f"videos is {videos!r}, where no such file was found; expected {kinds}, a folder or a pattern")
    return found


def _channels_first(frames: NDArray[np.uint8], flip: bool) -> NDArray[np.uint8]:
    """(n, H, W, C) -> (C, n, H, W), mirrored along W if so wanted."""
    return np.ascontiguousarray((frames[:, :, ::-1] if flip else frames).transpose(3, 0, 1, 2))
