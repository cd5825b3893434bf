"""The order of tiles and the split over tokens, which the host works out for the kernels."""

from __future__ import annotations

from math import ceil

import pytest
from featcal_kernels.schedule import COLUMN_MASK, CROSS, ROW_SHIFT, tile_order, token_splits


def tiles(order: list[int]) -> list[tuple[bool, int, int]]:
    return [(code & CROSS > 0, (code & ~CROSS) >> ROW_SHIFT, code & COLUMN_MASK) for code in order]


@pytest.mark.parametrize(("block_m", "block_n"), [(128, 128), (128, 256), (64, 16), (256, 128)])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize(("d", "m"), [(1, 0), (1, 1), (768, 768), (1000, 130), (2048, 0), (0, 300), (4097, 513)])
def test_every_tile_once(d: int, m: int, group: int, block_m: int, block_n: int):
    order = tiles(tile_order(d, m, d or 70, block_m, block_n, group))
    assert len(set(order)) == len(order)
    columns = ceil((d or 70) / block_n)
    square = {
        (False, i, j)
        for i in range(ceil(d / block_m))
        for j in range(columns)
        if (j + 1) * block_n > i * block_m  # its last column reaches the diagonal
    }
    rectangle = {(True, i, j) for i in range(ceil(m / block_m)) for j in range(columns)}
    assert set(order) == square | rectangle
    assert all(0 <= code < 2**31 for code in tile_order(d, m, d or 70, block_m, block_n, group))


def test_a_wave_shares_its_operands():
    """132 programs at a time (an H200) read a fraction of the blocks that they would row by row."""
    order = tiles(tile_order(14336, 0, 14336, 128, 256, group=8))
    waves = [order[start : start + 132] for start in range(0, len(order), 132)]
    blocks = [len({i for _, i, _ in wave}) + 2 * len({j for _, _, j in wave}) for wave in waves]
    assert sum(blocks) / len(blocks) < 50  # row by row: 79


@pytest.mark.parametrize(("tile_count", "steps", "expected"), [(30, 256, 4), (5000, 256, 1), (1, 4, 1), (6, 2, 1)])
def test_small_sums_are_split_over_the_tokens(tile_count: int, steps: int, expected: int):
    assert token_splits(tile_count, steps, slots=132) == expected
