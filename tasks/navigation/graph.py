"""Navigation graphs: viewpoints of a building, which of them are adjacent, shortest paths.

A scan is one file ``<scan>_connectivity.json`` of the Matterport3D simulator: a list with, per viewpoint, `image_id`,
`pose` (4 x 4 camera to world, row-major, metres, z up), `included` and `unobstructed` (adjacency by index in the file).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra

from tasks.core.data import DataError

SUFFIX = "_connectivity.json"


class ScanGraph:
    """The viewpoints of one scan, by their number in the file.

    Distances and paths are geodesic: Dijkstra over the included viewpoints that have an edge, Euclidean lengths in
    metres. Other viewpoints are infinitely far from all others.

    Args:
        scan: Name of the scan.
        viewpoints: Ids of all n viewpoints, in the order of the file.
        positions: (n, 3) metres.
        included: (n,) viewpoints that an agent may visit.
        unobstructed: (n, n) adjacency.
    """

    def __init__(
        self,
        scan: str,
        viewpoints: Sequence[str],
        positions: NDArray[np.float64],
        included: NDArray[np.bool_],
        unobstructed: NDArray[np.bool_],
    ) -> None:
        self.scan = scan
        self.viewpoints = tuple(viewpoints)
        self.positions = positions
        self.included = included
        # What the simulator lets an agent walk to; the diagonal of a file has no meaning.
        self.edges = unobstructed & included[None, :] & included[:, None] & ~np.eye(len(included), dtype=bool)
        self.index = {viewpoint: number for number, viewpoint in enumerate(self.viewpoints)}

    def __len__(self) -> int:
        return len(self.viewpoints)

    def number(self, viewpoint: str) -> int:
        """The number of a viewpoint; raises `DataError` if the scan has none of this id or excludes it."""
        if viewpoint not in self.index:
            raise DataError(f"viewpoint {viewpoint!r} is not in the graph of scan {self.scan}")
        number = self.index[viewpoint]
        if not self.included[number]:
            raise DataError(
                f"viewpoint {viewpoint} of scan {self.scan} is excluded from the graph; it cannot be visited"
            )
        return number

    @cached_property
    def neighbours(self) -> NDArray[np.int64]:
        """(n, D) numbers of adjacent viewpoints in the order of the file, padded with -1 to the largest degree D."""
        degree = self.edges.sum(axis=1)
        table = np.full((len(self), max(int(degree.max(initial=0)), 1)), -1)
        for number in range(len(self)):
            table[number, : degree[number]] = np.flatnonzero(self.edges[number])
        return table

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """Viewpoints that have an edge: those between which distances are finite."""
        connected = np.flatnonzero((self.edges | self.edges.T).any(axis=1))
        return tuple(self.viewpoints[number] for number in connected)

    @cached_property
    def num_edges(self) -> int:
        """Number of undirected edges."""
        return int(np.triu(self.edges | self.edges.T).sum())

    @cached_property
    def _shortest(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Distances (n, n) and predecessors (n, n): [a, b] is the node before b on the path from a."""
        rows, columns = np.nonzero(self.edges | self.edges.T)
        x, y, z = (self.positions[rows] - self.positions[columns]).T
        lengths = np.sqrt(x**2 + y**2 + z**2)
        graph = csr_matrix((lengths, (rows, columns)), shape=(len(self), len(self)))
        distances, predecessors = dijkstra(graph, return_predecessors=True)
        isolated = np.array([viewpoint not in set(self.nodes) for viewpoint in self.viewpoints])
        distances[isolated, isolated] = np.inf
        return distances, predecessors.astype(np.int64)

    @property
    def distances(self) -> NDArray[np.float64]:
        """(n, n) geodesic distances in metres."""
        return self._shortest[0]

    @cached_property
    def next_hop(self) -> NDArray[np.int64]:
        """(n, n): the first node after a on the shortest path from a to b; a itself for a = b, -1 without a path."""
        predecessors = self._shortest[1]
        start = np.arange(len(self))[:, None]
        # Walk back from b until the node whose predecessor is a; all pairs at once.
        hop = np.broadcast_to(np.arange(len(self)), predecessors.shape).copy()
        while True:
            before = np.take_along_axis(predecessors, hop, axis=1)
            moving = (before >= 0) & (before != start)
            if not moving.any():
                break
            hop = np.where(moving, before, hop)
        reachable = np.isfinite(self.distances)
        return np.where(reachable, hop, -1)

    def distance(self, a: str, b: str) -> float:
        """Geodesic distance between two viewpoints in metres, infinite without a path."""
        return float(self.distances[self.number(a), self.number(b)])

    def shortest_path(self, a: str, b: str) -> list[str]:
        """The viewpoints from `a` to `b`, both included; raises `DataError` if there is no path."""
        start, goal = self.number(a), self.number(b)
        if start != goal and not np.isfinite(self.distances[start, goal]):
            raise DataError(f"scan {self.scan}: no path leads from viewpoint {a} to {b}")
        path = [goal]
        while path[-1] != start:
            path.append(int(self._shortest[1][start, path[-1]]))
        return [self.viewpoints[number] for number in reversed(path)]

    def adjacent(self, a: str, b: str) -> bool:
        """Whether an agent can walk from `a` to `b` in one step."""
        return bool(self.edges[self.number(a), self.number(b)])


def read_graph(path: Path, scan: str) -> ScanGraph:
    """Read one connectivity file; raises `DataError` naming the file and the field that is not as expected."""
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, list) or not content:
        raise DataError(f"{path}: expected a list of viewpoints")
    count = len(content)
    for number, entry in enumerate(content):
        if problem := _problem_of(entry, count):
            raise DataError(f"{path}: viewpoint {number}: {problem}")
    viewpoints = [entry["image_id"] for entry in content]
    if len(set(viewpoints)) < count:
        raise DataError(f"{path}: an image_id occurs twice; expected unique ids")
    poses = np.array([entry["pose"] for entry in content], dtype=np.float64)
    return ScanGraph(
        scan,
        viewpoints,
        poses[:, [3, 7, 11]],
        np.array([entry["included"] for entry in content], dtype=bool),
        np.array([entry["unobstructed"] for entry in content], dtype=bool),
    )


def _problem_of(entry: Any, count: int) -> str | None:
    if not isinstance(entry, dict):
        return f"expected an object, got {type(entry).__name__}"
    name = entry.get("image_id")
    if not isinstance(name, str) or not name or Path(name).name != name:
        return "image_id: expected the viewpoint's id"
    pose = entry.get("pose")
    if (
        not isinstance(pose, list)
        or len(pose) != 16
        or not all(type(x) in (int, float) and np.isfinite(x) for x in pose)
    ):
        return "pose: expected 16 numbers"
    if not isinstance(entry.get("included"), bool):
        return "included: expected true or false"
    flags = entry.get("unobstructed")
    if not isinstance(flags, list) or len(flags) != count or not all(type(flag) is bool for flag in flags):
        return f"unobstructed: expected {count} times true or false, one per viewpoint"
    return None


class Graphs(Mapping[str, ScanGraph]):
    """The graphs of a folder with ``<scan>_connectivity.json`` files, each read when it is first asked for."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._graphs: dict[str, ScanGraph] = {}

    def __getitem__(self, scan: str) -> ScanGraph:
        if scan not in self._graphs:
            path = self.folder / f"{scan}{SUFFIX}"
            if Path(scan).name != scan or not path.is_file():
                raise DataError(f"scan {scan!r}: no file {path}")
            self._graphs[scan] = read_graph(path, scan)
        return self._graphs[scan]

    def __contains__(self, scan: object) -> bool:
        return isinstance(scan, str) and Path(scan).name == scan and (self.folder / f"{scan}{SUFFIX}").is_file()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(path.name.removesuffix(SUFFIX) for path in self.folder.glob(f"*{SUFFIX}")))

    def __len__(self) -> int:
        return sum(1 for _ in iter(self))
