"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(title: str, rows: Sequence[dict[str, Any]], notes: Sequence[str] = ()) -> str:
    """Rows under the columns that any of them has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([text(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([title, *lines, *notes])


def text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
