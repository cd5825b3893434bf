"""The order of tiles and the split over tokens, which the host works out for the kernels."""

from __future__ import annotations

import heapq
from math import ceil

import pytest
import torch
from featcal_kernels.configs import TABLE, WORKSPACE_BYTES, Tile
from featcal_kernels.schedule import COLUMN_MASK, CROSS, ROW_SHIFT, tile_count, tile_order, token_splits


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


@pytest.mark.parametrize(("tiles", "steps", "expected"), [(30, 256, 4), (5000, 256, 1), (1, 4, 1), (6, 2, 1)])
def test_small_sums_are_split_over_the_tokens(tiles: int, steps: int, expected: int):
    assert token_splits(tiles, steps, slots=132)[0] == expected


SHAPES = [(1024, 1024), (2048, 2048), (3072, 3072), (4096, 4096), (14336, 4096)]
SHAPES += [(d, 0) for d in (1024, 2048, 3072, 4096, 14336)]  # a Gram matrix alone


@pytest.mark.parametrize("n", [2048, 16384, 65536])
@pytest.mark.parametrize(("d", "m"), SHAPES)
def test_an_h200_is_kept_busy(d: int, m: int, n: int, monkeypatch: pytest.MonkeyPatch):
    """At least 0.90 of the SMs' time goes into products that are needed, by the schedule's own arithmetic.

    Two kinds of these shapes fall short and are left to cuBLAS: little work, and a Gram matrix alone of a few columns,
    more than a tenth of whose tiles lies below the diagonal. One alone of 2,048 columns falls short, too, but takes
    0.7 of cuBLAS's time.
    """
    launch = pytest.importorskip("featcal_kernels.launch")
    monkeypatch.setattr(launch.blas, "available", lambda device: True)
    gram, cross, x = (torch.empty(size, d, device="meta", dtype=torch.bfloat16) for size in (d, m, n))
    if launch._path(gram, cross if m else None, x, TABLE["sm_90"]) == "triton":
        tile, splits = launch.choose_tile((d, m, d), n, 1, TABLE["sm_90"], half=True, slots=132)
        assert busy(d, m, n, tile, splits) > (0.8 if (d, m) == (2048, 0) else 0.9)
    else:
        assert n * d * (d + 2 * m) < 5.2e10 or (m == 0 and d <= 1024)


@pytest.mark.parametrize("n", [2048, 16384, 65536])
@pytest.mark.parametrize(("d", "m"), [shape for shape in SHAPES if shape[1]])
def test_an_h200_is_kept_busy_with_float32_features(d: int, m: int, n: int):
    launch = pytest.importorskip("featcal_kernels.launch")
    tile, splits = launch.choose_tile((d, m, d), n, 3, TABLE["sm_90"], half=True, slots=132)
    assert busy(d, m, n, tile, splits) > (0.7 if (d, n) == (1024, 2048) else 0.9)  # 25 us of work


@pytest.mark.parametrize("size", range(128, 8192, 640))
def test_partial_sums_take_no_more_than_plans_say(size: int):
    launch = pytest.importorskip("featcal_kernels.launch")
    for runs in (1, 3):
        tile, splits = launch.choose_tile((size, size, size), 65536, runs, TABLE["sm_90"], half=True, slots=148)
        workspace = tile_count(size, size, size, tile.m, tile.n) * splits * tile.m * tile.n * 4
        assert splits == 1 or workspace <= WORKSPACE_BYTES


def busy(d: int, m: int, n: int, tile: Tile, splits: int, slots: int = 132) -> float:
    """The share of the slots' time that needed products take: programs start in order, each where one is free."""
    count, steps = len(tile_order(d, m, d, tile.m, tile.n, tile.group)), ceil(n / tile.k)
    assert count == tile_count(d, m, d, tile.m, tile.n)
    free = [0] * slots
    for part in range(splits):
        length = steps * (part + 1) // splits - steps * part // splits
        for _ in range(count):
            heapq.heapreplace(free, free[0] + length)
    needed = (d * d / 2 + m * d) / (tile.m * tile.n) * steps
    return needed / (slots * max(free))
