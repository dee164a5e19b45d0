"""Windows as samples: augmented ones for training, consecutive ones for evaluation, and how they become batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from tasks.video.annotations import Video
from tasks.video.reading import Crop, FeatureArray, FrameArray, FrameFolder
from tasks.video.windows import Splice, Window, boundary_masks, random_splice

Source = FrameArray | FrameFolder | FeatureArray
STACKED = ("clip", "features", "start_mask", "end_mask", "triplet_clip", "triplet_features", "triplet_segments")


@dataclass(frozen=True)
class Clips:
    """How pieces are read from the sources: windows of `length` frames, squares of `crop_size` pixels.

    A feature stands for `stride` frames; `stride` is 1 for frames.
    """

    length: int
    crop_size: int
    stride: int = 1

    def read(self, source: Source, offset: int, crop: Crop | None) -> tuple[str, NDArray[Any], int]:
        """Name of the input, its content, zero-padded behind, and how many of its frames are video."""
        first, steps = offset // self.stride, self.length // self.stride
        last = min(first + steps, len(source))
        content: NDArray[Any]
        if isinstance(source, FeatureArray):
            name, content = "features", source.read(first, last)
        else:
            assert crop is not None
            name, content = "clip", source.read(first, last, crop)
        padding = [(0, 0), (0, steps - (last - first)), *[(0, 0)] * (content.ndim - 2)]
        return name, np.pad(content, padding), (last - first) * self.stride

    def centre(self, source: Source) -> Crop | None:
        """The crop in the middle of the frames."""
        if isinstance(source, FeatureArray):
            return None
        _, height, width = source.shape
        size = self.crop_size  # rounded half to even, as AFSD does
        return Crop(round((height - size) / 2), round((width - size) / 2), size)

    def random(self, source: Source, flip: bool, generator: np.random.Generator) -> Crop | None:
        """A crop anywhere in the frames, half of them mirrored if so wanted; the same for all frames of a clip."""
        if isinstance(source, FeatureArray):
            return None
        _, height, width = source.shape
        top = int(generator.integers(height - self.crop_size + 1))
        left = int(generator.integers(width - self.crop_size + 1))
        return Crop(top, left, self.crop_size, flip and bool(generator.random() < 0.5))


class TrainingWindow(NamedTuple):
    """A window with the frames of background that are spliced into its instances."""

    video: Video
    window: Window
    piece: int


class TrainWindows(Dataset[dict[str, Any]]):
    """Augmented training windows, indexed by virtual indices `index + epoch * len` (see `tasks.core.data`).

    `splice` makes the clip for the consistency loss too, with instances as long as two pieces if `or_equal`.
    """

    def __init__(
        self,
        windows: Sequence[TrainingWindow],
        sources: Mapping[str, Source],
        clips: Clips,
        seed: int,
        flip: bool = True,
        splice: bool = True,
        or_equal: bool = False,
    ) -> None:
        self.windows = windows
        self.sources = sources
        self.clips = clips
        self.seed = seed
        self.flip = flip
        self.splice = splice
        self.or_equal = or_equal

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, virtual: int) -> dict[str, Any]:
        epoch, index = divmod(virtual, len(self))
        generator = np.random.default_rng((self.seed, epoch, index))
        video, window, piece = self.windows[index]
        source = self.sources[video.id]
        crop = self.clips.random(source, self.flip, generator)
        name, content, valid = self.clips.read(source, window.offset, crop)
        start_mask, end_mask = boundary_masks(window.segments, self.clips.length)
        sample = _described(video, window.offset, valid) | {
            name: torch.from_numpy(content),
            "segments": torch.from_numpy(window.segments.astype(np.float32)),
            "labels": torch.from_numpy(window.labels),
            "start_mask": torch.from_numpy(start_mask),
            "end_mask": torch.from_numpy(end_mask),
        }
        return sample | self._spliced(name, content, window, piece, generator) if self.splice else sample

    def _spliced(
        self, name: str, content: NDArray[Any], window: Window, piece: int, generator: np.random.Generator
    ) -> dict[str, Any]:
        """The clip in which background interrupts an instance; zeros where there is none."""
        stride = self.clips.stride
        steps = self.clips.length // stride
        spliced = random_splice(window.segments / stride, -(-piece // stride), steps, generator, or_equal=self.or_equal)
        valid = spliced is not None
        if spliced is None:
            spliced, content = Splice(np.arange(steps), np.zeros((3, 2))), np.zeros_like(content)
        return {
            f"triplet_{name}": torch.from_numpy(content[:, spliced.frames]),
            "triplet_segments": torch.from_numpy((spliced.segments * stride).astype(np.float32)),
            "triplet_valid": torch.tensor(valid),
        }


class EvaluationWindows(Dataset[dict[str, Any]]):
    """Windows that cover whole videos, cropped in the middle, without instances."""

    def __init__(
        self,
        videos: Sequence[Video],
        sources: Mapping[str, Source],
        clips: Clips,
        offsets: Callable[[Video], Sequence[int]],
    ) -> None:
        self.windows = [(video, offset) for video in videos for offset in offsets(video)]
        self.sources = sources
        self.clips = clips

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        video, offset = self.windows[index]
        source = self.sources[video.id]
        name, content, valid = self.clips.read(source, offset, self.clips.centre(source))
        return _described(video, offset, valid) | {name: torch.from_numpy(content)}


def collate_windows(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate any number of samples: inputs and masks are stacked, the rest become lists; empty without samples."""
    batch: dict[str, Any] = defaultdict(list)
    for sample in samples:
        for name, value in sample.items():
            batch[name].append(value)
    stacked: dict[str, Tensor] = {
        name: torch.stack(values) for name, values in batch.items() if name in STACKED or name == "triplet_valid"
    }
    if not samples:
        batch |= {"id": [], "offset": [], "fps": [], "duration": [], "valid": []}
    return dict(batch) | stacked


def _described(video: Video, offset: int, valid: int) -> dict[str, Any]:
    duration = video.sampled_seconds if video.duration is None else video.duration
    shifted = offset + video.first_frame
    return {
        "id": video.id,
        "offset": int(shifted) if shifted == int(shifted) else shifted,
        "fps": video.fps,
        "duration": duration,
        "valid": valid,
    }
