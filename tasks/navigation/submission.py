"""Submissions to the leaderboards, and reading them back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.core.data import DataError
from tasks.core.errors import UserError
from tasks.navigation.episodes import read_json


def submission(dataset: str, split: str, records: Mapping[str, Mapping[str, Any]]) -> tuple[str, bytes]:
    """Name and content of the JSON file of a leaderboard, from records by instruction id, in the order of the ids.

    R2R: `instr_id` and `trajectory`; REVERIE: also `predObjId`; NDH: `inst_idx` and `trajectory`. Rows of a trajectory
    are viewpoint, heading and elevation.
    """
    entries: list[dict[str, Any]] = []
    for id, record in sorted(records.items(), key=lambda item: _natural(item[0])):
        trajectory = [[viewpoint, round(float(h), 6), round(float(e), 6)] for viewpoint, h, e in record["trajectory"]]
        if dataset == "ndh":
            entries.append({"inst_idx": int(id), "trajectory": trajectory})
        else:
            entries.append({"instr_id": id, "trajectory": trajectory})
        if dataset == "reverie":
            name = record.get("object")
            entries[-1]["predObjId"] = int(name) if name is not None and str(name).isdecimal() else name
    return f"submit_{dataset}_{split}.json", (json.dumps(entries, separators=(",", ":")) + "\n").encode()


def _natural(id: str) -> tuple[tuple[int, str], ...]:
    """Numbers in the order of their size."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in id.split("_"))


def read_submission(path: Path, known: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Records by id of a submission in any of the formats, and what is unusual about it.

    As in the official scripts the first of several entries of an id counts, and ids that are not `known` are ignored.
    """
    entries = read_json(path, "a submission: a list of trajectories")
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a list of trajectories, got {type(entries).__name__}")
    records: dict[str, dict[str, Any]] = {}
    repeated, unknown, ids = 0, 0, set(known)
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("trajectory"), list):
            raise DataError(f"{path}: entry {number}: expected an object with an id and a list as trajectory")
        id = next((str(entry[name]) for name in ("instr_id", "inst_idx", "instr_idx") if name in entry), None)
        if id is None:
            raise DataError(f"{path}: entry {number}: expected instr_id (R2R, REVERIE) or inst_idx (NDH)")
        repeated += id in records
        unknown += id not in ids
        records.setdefault(id, {"trajectory": entry["trajectory"], "object": entry.get("predObjId")})
    if entries and not ids & records.keys():
        raise UserError(f"{path}: none of its {len(records)} ids is in the split; the first is {next(iter(records))!r}")
    notes = []
    if repeated:
        notes.append(f"{path}: {repeated} entries repeat an id; the first of each counts")
    if unknown:
        notes.append(f"{path}: {unknown} entries are of ids that the split does not have; they are ignored")
    return records, notes
