"""Which program computes which tile, and how many programs share a tile's tokens.

Plain Python: the host lists a launch's tiles once per shape, and each program looks its own up. A *code* names a
tile in one int32: bit 30 says cross (1) or gram (0), bits 15 to 29 are the tile row, bits 0 to 14 the tile column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

CROSS = 1 << 30
ROW_SHIFT = 15
COLUMN_MASK = (1 << ROW_SHIFT) - 1

# What a launch costs beside its products, in k-steps of the architecture's `half` tile (0.85 us for 128 x 256 x 64,
# timed on an H200). Estimates: they decide which tiles and how many programs a tile's tokens take, never what is
# computed.
TILE_STEPS = 4  # a program's start and end
REDUCE_STEPS = 4  # the launch that adds the partial tiles up
WORKSPACE_STEPS = 0.05  # writing and reading one partial tile, the memory shared by all programs
MIN_STEPS = 4  # a program shorter than this gains nothing
MAX_WAVES = 10  # bounds the workspace


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def tile_order(gram_columns: int, cross_rows: int, columns: int, block_m: int, block_n: int, group: int) -> list[int]:
    """The codes of all tiles of one launch, in launch order.

    Args:
        gram_columns: size of the square sum, of which the upper triangle is computed; 0 for none.
        cross_rows: rows of the rectangular sum; 0 for none.
        columns: columns of the rectangular sum.
        block_m: tile rows.
        block_n: tile columns.
        group: tile rows of a band. Programs that run at the same time stay within one or two bands, so that the L2
            cache serves a few row blocks and a few column blocks instead of the whole input.

    Returns:
        Every tile that touches the triangle and every tile of the rectangle, once.
    """
    square = _bands(
        ceil_div(gram_columns, block_m), ceil_div(gram_columns, block_n), group, lambda i: i * block_m // block_n
    )
    rectangle = _bands(ceil_div(cross_rows, block_m), ceil_div(columns, block_n), group, lambda i: 0)
    return [*square, *(CROSS | code for code in rectangle)]


def tile_count(gram_columns: int, cross_rows: int, columns: int, block_m: int, block_n: int) -> int:
    """How many there are in `tile_order`."""
    across = ceil_div(gram_columns, block_n)
    square = sum(across - i * block_m // block_n for i in range(ceil_div(gram_columns, block_m)))
    return square + ceil_div(cross_rows, block_m) * ceil_div(columns, block_n)


def _bands(rows: int, columns: int, group: int, first_column: Callable[[int], int]) -> Iterator[int]:
    for start in range(0, rows, group):
        band = range(start, min(start + group, rows))
        for j in range(first_column(start), columns):
            for i in band:
                if j >= first_column(i):
                    yield i << ROW_SHIFT | j


def token_splits(tiles: int, steps: int, slots: int, size: float = 1.0, step: float = 1.0) -> tuple[int, float]:
    """How many programs should share each tile's tokens, and what the launch then takes.

    Args:
        tiles: tiles of the launch.
        steps: k-steps of a tile.
        slots: programs that run at once.
        size: entries of a tile, by those of a `half` tile.
        step: what one of its steps takes, in those of a `half` tile.

    Returns:
        Programs a tile, and the launch's time in steps of a `half` tile.
    """

    def cost(splits: int) -> float:
        waves = ceil_div(tiles * splits, slots)
        reduce = REDUCE_STEPS + WORKSPACE_STEPS * size * tiles * splits if splits > 1 else 0
        return waves * (ceil_div(steps, splits) * step + TILE_STEPS * size) + reduce

    most = max(1, min(steps // MIN_STEPS, MAX_WAVES * slots // tiles))
    best = min(range(1, most + 1), key=cost)
    return best, cost(best)
