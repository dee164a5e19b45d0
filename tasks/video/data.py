"""The data sets of temporal action detection; each docstring shows the layout on disk.

Every batch holds windows: uint8 RGB clips (B, 3, T, H, W) or float32 features (B, C, T), and instances in frames of the
window with labels 0..K-1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tasks.core.data import DataError
from tasks.core.sample import cache_folder, write_folder_once
from tasks.core.splits import Listing, fraction_by_name
from tasks.video import sample
from tasks.video.annotations import (
    THUMOS14_CLASSES,
    Video,
    read_json_classes,
    read_json_split,
    read_thumos_classes,
    read_thumos_split,
    subsets_of,
)
from tasks.video.datamodule import DetectionDataModule, inside
from tasks.video.decoding import Sampling
from tasks.video.windows import Window

VAL_FRACTION = 0.2
SUBSETS = {"train": ("train", "training"), "val": ("val", "validation"), "test": ("test", "testing")}


class THUMOS14(DetectionDataModule):
    """THUMOS14: 20 classes, trained on the 200 validation videos, evaluated on test videos.

    The csv files are those of AFSD's repository; ``_Annotation.csv``, with ambiguous instances, is read where there is
    no ``_Annotation_ours.csv``. Videos may lie in folders below ``videos``::

        root/val_Annotation_ours.csv     root/val_video_info.csv
        root/test_Annotation_ours.csv    root/test_video_info.csv
        root/videos/validation/video_validation_0000051.mp4
        root/videos/test/video_test_0000004.mp4

    With `frame_columns` instances lie where AFSD's frame columns put them, instead of where their seconds do.
    `excluded` names videos that are left out: two test videos are wrongly annotated and a third only has ambiguous
    instances, which leaves the 210 that most papers evaluate.
    """

    layout = """
root/val_Annotation_ours.csv     root/val_video_info.csv
root/test_Annotation_ours.csv    root/test_video_info.csv
root/videos/validation/video_validation_0000051.mp4
root/videos/test/video_test_0000004.mp4"""
    source = (
        "annotations: thumos_annotations/ of https://github.com/TencentYoutuResearch/ActionDetection-AFSD;"
        " videos: https://www.crcv.ucf.edu/THUMOS14"
    )
    repairable = False

    def __init__(
        self,
        root: str,
        frame_columns: bool = False,
        excluded: Sequence[str] = ("video_test_0000270", "video_test_0001292", "video_test_0001496"),
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, **kwargs)
        self.frame_columns = frame_columns
        self.excluded = excluded

    @cached_property
    def _classes(self) -> dict[str, int]:
        path = Path(self.root, "Class Index_Detection.txt")
        return read_thumos_classes(path) if path.is_file() else THUMOS14_CLASSES

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their original indices."""
        return list(self._classes)

    def read_annotations(self, split: str) -> Listing[list[Video]]:
        """The videos and instances of the validation ("train") or the test set ("val")."""
        return read_thumos_split(Path(self.root), split, self._classes, self.frame_columns, self.excluded)


class MovingDigits(THUMOS14):
    """The sample data set: moving handwritten digits, whose kind of motion is the action, in the layout of THUMOS14.

    It is written to `root` if that folder does not exist; by default to a folder in the user's cache.
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        num_workers: int = 1,
        frame_size: int = 32,
        crop_size: int = 32,
        clip_length: int = 64,
        clip_stride: int = 16,
        eval_stride: int = 32,
        flip: bool = True,
        num_train: int = 60,
        num_val: int = 20,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root=root or str(cache_folder(f"video-v1-{num_train}-{num_val}")),
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            frame_size=frame_size,
            crop_size=crop_size,
            clip_length=clip_length,
            clip_stride=clip_stride,
            eval_stride=eval_stride,
            flip=flip,
            **kwargs,
        )
        self.num_train = num_train
        self.num_val = num_val

    @property
    def _classes(self) -> dict[str, int]:  # known before the files are written
        return {name: index for index, name in enumerate(sample.CLASS_NAMES, start=1)}

    def prepare_data(self) -> None:
        """Write the sample unless it is there already."""
        write_folder_once(Path(self.root), lambda folder: sample.write_sample(folder, self.num_train, self.num_val))


class ActivityNet(DetectionDataModule):
    """ActivityNet 1.3: 200 classes, 10,024 training and 4,926 validation videos, many of which are gone.

    A video is one window: `clip_length` of its frames, evenly spaced, or all if it has fewer. Videos without a file are
    left out. Names may begin with ``v_``::

        root/activity_net.v1-3.min.json
        root/videos/v_sJFgo9H6zNo.mp4

    With `class_agnostic` all classes are one, "action", as AFSD trains it.
    """

    layout = """
root/activity_net.v1-3.min.json
root/videos/v_sJFgo9H6zNo.mp4"""
    source = "http://activity-net.org/download.html"
    splice_or_equal = True
    repairable = False

    def __init__(
        self,
        root: str,
        annotations: str = "activity_net.v1-3.min.json",
        class_agnostic: bool = False,
        clip_length: int = 768,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, clip_length=clip_length, **kwargs)
        self.annotations = annotations
        self.class_agnostic = class_agnostic
        self.sampling = Sampling(max_frames=clip_length, size=self.sampling.size)

    @cached_property
    def _all_classes(self) -> list[str]:
        return read_json_classes(Path(self.root, self.annotations))

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, sorted."""
        return ["action"] if self.class_agnostic else self._all_classes

    def read_annotations(self, split: str) -> Listing[list[Video]]:
        """The videos and instances of the training or the validation set."""
        listing = read_json_split(Path(self.root, self.annotations), SUBSETS[split], self._all_classes)
        if self.class_agnostic:
            videos = [replace(video, labels=np.zeros_like(video.labels)) for video in listing.samples]
            return Listing(videos, listing.problems, listing.notes)
        return listing

    def files(self) -> dict[str, Path]:
        """The files to read, by the names of their videos without ``v_``."""
        return {id.removeprefix("v_"): path for id, path in super().files().items()}

    def rate_of_frames(self, video: Video, num_frames: int) -> float:
        """Frames are spaced evenly over the video."""
        if not video.duration:
            raise DataError(f"{self.annotations}: video {video.id!r} has no duration; expected seconds")
        return num_frames / video.duration

    def cut(self, video: Video) -> Iterator[tuple[Window, int]]:
        """The whole video as one window."""
        segments, labels = inside(video)
        if len(labels):
            shortest = min(self.clip_length, float((segments[:, 1] - segments[:, 0]).min()))
            yield Window(0, segments, labels), math.floor(shortest) // 4

    def offsets(self, video: Video) -> list[int]:
        """The first frame alone."""
        return [0]


class VideoFolder(DetectionDataModule):
    """Your own videos, annotated by a json file in ActivityNet's layout.

    ``subset`` is ``train`` (or ``training``), ``val`` (``validation``) or ``test`` (``testing``; optional, else `test`
    evaluates the validation videos). Without a validation subset a fifth of the training videos, chosen by a hash of
    their names, is for validation. ``classes.txt`` has one class per line; without it, the classes are the labels that
    occur, sorted. ``duration`` and ``fps`` are optional::

        root/annotations.json    {"database": {"holiday": {"subset": "train",
                                     "annotations": [{"label": "jump", "segment": [3.5, 7.25]}]}}}
        root/classes.txt         (optional)
        root/videos/holiday.mp4
    """

    layout = """
root/annotations.json    {"database": {"holiday": {"subset": "train",
                             "annotations": [{"label": "jump", "segment": [3.5, 7.25]}]}}}
root/videos/holiday.mp4"""
    source = "your own data"

    @property
    def _file(self) -> Path:
        path = Path(self.root, "annotations.json")
        if not path.is_file():
            raise DataError(self.missing(f"{path}: file not found."))
        return path

    @cached_property
    def _classes(self) -> list[str]:
        path = Path(self.root, "classes.txt")
        if not path.is_file():
            return read_json_classes(self._file)
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if not names or len(set(names)) < len(names):
            raise DataError(f"{path}: {len(names)} names; expected different class names, one per line")
        return names

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by label."""
        return self._classes

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the annotated splits."""
        return ("train", "val", "test") if self._subsets["test"] else ("train", "val")

    @cached_property
    def _subsets(self) -> dict[str, list[str]]:
        """The subsets of the file that make up each split."""
        found = subsets_of(self._file)
        if unknown := sorted(set(found) - {name for names in SUBSETS.values() for name in names}):
            raise DataError(f"{self._file}: subset {unknown[0]!r}; expected train, val or test")
        return {split: [name for name in names if name in found] for split, names in SUBSETS.items()}

    def read_annotations(self, split: str) -> Listing[list[Video]]:
        """The videos and instances of a split."""
        held_out = split in ("train", "val") and not self._subsets["val"]
        subsets = self._subsets["train" if held_out else split]
        listing = read_json_split(self._file, subsets, self._classes)
        if not listing.samples:
            return Listing([], [*listing.problems, f"{self._file}: no video of subset {split!r}"])
        if not held_out:
            return listing
        if len(listing.samples) == 1:
            return Listing([], [f"{self._file}: one video; expected at least two, one of them for validation"])
        chosen = fraction_by_name([video.id for video in listing.samples], VAL_FRACTION)
        videos = [video for video in listing.samples if (video.id in chosen) == (split == "val")]
        return Listing(videos, listing.problems, listing.notes)
