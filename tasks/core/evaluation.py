"""Per-sample records of an evaluation, merged over processes by id: exact for any number of them."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
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
        self._kept: list[Sample] = []  # best first; the k best and k worst so far

    def add(self, id: str, score: float, payload: Callable[[], Any]) -> None:
        """Consider one sample; `payload` is called only if it is kept, and should return small arrays."""
        score = float(score)
        if math.isnan(score) or any(sample.id == id for sample in self._kept):
            return
        place = bisect.bisect(self._kept, _rank(Sample(id, score, None)), key=_rank)
        if len(self._kept) == 2 * self.k:
            if place == self.k:  # between the best and the worst
                return
            del self._kept[self.k - 1 if place < self.k else self.k]
            place -= place > self.k
        self._kept.insert(place, Sample(id, score, payload()))

    def gather(self) -> tuple[list[Sample], list[Sample]]:
        """The best (best first) and worst samples (worst first) of all processes; every process must call it.

        No sample is in both lists: with fewer than 2k samples the best are chosen first.
        """
        samples = {sample.id: sample for part in all_gather(self._kept) for sample in part}
        ranked = sorted(samples.values(), key=_rank)
        return ranked[: self.k], ranked[self.k :][::-1][: self.k]


def all_gather(value: Any) -> list[Any]:
    """The values of all processes in rank order; `[value]` without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts


def _rank(sample: Sample) -> tuple[float, str]:
    return -sample.score, sample.id


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
