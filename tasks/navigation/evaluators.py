"""The figures of R2R, REVERIE and NDH, equal to those of their official evaluation scripts.

All distances are geodesic. Rates are fractions; TL, NE and GP are metres. Where the official script and that of
VLN-DUET (for NDH: HAMT) differ, `definition` chooses.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from tasks.core.errors import UserError, expect
from tasks.navigation.episodes import Episode
from tasks.navigation.graph import ScanGraph
from tasks.navigation.trajectories import (
    Paths,
    coverage_by_length_score,
    dynamic_time_warping,
    pairwise_distances,
    path_lengths,
    to_paths,
)

Definition = Literal["official", "duet"]
Columns = dict[str, NDArray[np.float64]]
SUCCESS_DISTANCE = 3.0  # metres, exclusive
SHORTEST_PATH = 0.01  # metres; below it DUET divides by this


@dataclass(frozen=True)
class Evaluation:
    """Figures per instruction, `table` (n,) by name, and their means."""

    ids: tuple[str, ...]
    scans: tuple[str, ...]
    table: Columns
    summary: dict[str, float]

    def rows(self) -> list[dict[str, Any]]:
        """The table, one dictionary per instruction."""
        columns = {name: values.tolist() for name, values in self.table.items()}
        return [
            {"id": id, "scan": scan, **{name: values[row] for name, values in columns.items()}}
            for row, (id, scan) in enumerate(zip(self.ids, self.scans, strict=True))
        ]


@dataclass(frozen=True)
class Truth:
    """Episodes of one scan with their annotated paths."""

    graph: ScanGraph
    episodes: Sequence[Episode]
    names: Sequence[str]
    annotated: Paths

    @classmethod
    def of(cls, graph: ScanGraph, episodes: Sequence[Episode]) -> Truth:
        """Number the annotated paths."""
        names = [episode.id for episode in episodes]
        return cls(graph, episodes, names, to_paths(graph, [episode.path for episode in episodes], names))


@dataclass(frozen=True)
class Group(Truth):
    """Episodes of one scan with the paths that were taken."""

    taken: Paths
    records: Sequence[Mapping[str, Any]]

    def to(self, nodes: NDArray[np.int64], goals: NDArray[np.int64]) -> NDArray[np.float64]:
        """Metres between viewpoints, elementwise."""
        return self.graph.distances[nodes, goals]

    def to_region(self, nodes: NDArray[np.int64], regions: Sequence[Sequence[str]]) -> NDArray[np.float64]:
        """Metres from each viewpoint (N,) to the nearest of its region."""
        return self.graph.distances[nodes, to_paths(self.graph, regions, self.names).nodes].min(axis=0)


class Evaluator:
    """Scores trajectories against the annotations of one split.

    Args:
        episodes: The instructions to score; ids of others are ignored.
        graphs: Graphs by scan.
        definition: Where definitions differ, that of the official script or of VLN-DUET. The official ones also demand
            that each trajectory begins where it should and walks along edges.
        keep_repeats: Count a viewpoint again for every turn of the camera in nDTW, sDTW and `steps`.
        threshold: Metres from the goal below which an agent has arrived.
    """

    headline: ClassVar[tuple[str, ...]]  # the means of the summary, in this order

    def __init__(
        self,
        episodes: Sequence[Episode],
        graphs: Mapping[str, ScanGraph],
        definition: Definition = "official",
        keep_repeats: bool = False,
        threshold: float = SUCCESS_DISTANCE,
    ) -> None:
        expect("definition", definition, definition in ("official", "duet"), "'official' or 'duet'")
        hidden = next((episode.id for episode in episodes if not episode.has_goal), None)
        if hidden is not None:
            raise UserError(
                f"{hidden}: its goal is not published, so there is nothing to compare with; use another split"
            )
        self.graphs = graphs
        self.definition = definition
        self.keep_repeats = keep_repeats
        self.threshold = threshold
        self.episodes = {episode.id: episode for episode in self._scored(episodes)}

    def _scored(self, episodes: Sequence[Episode]) -> Sequence[Episode]:
        return episodes

    def evaluate(self, records: Mapping[str, Mapping[str, Any]]) -> Evaluation:
        """Score ``{id: {"trajectory": [[viewpoint, heading, elevation], ...], "object": id or None}}``.

        Rows of a trajectory may also be viewpoints alone. Raises `UserError` for missing ids and, in the official
        definition, for trajectories that an agent cannot have walked.
        """
        if missing := self.episodes.keys() - records.keys():
            raise UserError(
                f"no trajectory for {len(missing)} of {len(self.episodes)} instructions, the first is {min(missing)!r};"
                " expected one for each"
            )
        truths, order = self._truths
        parts = [self._columns(self._group(truth, records)) for truth in truths]
        names = parts[0] if parts else {}
        table = {name: np.concatenate([part[name] for part in parts])[order].astype(np.float64) for name in names}
        return Evaluation(
            tuple(self.episodes),
            tuple(episode.scan for episode in self.episodes.values()),
            table,
            {name: _mean(table[name]) for name in self.headline if table},
        )

    @cached_property
    def _truths(self) -> tuple[list[Truth], NDArray[np.int64]]:
        """The episodes by scan, and where in that order each episode is."""
        by_scan: dict[str, list[Episode]] = {}
        for episode in self.episodes.values():
            by_scan.setdefault(episode.scan, []).append(episode)
        position = {id: row for row, id in enumerate(e.id for episodes in by_scan.values() for e in episodes)}
        order = np.array([position[id] for id in self.episodes], dtype=np.int64)
        return [Truth.of(self.graphs[scan], episodes) for scan, episodes in by_scan.items()], order

    def _group(self, truth: Truth, records: Mapping[str, Mapping[str, Any]]) -> Group:
        own = list(map(records.__getitem__, truth.names))
        try:
            trajectories = list(map(operator.itemgetter("trajectory"), own))
        except (KeyError, TypeError):
            raise UserError(f"a record of scan {truth.graph.scan} has no trajectory; expected one for each") from None
        taken = to_paths(truth.graph, trajectories, truth.names, drop_repeats=not self.keep_repeats)
        if self.definition == "official":
            self._require_walkable(truth.graph, truth.names, taken, truth.annotated)
        return Group(truth.graph, truth.episodes, truth.names, truth.annotated, taken, own)

    def _require_walkable(self, graph: ScanGraph, names: Sequence[str], taken: Paths, annotated: Paths) -> None:
        wrong = taken.first != annotated.first
        if wrong.any():
            row = int(np.argmax(wrong))
            begin, expected = graph.viewpoints[taken.first[row]], graph.viewpoints[annotated.first[row]]
            raise UserError(f"{names[row]}: the trajectory begins at viewpoint {begin}; expected {expected}")
        before, after = taken.nodes[:-1], taken.nodes[1:]
        jump = (before != after) & ~graph.edges[before, after]
        if jump.any():
            step, row = (int(value) for value in np.argwhere(jump)[0])
            pair = graph.viewpoints[before[step, row]], graph.viewpoints[after[step, row]]
            raise UserError(
                f"{names[row]}: the trajectory goes from viewpoint {pair[0]} to {pair[1]}; expected neighbours"
            )

    def _columns(self, group: Group) -> Columns:
        raise NotImplementedError

    def _shortest(self, group: Group) -> NDArray[np.float64]:
        """The length that SPL compares with: to the goal (official) or of the annotated path (DUET)."""
        if self.definition == "official":
            return group.to(group.annotated.first, group.annotated.last)
        return path_lengths(group.graph.distances, group.annotated)


class R2REvaluator(Evaluator):
    """R2R (CVPR 2018) with the path-fidelity figures of R4R; also RxR's, R4R's and any data of R2R's format.

    The official script scores the first three instructions of each path.
    """

    headline = ("TL", "NE", "OSR", "SR", "SPL", "nDTW", "sDTW", "CLS")

    def _scored(self, episodes: Sequence[Episode]) -> Sequence[Episode]:
        if self.definition == "duet":
            return episodes
        return [episode for episode in episodes if episode.id.rpartition("_")[2] in ("0", "1", "2")]

    def _columns(self, group: Group) -> Columns:
        distances = group.graph.distances
        length = path_lengths(distances, group.taken)
        error = group.to(group.taken.last, group.annotated.last)
        nearest = group.to(group.taken.nodes, group.annotated.last).min(axis=0)
        success = (error < self.threshold).astype(np.float64)
        shortest = self._shortest(group)
        reference = path_lengths(distances, group.annotated)
        pairs = pairwise_distances(distances, group.taken, group.annotated)
        cost = dynamic_time_warping(pairs, group.taken.lengths, group.annotated.lengths)
        similarity = np.exp(-cost / (self.threshold * group.annotated.lengths))
        return {
            "TL": length,
            "NE": error,
            "OE": nearest,
            "OSR": nearest < self.threshold,
            "SR": success,
            "SPL": success * self._efficiency(group, shortest, length),
            "nDTW": similarity,
            "sDTW": success * similarity,
            "CLS": coverage_by_length_score(pairs, group.annotated.lengths, length, reference, self.threshold),
            "DTW": cost,
            "shortest": shortest,
            "steps": group.taken.lengths - 1,
        }

    def _efficiency(
        self, group: Group, shortest: NDArray[np.float64], length: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        if self.definition == "duet":
            return shortest / np.maximum(np.maximum(length, shortest), SHORTEST_PATH)
        longer = np.maximum(length, shortest)
        if not longer.all():
            name = group.episodes[int(np.argmin(longer))].id
            raise UserError(
                f"{name}: the agent stays at its start, which is its goal; the official SPL divides by zero there"
                " (definition 'duet' gives 0)"
            )
        return shortest / longer


class REVERIEEvaluator(Evaluator):
    """REVERIE (CVPR 2020): success is to stop where the object is visible, at any distance; RGS is to name it."""

    headline = ("TL", "OSR", "SR", "SPL", "RGS", "RGSPL")

    def _columns(self, group: Group) -> Columns:
        length = path_lengths(group.graph.distances, group.taken)
        visible = np.zeros((len(group.graph), len(group.episodes)), dtype=bool)
        for row, episode in enumerate(group.episodes):
            visible[[group.graph.index[node] for node in episode.target_views if node in group.graph.index], row] = True
        seen = visible[group.taken.nodes, np.arange(len(group.episodes))]
        success = seen[-1].astype(np.float64)
        shortest = self._shortest(group)
        floor = SHORTEST_PATH if self.definition == "duet" else np.finfo(np.float64).tiny
        efficiency = shortest / np.maximum(np.maximum(length, shortest), floor)
        grounded = np.array(
            [
                record.get("object") is not None and str(record["object"]) == episode.target
                for record, episode in zip(group.records, group.episodes, strict=True)
            ],
            dtype=np.float64,
        )
        return {
            "TL": length,
            "OSR": seen.any(axis=0),
            "SR": success,
            "SPL": success * efficiency,
            "RGS": grounded,
            "RGSPL": grounded * efficiency,
            "NE": group.to(group.taken.last, group.annotated.last),
            "shortest": shortest,
            "steps": group.taken.lengths - 1,
        }


class NDHEvaluator(Evaluator):
    """Navigation from dialogue history (CoRL 2019): GP is how many metres nearer to the goal's region an agent ends.

    The other figures are to the end of the supervised path; with definition ``duet``, as in HAMT, SR is to end in the
    goal's region.
    """

    headline = ("GP", "TL", "NE", "OSR", "SR", "SPL", "OPSR")

    def _columns(self, group: Group) -> Columns:
        length = path_lengths(group.graph.distances, group.taken)
        goal = group.annotated.last
        error = group.to(group.taken.last, goal)
        nearest = group.to(group.taken.nodes, goal).min(axis=0)
        planner = to_paths(group.graph, [episode.planner_path for episode in group.episodes], group.names)
        plan_error = group.to(group.taken.nodes, planner.last).min(axis=0)
        regions = [episode.end_region for episode in group.episodes]
        remaining = group.to_region(group.taken.last, regions)
        success = (error < self.threshold if self.definition == "official" else remaining == 0).astype(np.float64)
        shortest = group.to(group.annotated.first, goal)
        longer = np.maximum(length, shortest)
        efficiency = np.where(shortest > 0, shortest / np.where(longer > 0, longer, 1), longer == 0)
        return {
            "GP": group.to_region(group.annotated.first, regions) - remaining,
            "TL": length,
            "NE": error,
            "OE": nearest,
            "OSR": nearest < self.threshold,
            "SR": success,
            "SPL": success * efficiency,
            "OPE": plan_error,
            "OPSR": plan_error < self.threshold,
            "shortest": shortest,
            "steps": group.taken.lengths - 1,
        }


EVALUATORS: dict[str, Callable[..., Evaluator]] = {
    "r2r": R2REvaluator,
    "reverie": REVERIEEvaluator,
    "ndh": NDHEvaluator,
}


def _mean(values: NDArray[np.float64]) -> float:
    """The mean of what is defined."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")
