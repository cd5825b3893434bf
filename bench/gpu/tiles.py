"""Tile shapes, timed in turns; the row for `featcal_kernels.configs.TABLE` that they and the sums' paths give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import exp, inf, log
from typing import Any

import torch
from featcal_kernels import gram_cross_
from featcal_kernels.configs import TABLE, Arch, Tile
from torch import Tensor

from bench.gpu.compiling import Compiling, Target, with_tile
from bench.gpu.sections import LeftOut, Row, Section
from bench.gpu.timing import Run, measure, refusal
from bench.harness.results import Results, Rows


@dataclass(frozen=True)
class Shape:
    """One Gram matrix `[d, d]` and one cross moment `[m, d]` of `n` tokens."""

    d: int
    m: int
    n: int
    dtype: torch.dtype

    @property
    def flops(self) -> float:
        """Of the triangle and the rectangle, on matrix units: float32 features are split in two, for three products."""
        return self.n * self.d * (self.d + 1 + 2 * self.m) * (3 if self.dtype == torch.float32 else 1)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.d} {self.m} {self.n}"

    def features(self, device: torch.device) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.n, self.d, device=device, dtype=self.dtype)
        return x, torch.randn(self.n, self.m, device=device, dtype=self.dtype)

    def sums(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.d, self.d, device=device), torch.zeros(self.m, self.d, device=device)


COUNTS = {"half": 8, "split": 4, "small": 2}
TOLERANCE = 1.01  # a candidate replaces the table's only if it is faster by more
LARGE = Shape(4096, 4096, 16384, torch.bfloat16)  # which keeps a GPU busy
KINDS = {  # the shapes that a kind is timed on
    "half": [LARGE, Shape(14336, 4096, 16384, torch.bfloat16), Shape(1024, 1024, 16384, torch.bfloat16)],
    "split": [Shape(d, d, 16384, torch.float32) for d in (4096, 1024)],
    "small": [Shape(768, 768, 4096, torch.bfloat16), Shape(1024, 1024, 4096, torch.bfloat16), LARGE],
}
DRY_SHAPE = Shape(48, 32, 100, torch.bfloat16)


def candidates(arch: Arch, kind: str, shared: float) -> dict[str, Tile]:
    """Some of `neighbours` whose operands fit in `shared` bytes of shared memory; the first is the table's."""
    found = {name: tile for name, tile in neighbours(arch, kind).items() if _operand_bytes(tile) <= shared}
    return dict(list(found.items())[: COUNTS[kind]])


def neighbours(arch: Arch, kind: str) -> dict[str, Tile]:
    """The table's tile, and others with one or two things changed, as far as their sums fit in registers."""
    first: Tile = getattr(arch, kind)
    changes: list[dict[str, Any]] = [
        {},
        {"stages": first.stages - 1},
        {"m": first.n, "n": first.m},
        {"m": 128, "n": 128},
        {"m": 128, "n": 256, "halves": True},
        {"group": 2 * first.group},
        {"k": 2 * first.k, "stages": max(2, first.stages // 2)},
        {"group": first.group // 2},
        {"stages": first.stages + 1},
        {"m": 256, "n": 128, "halves": True},
        {"m": 64, "n": 256, "warps": 4},
        {"m": 128, "n": 64, "warps": 4},
        {"k": first.k // 2, "stages": first.stages + 1},
    ]
    if kind == "split":
        changes.insert(1, other_way(first))
    if kind == "small":
        changes[1:1] = [{"m": 128, "n": 64, "warps": 4}, {"m": 64, "n": 128, "warps": 4}]
    tokens = first.promote * first.k  # after which matrix units are relieved of their sums
    found = {}
    for change in changes:
        tile = replace(first, **change)
        tile = replace(tile, promote=max(1, tokens // tile.k) if tokens else 0)
        if tile.m * tile.n <= 128 * 32 * tile.warps and tile.stages > 1 and tile.k >= 16:
            found[name_of(tile)] = tile
    return found


def other_way(tile: Tile) -> dict[str, Any]:
    """What makes a tile for split operands multiply their parts in runs instead of all in one step, or the reverse."""
    return {"triple": not tile.triple, "stages": tile.stages + 1 if tile.triple else 2}


def _operand_bytes(tile: Tile) -> int:
    """Of the steps that are on their way, at least; AMD's wait in registers for one of them."""
    return 2 * (1 + tile.triple) * tile.k * (tile.m + tile.n) * (tile.stages - bool(tile.options))


def name_of(tile: Tile) -> str:
    parts = [f"{tile.m}x{tile.n}x{tile.k}", f"{tile.warps}w", f"{tile.stages}s", f"g{tile.group}"]
    parts += ["halves"] * tile.halves + ["triple"] * tile.triple
    return " ".join(parts)


def start(run: Run, results: Results) -> Compiling | None:
    """Begin to compile what is not timed yet: it takes processors, not the GPU."""
    arch, kinds = arch_at_hand(run), _kinds(run)
    missing = [kind for kind, shapes in kinds.items() if any(_key(kind, s) not in results.of("tiles") for s in shapes)]
    target = Target("cuda", 90, 32, "sm_90", 132, 232_448) if run.dry else Target.here(run.device, arch)
    chosen = {kind: candidates(arch, kind, target.shared) for kind in missing}
    if run.dry:
        chosen = {kind: dict(list(tiles.items())[:1]) for kind, tiles in chosen.items()}
    sizes = {kind: [(shape.d, shape.m, shape.n) for shape in kinds[kind]] for kind in missing}
    return Compiling(target, sizes, chosen) if missing else None


def arch_at_hand(run: Run) -> Arch:
    """The device's row of the table; in a dry run, one to go through the motions with."""
    arch = TABLE["sm_90"] if run.dry else run.arch
    assert arch is not None
    return arch


def _kinds(run: Run) -> dict[str, list[Shape]]:
    """The kinds of tiles there are, and the shapes to time them on."""
    if run.dry:
        return {"half": [DRY_SHAPE], "split": [DRY_SHAPE]}
    return {kind: shapes for kind, shapes in KINDS.items() if getattr(run.arch, kind) is not None}


def _key(kind: str, shape: Shape) -> str:
    return f"{kind} {shape}"


def rows(run: Run, results: Results) -> Iterator[Row]:
    arch = arch_at_hand(run)
    for kind, shapes in _kinds(run).items():
        for shape in shapes:
            yield Row(_key(kind, shape), partial(_time_tiles, kind, shape, arch, run), 3.0)


def _time_tiles(kind: str, shape: Shape, arch: Arch, run: Run, left: float) -> dict[str, Any]:
    if run.compiling is None:
        raise LeftOut("nothing was compiled")
    usable, refused = run.compiling.usable(kind, left)
    if not usable:
        raise LeftOut("; ".join(f"{name}: {why}" for name, why in refused.items()))
    s, h = shape.sums(run.device)
    x, y = shape.features(run.device)

    def call(tile: Tile) -> object:
        if run.dry:
            return gram_cross_(s, h, x, y)
        from featcal_kernels import launch

        return launch.moments_(s, h, x, y, arch=with_tile(arch, kind, tile), path="triton")

    calls = {name: partial(call, tile) for name, tile in usable.items()}
    found = {name: refusal(call) for name, call in calls.items()}
    refused |= {name: why for name, why in found.items() if why}
    usable_calls = {name: call for name, call in calls.items() if not found[name]}
    ms = measure(usable_calls, run, 0.1 * len(calls)).device
    return {"kind": kind, "d": shape.d, "m": shape.m, "n": shape.n, "ms": ms, "refused": refused}


def best(found: Sequence[dict[str, Any]]) -> str:
    """The tile that takes least on average over the shapes; the first one if none is clearly better."""
    names = [name for name in found[0]["ms"] if all(name in row["ms"] for row in found)]
    mean = {name: mean_ms(found, name) for name in names}
    fastest = min(mean, key=lambda name: mean[name])
    return fastest if mean[fastest] * TOLERANCE < mean[names[0]] else names[0]


def mean_ms(found: Sequence[dict[str, Any]], name: str) -> float:
    """Geometric, over the shapes that a tile was timed on."""
    values = [row["ms"][name] for row in found if name in row["ms"]]
    return exp(sum(map(log, values)) / len(values))


def best_row(arch: Arch, rows: Rows, moments: Rows | None = None) -> Arch:
    """The table's row with what was fastest: tiles, and cuBLAS's part by the sums, as far as they were timed."""
    timed = {kind: [row for row in rows.values() if row["kind"] == kind] for kind in COUNTS}
    for kind, found in timed.items():
        if found and getattr(arch, kind) is not None:
            arch = replace(arch, **{kind: neighbours(arch, kind)[best(found)]})
    large = [next((row for row in timed[kind] if row["d"] == LARGE.d), None) for kind in ("small", "half")]
    if arch.small is not None and None not in large:
        small, half = (row["ms"][best(timed[row["kind"]])] for row in large if row)
        step = small / half * (arch.small.m * arch.small.n) / (arch.half.m * arch.half.n)
        arch = replace(arch, small=replace(arch.small, step=round(step, 2)))
    paths = [row for row in (moments or {}).values() if "squares" in row["ms"]]
    if both := [row for row in paths if row["m"]]:
        flops, columns = crossovers(both)
        arch = replace(arch, blas_flops=float(round(flops, -8)), blas_columns=columns)
    if grams := sorted((row for row in paths if not row["m"]), key=lambda row: row["d"]):
        slower = [i for i, row in enumerate(grams) if row["ms"]["triton"] < row["ms"]["squares"]]
        upto = grams[: slower[0] if slower else None]
        arch = replace(arch, blas_grams=upto[-1]["d"] if upto else 0)
    return arch


def crossovers(rows: Sequence[dict[str, Any]]) -> tuple[float, int | None]:
    """`blas_flops` and `blas_columns`: the thresholds that lose the least time, relative to the faster path."""

    def loss(flops: float, columns: float) -> float:
        def taken(row: dict[str, Any]) -> str:
            return "squares" if row["flops"] < flops or row["d"] >= columns else "triton"

        return sum(row["ms"][taken(row)] / min(row["ms"]["triton"], row["ms"]["squares"]) for row in rows)

    flops = [0.0, *sorted(row["flops"] * 1.01 for row in rows)]
    columns = [inf, *sorted({row["d"] for row in rows}, reverse=True)]
    least = min(product(flops, columns), key=lambda pair: (round(loss(*pair), 3), pair[0], -pair[1]))
    return least[0], None if least[1] == inf else int(least[1])


def lines(rows: Rows, peak: float) -> list[dict[str, Any]]:
    """A tile a line."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows.values():
        for name, ms in row["ms"].items():
            found.setdefault((row["kind"], name), {})[f"d={row['d']}"] = ms
    return [{"tile": f"{kind} {name}", **ms} for (kind, name), ms in found.items()]


def notes(rows: Rows, peak: float) -> list[str]:
    refused = {f"{row['kind']} {name}": why for row in rows.values() for name, why in row["refused"].items()}
    return [f"left out: {name}: {why}" for name, why in refused.items()]


TILES = Section("tiles", 0.08, rows, "Tiles for sums, ms", lines, notes, needs_kernels=True)
