"""Tile shapes and paths, timed in turns; the row for `featcal_kernels.configs.TABLE` that they give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from math import exp, inf, log
from typing import Any

import torch
from featcal_kernels import gram_cross_
from featcal_kernels.configs import TABLE, Arch, Tile

from bench.gpu.compiling import Compiling, Target, with_tile
from bench.gpu.moments import Shape, other_way
from bench.gpu.sections import LeftOut, Row, Section
from bench.gpu.timing import Run, measure, refusal
from bench.harness.results import Results, Rows
from bench.harness.tables import table

COUNTS = {"half": 8, "split": 4, "small": 2}
TOLERANCE = 1.01  # a candidate replaces the table's only if it is faster by more
LARGE = Shape(4096, 4096, 16384, torch.bfloat16)  # which keeps a GPU busy
KINDS = {  # the shapes that a kind is timed on
    "half": [LARGE, Shape(14336, 4096, 16384, torch.bfloat16), Shape(1024, 1024, 16384, torch.bfloat16)],
    "split": [Shape(d, d, 16384, torch.float32) for d in (4096, 1024)],
    "small": [Shape(768, 768, 4096, torch.bfloat16), Shape(1024, 1024, 4096, torch.bfloat16), LARGE],
}
PATH_SHAPES = [
    Shape(d, m, n * 1024, torch.bfloat16)
    for n in (16, 2, 64)
    for d in (4096, 1024, 2048, 768, 14336, 512, 3072, 8192)
    for m in (min(d, 4096), 0)
    if m or n == 16
]
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


def _operand_bytes(tile: Tile) -> int:
    """Of the steps that are on their way, at least; AMD's wait in registers for one of them."""
    return 2 * (1 + tile.triple) * tile.k * (tile.m + tile.n) * (tile.stages - bool(tile.options))


def name_of(tile: Tile) -> str:
    parts = [f"{tile.m}x{tile.n}x{tile.k}", f"{tile.warps}w", f"{tile.stages}s", f"g{tile.group}"]
    parts += ["halves"] * tile.halves + ["triple"] * tile.triple
    return " ".join(parts)


def start(run: Run, results: Results) -> Compiling | None:
    """Begin to compile what is not timed yet: it takes processors, not the GPU."""
    arch, kinds = _arch(run), _kinds(run)
    missing = [kind for kind, shapes in kinds.items() if any(_key(kind, s) not in results.of("tiles") for s in shapes)]
    target = Target("cuda", 90, 32, "sm_90", 132, 232_448) if run.dry else Target.here(run.device, arch)
    chosen = {kind: candidates(arch, kind, target.shared) for kind in missing}
    if run.dry:
        chosen = {kind: dict(list(tiles.items())[:1]) for kind, tiles in chosen.items()}
    sizes = {kind: [(shape.d, shape.m, shape.n) for shape in kinds[kind]] for kind in missing}
    return Compiling(target, sizes, chosen) if missing else None


def _arch(run: Run) -> Arch:
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
    arch = _arch(run)
    for kind, shapes in _kinds(run).items():
        for shape in shapes:
            need = 2 * shape.bytes + shape.n * (shape.d + shape.m) * 4
            yield Row(_key(kind, shape), partial(_time_tiles, kind, shape, arch, run), 3.0, need)
    tuned = best_row(arch, results.of("tiles"))
    for shape in [DRY_SHAPE] if run.dry else PATH_SHAPES:
        yield Row(_key("paths", shape), partial(_time_paths, shape, tuned, run), 1.0, 2 * shape.bytes)


def _time_tiles(kind: str, shape: Shape, arch: Arch, run: Run, left: float) -> dict[str, Any]:
    if run.compiling is None:
        raise LeftOut("nothing was compiled")
    usable, refused = run.compiling.usable(kind, left)
    if not usable:
        raise LeftOut("; ".join(f"{name}: {why}" for name, why in refused.items()))
    s, h = shape.sums(run.device)
    x, y = shape.features(run.device)
    calls = {name: _call(s, h, x, y, with_tile(arch, kind, tile), "triton", run) for name, tile in usable.items()}
    found = {name: refusal(call) for name, call in calls.items()}
    refused |= {name: why for name, why in found.items() if why}
    ms = measure({name: call for name, call in calls.items() if not found[name]}, run, 0.1 * len(calls))
    return {"kind": kind, "d": shape.d, "m": shape.m, "n": shape.n, "ms": ms, "refused": refused}


def _time_paths(shape: Shape, arch: Arch, run: Run, left: float) -> dict[str, Any]:
    paths = ["triton"]
    if not run.dry:
        from featcal_kernels import blas, launch

        paths = list(launch.PATHS)
        if not blas.available(run.device):
            raise LeftOut("this torch has no 16-bit product that is added to float32: there is one path")
    s, h = shape.sums(run.device)
    x, y = shape.features(run.device)
    ms = measure({path: _call(s, h, x, y, arch, path, run) for path in paths}, run, 0.2)
    return {"kind": "paths", "d": shape.d, "m": shape.m, "n": shape.n, "flops": shape.flops, "ms": ms}


def _call(s, h, x, y, arch: Arch, path: str, run: Run) -> Callable[[], object]:
    if run.dry:
        return lambda: gram_cross_(s, h, x, y)
    from featcal_kernels import launch

    return lambda: launch.moments_(s, h, x, y if y.numel() else None, arch=arch, path=path)


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


def best_row(arch: Arch, rows: Rows) -> Arch:
    """The table's row with what was fastest, as far as it was timed."""
    timed = {kind: [row for row in rows.values() if row["kind"] == kind] for kind in COUNTS}
    for kind, found in timed.items():
        if found and getattr(arch, kind) is not None:
            arch = replace(arch, **{kind: neighbours(arch, kind)[best(found)]})
    large = [next((row for row in timed[kind] if row["d"] == LARGE.d), None) for kind in ("small", "half")]
    if arch.small is not None and None not in large:
        small, half = (row["ms"][best(timed[row["kind"]])] for row in large if row)
        step = small / half * (arch.small.m * arch.small.n) / (arch.half.m * arch.half.n)
        arch = replace(arch, small=replace(arch.small, step=round(step, 2)))
    paths = [row for row in rows.values() if row["kind"] == "paths" and "squares" in row["ms"]]
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


def show(rows: Rows, run: Run, results: Results) -> str:
    parts = []
    for kind in dict.fromkeys(row["kind"] for row in rows.values()):
        found = [row for row in rows.values() if row["kind"] == kind]
        names = dict.fromkeys(name for row in found for name in row["ms"])
        if kind == "paths":
            lines = [{"d": row["d"], "m": row["m"], "n": row["n"], **row["ms"]} for row in found]
        else:
            lines = [{"tile": name} | {f"d={row['d']}": row["ms"].get(name) for row in found} for name in names]
        refused = {name: why for row in found for name, why in row.get("refused", {}).items()}
        parts.append(table(f"{kind}, ms", lines, [f"left out: {name}: {why}" for name, why in refused.items()]))
    row = best_row(_arch(run), rows)
    results.note("arch", asdict(row))
    return "\n".join([*parts, f"The row for the table: {row}"])


TILES = Section("tiles", 0.10, rows, show, needs_kernels=True)
