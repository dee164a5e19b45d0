"""Which neighbours a camera sees, and where in its view: the geometry of the Matterport3D simulator.

Headings are clockwise from +y seen from above, elevations upwards, both in radians. The official C++ code computes in
float32 and float64 by turns; which number has which precision decides who is seen at the border of a view, so it is
the same here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.navigation.graph import ScanGraph

NUM_HEADINGS = 12
NUM_VIEWS = 36  # of a discretised camera: 12 headings looking down, then level, then up
STEP = np.pi / 6  # between the headings, and between the elevations, of neighbouring views


@dataclass(frozen=True)
class Camera:
    """Image size in pixels and vertical field of view in radians."""

    width: int = 640
    height: int = 480
    vfov: float = np.pi / 3

    @property
    def half_hfov(self) -> float:
        """Half of the simulator's horizontal field of view, which is linear in the aspect ratio."""
        return self.vfov * self.width / self.height / 2


@dataclass(frozen=True)
class Sightlines:
    """Neighbours in view, nearest to the centre first; (N, D), behind `count` (N,) of them everything is padding."""

    number: NDArray[np.int64]  # in the scan, padded with -1
    heading: NDArray[np.float64]  # relative to the camera
    elevation: NDArray[np.float64]
    distance: NDArray[np.float64]  # metres
    count: NDArray[np.int64]


def view_angles() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Heading and elevation (36,) of the centres of the discrete views."""
    views = np.arange(NUM_VIEWS)
    return np.float64(STEP) * (views % NUM_HEADINGS), np.float64(STEP) * (views // NUM_HEADINGS - 1)


class Places(NamedTuple):
    """Where viewpoints are, and which are adjacent."""

    positions: NDArray[np.float32]  # (n, 3) metres
    neighbours: NDArray[np.int64]  # (n, D) padded with -1

    @classmethod
    def of(cls, graph: ScanGraph) -> Places:
        """Those of a scan."""
        return cls(graph.positions.astype(np.float32), graph.neighbours)


def relative_positions(
    places: Places, number: NDArray[np.int64], heading: NDArray[np.floating], elevation: NDArray[np.floating]
) -> tuple[NDArray[np.float64], ...]:
    """Direction of each neighbour as seen by cameras (N,), in the order of `places.neighbours`, each (N, D).

    Returns relative heading, relative elevation, distance in metres and the cosine of the horizontal angle between
    view direction and neighbour; what belongs to padded neighbours has no meaning.
    """
    target = places.positions[places.neighbours[number]] - places.positions[number][:, None]  # (N, D, 3) float32
    x, y, z = target[..., 0], target[..., 1], target[..., 2]
    direction = np.stack([np.cos(np.pi / 2 - heading), np.sin(np.pi / 2 - heading)], axis=-1).astype(np.float32)
    cx, cy = direction[:, :1], direction[:, 1:]
    flat = x * x + y * y
    with np.errstate(divide="ignore", invalid="ignore"):  # a neighbour straight above has no heading
        scale = np.float32(1) / np.sqrt(flat)
        cosine = x * scale * cx + y * scale * cy
    across, along = x * cy - y * cx, x * cx + y * cy
    # Rounded once, as atan2f does; NumPy's float32 arctan2 is less exact.
    relative_heading = np.arctan2(across.astype(np.float64), along.astype(np.float64)).astype(np.float32)
    relative_elevation = np.arctan2(z.astype(np.float64), np.sqrt(flat)) - elevation[:, None]
    distance = np.sqrt(flat + z * z)
    return relative_heading.astype(np.float64), relative_elevation, distance.astype(np.float64), cosine


def navigable(
    places: Places,
    camera: Camera,
    number: NDArray[np.int64],
    heading: NDArray[np.floating],
    elevation: NDArray[np.floating],
    restricted: bool = True,
) -> Sightlines:
    """The neighbours that cameras at viewpoints `number` (N,) see; all of them unless `restricted`."""
    heading_to, elevation_to, distance, cosine = relative_positions(places, number, heading, elevation)
    neighbours = places.neighbours[number]
    seen = neighbours >= 0
    if restricted:
        seen &= cosine.astype(np.float64) >= np.cos(camera.half_hfov)
    off_centre = np.where(seen, np.sqrt(heading_to**2 + elevation_to**2), np.inf)
    order = np.argsort(off_centre, axis=1, kind="stable")

    def sort(values: NDArray) -> NDArray:
        return np.take_along_axis(values, order, axis=1)

    count = seen.sum(axis=1)
    return Sightlines(
        np.where(np.arange(seen.shape[1]) < count[:, None], sort(neighbours), -1),
        sort(heading_to),
        sort(elevation_to),
        sort(distance),
        count,
    )


class Candidate(NamedTuple):
    """A neighbour as EnvDrop and its successors describe it: by the discrete view whose centre is nearest to it."""

    viewpoint: str
    view: int  # `pointId`
    row: int  # `idx`: its place among what that view sees, from 1
    heading: float  # `normalized_heading`: heading of the view plus relative heading
    elevation: float


class Panorama:
    """The candidates of every viewpoint of a scan, and what its 36 views see."""

    def __init__(self, graph: ScanGraph, camera: Camera | None = None, restricted: bool = True) -> None:
        self.graph = graph
        self.camera = camera or Camera()
        self.restricted = restricted

    @cached_property
    def views(self) -> Sightlines:
        """What each view of each viewpoint sees; arrays (n, 36, D) and `count` (n, 36)."""
        n = len(self.graph)
        headings, elevations = view_angles()
        seen = navigable(
            Places.of(self.graph),
            self.camera,
            np.repeat(np.arange(n), NUM_VIEWS),
            np.tile(headings, n),
            np.tile(elevations, n),
            self.restricted,
        )
        return Sightlines(**{name: array.reshape(n, NUM_VIEWS, *array.shape[1:]) for name, array in vars(seen).items()})

    def candidates(self, viewpoint: str) -> tuple[Candidate, ...]:
        """Candidates of a viewpoint in the order in which a sweep through the views first sees them."""
        number = self.graph.number(viewpoint)
        if number not in self._candidates:
            self._candidates[number] = tuple(self._sweep(number))
        return self._candidates[number]

    @cached_property
    def _candidates(self) -> dict[int, tuple[Candidate, ...]]:
        return {}

    def _sweep(self, number: int) -> list[Candidate]:
        headings, elevations = view_angles()
        views = self.views
        found, count = views.number[number], views.count[number]
        heading, elevation = views.heading[number], views.elevation[number]
        nearest: dict[int, tuple[float, int, int]] = {}  # neighbour: off-centre angle, view, row
        for view in range(NUM_VIEWS):
            for row in range(count[view]):
                angle = float(np.sqrt(heading[view, row] ** 2 + elevation[view, row] ** 2))
                neighbour = int(found[view, row])
                if neighbour not in nearest or angle < nearest[neighbour][0]:
                    nearest[neighbour] = (angle, view, row)
        return [
            Candidate(
                self.graph.viewpoints[neighbour],
                view,
                row + 1,
                float(headings[view] + heading[view, row]),
                float(elevations[view] + elevation[view, row]),
            )
            for neighbour, (_, view, row) in nearest.items()  # in order of first appearance
        ]
