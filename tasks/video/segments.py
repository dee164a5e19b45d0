"""Tables of labelled time intervals: instances of the ground truth, or detections with scores. Needs only NumPy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.core.errors import UserError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Row = tuple[str, str, float, float, float]


@dataclass(frozen=True)
class SegmentTable:
    """N intervals as columns; `video` and `label` are indices into `videos` and `classes`.

    Times are seconds. A table may name videos and classes that no row has: videos without actions, classes that do not
    occur. Instances have a score of 1.
    """

    videos: tuple[str, ...]
    classes: tuple[str, ...]
    video: Integers  # (N,)
    label: Integers  # (N,)
    start: Floats  # (N,)
    end: Floats  # (N,)
    score: Floats  # (N,)

    def __len__(self) -> int:
        return len(self.video)

    @classmethod
    def from_rows(cls, rows: Iterable[Row], videos: Sequence[str] = (), classes: Sequence[str] = ()) -> SegmentTable:
        """Make a table of rows (video, class, start, end, score); names not in `videos` or `classes` are appended.

        Raises:
            UserError: A time or score is not finite.
        """
        rows = list(rows)
        video_index = {name: i for i, name in enumerate(videos)}
        class_index = {name: i for i, name in enumerate(classes)}
        video = [video_index.setdefault(row[0], len(video_index)) for row in rows]
        label = [class_index.setdefault(row[1], len(class_index)) for row in rows]
        start, end, score = np.array([row[2:] for row in rows], dtype=np.float64).reshape(-1, 3).T.copy()
        table = cls(tuple(video_index), tuple(class_index), _integers(video), _integers(label), start, end, score)
        table.check()
        return table

    def check(self) -> None:
        """Raise `UserError`, naming video and class, where a time or score is NaN or infinite."""
        finite = np.isfinite(self.start) & np.isfinite(self.end) & np.isfinite(self.score)
        if not finite.all():
            row = int(np.flatnonzero(~finite)[0])
            raise UserError(
                f"video {self.videos[self.video[row]]!r}, class {self.classes[self.label[row]]!r}: segment"
                f" [{self.start[row]}, {self.end[row]}] with score {self.score[row]}; expected finite numbers"
            )

    def take(self, rows: NDArray[np.bool_] | Integers) -> SegmentTable:
        """Select rows by mask or index; the names stay."""
        return SegmentTable(
            self.videos,
            self.classes,
            self.video[rows],
            self.label[rows],
            self.start[rows],
            self.end[rows],
            self.score[rows],
        )

    def renamed(self, videos: Sequence[str], classes: Sequence[str]) -> SegmentTable:
        """The same rows with the indices of other lists of names; a name not in them becomes -1."""
        video, label = _places(self.videos, videos)[self.video], _places(self.classes, classes)[self.label]
        return SegmentTable(tuple(videos), tuple(classes), video, label, self.start, self.end, self.score)


def _places(names: Sequence[str], others: Sequence[str]) -> Integers:
    """Index in `others` of each name, or -1."""
    place = {name: i for i, name in enumerate(others)}
    return _integers([place.get(name, -1) for name in names])


def _integers(values: Sequence[int]) -> Integers:
    return np.array(values, dtype=np.int64)
