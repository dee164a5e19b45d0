"""What an agent finds at every viewpoint of all scans: candidates, and the objects in the views towards them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.core.data import DataError
from tasks.navigation.features import WHOLE_IMAGE, Objects, ViewFeatures
from tasks.navigation.graph import ScanGraph
from tasks.navigation.rooms import Rooms
from tasks.navigation.sightlines import Candidate, Panorama

CACHE_BYTES = 1 << 30


class Sight(NamedTuple):
    """The objects of one view, padded to the capacity of the others."""

    features: NDArray[np.float32]  # (k, F)
    boxes: NDArray[np.float32]  # (k, 7)
    labels: Sequence[str]


class Surroundings(NamedTuple):
    """What does not change about a viewpoint: its candidates and what is seen towards each."""

    candidates: tuple[Candidate, ...]
    numbers: NDArray[np.int64]  # (C,) in the scan
    views: NDArray[np.int64]  # (C,)
    headings: NDArray[np.float64]  # (C,)
    elevations: NDArray[np.float64]  # (C,)
    sights: tuple[Sight, ...]


class World:
    """Graphs, features and rooms of all scans; shared by environments."""

    def __init__(
        self,
        graphs: Mapping[str, ScanGraph],
        objects: Objects,
        views: ViewFeatures | None = None,
        rooms: Rooms | None = None,
        max_objects: int = 25,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.graphs = graphs
        self.objects = objects
        self.views = views
        self.rooms = rooms or Rooms({})
        self.max_objects = max_objects
        self.cache_bytes = cache_bytes
        self._panoramas: dict[str, Panorama] = {}
        self._cache: OrderedDict[tuple[str, int], Surroundings] = OrderedDict()
        self._cached_bytes = 0

    def panorama(self, scan: str) -> Panorama:
        """The candidates of a scan's viewpoints."""
        if scan not in self._panoramas:
            self._panoramas[scan] = Panorama(self.graphs[scan])
        return self._panoramas[scan]

    def surroundings(self, scan: str, number: int) -> Surroundings:
        """What an agent finds at a viewpoint, kept while `cache_bytes` last."""
        key = scan, number
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        graph = self.graphs[scan]
        viewpoint = graph.viewpoints[number]
        candidates = self.panorama(scan).candidates(viewpoint)
        found = Surroundings(
            candidates,
            np.array([graph.index[candidate.viewpoint] for candidate in candidates], dtype=np.int64),
            np.array([candidate.view for candidate in candidates], dtype=np.int64),
            np.array([candidate.heading for candidate in candidates]),
            np.array([candidate.elevation for candidate in candidates]),
            tuple(self.sight(scan, viewpoint, candidate.view) for candidate in candidates),
        )
        self._cache[key] = found
        self._cached_bytes += _bytes(found)
        while self._cached_bytes > self.cache_bytes and len(self._cache) > 1:
            self._cached_bytes -= _bytes(self._cache.popitem(last=False)[1])
        return found

    def sight(self, scan: str, viewpoint: str, view: int) -> Sight:
        """The best objects of a view; of a view without any, the feature of the whole view or zeros."""
        found = self.objects.view(scan, viewpoint, view)
        if found is None:
            raise DataError(
                f"scan {scan}, viewpoint {viewpoint}, view {view}: no object features; `check` lists what is missing"
            )
        if len(found.features):
            best = slice(self.max_objects)
            return Sight(found.features[best], found.boxes[best], found.labels[best])
        whole = self.views.viewpoint(scan, viewpoint) if self.views else None
        feature = np.zeros(self.objects.feature_dim, dtype=np.float32) if whole is None else whole[view]
        if len(feature) != self.objects.feature_dim:
            raise DataError(
                f"scan {scan}, viewpoint {viewpoint}: view features of {len(feature)} numbers;"
                f" expected {self.objects.feature_dim}, as the objects have"
            )
        return Sight(feature[None], np.array([WHOLE_IMAGE], dtype=np.float32), ())


def _bytes(surroundings: Surroundings) -> int:
    return sum(sight.features.nbytes for sight in surroundings.sights)
