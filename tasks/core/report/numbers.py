"""Numbers as a reader wants them: few digits, and as many decimals as the others of their column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def plain(value: Any) -> Any:
    """`value` with NumPy and torch scalars and arrays as Python numbers and lists, NaN and infinity as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_number(value: Any) -> bool:
    """Whether a cell holds a number or a missing number, so that it is aligned right."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def format_column(values: Sequence[Any]) -> list[str]:
    """The cells of one table column; its numbers share the number of decimals."""
    values = [plain(value) for value in values]
    decimals = _decimals([value for value in values if isinstance(value, float)])
    return [_format(value, decimals) for value in values]


def format_number(value: Any) -> str:
    """One number alone."""
    return format_column([value])[0]


def _decimals(values: Sequence[float]) -> int:
    """Two for percentages, four for fractions and losses."""
    largest = max((abs(value) for value in values), default=0.0)
    return next((decimals for limit, decimals in ((10_000, 0), (10, 2)) if largest >= limit), 4)


def _format(value: Any, decimals: int) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        tiny = value != 0 and abs(value) < 0.5 * 10**-decimals  # would read as zero
        return f"{value:.2e}" if tiny else f"{value:,.{decimals}f}"
    return f"{value:,}" if is_number(value) else str(value)
