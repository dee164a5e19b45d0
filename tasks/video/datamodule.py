"""What the datamodules of videos share: options, finding and decoding files, windows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from tasks.core.check import read_all
from tasks.core.data import DataError
from tasks.core.errors import expect
from tasks.core.splits import Listing, Samples, SplitDataModule
from tasks.video.annotations import Video, instance_table
from tasks.video.datasets import Clips, EvaluationWindows, Source, TrainingWindow, TrainWindows, collate_windows
from tasks.video.decoding import VIDEO_SUFFIXES, Decoded, Sampling, decode_to_file, decoded_before
from tasks.video.reading import FeatureArray, FrameArray, files_by_stem, find_videos, frame_sources, open_frames
from tasks.video.segments import SegmentTable
from tasks.video.windows import Window, training_windows, window_offsets


@dataclass(frozen=True)
class _Opened:
    """A video whose file could be read, or the reason why not."""

    video: Video
    source: Source | None = None
    problem: str | None = None


class VideoDataModule(SplitDataModule[Samples]):
    """Base of all datamodules of this task: which frames of a video are kept, and which part of them.

    Args:
        root: The data set.
        videos: What `predict` reads: a folder, a file or a glob pattern (of videos, or of features where these are the
            input); without it, the validation videos.
        sample_fps: Frames per second that are kept of a video.
        frame_size: Height and width in pixels to which frames are resized.
        crop_size: Height and width of the random (training) or central crop.
        clip_length: Frames of the input.
        flip: Mirror half of the training clips.
    """

    def __init__(
        self,
        root: str,
        videos: str | None = None,
        batch_size: int = 1,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        seed: int = 0,
        pin_memory: bool = True,
        sample_fps: float = 10.0,
        frame_size: int = 112,
        crop_size: int = 96,
        clip_length: int = 256,
        flip: bool = True,
    ) -> None:
        super().__init__(root, batch_size, eval_batch_size, num_workers, seed, pin_memory)
        expect("data.sample_fps", sample_fps, sample_fps > 0, "a rate above 0")
        expect("data.crop_size", crop_size, 1 <= crop_size <= frame_size, f"1 to {frame_size} pixels, the frame_size")
        expect("data.clip_length", clip_length, clip_length >= 1, "at least 1 frame")
        self.videos = videos
        self.sampling = Sampling(fps=sample_fps, size=frame_size)
        self.crop_size = crop_size
        self.clip_length = clip_length
        self.flip = flip

    @property
    def class_names(self) -> list[str]:
        """Names of the K classes, by label."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of classes K, without background."""
        return len(self.class_names)

    @property
    def frames_per_feature(self) -> int:
        """Frames from one step of the input to the next."""
        return 1

    @property
    def feature_dim(self) -> int | None:
        """Channels of features; None where the input is frames."""
        return None


class DetectionDataModule(VideoDataModule[list[Video]]):
    """Base of the datamodules of temporal action detection. The defaults are those of AFSD for THUMOS14.

    Args:
        frames: Folder of frames that were sampled before, `sample_fps` per second: an array ``<video>.npy`` or a folder
            of images per video. Without it, videos are decoded once.
        features: Folder of features ``<video>.npy``, float32 (steps, channels), instead of frames.
        cache: Where decoded frames are kept; by default ``decoded`` in the root.
        clip_stride: Frames between training windows.
        eval_stride: Frames between evaluation windows.
        splice: Make the spliced clips of the consistency loss.
        feature_stride: Frames of the original video from one feature to the next.
        feature_window: Frames of the original video that a feature was computed from.
        feature_fps: Frames per second of the videos that features were computed from, where the annotations do not say.
        kwargs: Options of `VideoDataModule`.
    """

    sample_command = "python -m tasks.video fit -c configs/sample/stpt.yaml"
    train_collate = staticmethod(collate_windows)
    eval_collate = staticmethod(collate_windows)
    splice_or_equal: ClassVar[bool] = False
    repairable: ClassVar[bool] = True  # False: what the published annotations have wrong is a note of `check`

    def __init__(
        self,
        root: str,
        frames: str | None = None,
        features: str | None = None,
        cache: str | None = None,
        clip_stride: int = 30,
        eval_stride: int = 128,
        splice: bool = True,
        feature_stride: int = 4,
        feature_window: int = 16,
        feature_fps: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, **kwargs)
        for name, value in (
            ("clip_stride", clip_stride),
            ("eval_stride", eval_stride),
            ("feature_stride", feature_stride),
            ("feature_window", feature_window),
        ):
            expect(f"data.{name}", value, value >= 1, "at least 1 frame")
        if features is not None:
            strides = {"clip_length": self.clip_length, "clip_stride": clip_stride, "eval_stride": eval_stride}
            for name, value in strides.items():
                multiple = value % feature_stride == 0
                expect(f"data.{name}", value, multiple, f"a multiple of feature_stride ({feature_stride} frames)")
            if frames is not None:
                raise DataError("frames and features were both given; expected one of them")
        self.frames = frames
        self.features = features
        self.cache = cache
        self.clip_stride = clip_stride
        self.eval_stride = eval_stride
        self.splice = splice
        self.feature_stride = feature_stride
        self.feature_window = feature_window
        self.feature_fps = feature_fps
        self._sources: dict[str, Source] = {}

    # -- what a data set adds -----------------------------------------------------------------------------------------

    def read_annotations(self, split: str) -> Listing[list[Video]]:
        """The videos and instances of "train" or "val"."""
        raise NotImplementedError

    def rate_of_frames(self, video: Video, num_frames: int) -> float:
        """Frames per second of frames that were sampled before."""
        return video.fps or self.sampling.fps

    # -- for the model ------------------------------------------------------------------------------------------------

    @property
    def frames_per_feature(self) -> int:
        """Frames from one feature to the next; 1 where the input is frames."""
        return self.feature_stride if self.features is not None else 1

    @property
    def feature_dim(self) -> int | None:
        """Channels of the features; None where the input is frames."""
        if self.features is None:
            return None
        if not self._sources:
            self.samples(self.splits[0])
        return next(iter(self._sources.values())).shape[1]

    def ground_truth(self, split: str) -> SegmentTable:
        """The instances of a split, in seconds, for the evaluators."""
        return instance_table(self.samples(split), self.class_names)

    # -- data sets ----------------------------------------------------------------------------------------------------

    def train_dataset(self) -> TrainWindows:
        """Return the augmented training windows.

        Raises:
            DataError: No window holds an instance.
        """
        windows = [
            TrainingWindow(video, window, piece) for video in self.samples("train") for window, piece in self.cut(video)
        ]
        if not windows:
            raise DataError(f"{self.root}: no window of {self.clip_length} frames holds a whole training instance")
        return TrainWindows(
            windows, self._sources, self._clips, self.seed, self.flip, self.splice, self.splice_or_equal
        )

    def val_dataset(self) -> EvaluationWindows:
        """Return the windows of the validation videos."""
        return self._evaluation_dataset(self.samples("val"))

    def test_dataset(self) -> EvaluationWindows:
        """Return the windows of the annotated test videos, or of the validation videos."""
        return self._evaluation_dataset(self.samples(self.splits[-1]))

    def predict_dataset(self) -> EvaluationWindows:
        """Return the windows of the videos named by `videos`, or of the validation videos."""
        if self.videos is None:
            return self._evaluation_dataset(self.samples("val"))
        if "predict" not in self._samples:
            found = find_videos(self.videos, VIDEO_SUFFIXES if self.features is None else (".npy",))
            videos = [Video(id, np.zeros((0, 2)), np.zeros(0, dtype=np.int64)) for id in found]
            self._samples["predict"] = self._open_all(videos, found, "predict")
        return self._evaluation_dataset(self._samples["predict"])

    def cut(self, video: Video) -> Iterator[tuple[Window, int]]:
        """The training windows of a video, each with the length of the background spliced into its instances."""
        assert video.num_frames is not None
        segments, labels = inside(video)
        windows, shortest = training_windows(segments, labels, video.num_frames, self.clip_length, self.clip_stride)
        for window in windows:
            yield window, math.ceil(shortest)

    def offsets(self, video: Video) -> list[int]:
        """First frames of the evaluation windows of a video."""
        assert video.num_frames is not None
        return window_offsets(video.num_frames, self.clip_length, self.eval_stride)

    @property
    def _clips(self) -> Clips:
        return Clips(self.clip_length, self.crop_size, self.frames_per_feature)

    def _evaluation_dataset(self, videos: Sequence[Video]) -> EvaluationWindows:
        return EvaluationWindows(videos, self._sources, self._clips, self.offsets)

    def thumbnails(self, id: str, count: int) -> NDArray[np.uint8] | None:
        """RGB frames (count, H, W, 3) from the middles of equal parts of an opened video; None without RGB frames."""
        source = self._sources[id]
        crop = self._clips.centre(source)
        if crop is None or isinstance(source, FeatureArray):
            return None
        places = ((np.arange(count) + 0.5) / count * len(source)).astype(int).tolist()
        frames = np.concatenate([source.read(place, place + 1, crop) for place in places], axis=1)
        return frames.transpose(1, 2, 3, 0) if len(frames) == 3 else None

    # -- files --------------------------------------------------------------------------------------------------------

    def scan(self, split: str) -> Listing[list[Video]]:
        """List the annotated videos of "train" or "val" and their files; what the files hold is not read."""
        try:
            listing = self.read_annotations(split)
            files = self.files()
        except DataError as error:
            return Listing([], [self.missing(f"{error}.")])
        absent = [video for video in listing.samples if video.id not in files]
        if listing.samples and len(absent) == len(listing.samples):
            where = self.features or self.frames or Path(self.root, "videos")
            return Listing([], [self.missing(f"{where}: holds none of the {len(absent)} {split} videos.")])
        problems, notes = list(listing.problems), list(listing.notes)
        messages = problems if self.repairable else notes
        messages += [f"{video.id}: annotated, but there is no file of that name" for video in absent]
        return Listing([video for video in listing.samples if video.id in files], problems, notes)

    def files(self) -> dict[str, Path]:
        """The files to read, by the names of their videos."""
        if self.features is not None:
            return files_by_stem(_folder(Path(self.features)), (".npy",))
        if self.frames is not None:
            return frame_sources(_folder(Path(self.frames)))
        return files_by_stem(_folder(Path(self.root, "videos")), VIDEO_SUFFIXES)

    def samples(self, split: str) -> list[Video]:
        """Return the videos of a split, decoded if need be; raises `DataError` naming files that cannot be used."""
        if split not in self._samples:
            videos = super().samples(split)
            del self._samples[split]
            self._samples[split] = self._open_all(videos, self.files(), split)
        return self._samples[split]

    def open_each(self, videos: Sequence[Video], files: dict[str, Path], split: str) -> Iterator[_Opened]:
        """Open, and where needed decode, the files of `videos` in threads, under a progress bar."""
        read = partial(self._open, files=files, split=split)
        yield from read_all(videos, read, len(videos), self.num_workers, f"Reading {split} videos")

    def _open_all(self, videos: Sequence[Video], files: dict[str, Path], split: str) -> list[Video]:
        opened = list(self.open_each(videos, files, split))
        problems = [item.problem for item in opened if item.problem is not None]
        if problems:
            others = f" (and {len(problems) - 1} more videos; `check` lists them all)" if len(problems) > 1 else ""
            raise DataError(f"{problems[0]}{others}")
        self._sources |= {item.video.id: item.source for item in opened if item.source is not None}
        widths = {source.shape[1] for source in self._sources.values() if isinstance(source, FeatureArray)}
        if len(widths) > 1:
            raise DataError(f"{self.features}: features of {_listed(sorted(widths))} channels; expected one number")
        return [item.video for item in opened]

    def _open(self, video: Video, files: dict[str, Path], split: str) -> _Opened:
        path = files[video.id]
        try:
            if self.features is not None:
                return self._with_features(video, FeatureArray(path))
            if self.frames is not None and split != "predict":
                source = open_frames(path, self.sampling.size)
                fps = self.rate_of_frames(video, len(source))
            else:
                decoded, source = self._decoded(path, split)
                fps = decoded.fps
                video = replace(video, duration=video.duration or decoded.duration)
            if min(source.shape[1:]) < self.crop_size:
                raise DataError(f"{path}: frames of {source.shape[1:]} pixels; expected at least {self.crop_size}")
        except DataError as error:
            return _Opened(video, problem=str(error))
        return _Opened(replace(video, fps=fps, num_frames=len(source)), source)

    def _decoded(self, path: Path, split: str) -> tuple[Decoded, FrameArray]:
        """Frames of a video file, decoded now unless they were before."""
        root = Path(self.cache) if self.cache else Path(self.root, "decoded")
        target = root / self.sampling.name / ("predict" if split == "predict" else "") / f"{path.stem}.npy"
        decoded = decoded_before(path, target)
        if decoded is None:
            try:
                decoded = decode_to_file(path, target, self.sampling)
            except OSError as error:
                raise DataError(f"{target}: cannot be written ({error}); data.cache names another folder") from error
        return decoded, FrameArray(target)

    def _with_features(self, video: Video, features: FeatureArray) -> _Opened:
        fps = self.feature_fps or video.native_fps
        if fps is None:
            raise DataError(f"{features.path}: the annotations state no rate of its video; expected data.feature_fps")
        # The middle of a feature's frames is where the network takes it to stand.
        first_frame = (self.feature_window - self.feature_stride) / 2
        num_frames = len(features) * self.feature_stride
        return _Opened(replace(video, fps=fps, num_frames=num_frames, first_frame=first_frame), features)

    def check(self) -> bool:
        """Read the whole data set, print what is in it and everything that is wrong; True if nothing is."""
        from tasks.video.check import check_dataset, print_result

        result = check_dataset(self)
        print_result(result)
        return not result.problems


def inside(video: Video) -> tuple[Any, Any]:
    """Instances (n, 2) in sampled frames, and labels, without what lies behind the end of the video.

    THUMOS14's own frames are left as they are, for parity.
    """
    segments, labels = video.frames(), video.labels
    if video.official_frames is not None:
        return segments, labels
    segments = np.clip(segments, 0, video.num_frames)
    kept = segments[:, 1] > segments[:, 0]
    return segments[kept], labels[kept]


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise DataError(f"{path}: folder not found")
    return path


def _listed(values: Iterable[int]) -> str:
    return " and ".join(str(value) for value in values)
