"""What a report holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Curve = list[tuple[int, float]]  # (step, value)
Cost = dict[str, float | int | str | None]  # the keys of tasks.core.report.cost.measure_cost


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers, e.g. one row per class."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | int | float | None]]


@dataclass(frozen=True)
class Picture:
    """A PNG image. Consecutive pictures of one title (``Best cases``) share a heading; the caption tells them apart."""

    title: str
    caption: str
    png: bytes


@dataclass
class ReportParts:
    """What a task adds to the report."""

    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


@dataclass
class Report:
    """One evaluation; `monitor` names the headline among `metrics`."""

    task: str
    config: str
    title: str
    metrics: dict[str, float]
    cost: Cost = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    curves: dict[str, Curve] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    command: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    monitor: str | None = None
