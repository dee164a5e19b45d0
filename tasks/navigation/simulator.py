"""The Matterport3D simulator without images: poses, camera moves and navigable viewpoints of a batch of agents.

States equal those of the official C++ simulator (github.com/peteanderson80/Matterport3DSimulator), in both of its
versions and all of its modes, float32 rounding included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tasks.core.errors import UserError
from tasks.navigation.graph import ScanGraph
from tasks.navigation.sightlines import NUM_HEADINGS, STEP, Camera, Panorama, Places, Sightlines, navigable


class Location(NamedTuple):
    """A viewpoint that one move reaches; the first one of a state is where the agent is, with zeros."""

    viewpoint: str
    number: int  # in the connectivity file (`ix`)
    rel_heading: float
    rel_elevation: float
    rel_distance: float


@dataclass(frozen=True)
class State:
    """One agent: position in metres, angles in radians, discrete view (0 for a continuous camera)."""

    scan: str
    viewpoint: str
    number: int
    position: tuple[float, float, float]
    heading: float
    elevation: float
    view_index: int
    step: int
    navigable: tuple[Location, ...]


class Simulator:
    """A batch of agents in navigation graphs.

    Args:
        graphs: Graphs by scan.
        camera: Image size and field of view; they decide which viewpoints are in view.
        discretized: Camera at 12 headings and 3 elevations, 30 degrees apart, or at any angle.
        restricted: Agents may only walk to viewpoints in view.
        elevation_limits: Lowest and highest elevation of a continuous camera, in radians.
    """

    def __init__(
        self,
        graphs: Mapping[str, ScanGraph],
        camera: Camera | None = None,
        discretized: bool = True,
        restricted: bool = True,
        elevation_limits: tuple[float, float] = (-0.94, 0.94),
    ) -> None:
        self.graphs = graphs
        self.camera = camera or Camera()
        self.discretized = discretized
        self.restricted = restricted
        self.elevation_limits = elevation_limits
        self._scans: dict[str, int] = {}  # number of the first viewpoint among those of all scans seen so far
        # Viewpoints are numbered over all scans here.
        self._places = Places(np.zeros((0, 3), dtype=np.float32), np.zeros((0, 1), dtype=np.int64))
        # What each view sees, by (viewpoint, view, row), and how much that is.
        self._seen = np.zeros((0, 36, 1), dtype=np.int32)
        self._count = np.zeros((0, 36), dtype=np.int32)
        self.scans: list[str] = []
        self._offset = np.zeros(0, dtype=np.int64)
        self._node = np.zeros(0, dtype=np.int64)
        self._level = np.zeros(0, dtype=np.int64)
        self.heading: NDArray[np.floating] = np.zeros(0)
        self.elevation: NDArray[np.floating] = np.zeros(0)
        self.view_index = np.zeros(0, dtype=np.int64)
        self.step = np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.scans)

    @property
    def number(self) -> NDArray[np.int64]:
        """(B,) number of each agent's viewpoint in its scan."""
        return self._node - self._offset

    @property
    def viewpoints(self) -> list[str]:
        """Ids of the agents' viewpoints."""
        return [self.graphs[scan].viewpoints[i] for scan, i in zip(self.scans, self.number, strict=True)]

    def new_episodes(
        self, scans: Sequence[str], viewpoints: Sequence[str], headings: ArrayLike, elevations: ArrayLike
    ) -> None:
        """Place one agent per scan; raises `DataError` for an unknown scan and for unknown or excluded viewpoints."""
        numbers = [self.graphs[scan].number(viewpoint) for scan, viewpoint in zip(scans, viewpoints, strict=True)]
        for scan in dict.fromkeys(scans):
            if scan not in self._scans:
                self._add(scan)
        self.scans = list(scans)
        self._offset = np.array([self._scans[scan] for scan in scans], dtype=np.int64)
        self._node = self._offset + np.array(numbers, dtype=np.int64)
        self.step = np.zeros(len(scans), dtype=np.int64)
        self._turn_to(np.asarray(headings, dtype=np.float64), np.asarray(elevations, dtype=np.float64))

    def make_actions(self, index: ArrayLike, heading: ArrayLike, elevation: ArrayLike) -> None:
        """Move every agent to row `index` of its navigable viewpoints and turn its camera by the other two, in radians.

        Of a turn of a discretised camera only the sign counts. All are (B,) integers and floats; nobody moves if any
        index is outside the rows of its agent, which raises `UserError`.
        """
        index = np.asarray(index, dtype=np.int64)
        turn, tilt = np.asarray(heading, dtype=np.float64), np.asarray(elevation, dtype=np.float64)
        if self.discretized:
            self._check(index, self._rows())
            seen = self._seen[self._node, self.view_index, np.maximum(index - 1, 0)]
            self._node = np.where(index > 0, seen, self._node)
            column = (self.view_index % NUM_HEADINGS + np.sign(turn).astype(np.int64)) % NUM_HEADINGS
            self._level = np.clip(self._level + np.sign(tilt).astype(np.int64), 0, 2)
            self._look(column)
        else:
            moving = index != 0
            if moving.any():
                seen = self.navigable()
                self._check(index, seen.count + 1)
                chosen = seen.number[np.arange(len(self)), np.maximum(index - 1, 0)]
                self._node = np.where(moving, self._offset + chosen, self._node)
            self._turn_to(self.heading + turn, self.elevation + tilt)
        self.step += 1

    def navigable(self) -> Sightlines:
        """The viewpoints, besides their own, to which the agents may move; arrays (B, D)."""
        seen = navigable(self._places, self.camera, self._node, self.heading, self.elevation, self.restricted)
        return replace(seen, number=np.where(seen.number >= 0, seen.number - self._offset[:, None], -1))

    def states(self) -> list[State]:
        """The state of every agent."""
        seen = self.navigable()
        return [self._state(row, seen) for row in range(len(self))]

    def _state(self, row: int, seen: Sightlines) -> State:
        graph = self.graphs[self.scans[row]]
        number = int(self.number[row])
        viewpoint = graph.viewpoints[number]
        locations = [Location(viewpoint, number, 0.0, 0.0, 0.0)]
        for column in range(int(seen.count[row])):
            other = int(seen.number[row, column])
            angles = (float(values[row, column]) for values in (seen.heading, seen.elevation, seen.distance))
            locations.append(Location(graph.viewpoints[other], other, *angles))
        x, y, z = graph.positions[number].astype(np.float32).tolist()
        return State(
            self.scans[row],
            viewpoint,
            number,
            (x, y, z),
            float(self.heading[row]),
            float(self.elevation[row]),
            int(self.view_index[row]),
            int(self.step[row]),
            tuple(locations),
        )

    def _rows(self) -> NDArray[np.integer]:
        return self._count[self._node, self.view_index] + 1

    def _check(self, index: NDArray[np.int64], rows: NDArray[np.integer]) -> None:
        wrong = (index < 0) | (index >= rows)
        if wrong.any():
            agent = int(np.argmax(wrong))
            raise UserError(
                f"action index {index[agent]} of agent {agent} at viewpoint {self.viewpoints[agent]}: "
                f"expected 0 to {rows[agent] - 1}, a row of its navigable viewpoints"
            )

    def _turn_to(self, heading: NDArray[np.float64], elevation: NDArray[np.float64]) -> None:
        """Point the cameras; discretised ones to the centre of the nearest view."""
        heading = np.fmod(heading, 2 * np.pi)
        heading = np.where(heading < 0, heading + 2 * np.pi, heading)
        if self.discretized:
            self._level = np.where(elevation < -STEP / 2, 0, np.where(elevation > STEP / 2, 2, 1))
            self._look(np.floor(heading / STEP + 0.5).astype(np.int64) % NUM_HEADINGS)
        else:
            self.heading = heading
            self.elevation = np.clip(elevation, *self.elevation_limits)
            self.view_index = np.zeros(len(self), dtype=np.int64)

    def _look(self, column: NDArray[np.int64]) -> None:
        self.view_index = column + NUM_HEADINGS * self._level
        self.heading = column * STEP
        self.elevation = (self._level - 1) * STEP

    def _add(self, scan: str) -> None:
        """Note where the viewpoints of a scan are and, for discrete views, what each of them sees."""
        graph = self.graphs[scan]
        start = len(self._places.positions)
        self._scans[scan] = start
        own = Places.of(graph)
        self._places = Places(
            np.concatenate([self._places.positions, own.positions]),
            _stack(self._places.neighbours, np.where(own.neighbours >= 0, own.neighbours + start, -1)),
        )
        if self.discretized:
            seen = Panorama(graph, self.camera, self.restricted).views
            self._seen = _stack(self._seen, (seen.number + start).astype(np.int32))
            self._count = np.concatenate([self._count, seen.count.astype(np.int32)])


def _stack(above: NDArray, below: NDArray) -> NDArray:
    """Two arrays one after the other, the last axis padded with -1 to the wider one."""
    width = max(above.shape[-1], below.shape[-1])
    pad = [(0, 0)] * (above.ndim - 1)
    return np.concatenate([np.pad(x, [*pad, (0, width - x.shape[-1])], constant_values=-1) for x in (above, below)])
