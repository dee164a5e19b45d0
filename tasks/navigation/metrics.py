"""Navigation metrics in torchmetrics' form: records of episodes in, figures of each split out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchmetrics import Metric

from tasks.core.errors import UserError
from tasks.core.evaluation import gather_by_id
from tasks.navigation.evaluators import Evaluation, Evaluator


class NavigationMetrics(Metric):
    """Scores the trajectories of one or several splits, each by its own `Evaluator`.

    Records are kept by the keys of their episodes and merged over processes by key, each counted once, so the figures
    do not depend on the number of processes. A split without any record is left out of the result; one with some must
    have all.

    Attributes:
        evaluators: What scores a split, by name; to be set before `compute`.
        evaluations: The figures per instruction of the last `compute`.
        gathered: The records of all processes of the last `compute`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(self, evaluators: Mapping[str, Evaluator] | None = None) -> None:
        super().__init__(sync_on_compute=False)  # `compute` merges the records itself
        self.evaluators: dict[str, Evaluator] = dict(evaluators or {})
        self.records: dict[str, Any] = {}
        self.evaluations: dict[str, Evaluation] = {}
        self.gathered: dict[str, Any] = {}

    def update(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Add records by key: ``{"trajectory": rows of viewpoint, heading, elevation, "object": id or None, ...}``."""
        if repeated := records.keys() & self.records.keys():
            raise UserError(f"episode {min(repeated)!r} was evaluated twice; expected each once")
        self.records.update(records)

    def compute(self) -> dict[str, float]:
        """Return the figures as ``<split>/<name>``: fractions, and metres for TL, NE and GP."""
        self.gathered = gather_by_id(self.records)
        by_split: dict[str, dict[str, Any]] = {}
        for key, record in self.gathered.items():
            split, _, id = key.partition("/")
            by_split.setdefault(split, {})[id] = record
        if unknown := by_split.keys() - self.evaluators.keys():
            raise UserError(f"records of split {min(unknown)!r}; expected {', '.join(self.evaluators) or 'no'} splits")
        self.evaluations = {
            split: evaluator.evaluate(by_split[split])
            for split, evaluator in self.evaluators.items()
            if split in by_split
        }
        return {
            f"{split}/{name}": value
            for split, evaluation in self.evaluations.items()
            for name, value in evaluation.summary.items()
        }

    def reset(self) -> None:
        """Forget the records; what the last `compute` found is kept."""
        super().reset()
        self.records = {}
