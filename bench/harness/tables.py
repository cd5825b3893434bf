"""Tables for a terminal, and what is in their cells."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def table(title: str, rows: Sequence[dict[str, Any]], notes: Sequence[str] = ()) -> str:
    """Rows under the columns that any of them has; the first column to the left."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([text(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    aligned = [str.ljust, *[str.rjust] * len(names)]
    lines = [
        "  ".join(align(cell, width) for align, cell, width in zip(aligned, line, widths, strict=False)).rstrip()
        for line in cells
    ]
    return "\n".join([title, *lines, *notes])


def text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and the sample's standard deviation (0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
