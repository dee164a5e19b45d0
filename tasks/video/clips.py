"""Clips of one action each, in folders named like their classes: what video backbones are pre-trained on.

Batches hold uint8 RGB clips (B, 3, T, H, W) and labels 0..K-1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch.utils.data import Dataset

from tasks.core.check import Findings, read_all
from tasks.core.data import DataError
from tasks.core.errors import expect
from tasks.core.sample import cache_folder, write_folder_once
from tasks.core.splits import Listing
from tasks.video import sample
from tasks.video.datamodule import VideoDataModule
from tasks.video.decoding import VIDEO_SUFFIXES, Sampling, decode, probe
from tasks.video.reading import find_videos


@dataclass(frozen=True)
class Clip:
    """A video file, its unique name and its label; None where it is unknown."""

    path: Path
    id: str
    label: int | None


@dataclass(frozen=True)
class ClipReader:
    """Reads `length` consecutive sampled frames of a file; a shorter video ends in repetitions of its last frame."""

    sampling: Sampling
    length: int
    crop_size: int

    def num_sampled(self, path: Path) -> int:
        """How many frames are sampled, by the header of the file."""
        info = probe(path)
        return max(int(info.num_frames * self.sampling.rate(info.fps, info.num_frames) / info.fps), 1)

    def read(self, path: Path, first: int, top: int, left: int, flip: bool) -> tuple[NDArray[np.uint8], int]:
        """Frames from `first` on, cropped at (top, left), (3, length, size, size), and how many are video."""
        rows, columns = slice(top, top + self.crop_size), slice(left, left + self.crop_size)
        frames = [frame[rows, columns] for frame in decode(path, self.sampling, first, first + self.length)]
        if not frames:
            raise DataError(f"{path}: no frame could be decoded")
        valid = len(frames)
        clip = np.stack(frames + [frames[-1]] * (self.length - valid))
        return np.ascontiguousarray((clip[:, :, ::-1] if flip else clip).transpose(3, 0, 1, 2)), valid


class TrainClips(Dataset[dict[str, Any]]):
    """Clips at random times, cropped at random, indexed by virtual indices (see `tasks.core.data`)."""

    def __init__(self, clips: Sequence[Clip], reader: ClipReader, seed: int, flip: bool) -> None:
        self.clips = clips
        self.reader = reader
        self.seed = seed
        self.flip = flip

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, virtual: int) -> dict[str, Any]:
        epoch, index = divmod(virtual, len(self))
        clip, reader = self.clips[index], self.reader
        generator = np.random.default_rng((self.seed, epoch, index))
        last = max(reader.num_sampled(clip.path) - reader.length, 0)
        first = int(generator.integers(last + 1))
        top, left = (int(v) for v in generator.integers(reader.sampling.size - reader.crop_size + 1, size=2))
        content, valid = reader.read(clip.path, first, top, left, self.flip and bool(generator.random() < 0.5))
        return {"id": clip.id, "clip": torch.from_numpy(content), "label": clip.label, "valid": valid}


class EvaluationClips(Dataset[dict[str, Any]]):
    """Evenly spaced views of every video, cropped in the middle; each view is a sample."""

    def __init__(self, clips: Sequence[Clip], reader: ClipReader, num_views: int) -> None:
        self.clips = clips
        self.reader = reader
        self.num_views = num_views

    def __len__(self) -> int:
        return len(self.clips) * self.num_views

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, view = divmod(index, self.num_views)
        clip, reader = self.clips[number], self.reader
        last = max(reader.num_sampled(clip.path) - reader.length, 0)
        first = round(last * (view + 0.5) / self.num_views)
        corner = (reader.sampling.size - reader.crop_size) // 2
        content, valid = reader.read(clip.path, first, corner, corner, False)
        item = {"id": clip.id, "view": view, "clip": torch.from_numpy(content), "valid": valid}
        return item if clip.label is None else item | {"label": clip.label}


def collate_clips(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate any number of clips: clips and labels are stacked, the rest become lists; empty without samples."""
    batch: dict[str, Any] = defaultdict(list)
    for item in samples:
        for name, value in item.items():
            batch[name].append(value)
    if not samples:
        return {"id": [], "view": [], "valid": []}
    stacked = {"clip": torch.stack(batch["clip"])}
    if "label" in batch:
        stacked["label"] = torch.tensor(batch["label"])
    return dict(batch) | stacked


class VideoClips(VideoDataModule[list[Clip]]):
    """Clips of one action each in folders named like their classes, as Kinetics and UCF101 are often laid out::

        root/train/archery/a.mp4     root/train/bowling/b.avi
        root/val/archery/c.mp4       root/val/bowling/d.avi

    Training reads `clip_length` consecutive frames at a random time, evaluation at `num_views` evenly spaced ones.
    Files are decoded whenever they are read; the header says where a clip can begin.
    """

    layout = """
root/train/archery/a.mp4     root/train/bowling/b.avi
root/val/archery/c.mp4       root/val/bowling/d.avi"""
    source = "your own data, or e.g. https://github.com/cvdfoundation/kinetics-dataset"
    sample_command = "python -m tasks.video fit -c configs/sample/stpt_clips.yaml"
    train_collate = staticmethod(collate_clips)
    eval_collate = staticmethod(collate_clips)

    def __init__(self, root: str, clip_length: int = 32, num_views: int = 1, **kwargs: Any) -> None:
        super().__init__(root=root, clip_length=clip_length, **kwargs)
        expect("data.num_views", num_views, num_views >= 1, "at least 1")
        self.num_views = num_views

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the classes: the folders of the training split, sorted."""
        folder = Path(self.root, "train")
        names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        if not names:
            raise DataError(self.missing(f"{folder}: no folders of classes found."))
        return names

    def scan(self, split: str) -> Listing[list[Clip]]:
        """List the files of "train" or "val"; their contents are not read."""
        try:
            names = self.class_names
        except DataError as error:
            return Listing([], [str(error)])
        folder = Path(self.root, split)
        if not folder.is_dir():
            return Listing([], [self.missing(f"{folder}: folder not found.")])
        problems = [
            f"{path}: is no class of the training split; expected one of {', '.join(names[:8])}"
            for path in sorted(folder.iterdir())
            if path.is_dir() and path.name not in names
        ]
        clips = [
            Clip(path, path.relative_to(folder).with_suffix("").as_posix(), label)
            for label, name in enumerate(names)
            for path in sorted((folder / name).rglob("*"))
            if path.suffix.lower() in VIDEO_SUFFIXES
        ]
        if not clips and not problems:
            problems.append(self.missing(f"{folder}: contains no videos."))
        return Listing(clips, problems)

    @property
    def reader(self) -> ClipReader:
        """How clips are read."""
        return ClipReader(self.sampling, self.clip_length, self.crop_size)

    def train_dataset(self) -> TrainClips:
        """Return the training clips."""
        return TrainClips(self.samples("train"), self.reader, self.seed, self.flip)

    def val_dataset(self) -> EvaluationClips:
        """Return the views of the validation clips."""
        return EvaluationClips(self.samples("val"), self.reader, self.num_views)

    def test_dataset(self) -> EvaluationClips:
        """Return the views of the validation clips."""
        return self.val_dataset()

    def predict_dataset(self) -> EvaluationClips:
        """Return the views of the videos named by `videos`, or of the validation clips, without labels."""
        if self.videos is None:
            clips = [Clip(clip.path, clip.id, None) for clip in self.samples("val")]
        else:
            clips = [Clip(path, id, None) for id, path in find_videos(self.videos).items()]
        return EvaluationClips(clips, self.reader, self.num_views)

    def check(self) -> bool:
        """Decode every clip, print the number of clips per class and everything that is wrong; True if nothing is."""
        findings, counts = check_clips(self)
        console = Console()
        table = Table("id", "class", title="Clips")
        for split in counts:
            table.add_column(split, justify="right")
        for label, name in enumerate(self.class_names if counts else []):
            table.add_row(str(label), name, *(str(count[label]) for count in counts.values()))
        console.print(table)
        findings.print_messages(console)
        return not findings.problems


def check_clips(datamodule: VideoClips) -> tuple[Findings, dict[str, NDArray[np.int64]]]:
    """Decode every clip; what was found, and the number (K,) of sound clips per class of each split."""
    findings, counts = Findings(), {}
    datamodule.prepare_data()
    read = partial(_problem, sampling=datamodule.sampling)
    for split in datamodule.splits:
        listing = datamodule.scan(split)
        findings.add_listing(listing)
        labels = []
        readings: Iterator[str | None] = read_all(
            listing.samples, read, len(listing.samples), datamodule.num_workers, f"Checking {split}"
        )
        for clip, problem in zip(listing.samples, readings, strict=True):
            if problem is None:
                labels.append(clip.label)
            else:
                findings.problems.append(problem)
        if listing.samples:
            counts[split] = np.bincount(np.array(labels, dtype=np.int64), minlength=datamodule.num_classes)
    return findings, counts


def _problem(clip: Clip, sampling: Sampling) -> str | None:
    try:
        number = sum(1 for _ in decode(clip.path, sampling))
    except DataError as error:
        return str(error)
    return None if number else f"{clip.path}: no frame could be decoded"


class MovingDigitClips(VideoClips):
    """The sample for video classification: clips of 3.2 seconds, each of one motion of `MovingDigits`."""

    def __init__(
        self,
        root: str | None = None,
        clip_length: int = 16,
        frame_size: int = 32,
        crop_size: int = 32,
        batch_size: int = 16,
        eval_batch_size: int = 25,
        num_workers: int = 1,
        num_train: int = 80,
        num_val: int = 20,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root=root or str(cache_folder(f"video-clips-v1-{num_train}-{num_val}")),
            clip_length=clip_length,
            frame_size=frame_size,
            crop_size=crop_size,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            **kwargs,
        )
        self.num_train = num_train
        self.num_val = num_val

    @property
    def class_names(self) -> list[str]:  # known before the files are written
        """Names of the classes, sorted like the folders."""
        return sorted(sample.CLASS_NAMES)

    def prepare_data(self) -> None:
        """Write the sample, `num_train` and `num_val` clips per class, unless it is there already."""
        write_folder_once(Path(self.root), lambda folder: sample.write_clips(folder, self.num_train, self.num_val))
