"""Episodes in progress: what a batch of agents sees, may do and should do at every step.

Each step an agent chooses among its *options*: the neighbours of its viewpoint, in the order of
`Panorama.candidates`, and to stop, which is the last one. What describes the options (ORIST, ICCV 2021) is flattened to
rows, episode by episode.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from tasks.core.data import DataError
from tasks.core.errors import UserError
from tasks.navigation.angles import angle_features, direction_class, view_elevation, view_heading
from tasks.navigation.episodes import Episode
from tasks.navigation.features import WHOLE_IMAGE
from tasks.navigation.graph import ScanGraph
from tasks.navigation.rooms import UNLABELLED
from tasks.navigation.sightlines import NUM_HEADINGS, STEP
from tasks.navigation.world import Sight, Surroundings, World

ENDED = -1


@dataclass(frozen=True)
class Observation:
    """A step of B episodes with N option rows; in each episode C neighbours come first and stopping last.

    Attributes:
        num_options: (B,) C + 1.
        row_start: (B,) number of the first row of each episode.
        input_ids: (B, T) word pieces, padded with 0.
        text_length: (B,) their number.
        objects: (N, K, F) features of the objects in the view towards each option, padded with 0.
        boxes: (N, K, 7) x1, y1, x2, y2, width, height, area in fractions of the image.
        num_objects: (N,) at least 1.
        orientation: (N, 4) sin and cos of the heading, sin and cos of the elevation.
        views: (N,) discrete view towards the option; of stopping, the view that led here, -1 at the start.
        candidates: The viewpoint of each neighbour.
        mask: (B, max C + 1) where an option is.
        visited: (B, max C + 1) options that lead to a viewpoint where the agent has been.
        teacher: (B,) the option on the shortest path to the goal; `ENDED` for ended episodes and unknown goals.
        ended: (B,) episodes that are over.
        distance: (B,) float64 metres to the goal; NaN if it is unknown.
        direction: (N,) 0 forward, 1 backward, 2 left, 3 right; -100 of stopping and in ended episodes.
        next_room: (B,) room of the teacher's next viewpoint; -100 where unlabelled, unknown or ended.
        target_room: (B,) room of the goal; likewise.
        progress: (B,) share of the shortest path's viewpoints that the agent would have walked by now.
        labels: Names of the objects of each row, or none.
    """

    num_options: Tensor
    row_start: Tensor
    input_ids: Tensor
    text_length: Tensor
    objects: Tensor
    boxes: Tensor
    num_objects: Tensor
    orientation: Tensor
    views: Tensor
    candidates: list[list[str]]
    mask: Tensor
    visited: Tensor
    teacher: Tensor
    ended: Tensor
    distance: Tensor
    direction: Tensor
    next_room: Tensor
    target_room: Tensor
    progress: Tensor
    labels: list[Sequence[Sequence[str]]]

    def table(self, values: Tensor) -> Tensor:
        """Values of rows (N,) as (B, max C + 1), padded with 0; differentiable."""
        result = values.new_zeros(self.mask.shape)
        return result.masked_scatter(self.mask.to(values.device), values)


class NavigationEnvironment:
    """A batch of episodes in a `World`.

    Args:
        world: Graphs, features and rooms.
        max_text: Width of `input_ids`.
        stop_feature: (F,) or (B, F): the object of the option to stop at the start, to which no view has led. ORIST
            draws it anew, in evaluation too; the default is one drawing for all.
        stop_angle: Heading of the option to stop after the start.
        relative_elevation: Elevation of options minus the agent's, as in HAMT and DUET; ORIST keeps it absolute.
        freeze_ended: An episode stays where it ended; in ORIST's code it may walk on, and its path grows.
    """

    def __init__(
        self,
        world: World,
        max_text: int = 80,
        stop_feature: ArrayLike | None = None,
        stop_angle: float = np.pi,
        relative_elevation: bool = False,
        freeze_ended: bool = True,
    ) -> None:
        self.world = world
        self.max_text = max_text
        self.stop_angle = stop_angle
        self.relative_elevation = relative_elevation
        self.freeze_ended = freeze_ended
        if stop_feature is None:
            stop_feature = np.random.default_rng(0).random(world.objects.feature_dim)
        self._stop_feature = np.asarray(stop_feature, dtype=np.float32)
        self.episodes: list[Episode] = []
        self.t = 0
        self.number = np.zeros(0, dtype=np.int64)
        self.view_index = np.zeros(0, dtype=np.int64)
        self.ended = np.zeros(0, dtype=bool)
        self._goal = np.zeros(0, dtype=np.int64)
        self._path_length = np.zeros(0, dtype=np.int64)
        self._visited: list[frozenset[int]] = []
        self._rows: list[list[list[str | float]]] = []
        self._arrival: list[tuple[Sight, int]] = []  # what is seen towards the viewpoint, and in which view

    def reset(self, episodes: Sequence[Episode]) -> Observation:
        """Start episodes and return what their agents see."""
        self.episodes = list(episodes)
        vars(self).pop("_text", None)
        self.t = 0
        count = len(episodes)
        graphs = [self.world.graphs[episode.scan] for episode in episodes]
        self.number = np.array(
            [graph.number(episode.start) for graph, episode in zip(graphs, episodes, strict=True)], dtype=np.int64
        )
        headings = np.array([episode.heading for episode in episodes], dtype=np.float64) % (2 * np.pi)
        self.view_index = NUM_HEADINGS + np.floor(headings / STEP + 0.5).astype(np.int64) % NUM_HEADINGS
        self.ended = np.zeros(count, dtype=bool)
        goals = [
            graph.number(episode.goal) if episode.has_goal else -1
            for graph, episode in zip(graphs, episodes, strict=True)
        ]
        self._goal = np.array(goals, dtype=np.int64)
        self._path_length = np.array([self._nodes_to_goal(row) for row in range(count)], dtype=np.int64)
        self._visited = [frozenset((int(number),)) for number in self.number]
        self._rows = [[self._pose(row)] for row in range(count)]
        features = np.broadcast_to(self._stop_feature, (count, self._stop_feature.shape[-1]))
        whole = np.array([WHOLE_IMAGE], dtype=np.float32)
        self._arrival = [(Sight(features[row : row + 1], whole, ()), -1) for row in range(count)]
        return self.observe()

    def step(self, actions: ArrayLike | Tensor) -> Observation:
        """Let every agent take the option of its number (B,) and return what they see then.

        The last option, or `ENDED`, is to stop. Raises `UserError` for a number that is no option; nobody moves then.
        """
        chosen = np.asarray(actions.tolist() if isinstance(actions, Tensor) else actions, dtype=np.int64)
        if chosen.shape != self.ended.shape:
            raise UserError(f"actions of shape {chosen.shape}; expected ({len(self.ended)},), one per episode")
        around = [self._surroundings(row) for row in range(len(self.episodes))]
        options = np.array([len(place.candidates) + 1 for place in around], dtype=np.int64)
        stay = (chosen == ENDED) | (chosen == options - 1) | (self.ended & self.freeze_ended)
        wrong = ~stay & ((chosen < 0) | (chosen >= options))
        if wrong.any():
            row = int(np.argmax(wrong))
            raise UserError(f"{self.episodes[row].key}: action {chosen[row]}; expected 0 to {options[row] - 1}, or -1")
        self.ended = self.ended | stay
        for mover in np.flatnonzero(~stay).tolist():
            self._move(mover, around[mover], int(chosen[mover]))
        self.t += 1
        return self.observe()

    def observe(self) -> Observation:
        """What the agents see now."""
        around = [self._surroundings(row) for row in range(len(self.episodes))]
        count = np.array([len(place.candidates) + 1 for place in around], dtype=np.int64)
        sights = [
            sight
            for place, (arrival, _) in zip(around, self._arrival, strict=True)
            for sight in (*place.sights, arrival)
        ]
        objects, boxes, num_objects = _stack(sights, self.world.objects.feature_dim)
        orientation, direction = self._directions(around)
        views = [np.append(place.views, view) for place, (_, view) in zip(around, self._arrival, strict=True)]
        input_ids, text_length = self._text
        teacher, next_room, target_room = self._supervision(around)
        mask = np.arange(count.max(initial=1)) < count[:, None]
        visited = np.zeros_like(mask)
        for row, place in enumerate(around):
            visited[row, : len(place.numbers)] = [int(number) in self._visited[row] for number in place.numbers]
        steps = np.minimum((self.t + 1) / np.maximum(self._path_length, 1), 1.0)
        arrays = {
            "num_options": count,
            "row_start": np.cumsum(count) - count,
            "objects": objects,
            "boxes": boxes,
            "num_objects": num_objects,
            "orientation": orientation,
            "views": np.concatenate(views) if views else np.zeros(0, dtype=np.int64),
            "mask": mask,
            "visited": visited,
            "teacher": teacher,
            "ended": self.ended.copy(),
            "distance": self.distance,
            "direction": direction,
            "next_room": next_room,
            "target_room": target_room,
            "progress": steps.astype(np.float32),
        }
        return Observation(
            **{name: torch.from_numpy(array) for name, array in arrays.items()},
            input_ids=input_ids,
            text_length=text_length,
            candidates=[[candidate.viewpoint for candidate in place.candidates] for place in around],
            labels=[[*(sight.labels for sight in place.sights), ()] for place in around],
        )

    def select(self, rows: ArrayLike | Tensor) -> NavigationEnvironment:
        """An environment of its own whose episodes are copies of these rows, which may repeat: for beam search."""
        rows = np.asarray(rows.tolist() if isinstance(rows, Tensor) else rows, dtype=np.int64)
        other = copy.copy(self)
        vars(other).pop("_text", None)
        other.episodes = [self.episodes[row] for row in rows]
        for name in ("number", "view_index", "ended", "_goal", "_path_length"):
            setattr(other, name, getattr(self, name)[rows])
        other._visited = [self._visited[row] for row in rows]
        other._rows = [list(self._rows[row]) for row in rows]
        other._arrival = [self._arrival[row] for row in rows]
        return other

    @property
    def viewpoints(self) -> list[str]:
        """Where the agents are."""
        return [self._graph(row).viewpoints[number] for row, number in enumerate(self.number)]

    @property
    def distance(self) -> NDArray[np.float64]:
        """(B,) metres to the goals; NaN where a goal is unknown."""
        pairs = zip(self.number, self._goal, strict=True)
        return np.array(
            [self._graph(row).distances[here, goal] if goal >= 0 else np.nan for row, (here, goal) in enumerate(pairs)],
            dtype=np.float64,
        )

    def trajectory(self, row: int) -> list[list[str | float]]:
        """Viewpoint, heading and elevation after every elementary move of the camera, as submissions hold them."""
        return [list(pose) for pose in self._rows[row]]

    def trajectories(self) -> dict[str, list[list[str | float]]]:
        """The trajectory of each episode by its key."""
        return {episode.key: self.trajectory(row) for row, episode in enumerate(self.episodes)}

    def viewpoint_objects(self, row: int) -> list[tuple[int, Sight]]:
        """The 36 views of an agent's viewpoint with their objects."""
        scan, viewpoint = self.episodes[row].scan, self.viewpoints[row]
        return [(view, self.world.sight(scan, viewpoint, view)) for view in range(3 * NUM_HEADINGS)]

    def _graph(self, row: int) -> ScanGraph:
        return self.world.graphs[self.episodes[row].scan]

    def _surroundings(self, row: int) -> Surroundings:
        return self.world.surroundings(self.episodes[row].scan, int(self.number[row]))

    def _nodes_to_goal(self, row: int) -> int:
        """Number of viewpoints on the shortest path from the start to the goal, both counted."""
        here, goal = int(self.number[row]), int(self._goal[row])
        nodes = 1
        while goal >= 0 and here != goal:
            here = self._next(row, here)
            nodes += 1
        return nodes

    def _next(self, row: int, here: int) -> int:
        """The next viewpoint on the shortest path to the goal."""
        graph = self._graph(row)
        following = int(graph.next_hop[here, self._goal[row]])
        if following < 0:
            raise DataError(
                f"{self.episodes[row].key}: no path leads from viewpoint {graph.viewpoints[here]}"
                f" to the goal {self.episodes[row].goal} in scan {graph.scan}"
            )
        return following

    def _pose(self, row: int) -> list[str | float]:
        view = int(self.view_index[row])
        viewpoint = self._graph(row).viewpoints[self.number[row]]
        return [viewpoint, view % NUM_HEADINGS * STEP, (view // NUM_HEADINGS - 1) * STEP]

    def _move(self, row: int, place: Surroundings, option: int) -> None:
        """Look at the neighbour, tilting first and then turning right, and go there."""
        target = int(place.candidates[option].view)
        while (level := self.view_index[row] // NUM_HEADINGS) != target // NUM_HEADINGS:
            self.view_index[row] += NUM_HEADINGS if level < target // NUM_HEADINGS else -NUM_HEADINGS
            self._rows[row].append(self._pose(row))
        while self.view_index[row] != target:
            column = (self.view_index[row] + 1) % NUM_HEADINGS
            self.view_index[row] = self.view_index[row] // NUM_HEADINGS * NUM_HEADINGS + column
            self._rows[row].append(self._pose(row))
        self.number[row] = place.numbers[option]
        self._rows[row].append(self._pose(row))
        self._visited[row] = self._visited[row] | {int(self.number[row])}
        self._arrival[row] = place.sights[option], target

    @cached_property
    def _text(self) -> tuple[Tensor, Tensor]:
        """Word pieces (B, T), padded with 0, and their numbers (B,)."""
        lengths = np.array([len(episode.tokens) for episode in self.episodes], dtype=np.int64)
        if lengths.max(initial=0) > self.max_text:
            raise UserError(f"max_text is {self.max_text}, but an instruction has {lengths.max()} word pieces")
        ids = np.zeros((len(self.episodes), self.max_text), dtype=np.int64)
        for row, episode in enumerate(self.episodes):
            ids[row, : lengths[row]] = episode.tokens
        return torch.from_numpy(ids), torch.from_numpy(lengths)

    def _directions(self, around: Sequence[Surroundings]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Orientation features (N, 4) and direction classes (N,)."""
        count = np.array([len(place.candidates) + 1 for place in around], dtype=np.int64)
        stop = np.cumsum(count) - 1  # rows
        none = [np.zeros(0)]
        heading = np.concatenate([*(np.append(place.headings, np.nan) for place in around), *none])
        elevation = np.concatenate([*(np.append(place.elevations, 0.0) for place in around), *none])
        heading -= np.repeat(view_heading(self.view_index), count)
        if self.relative_elevation:
            elevation -= np.repeat(view_elevation(self.view_index), count)
        heading[stop], elevation[stop] = self.stop_angle, 0.0
        features = angle_features(heading, elevation)
        if not self.t:
            features[stop] = 0.0
        classes = direction_class(heading)
        classes[stop] = UNLABELLED
        classes[np.repeat(self.ended, count)] = UNLABELLED
        return features, classes

    def _supervision(self, around: Sequence[Surroundings]) -> tuple[NDArray[np.int64], ...]:
        """Teacher's option, room of its viewpoint and room of the goal, each (B,)."""
        teacher = np.full(len(around), ENDED, dtype=np.int64)
        next_room, target_room = np.full((2, len(around)), UNLABELLED, dtype=np.int64)
        for row, place in enumerate(around):
            here, goal = int(self.number[row]), int(self._goal[row])
            if goal < 0 or self.ended[row]:
                continue
            following = here if here == goal else self._next(row, here)
            teacher[row] = len(place.numbers) if here == goal else int(np.flatnonzero(place.numbers == following)[0])
            scan, names = self.episodes[row].scan, self._graph(row).viewpoints
            next_room[row] = self.world.rooms.of(scan, names[following])
            target_room[row] = self.world.rooms.of(scan, names[goal])
        return teacher, next_room, target_room


def _stack(
    sights: Sequence[Sight], feature_dim: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Features (N, K, F), boxes (N, K, 7) and counts (N,), padded with zeros."""
    counts = np.array([len(sight.features) for sight in sights], dtype=np.int64)
    most = int(counts.max(initial=1))
    features = np.zeros((len(sights), most, feature_dim), dtype=np.float32)
    boxes = np.zeros((len(sights), most, 7), dtype=np.float32)
    if len(sights):
        filled = np.arange(most) < counts[:, None]
        features[filled] = np.concatenate([sight.features for sight in sights])
        boxes[filled] = np.concatenate([sight.boxes for sight in sights])
    return features, boxes, counts
