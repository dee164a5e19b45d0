"""Per-sample records of an evaluation, merged over processes by id: exact for any number of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tasks.core.errors import UserError


def gather_by_id(records: dict[str, Any]) -> dict[str, Any]:
    """The records of all processes in one dictionary sorted by id, the same on every process.

    Every process must call it, also one without records. Without a process group the records are only sorted.

    Raises:
        UserError: An id came with two different values, so two samples share it.
    """
    merged: dict[str, Any] = {}
    for part in all_gather(records):
        for key, value in part.items():
            if key in merged and not _equal(merged[key], value):
                raise UserError(f"sample id {key!r} occurs twice with different results; expected unique ids")
            merged[key] = value
    return dict(sorted(merged.items()))


@dataclass(frozen=True)
class Sample:
    """One evaluated sample: its id, its score (higher is better) and what is needed to draw it."""

    id: str
    score: float
    payload: Any


class Extremes:
    """The `k` best and `k` worst samples of an evaluation, in bounded memory on every process.

    Equal scores are ordered by id, so the selection does not depend on the number of processes or on the order of
    the samples. Samples whose score is NaN (nothing to score) are left out, a repeated id counts once.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self._best: list[Sample] = []
        self._worst: list[Sample] = []

    def add(self, id: str, score: float, payload: Callable[[], Any]) -> None:
        """Consider one sample; `payload` is called only if it is kept, and should return small arrays."""
        score = float(score)
        if math.isnan(score) or any(sample.id == id for sample in [*self._best, *self._worst]):
            return
        candidate = Sample(id, score, payload)
        best = _first([*self._best, candidate], self.k, _descending)
        worst = _first([*self._worst, candidate], self.k, _ascending)
        if any(sample is candidate for sample in [*best, *worst]):
            kept = Sample(id, score, payload())
            self._best = [kept if sample is candidate else sample for sample in best]
            self._worst = [kept if sample is candidate else sample for sample in worst]

    def gather(self) -> tuple[list[Sample], list[Sample]]:
        """The best (best first) and worst samples (worst first) of all processes; every process must call it.

        No sample is in both lists: with fewer than 2k samples the best are chosen first.
        """
        samples = {s.id: s for part in all_gather([*self._best, *self._worst]) for s in part}
        best = _first(samples.values(), self.k, _descending)
        chosen = {sample.id for sample in best}
        worst = _first((s for s in samples.values() if s.id not in chosen), self.k, _ascending)
        return best, worst


def all_gather(value: Any) -> list[Any]:
    """The values of all processes in rank order; `[value]` without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts


def _first(samples: Iterable[Sample], k: int, order: Callable[[Sample], tuple[float, str]]) -> list[Sample]:
    return sorted(samples, key=order)[:k]


def _descending(sample: Sample) -> tuple[float, str]:
    return -sample.score, sample.id


def _ascending(sample: Sample) -> tuple[float, str]:
    return sample.score, sample.id


def _equal(a: Any, b: Any) -> bool:
    """Exact equality through dictionaries, sequences, arrays and tensors; NaN equals NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        a, b = a.detach().cpu().numpy(), b.detach().cpu().numpy()
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b or (a != a and b != b))
