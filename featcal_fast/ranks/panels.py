"""Sums and weights taken apart into panels, the same ones however many processes there are.

A product or a solve of some rows may round otherwise than one of all rows does; so these are made panel by panel on one
device, too.
"""

from __future__ import annotations

PANEL_BYTES = 64 * 2**20  # of float32, at most
STEP = 128  # rows: a panel is a multiple of it


def row_panels(rows: int, width: int) -> list[slice]:
    """What a matrix `[rows, width]` is taken apart into: of `PANEL_BYTES` at most each, but of `STEP` rows at least."""
    size = max(STEP, PANEL_BYTES // (4 * width) // STEP * STEP)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
