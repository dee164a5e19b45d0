"""Training curves from the file that Lightning's CSVLogger keeps."""

from __future__ import annotations

import csv
from pathlib import Path

from tasks.core.errors import UserError
from tasks.core.report.document import Curve


def read_metrics_csv(path: Path) -> dict[str, Curve]:
    """Curves by metric name from ``metrics.csv``, steps ascending; of several values at one step the last counts.

    Raises:
        UserError: A line has no whole `step` or a value is not a number.
    """
    points: dict[str, dict[int, float]] = {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            try:
                step = int(row.pop("step"))
                row.pop("epoch", None)
                for name, text in row.items():
                    if text:
                        points.setdefault(name, {})[step] = float(text)
            except (KeyError, ValueError, TypeError) as error:
                raise UserError(
                    f"{path}, line {reader.line_num}: expected a whole step and numbers ({error})"
                ) from None
    return {name: sorted(values.items()) for name, values in sorted(points.items())}
