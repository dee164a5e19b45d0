"""Writes the sample data set of this task: generated houses in the layout of R2R, with object features.

A house has six rooms of two viewpoints each, on a jittered grid. Every viewpoint has a landmark of its own, a piece of
furniture that fits the room and is the only one of its kind in the house. Instructions name the landmarks on the way:
"leave the kitchen, go past the sofa and stop by the bed". From each start there are several goals more than 3 m apart,
so that only the instruction says which one is meant; houses of `val_unseen` were never seen in training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from tasks.navigation.features import view_key
from tasks.navigation.graph import SUFFIX, ScanGraph
from tasks.navigation.rooms import ROOMS
from tasks.navigation.sightlines import NUM_VIEWS, Camera, view_angles
from tasks.navigation.text import CLS_PIECE, PAD_PIECE, SEP_PIECE, UNK_PIECE, build_vocabulary

FURNITURE = {
    "kitchen": ("stove", "fridge"),
    "bedroom": ("bed", "wardrobe"),
    "living room": ("sofa", "fireplace"),
    "bathroom": ("bathtub", "washbasin"),
    "office": ("desk", "bookshelf"),
    "dining room": ("table", "cupboard"),
    "hallway": ("mirror", "coatrack"),
    "garage": ("car", "workbench"),
}
DECORATION = ("plant", "picture", "rug", "lamp")  # anywhere, and never named
OBJECTS = (*(name for names in FURNITURE.values() for name in names), *DECORATION)
FEATURE_DIM = 32
FEATURE_NOISE = 0.05
COLUMNS, ROWS = 4, 3
SPACING = 3.7  # metres between neighbours, before a jitter that leaves more than 3 m
JITTER = 0.25
EYE_HEIGHT = 1.5
NEAREST = 1.2  # metres; what is nearer is not in the picture
TEMPLATES = (
    "leave the {room} , go past {past} and stop by the {goal}",
    "walk past {past} , then stop at the {goal}",
    "exit the {room} and pass {past} . wait near the {goal}",
)
EXTRA_DOORS = 4
STARTS, GOALS = 4, 6  # per house; goals per start


@dataclass(frozen=True)
class Thing:
    """An object beside a viewpoint: number of its kind in `OBJECTS`, position and size in metres, its own feature."""

    kind: int
    beside: int
    position: NDArray[np.float64]
    size: float
    feature: NDArray[np.float64]


@dataclass(frozen=True)
class House:
    """A generated scan."""

    graph: ScanGraph
    rooms: Sequence[str]  # of each viewpoint
    landmarks: Sequence[str]
    things: Sequence[Thing]


def write_sample(root: str | Path, num_train: int = 48, num_unseen: int = 10, seed: int = 0) -> None:
    """Write `num_train` houses for training and `val_seen` and `num_unseen` for `val_unseen` below `root`."""
    root = Path(root)
    for folder in ("connectivity", "objects"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    identities = np.linalg.qr(np.random.default_rng(seed).standard_normal((FEATURE_DIM, FEATURE_DIM)))[0][
        : len(OBJECTS)
    ]
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "val_seen": [], "val_unseen": []}
    rooms: dict[str, dict[str, int]] = {}
    store = _Store()
    numbers = range(num_train + num_unseen)
    for number in track(numbers, "Writing sample houses", console=Console(stderr=True), transient=True):
        generator = np.random.default_rng((seed, number))
        house = build_house(generator, f"house{number:03d}", identities)
        scan = house.graph.scan
        (root / "connectivity" / f"{scan}{SUFFIX}").write_text(json.dumps(connectivity(house.graph)))
        labels = zip(house.graph.viewpoints, house.rooms, strict=True)
        rooms[scan] = {viewpoint: ROOMS.index(room) for viewpoint, room in labels}
        store.add(house)
        paths = annotate(generator, house, number)
        if number >= num_train:
            splits["val_unseen"] += paths
        else:  # one path of each start is kept for val_seen
            splits["val_seen"] += [path for path in paths if path["path_id"] % GOALS == 0]
            splits["train"] += [path for path in paths if path["path_id"] % GOALS]
    (root / "connectivity" / "scans.txt").write_text("".join(f"{scan}\n" for scan in rooms))
    for split, entries in splits.items():
        (root / f"R2R_{split}.json").write_text(json.dumps(entries))
    (root / "house_panos_gt.json").write_text(json.dumps(rooms))
    words = build_vocabulary(all_sentences(), min_count=1)  # also what no house at hand happens to have
    (root / "train_vocab.txt").write_text("".join(f"{word}\n" for word in words))
    pieces = [PAD_PIECE, UNK_PIECE, CLS_PIECE, SEP_PIECE, *sorted(words[3:])]
    (root / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    store.write(root / "objects")


def build_house(generator: np.random.Generator, scan: str, identities: NDArray[np.float64]) -> House:
    """Draw the viewpoints, doors, rooms and objects of one house."""
    count = COLUMNS * ROWS
    grid = np.stack(np.meshgrid(np.arange(ROWS), np.arange(COLUMNS), indexing="ij"), axis=-1).reshape(count, 2)
    flat = SPACING * grid + generator.uniform(-JITTER, JITTER, (count, 2))
    turn = generator.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    height = EYE_HEIGHT + generator.uniform(-0.05, 0.05, (count, 1))
    positions = np.concatenate([flat @ rotation.T, height], axis=1)
    viewpoints = [hashlib.md5(f"{scan}/{number}".encode()).hexdigest() for number in range(count)]
    edges = _doors(generator)
    graph = ScanGraph(scan, viewpoints, positions, np.ones(count, dtype=bool), edges)
    chosen = generator.permutation(list(FURNITURE))[: count // 2]
    rooms = [str(chosen[number // 2]) for number in range(count)]  # two neighbours in a row share a room
    landmarks = [FURNITURE[room][number % 2] for number, room in enumerate(rooms)]
    things = []
    for number, landmark in enumerate(landmarks):
        kinds = [OBJECTS.index(landmark), *(OBJECTS.index(str(name)) for name in generator.choice(DECORATION, 1))]
        for kind in kinds:
            offset = np.append(generator.uniform(-0.4, 0.4, 2), generator.uniform(-0.9, -0.4))
            noise = generator.normal(0, FEATURE_NOISE, FEATURE_DIM)
            things.append(
                Thing(kind, number, positions[number] + offset, generator.uniform(0.6, 1.2), identities[kind] + noise)
            )
    return House(graph, rooms, landmarks, things)


def _doors(generator: np.random.Generator) -> NDArray[np.bool_]:
    """Adjacency (n, n): a random tree over the grid that joins the two viewpoints of each room, and some doors more.

    The more doors, the more often an agent has to choose, and the sooner it learns to read.
    """
    count = COLUMNS * ROWS
    walls = [(n, n + 1) for n in range(count) if (n + 1) % COLUMNS] + [(n, n + COLUMNS) for n in range(count - COLUMNS)]
    inside = [(n, n + 1) for n in range(0, count, 2)]
    order = [*inside, *(wall for wall in generator.permutation(walls).tolist() if tuple(wall) not in inside)]
    group = list(range(count))
    edges = np.zeros((count, count), dtype=bool)
    extra = EXTRA_DOORS
    for a, b in order:
        if group[a] != group[b]:
            old = group[b]
            group = [group[a] if member == old else member for member in group]
        elif extra:
            extra -= 1
        else:
            continue
        edges[a, b] = edges[b, a] = True
    return edges


def annotate(generator: np.random.Generator, house: House, number: int) -> list[dict[str, Any]]:
    """R2R's entries of a house: `GOALS` paths of 3 to 6 viewpoints from each of `STARTS` viewpoints."""
    graph = house.graph
    entries: list[dict[str, Any]] = []
    for start in generator.permutation(len(graph)).tolist():
        paths = [graph.shortest_path(graph.viewpoints[start], goal) for goal in graph.viewpoints]
        paths = [path for path in paths if 3 <= len(path) <= 6]
        if len(paths) < GOALS or len(entries) == STARTS * GOALS:
            continue
        for choice in generator.permutation(len(paths))[:GOALS].tolist():
            nodes = [graph.index[viewpoint] for viewpoint in paths[choice]]
            names = [house.landmarks[node] for node in nodes]
            words = {"room": house.rooms[start], "past": past_all(names[1:-1]), "goal": names[-1]}
            entries.append(
                {
                    "distance": round(graph.distance(paths[choice][0], paths[choice][-1]), 2),
                    "scan": graph.scan,
                    "path_id": number * STARTS * GOALS + len(entries),
                    "path": paths[choice],
                    "heading": round(float(generator.uniform(0, 2 * np.pi)), 3),
                    "instructions": [template.format(**words) for template in TEMPLATES],
                }
            )
    return entries


def past_all(names: Sequence[str]) -> str:
    """The landmarks on the way as a phrase."""
    return " and ".join(f"the {name}" for name in names)


def all_sentences() -> list[str]:
    """Sentences that have every word of the instructions."""
    return [
        template.format(room=room, past=past_all(names), goal=names[0])
        for template in TEMPLATES
        for room, names in FURNITURE.items()
    ]


def connectivity(graph: ScanGraph) -> list[dict[str, Any]]:
    """The official file of a graph whose viewpoints are all included."""
    entries = []
    for number, viewpoint in enumerate(graph.viewpoints):
        pose = np.eye(4)
        pose[:3, 3] = graph.positions[number]
        neighbours = graph.edges[number].tolist()
        entries.append(
            {
                "image_id": viewpoint,
                "pose": pose.ravel().tolist(),
                "included": True,
                "visible": neighbours,
                "unobstructed": neighbours,
                "height": EYE_HEIGHT,
            }
        )
    return entries


class _Store:
    """Collects the objects of all views and writes them as NumPy files."""

    def __init__(self) -> None:
        self.features: list[NDArray[np.float64]] = []
        self.boxes: list[tuple[float, ...]] = []
        self.labels: list[str] = []
        self.index: dict[str, list[int]] = {}

    def add(self, house: House) -> None:
        """Note what each view of each viewpoint shows: the things beside its neighbours, nearest first."""
        camera = Camera()
        headings, elevations = view_angles()
        graph = house.graph
        for number, viewpoint in enumerate(graph.viewpoints):
            near = [thing for thing in house.things if graph.edges[number, thing.beside]]
            x, y, z = (np.array([thing.position for thing in near]) - graph.positions[number]).T
            distance = np.sqrt(x**2 + y**2 + z**2)
            across = (np.arctan2(x, y) - headings[:, None] + np.pi) % (2 * np.pi) - np.pi  # (36, things)
            above = np.arctan2(z, np.sqrt(x**2 + y**2)) - elevations[:, None]
            shown = (np.abs(across) < camera.vfov / 2) & (np.abs(above) < camera.vfov / 2) & (distance > NEAREST)
            for view in range(NUM_VIEWS):
                inside = [i for i in np.argsort(distance) if shown[view, i]]
                self.index[view_key(graph.scan, viewpoint, view)] = [len(self.labels), len(inside)]
                for i in inside:
                    half = near[i].size / distance[i] / 2
                    centre = 0.5 + across[view, i] / (2 * camera.half_hfov), 0.5 - above[view, i] / camera.vfov
                    corners = [c + side * half for side in (-1, 1) for c in centre]
                    self.boxes.append(tuple(np.clip(corners, 0, 1)))
                    self.features.append(near[i].feature)
                    self.labels.append(OBJECTS[near[i].kind])

    def write(self, folder: Path) -> None:
        """Write all objects."""
        np.save(folder / "features.npy", np.array(self.features, dtype=np.float32))
        np.save(folder / "boxes.npy", np.array(self.boxes, dtype=np.float32))
        (folder / "labels.json").write_text(json.dumps(self.labels))
        (folder / "index.json").write_text(json.dumps(self.index))
