"""The Gram matrix and the cross moment of a layer's features: every path there is, beside torch's full products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from featcal_kernels import gram_, gram_cross_
from featcal_kernels.configs import Arch
from torch import Tensor

from bench.gpu.sections import Row, Section
from bench.gpu.tiles import Shape, best_row, other_way
from bench.gpu.timing import Run, apart, clock_note, measure, refusal
from bench.harness.results import Results, Rows

SIZES = ((4096, 4096), (14336, 4096), (1024, 1024), (3072, 3072), (768, 768))
OTHERS = ((2048, 2048), (512, 512), (8192, 4096))  # in 16 bits, where a path's worth depends on the size
TOKENS = (16384, 2048, 65536)  # the first is what an engine's layer is given at a time
EXACT = 2**40  # multiplications that float64 may take: it is slow on many GPUs


def shapes(dry: bool) -> list[Shape]:
    """The first ones are worth most: a Llama-8B layer's; the last ones are Gram matrices alone."""
    if dry:
        return [Shape(d, m, 100, dtype) for dtype in (torch.bfloat16, torch.float32) for d, m in ((48, 48), (64, 24))]
    sizes = {torch.bfloat16: SIZES + OTHERS, torch.float32: SIZES}
    first = [Shape(d, m, TOKENS[0], torch.bfloat16) for d, m in SIZES]
    each = [Shape(d, m, n, dtype) for dtype, found in sizes.items() for n in TOKENS for d, m in found]
    grams = [Shape(d, 0, TOKENS[0], torch.bfloat16) for d, _ in SIZES + OTHERS]
    return list(dict.fromkeys([*first, *each, *grams]))


def rows(run: Run, results: Results) -> Iterator[Row]:
    arch = run.arch and best_row(run.arch, results.of("tiles"))
    for shape in shapes(run.dry):
        yield Row(str(shape), lambda left, shape=shape: measure_shape(shape, run, arch), 2.0)


def measure_shape(shape: Shape, run: Run, arch: Arch | None) -> dict[str, Any]:
    """What the launcher takes, and all else; its paths with the tiles of `arch`."""
    x, y = shape.features(run.device)
    s, h = shape.sums(run.device)
    x32, y32 = x.float(), y.float()
    taken = partial(gram_cross_, s, h, x, y) if shape.m else partial(gram_, s, x)
    variants: dict[str, Callable[[], object]] = {
        "taken": taken,
        "torch": lambda: (x.mT @ x, y.mT @ x),
        "fp32": lambda: (x32.mT @ x32, y32.mT @ x32),
    }
    ways = {} if arch is None or run.dry else other_ways(s, h, x, y, arch)
    ms, host = measure(variants | {name: way for name, way in ways.items() if not refusal(way)}, run)
    row = {"dtype": str(shape.dtype).removeprefix("torch."), "d": shape.d, "m": shape.m, "n": shape.n}
    row |= {"flops": shape.flops, "ms": ms, "host ms": host}
    if shape.n * shape.d * (shape.d + shape.m) <= EXACT:
        s.zero_(), h.zero_()
        taken()
        right = x.double()
        row["error"] = apart(s.triu(), (right.mT @ right).triu())
        if shape.m:
            row["error"] = max(row["error"], apart(h, y.double().mT @ right))
    return row


def other_ways(s: Tensor, h: Tensor, x: Tensor, y: Tensor, arch: Arch) -> dict[str, Callable[[], object]]:
    """Every path of the launcher that applies; for float32, parts multiplied in runs and all in one step."""
    from featcal_kernels import blas, launch

    way = partial(partial, launch.moments_, s, h, x, y)
    if x.dtype != torch.float32:
        paths = launch.PATHS if blas.available(x.device) else ("triton",)
        return {path: way(arch=arch, path=path) for path in paths}
    tiles = (arch.split, replace(arch.split, **other_way(arch.split)))
    return {"triple" if each.triple else "runs": way(arch=replace(arch, split=each)) for each in tiles}


def lines(rows: Rows, peak: float) -> list[dict[str, Any]]:
    """A shape a line."""
    found = []
    for row in rows.values():
        rate = row["flops"] / row["ms"]["taken"] * 1e-9
        line = {name: row[name] for name in ("dtype", "d", "m", "n")} | {"taken ms": row["ms"]["taken"]}
        line |= {name: times(row, name) for name in row["ms"] if name != "taken"}
        if "host ms" in row:
            line |= {"host ms": row["host ms"]["taken"], "torch host ms": row["host ms"]["torch"]}
        found.append(line | {"TFLOP/s": rate, "peak": rate / peak, "error": row.get("error")})
    return found


def times(row: dict[str, Any], way: str) -> float | None:
    """How many times what was taken takes this way."""
    return row["ms"][way] / row["ms"]["taken"] if way in row["ms"] else None


def notes(rows: Rows, peak: float) -> list[str]:
    return [
        clock_note(rows.values()),
        "taken ms: of the path that the launcher takes; beside it, how many times that long the others take: torch's "
        "two full products in the same type and in float32, and each path.",
        "TFLOP/s: of the triangle and the rectangle alone; peak: their share of the measured peak. error: relative, "
        "Frobenius, against float64.",
    ]


TITLE = "Gram matrix [d, d] and cross moment [m, d] of n tokens"
MOMENTS = Section("moments", 0.14, rows, TITLE, lines, notes, needs_kernels=True)
