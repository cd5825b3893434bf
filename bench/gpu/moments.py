"""The Gram matrix and the cross moment of a layer's features: every path there is, beside torch's full products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from featcal_kernels import gram_cross_
from featcal_kernels.configs import Tile
from torch import Tensor

from bench.gpu.sections import Row, Section
from bench.gpu.timing import Run, apart, measure, refusal
from bench.harness.results import Results, Rows
from bench.harness.tables import table

SIZES = ((4096, 4096), (14336, 4096), (1024, 1024), (3072, 3072), (768, 768))
TOKENS = (16, 2, 64)  # thousands; the first is what an engine's layer is given at a time
NOTES = (
    "taken ms: of the path that the launcher takes; beside it, how many times that long the others take: torch's two "
    "full products in the same type and in float32, and each path.",
    "TFLOP/s: of the triangle and the rectangle alone; peak: their share of the measured peak. error: relative, "
    "Frobenius, against float64.",
)
EXACT = 2**40  # multiplications that float64 may take: it is slow on many GPUs


@dataclass(frozen=True)
class Shape:
    """One Gram matrix `[d, d]` and one cross moment `[m, d]` of `n` tokens."""

    d: int
    m: int
    n: int
    dtype: torch.dtype

    @property
    def products(self) -> int:
        """Matrix units' products for each of the sum's: float32 features are split in two."""
        return 3 if self.dtype == torch.float32 else 1

    @property
    def flops(self) -> float:
        """Of the triangle and the rectangle, on matrix units."""
        return self.n * self.d * (self.d + 1 + 2 * self.m) * self.products

    @property
    def bytes(self) -> int:
        """Of features and sums."""
        return self.n * (self.d + self.m) * self.dtype.itemsize + (self.d + self.m) * self.d * 4

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.d} {self.m} {self.n}"

    def features(self, device: torch.device) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.n, self.d, device=device, dtype=self.dtype)
        return x, torch.randn(self.n, self.m, device=device, dtype=self.dtype)

    def sums(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.d, self.d, device=device), torch.zeros(self.m, self.d, device=device)


def shapes(dry: bool) -> list[Shape]:
    """The first ones are worth most: a Llama-8B layer's."""
    if dry:
        return [Shape(d, m, 100, dtype) for dtype in (torch.bfloat16, torch.float32) for d, m in ((48, 48), (64, 24))]
    first = [Shape(d, m, TOKENS[0] * 1024, torch.bfloat16) for d, m in SIZES]
    each = [Shape(d, m, n * 1024, dtype) for dtype in (torch.bfloat16, torch.float32) for n in TOKENS for d, m in SIZES]
    return list(dict.fromkeys([*first, *each]))


def rows(run: Run, results: Results) -> Iterator[Row]:
    for shape in shapes(run.dry):
        wide = 2 * shape.bytes + shape.n * (shape.d + shape.m) * 8  # in float32 too, and as split parts
        exact = shape.bytes * 8 if _exact(shape) else 0
        yield Row(str(shape), lambda left, shape=shape: measure_shape(shape, run), 2.0, max(wide, exact))


def measure_shape(shape: Shape, run: Run) -> dict[str, Any]:
    x, y = shape.features(run.device)
    s, h = shape.sums(run.device)
    x32, y32 = x.float(), y.float()
    variants: dict[str, Callable[[], object]] = {
        "taken": lambda: gram_cross_(s, h, x, y),
        "torch": lambda: (x.mT @ x, y.mT @ x),
        "fp32": lambda: (x32.mT @ x32, y32.mT @ x32),
    }
    ways = {name: way for name, way in other_ways(s, h, x, y, run).items() if not refusal(way)}
    ms = measure(variants | ways, run)
    row = {"dtype": str(shape.dtype).removeprefix("torch."), "d": shape.d, "m": shape.m, "n": shape.n, "ms": ms}
    row["TFLOP/s"] = shape.flops / ms["taken"] * 1e-9
    if _exact(shape):
        s.zero_(), h.zero_()
        gram_cross_(s, h, x, y)
        right = x.double()
        gram, cross = right.mT @ right, y.double().mT @ right
        row["error"] = max(apart(s.triu(), gram.triu()), apart(h, cross))
    return row


def _exact(shape: Shape) -> bool:
    return shape.n * shape.d * (shape.d + shape.m) <= EXACT


def other_ways(s: Tensor, h: Tensor, x: Tensor, y: Tensor, run: Run) -> dict[str, Callable[[], object]]:
    """Every path of the launcher that applies; for float32, parts multiplied in runs and all in one step."""
    if run.arch is None or run.dry:
        return {}
    from featcal_kernels import blas, launch

    def way(**how: Any) -> Callable[[], object]:
        return lambda: launch.moments_(s, h, x, y, **how)

    if x.dtype != torch.float32:
        paths = launch.PATHS if blas.available(run.device) else ("triton",)
        return {path: way(path=path) for path in paths}
    tile = run.arch.split
    other = replace(tile, **other_way(tile))
    tiles = {"triple" if each.triple else "runs": each for each in (tile, other)}
    return {name: way(arch=replace(run.arch, split=each)) for name, each in tiles.items()}


def other_way(tile: Tile) -> dict[str, Any]:
    """What makes a tile for split operands multiply their parts in runs instead of all in one step, or the reverse."""
    return {"triple": not tile.triple, "stages": tile.stages + 1 if tile.triple else 2}


def lines(found: Iterable[dict[str, Any]], peak: float) -> list[dict[str, Any]]:
    """A shape a line."""
    return [
        {name: row[name] for name in ("dtype", "d", "m", "n")}
        | {"taken ms": row["ms"]["taken"]}
        | {name: times(row, name) for name in row["ms"] if name != "taken"}
        | {"TFLOP/s": row["TFLOP/s"], "peak": row["TFLOP/s"] / peak, "error": row.get("error")}
        for row in found
    ]


def show(rows: Rows, run: Run, results: Results) -> str:
    return table("Gram matrix [d, d] and cross moment [m, d] of n tokens", lines(rows.values(), run.peak), NOTES)


def times(row: dict[str, Any], way: str) -> float | None:
    """How many times what was taken takes this way."""
    return row["ms"][way] / row["ms"]["taken"] if way in row["ms"] else None


MOMENTS = Section("moments", 0.12, rows, show, needs_kernels=True)
