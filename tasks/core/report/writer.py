"""Writes a report as ``report.json``, ``report.md`` and ``report.html``."""

from __future__ import annotations

import base64
import html
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tasks.core.files import write_atomically
from tasks.core.report.document import Report, Table
from tasks.core.report.figures import curve_panels
from tasks.core.report.numbers import format_column, format_number, is_number, plain

COST = {"params": "Parameters", "macs": "MACs", "step_time_ms": "Step time", "peak_memory_mb": "Peak memory"}
UNITS = {"step_time_ms": "\N{NO-BREAK SPACE}ms", "peak_memory_mb": "\N{NO-BREAK SPACE}MB"}
COST_KINDS = {"macs": "macs_kind", "step_time_ms": "step_time_kind", "peak_memory_mb": "peak_memory_kind"}


class Cell(NamedTuple):
    """One table cell: what is shown, what it sorts by, and whether it is a number."""

    text: str
    value: Any
    number: bool


def write_report(report: Report, folder: Path | str) -> Path:
    """Write the three files and, for ``report.md``, the pictures in ``report_files/``; returns ``report.html``.

    NaN and infinite numbers are null in the JSON file.
    """
    folder = Path(folder)
    files = [f"report_files/{number:02d}.png" for number in range(1, len(report.pictures) + 1)]
    for picture, file in zip(report.pictures, files, strict=True):
        write_atomically(folder / file, picture.png)
    for old in set((folder / "report_files").glob("*.png")) - {folder / file for file in files}:
        old.unlink()  # of an earlier report in this folder
    write_atomically(folder / "report.json", to_json(report, files))
    write_atomically(folder / "report.md", to_markdown(report, files))
    write_atomically(folder / "report.html", to_html(report))
    return folder / "report.html"


def to_json(report: Report, files: Sequence[str]) -> str:
    """Every number of the report as strict JSON; `files` are the paths of its pictures."""
    pictures = [
        {"title": picture.title, "caption": picture.caption, "file": file}
        for picture, file in zip(report.pictures, files, strict=True)
    ]
    content = {
        **vars(report),
        "cost": {**dict.fromkeys(COST), **report.cost},
        "tables": [vars(table) for table in report.tables],
        "pictures": pictures,
    }
    return json.dumps(plain(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def to_html(report: Report) -> str:
    """One page that needs nothing else: style, script, curves and pictures are inside."""
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = [
        (title, [(picture.caption, _data_uri(picture.png, "image/png")) for picture in group])
        for title, group in itertools.groupby(report.pictures, key=lambda picture: picture.title)
    ]
    return jinja.get_template("template.html.jinja").render(
        report=report,
        tiles=_tiles(report),
        metrics=_cells(_metrics_table(report)),
        tables=[(table, _cells(table)) for table in report.tables],
        curves=[(title, _data_uri(svg, "image/svg+xml")) for title, svg in curve_panels(report.curves)],
        pictures=pictures,
        cost=_cells(_cost_table(report)),
        environment=_cells(Table("Environment", ["what", "version"], list(report.environment.items()))),
        number=format_number,
    )


def to_markdown(report: Report, files: Sequence[str]) -> str:
    """The report for a repository or a code review; pictures are links to `files`."""
    parts = [f"# {_escape(report.title)}", f"Task: {_escape(report.task)} · Config: {_escape(report.config) or '–'}"]
    for table in [_metrics_table(report), *report.tables, _cost_table(report)]:
        parts += [f"## {_escape(table.title)}", _markdown_table(table)]
    for title, group in itertools.groupby(zip(report.pictures, files, strict=True), key=lambda pair: pair[0].title):
        parts.append(f"## {_escape(title)}")
        parts += [f"![{_escape(picture.caption)}]({file})\n\n{_escape(picture.caption)}" for picture, file in group]
    if report.command:
        parts += ["## Command", "\n".join(f"    {line}" for line in report.command.splitlines())]
    if report.environment:
        rows = list(report.environment.items())
        parts += ["## Environment", _markdown_table(Table("", ["what", "version"], rows))]
    if report.notes:
        parts += ["## Notes", "\n".join(f"- {_escape(note)}" for note in report.notes)]
    return "\n\n".join(parts) + "\n"


def _metrics_table(report: Report) -> Table:
    """The headline first, then validation and test, then the rest."""

    def order(name: str) -> tuple[bool, bool, str]:
        return name != report.monitor, not name.startswith(("val", "test")), name

    return Table(
        "Metrics", ["metric", "value"], [(name, report.metrics[name]) for name in sorted(report.metrics, key=order)]
    )


def _cost_table(report: Report) -> Table:
    rows = [
        (label, _amount(key, report.cost.get(key)), report.cost.get(COST_KINDS.get(key, "")) or "")
        for key, label in COST.items()
    ]
    return Table("Cost", ["what", "value", "measured as"], rows)


def _tiles(report: Report) -> list[tuple[str, str]]:
    """The known costs, short."""
    return [(label, _amount(key, report.cost[key])) for key, label in COST.items() if report.cost.get(key) is not None]


def _amount(key: str, value: Any) -> str:
    """A cost with its unit."""
    if value is None:
        return "–"
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if key in ("params", "macs") and value >= factor:
            return f"{value / factor:,.2f}\N{NO-BREAK SPACE}{prefix}"
    return format_number(value) + UNITS.get(key, "")


def _cells(table: Table) -> list[list[Cell]]:
    """The rows of a table, numbers formatted column by column."""
    columns = list(zip(*table.rows, strict=True))
    texts = [format_column(column) for column in columns]
    cells = [
        [Cell(text, plain(value), is_number(plain(value))) for text, value in zip(shown, column, strict=True)]
        for shown, column in zip(texts, columns, strict=True)
    ]
    return [list(row) for row in zip(*cells, strict=True)]


def _markdown_table(table: Table) -> str:
    rows = _cells(table)
    numeric = [bool(rows) and all(row[i].number for row in rows) for i in range(len(table.columns))]
    lines = [
        [_escape(column) for column in table.columns],
        ["---:" if right else ":---" for right in numeric],
        *[[_escape(cell.text) for cell in row] for row in rows],
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(text: str) -> str:
    """Text that Markdown renders as written, on one line."""
    text = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{c}" if c in r"\`*_[]|" else c for c in text)


def _data_uri(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
