"""Mean average precision of temporal action detection over processes, equal to the official evaluators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torchmetrics import Metric

from tasks.core.errors import UserError
from tasks.core.evaluation import gather_by_id
from tasks.video.evaluators import THUMOS14_TIOUS, Evaluation, EvaluatorName, evaluate, metrics_by_name
from tasks.video.predictions import Detections, Merge, as_rows, merge_windows, window_key
from tasks.video.recall import average_recall
from tasks.video.segments import SegmentTable


class TemporalDetectionMetric(Metric):
    """Mean AP of detections that come window by window, on any process and in any order.

    Detections are gathered by video and window, joined in the order of time and handed to `merge`, so that the result
    is the same number for any number of processes. Set `ground_truth` before `compute`; `last` then holds the whole
    evaluation and `videos` what was evaluated, by video.

    Args:
        class_names: Names of the labels 0..K-1.
        evaluator: The official program whose rules count: ``afsd``, ``opentad`` or ``activitynet``.
        tious: Thresholds of the temporal IoU.
        merge: Maps a video and the detections of all of its windows to those that remain (soft-NMS).
        proposals: Numbers N at which the average recall AR@N is given.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(
        self,
        class_names: Sequence[str],
        evaluator: EvaluatorName = "afsd",
        tious: Sequence[float] = THUMOS14_TIOUS,
        merge: Merge | None = None,
        proposals: Sequence[int] = (10, 100),
    ) -> None:
        super().__init__(dist_sync_on_step=False, sync_on_compute=False)  # records are gathered by name instead
        self.class_names = list(class_names)
        self.evaluator = evaluator
        self.tious = tuple(tious)
        self.merge = merge
        self.proposals = tuple(proposals)
        self.ground_truth: SegmentTable | None = None
        self.last: Evaluation | None = None
        self.videos: dict[str, Detections] = {}
        self._windows: dict[str, Detections] = {}

    def update(self, id: str, offset: float, segments: Tensor, scores: Tensor, labels: Tensor) -> None:
        """Add the detections of the window of video `id` that begins at frame `offset`.

        Args:
            id: The name of the video.
            offset: First frame of the window.
            segments: (n, 2) in seconds.
            scores: (n,).
            labels: (n,) 0..K-1.
        """
        columns = {"segments": segments, "scores": scores, "labels": labels}
        if len({len(column) for column in columns.values()}) > 1:
            raise UserError(f"{id}: {len(segments)} segments, {len(scores)} scores and {len(labels)} labels")
        self._windows[window_key(id, offset)] = {
            name: column.detach().cpu().numpy() if isinstance(column, Tensor) else np.asarray(column)
            for name, column in columns.items()
        }

    def compute(self) -> dict[str, float]:
        """Return ``mAP``, ``mAP@<tIoU>`` and ``AR@<N>`` as fractions; every process must call it."""
        if self.ground_truth is None:
            raise UserError("no ground truth was set; expected the instances of the evaluated videos")
        self.videos = merge_windows(gather_by_id(self._windows), self.merge)
        rows = as_rows(self.videos, self.class_names)
        predictions = SegmentTable.from_rows(rows, videos=tuple(self.videos), classes=self.class_names)
        self.last = evaluate(self.ground_truth, predictions, self.tious, self.evaluator)
        recall = average_recall(self.last, largest=max(self.proposals)) if self.proposals else None
        at = {f"AR@{number}": recall.at(number) for number in self.proposals} if recall else {}
        return metrics_by_name(self.last) | at

    def reset(self) -> None:
        """Forget the windows seen so far; `last` and `videos` stay for the report."""
        super().reset()
        self._windows = {}
