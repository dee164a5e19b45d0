"""Paths in a navigation graph as arrays, and what is measured on many of them at once.

Arrays are laid out (length, number of paths): a loop over steps then works on contiguous rows. Paths are padded with
their last viewpoint, which changes neither lengths nor smallest distances.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.core.errors import UserError
from tasks.navigation.graph import ScanGraph


class Paths(NamedTuple):
    """Numbers of viewpoints (L, N), padded with the last one of each path, and the lengths (N,) of the paths."""

    nodes: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @property
    def first(self) -> NDArray[np.int64]:
        """The first viewpoint of each path."""
        return self.nodes[0]

    @property
    def last(self) -> NDArray[np.int64]:
        """The last viewpoint of each path."""
        return self.nodes[-1]


def to_paths(
    graph: ScanGraph, paths: Sequence[Sequence[Any]], names: Sequence[str], drop_repeats: bool = False
) -> Paths:
    """Numbers of the viewpoints of `paths`, optionally without consecutive repeats (turns of the camera).

    All paths are lists of viewpoints, or all are lists of rows that begin with one.

    Raises:
        UserError: A path is empty or visits a viewpoint that its scan lacks; `names` are used to say which.
    """
    try:
        lengths = np.fromiter(map(len, paths), dtype=np.int64, count=len(paths))
        rows: Iterable[Any] = itertools.chain.from_iterable(paths)
        if not any(isinstance(path[0], str) for path in paths[:1]):
            rows = map(operator.itemgetter(0), rows)
        flat = np.fromiter(map(graph.index.__getitem__, rows), dtype=np.int64, count=int(lengths.sum()))
    except (KeyError, TypeError, IndexError):
        raise UserError(_problem_of(graph, paths, names)) from None
    if not lengths.all():
        raise UserError(_problem_of(graph, paths, names))
    owner = np.repeat(np.arange(len(paths)), lengths)
    if drop_repeats and len(flat):
        keep = np.append(True, (flat[1:] != flat[:-1]) | (owner[1:] != owner[:-1]))
        flat, owner = flat[keep], owner[keep]
        lengths = np.bincount(owner, minlength=len(paths))
    ends = np.cumsum(lengths)
    steps = np.arange(lengths.max(initial=1))[:, None]
    return Paths(flat[np.minimum(ends - lengths + steps, ends - 1)], lengths)


def _problem_of(graph: ScanGraph, paths: Sequence[Any], names: Sequence[str]) -> str:
    """What is wrong with the first path that is not as expected."""
    for name, path in zip(names, paths, strict=True):
        if not isinstance(path, list | tuple) or not path:
            return f"{name}: trajectory: expected a list of at least one viewpoint, got {str(path)[:60]!r}"
        for row in path:
            node = row[0] if isinstance(row, list | tuple) and row else row
            if not isinstance(node, str):
                return f"{name}: trajectory: expected rows of viewpoint, heading and elevation, got {str(row)[:60]!r}"
            if node not in graph.index:
                return f"{name}: viewpoint {node!r} is not in the graph of scan {graph.scan}"
    return "trajectories mix viewpoints with rows; expected the same in all"


def path_lengths(distances: NDArray[np.float64], paths: Paths) -> NDArray[np.float64]:
    """Metres (N,): the sum of the geodesic distances between consecutive viewpoints."""
    return distances[paths.nodes[:-1], paths.nodes[1:]].sum(axis=0)


def pairwise_distances(distances: NDArray[np.float64], paths: Paths, references: Paths) -> NDArray[np.float64]:
    """Metres (L, G, N) between every viewpoint of each path and every one of its reference."""
    return distances.take(paths.nodes[:, None] * len(distances) + references.nodes[None])


def dynamic_time_warping(
    pairs: NDArray[np.float64], lengths: NDArray[np.int64], references: NDArray[np.int64]
) -> NDArray[np.float64]:
    """DTW costs (N,) of `pairs` (L, G, N) with the lengths (N,) of paths and references (arXiv 1907.05446, eq. 3).

    D(i, j) = d(i, j) + min(D(i-1, j), D(i, j-1), D(i-1, j-1)), with D(0, 0) = 0 and infinite borders.
    """
    longest, width, count = pairs.shape
    row = np.full((width + 1, count), np.inf)
    row[0] = 0.0
    result = np.empty(count)
    for i in range(longest):
        above, row = row, np.empty_like(row)
        row[0] = np.inf
        diagonal = np.minimum(above[1:], above[:-1])
        for j in range(width):
            np.add(pairs[i, j], np.minimum(diagonal[j], row[j]), out=row[j + 1])
        ended = np.flatnonzero(lengths == i + 1)
        result[ended] = row[references[ended], ended]
    return result


def coverage_by_length_score(
    pairs: NDArray[np.float64],
    lengths: NDArray[np.int64],
    path_length: NDArray[np.float64],
    reference_length: NDArray[np.float64],
    threshold: float,
) -> NDArray[np.float64]:
    """CLS (N,) of `pairs` (L, G, N); `lengths` (N,) of the references in nodes (arXiv 1905.12255, eq. 5 to 8).

    NaN where both the reference and the path stay where they are.
    """
    nearness = np.exp(-pairs.min(axis=0) / threshold)  # (G, N)
    counted = np.arange(len(nearness))[:, None] < lengths
    coverage = np.where(counted, nearness, 0).sum(axis=0) / lengths
    expected = coverage * reference_length
    with np.errstate(invalid="ignore"):
        return coverage * expected / (expected + np.abs(expected - path_length))
