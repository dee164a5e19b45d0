"""Annotations of R2R, REVERIE and NDH: one episode per instruction.

Whatever is wrong with a file is one `DataError` that names the file, the entry and the field.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tasks.core.data import DataError
from tasks.navigation.text import TURN

PathType = Literal["oracle", "navigator", "mixed"]
History = Literal["target", "oracle_ans", "nav_q_oracle_ans", "all"]


@dataclass(frozen=True)
class Episode:
    """One instruction to follow.

    `path` is the annotated path, of which test splits publish the first viewpoint alone (`has_goal` is then false).
    REVERIE: `target` is the id of the object to find and `target_views` the viewpoints from which it is visible.
    NDH: `end_region` holds the viewpoints of the goal's region, and `planner_path` the path that the oracle saw.
    """

    id: str
    split: str
    scan: str
    path: tuple[str, ...]
    heading: float
    instruction: str
    has_goal: bool = True
    tokens: tuple[int, ...] = ()
    target: str | None = None
    target_views: frozenset[str] = frozenset()
    end_region: tuple[str, ...] = ()
    planner_path: tuple[str, ...] = ()

    @property
    def start(self) -> str:
        """The first viewpoint."""
        return self.path[0]

    @property
    def goal(self) -> str:
        """The last annotated viewpoint."""
        return self.path[-1]

    @property
    def key(self) -> str:
        """A name that is unique over all splits."""
        return f"{self.split}/{self.id}"


class Entry:
    """One object of an annotation file, whose fields are read with their types."""

    def __init__(self, path: Path, number: int, content: Any) -> None:
        self.path = path
        self.number = number
        if not isinstance(content, dict):
            raise self.error("", f"expected an object, got {type(content).__name__}")
        self.content: Mapping[str, Any] = content

    def error(self, field: str, problem: str) -> DataError:
        """An error that names file, entry and field."""
        return DataError(f"{self.path}: entry {self.number}: {f'{field}: ' if field else ''}{problem}")

    def text(self, field: str) -> str:
        """A text."""
        return self._value(field, lambda value: isinstance(value, str), "a text")

    def name(self, field: str) -> str:
        """An id: a text or a whole number."""
        kind = "an id (text or whole number)"
        return str(self._value(field, lambda value: isinstance(value, str | int) and not isinstance(value, bool), kind))

    def angle(self, field: str) -> float:
        """A heading in radians."""
        valid = lambda value: isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6  # noqa: E731
        return float(self._value(field, valid, "an angle in radians"))

    def texts(self, field: str) -> tuple[str, ...]:
        """A list of texts that is not empty."""
        valid = lambda value: isinstance(value, list) and value and all(isinstance(item, str) for item in value)  # noqa: E731
        return tuple(self._value(field, valid, "a list of texts"))

    def objects(self, field: str) -> list[Entry]:
        """A list of objects, possibly empty."""
        values = self._value(field, lambda value: isinstance(value, list), "a list of objects")
        return [Entry(self.path, self.number, value) for value in values]

    def _value(self, field: str, valid: Callable[[Any], Any], expected: str) -> Any:
        if field not in self.content:
            raise self.error(field, f"is missing; expected {expected}")
        value = self.content[field]
        if not valid(value):
            shown = json.dumps(value)
            raise self.error(field, f"{shown if len(shown) < 60 else shown[:57] + '...'}; expected {expected}")
        return value


def read_json(path: Path, expected: str) -> Any:
    """The content of a JSON file; `expected` says what it should have been."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); expected {expected}") from None


def read_entries(path: Path) -> list[Entry]:
    """The entries of an annotation file."""
    content = read_json(path, "a list of annotations")
    if not isinstance(content, list) or not content:
        raise DataError(f"{path}: expected a list of annotations")
    return [Entry(path, number, entry) for number, entry in enumerate(content)]


def read_r2r(path: Path, split: str) -> list[Episode]:
    """R2R (and R4R and augmented paths of its format): `scan`, `path_id`, `path`, `heading`, `instructions`."""
    episodes = []
    for entry in read_entries(path):
        name, nodes = entry.name("path_id"), entry.texts("path")
        for k, instruction in enumerate(entry.texts("instructions")):
            has_goal = len(nodes) > 1 or "distance" in entry.content
            episodes.append(
                Episode(f"{name}_{k}", split, entry.text("scan"), nodes, entry.angle("heading"), instruction, has_goal)
            )
    return unique(episodes, path)


def read_reverie(path: Path, split: str, visible: Mapping[str, Mapping[str, Collection[str]]] | None) -> list[Episode]:
    """REVERIE, version 1 or 2; `visible` holds the viewpoints that see an object, by scan and object id."""
    episodes = []
    for entry in read_entries(path):
        nodes, scan = entry.texts("path"), entry.text("scan")
        target = entry.name("objId") if "objId" in entry.content else None
        views = (visible or {}).get(scan, {}).get(target, ()) if target is not None else ()
        for k, instruction in enumerate(entry.texts("instructions")):
            episodes.append(
                Episode(
                    f"{entry.name('id')}_{k}",
                    split,
                    scan,
                    nodes,
                    entry.angle("heading"),
                    instruction,
                    target is not None,
                    target=target,
                    target_views=frozenset(views),
                )
            )
    return unique(episodes, path)


def read_ndh(path: Path, split: str, supervision: PathType, history: History = "all") -> list[Episode]:
    """Navigation from dialogue history, in CVDN's format or in that of ORIST, with the paths of `supervision`."""
    read = [
        _orist_ndh(entry, split, supervision)
        if "instructions" in entry.content
        else _cvdn(entry, split, supervision, history)
        for entry in read_entries(path)
    ]
    return unique(read, path)


def supervised_path(planner: Sequence[str], player: Sequence[str], supervision: PathType) -> tuple[str, ...]:
    """What an agent is to follow: the planner's path (oracle), the player's (navigator), or the trusted one (mixed).

    The player is trusted if the end of the planner's path is among the viewpoints it went to.
    """
    trusted = player if planner[-1] in player[1:] else planner
    return tuple({"oracle": planner, "navigator": player, "mixed": trusted}[supervision])


def _cvdn(entry: Entry, split: str, supervision: PathType, history: History) -> Episode:
    start = Entry(entry.path, entry.number, entry.content.get("start_pano"))
    target = entry.text("target")
    turns = [(turn.text("role"), turn.text("message")) for turn in entry.objects("dialog_history")]
    has_goal = "planner_path" in entry.content
    planner = entry.texts("planner_path") if has_goal else (start.name("pano"),)
    nodes = supervised_path(planner, entry.texts("player_path"), supervision) if has_goal else planner
    if nodes[0] != start.name("pano"):
        raise entry.error("start_pano", f"{start.name('pano')}; expected {nodes[0]}, where the path begins")
    return Episode(
        entry.name("inst_idx"),
        split,
        entry.text("scan"),
        nodes,
        start.angle("heading"),
        dialogue(turns, target, history),
        has_goal,
        end_region=entry.texts("end_panos") if has_goal else (),
        planner_path=planner,
    )


def _orist_ndh(entry: Entry, split: str, supervision: PathType) -> Episode:
    has_goal = "planner_path" in entry.content
    planner = entry.texts("planner_path") if has_goal else entry.texts("path")
    return Episode(
        entry.name("path_id"),
        split,
        entry.text("scan"),
        supervised_path(planner, entry.texts("player_path"), supervision) if has_goal else planner,
        entry.angle("heading"),
        " ".join(entry.texts("instructions"))
        if isinstance(entry.content.get("instructions"), list)
        else entry.text("instructions"),
        has_goal,
        end_region=entry.texts("end_panos") if has_goal else (),
        planner_path=planner,
    )


def dialogue(turns: Sequence[tuple[str, str]], target: str, history: History) -> str:
    """The turns (role, message) that `history` keeps and the target, joined as ORIST joins them: with ``[sep]``.

    `target` keeps none, `oracle_ans` the last answer, `nav_q_oracle_ans` also the question before it.
    """
    kept = {"target": 0, "oracle_ans": 1, "nav_q_oracle_ans": 2, "all": len(turns)}[history]
    return f" {TURN} ".join([*(message for _, message in turns[len(turns) - kept :]), target])


def unique(episodes: list[Episode], path: Path) -> list[Episode]:
    """`episodes`, unless an id occurs twice."""
    seen: set[str] = set()
    for episode in episodes:
        if episode.id in seen:
            raise DataError(f"{path}: instruction id {episode.id!r} occurs twice; expected unique ids")
        seen.add(episode.id)
    return episodes


def visible_objects(boxes: Mapping[str, Any], origin: Path) -> dict[str, dict[str, set[str]]]:
    """Viewpoints from which each object is visible, by scan and object id, from REVERIE's boxes.

    `boxes` maps ``<scan>_<viewpoint>`` to its objects (as DUET merges them) or to {viewpoint: objects} (a file of the
    release). An object with no view in `visible_pos` is near but hidden.
    """
    visible: dict[str, dict[str, set[str]]] = {}
    for key, content in boxes.items():
        scan, separator, viewpoint = key.partition("_")
        if not separator or not isinstance(content, dict):
            raise DataError(f"{origin}: {key!r}: expected the objects of <scan>_<viewpoint>")
        objects = content[viewpoint] if set(content) == {viewpoint} else content
        for name, description in objects.items():
            if not isinstance(description, dict) or not isinstance(description.get("visible_pos"), list):
                raise DataError(f"{origin}: {key}: object {name}: visible_pos: expected a list of view indices")
            if description["visible_pos"]:
                visible.setdefault(scan, {}).setdefault(str(name), set()).add(viewpoint)
    return visible
