"""Room labels of viewpoints, for the auxiliary heads that predict rooms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from tasks.core.data import DataError
from tasks.navigation.episodes import read_json

UNLABELLED = -100
ROOMS = (
    "bathroom", "bedroom", "closet", "dining room", "entryway", "familyroom", "garage", "hallway", "library",
    "laundryroom", "kitchen", "living room", "meetingroom", "lounge", "office", "porch", "rec/game", "stairs", "toilet",
    "utilityroom", "tv", "workout", "outdoor", "balcony", "other room", "bar", "classroom", "dining booth", "spa",
    "junk", "no-label",
)  # fmt: skip


class Rooms:
    """The class of the room in which a viewpoint is, by scan and viewpoint; `UNLABELLED` where none is known."""

    def __init__(self, labels: Mapping[str, Mapping[str, int]], names: tuple[str, ...] = ROOMS) -> None:
        self.labels = labels
        self.names = names

    def of(self, scan: str, viewpoint: str) -> int:
        """The class of a viewpoint's room."""
        return self.labels.get(scan, {}).get(viewpoint, UNLABELLED)


def read_rooms(path: Path) -> Rooms:
    """Read ``house_panos_gt.json``, {scan: {viewpoint: class}}; without the file, warn and label nothing."""
    if not path.is_file():
        rank_zero_warn(f"{path}: not found; the losses of the room heads are left out")
        return Rooms({})
    labels = read_json(path, "room classes by scan and viewpoint")
    if not isinstance(labels, dict):
        raise DataError(f"{path}: expected {{scan: {{viewpoint: class}}}}")
    for scan, rooms in labels.items():
        if not isinstance(rooms, dict):
            raise DataError(f"{path}: {scan}: expected {{viewpoint: class}}")
        for viewpoint, room in rooms.items():
            if type(room) is not int or not 0 <= room < len(ROOMS):
                raise DataError(f"{path}: {scan}: {viewpoint}: {room!r}; expected a class from 0 to {len(ROOMS) - 1}")
    return Rooms(labels)
