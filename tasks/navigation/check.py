"""Reads a whole data set and reports what is in it and everything that is wrong with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from tasks.core.check import Findings
from tasks.core.data import DataError
from tasks.navigation.episodes import Episode
from tasks.navigation.features import Objects
from tasks.navigation.graph import ScanGraph
from tasks.navigation.rooms import UNLABELLED, Rooms
from tasks.navigation.sightlines import Panorama
from tasks.navigation.text import WordPieces

if TYPE_CHECKING:
    from tasks.navigation.datamodule import NavigationDataModule


@dataclass
class SplitSummary:
    """What one split holds."""

    instructions: int = 0
    scans: set[str] = field(default_factory=set)
    nodes: Counter[int] = field(default_factory=Counter)  # paths by number of viewpoints
    metres: list[float] = field(default_factory=list)  # geodesic, start to goal
    words: list[int] = field(default_factory=list)
    unknown: int = 0  # instructions with a word that no word pieces make up
    cut: int = 0  # instructions longer than `max_text`


@dataclass
class CheckResult(Findings):
    """Everything found in a data set."""

    splits: dict[str, SplitSummary] = field(default_factory=dict)


def check_dataset(datamodule: NavigationDataModule) -> CheckResult:
    """Read all annotations, graphs and object features of `datamodule` and collect all problems.

    Per instruction: its scan is missing, its path visits unknown or excluded viewpoints or is not connected, its goal
    cannot be reached. Per viewpoint of the scans used: views without object features, viewpoints without a room.
    """
    return _Checker(datamodule).run()


class _Checker:
    def __init__(self, datamodule: NavigationDataModule) -> None:
        self.data = datamodule
        self.result = CheckResult()
        self.graphs: dict[str, ScanGraph | None] = {}
        self.tokenizer: WordPieces | None = None

    def run(self) -> CheckResult:
        """Check every split that has an annotation file, and every annotated one."""
        data, result = self.data, self.result
        self.tokenizer, objects = self._open("tokenizer"), self._open("object_store")
        if self._open("graphs") is None:
            return result
        extra = [data.predict_split] if data.annotation(data.predict_split).is_file() else []
        for split in dict.fromkeys((*data.splits, data.test_split, *extra)):
            listing = data.listing(split)
            result.add_listing(listing)
            summary = result.splits.setdefault(split, SplitSummary())
            for episode in listing.samples:
                self._episode(episode, summary)
        self._compare_splits()
        used = {scan: graph for scan, graph in self.graphs.items() if graph is not None}
        if objects is not None:
            self._features(used, objects)
        if (rooms := self._open("room_labels")) is not None:
            self._rooms(used, rooms)
        return result

    def _open(self, part: str) -> Any:
        """A part of the data, None if it cannot be read, which is a problem."""
        try:
            return getattr(self.data, part)
        except DataError as error:
            self.result.problems.append(str(error))
            return None

    def _graph(self, scan: str) -> ScanGraph | None:
        """The graph of a scan; the first time that there is none it is a problem."""
        if scan not in self.graphs:
            try:
                self.graphs[scan] = self.data.graphs[scan]
            except DataError as error:
                self.result.problems.append(str(error))
                self.graphs[scan] = None
        return self.graphs[scan]

    def _episode(self, episode: Episode, summary: SplitSummary) -> None:
        summary.instructions += 1
        summary.scans.add(episode.scan)
        summary.words.append(len(episode.instruction.split()))
        if self.tokenizer is not None:
            summary.unknown += self.tokenizer.unknown in self.tokenizer.encode(episode.instruction)
            summary.cut += self.tokenizer.is_cut(episode.instruction)
        graph = self._graph(episode.scan)
        if graph is None:
            self.result.problems.append(f"{episode.key}: its scan {episode.scan} has no graph")
            return
        if problem := problem_of_path(graph, episode):
            self.result.problems.append(f"{episode.key}: {problem}")
            return
        if episode.has_goal:
            summary.nodes[len(episode.path)] += 1
            summary.metres.append(graph.distance(episode.start, episode.goal))
        if episode.target is not None and not episode.target_views:
            self.result.notes.append(f"{episode.key}: object {episode.target} is visible from no viewpoint")

    def _compare_splits(self) -> None:
        """Houses of val_unseen and test must not be trained on."""
        train = self.result.splits.get("train", SplitSummary()).scans
        for split in ("val_unseen", "test"):
            if both := sorted(train & self.result.splits.get(split, SplitSummary()).scans):
                self.result.problems.append(
                    f"{split}: scan {', '.join(both[:3])} is in train too; expected unseen ones"
                )

    def _features(self, graphs: dict[str, ScanGraph], objects: Objects) -> None:
        """Every view that looks at a neighbour needs its objects."""
        scans = track(graphs.items(), "Checking features", console=Console(stderr=True), transient=True)
        for scan, graph in scans:
            lacking, looked = Counter[str](), 0
            panorama = Panorama(graph)
            for viewpoint in graph.nodes:
                for candidate in panorama.candidates(viewpoint):
                    looked += 1
                    try:
                        if objects.view(scan, viewpoint, candidate.view) is None:
                            lacking[viewpoint] += 1
                    except DataError as error:
                        self.result.problems.append(str(error))
            if lacking:
                first = next(iter(lacking))
                self.result.problems.append(
                    f"scan {scan}: no object features of {lacking.total()} of {looked} views towards a neighbour, at"
                    f" {len(lacking)} viewpoints, the first is {first}"
                )

    def _rooms(self, graphs: dict[str, ScanGraph], rooms: Rooms) -> None:
        lacking = [
            scan
            for scan, graph in graphs.items()
            if any(rooms.of(scan, viewpoint) == UNLABELLED for viewpoint in graph.nodes)
        ]
        if lacking:
            self.result.notes.append(
                f"no room label for some viewpoints of {len(lacking)} scans, the first is {lacking[0]};"
                " the room heads do not learn from these"
            )


def problem_of_path(graph: ScanGraph, episode: Episode) -> str | None:
    """Why an episode cannot be followed: unknown viewpoints, gaps in its path, a goal out of reach; None if it can."""
    try:
        for viewpoint in (*episode.path, *episode.end_region, *episode.planner_path):
            graph.number(viewpoint)
    except DataError as error:
        return str(error)
    for before, after in zip(episode.path[:-1], episode.path[1:], strict=True):
        if before != after and not graph.adjacent(before, after):
            return f"path is not connected: viewpoints {before} and {after} are no neighbours"
    if episode.has_goal and not np.isfinite(graph.distance(episode.start, episode.goal)):
        return f"goal {episode.goal} cannot be reached from {episode.start}"
    return None


def print_result(result: CheckResult) -> None:
    """Print what the splits hold, notes and problems."""
    console = Console()
    names = ("instructions", "scans", "viewpoints", "metres", "words", "cut", "unknown words")
    table = Table(Column("split", no_wrap=True), *names, title="Episodes")
    for split, summary in result.splits.items():
        nodes = sorted(summary.nodes)
        table.add_row(
            split,
            str(summary.instructions),
            str(len(summary.scans)),
            f"{nodes[0]} to {nodes[-1]}" if nodes else "-",
            f"{np.mean(summary.metres):.2f}" if summary.metres else "-",
            f"{np.mean(summary.words):.1f}" if summary.words else "-",
            str(summary.cut),
            str(summary.unknown),
        )
    console.print(table)
    result.print_messages(console)
