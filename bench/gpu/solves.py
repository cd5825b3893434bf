"""A layer's ridge systems: Cholesky and triangular solves, by the library and by blocks, beside LU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.sections import Row, Section
from bench.gpu.timing import Run, measure
from bench.harness.results import Results, Rows
from featcal_fast.layer import cholesky

SIZES = ((4096, 4096, 3), (14336, 4096, 1), (1024, 1024, 3), (768, 768, 3))  # columns, right-hand sides, systems


def rows(run: Run, results: Results) -> Iterator[Row]:
    for d, m, count in ((64, 48, 2),) if run.dry else SIZES:
        yield Row(f"{count} {d} {m}", lambda left, size=(d, m, count): _measure(*size, run), 4.0)


def _measure(d: int, m: int, count: int, run: Run) -> dict[str, Any]:
    x = torch.randn(2 * d, d, device=run.device)
    systems = (x.mT @ x / len(x) + 0.1 * torch.eye(d, device=run.device)).expand(count, d, d).contiguous()
    rights = torch.randn(count, m, d, device=run.device)
    a, r, factors = torch.empty_like(systems), torch.empty_like(rights), systems.clone()
    for each in factors:
        cholesky.factor_(each, split=False)

    def factored(factor: Callable[[Tensor], object]) -> None:
        for each in a.copy_(systems):
            factor(each)

    def solved(solve: Callable[[Tensor, Tensor], object]) -> None:
        r.copy_(rights)
        for factor, right in zip(factors, r, strict=True):
            solve(factor, right.mT)

    def by_blocks_of(size: int, call: Callable[..., object], *arguments: Tensor) -> None:
        usual, cholesky.BLOCK = cholesky.BLOCK, size
        try:
            call(*arguments)
        finally:
            cholesky.BLOCK = usual

    variants: dict[str, Callable[[], object]] = {
        "LU": lambda: torch.linalg.solve(systems, rights.mT),
        "potrf batched": lambda: cholesky.factor_(a.copy_(systems), split=False),
        "potrf library": partial(factored, partial(cholesky.factor_, split=False)),
        "trsm library": partial(solved, partial(cholesky.solve_, split=False)),
    }
    for size in (32,) if run.dry else (cholesky.BLOCK, cholesky.BLOCK // 2):
        if d > size:
            variants |= {
                f"potrf blocks {size}": partial(factored, partial(by_blocks_of, size, cholesky.factor_blocked_)),
                f"trsm blocks {size}": partial(solved, partial(by_blocks_of, size, cholesky.solve_blocked_)),
            }
    return {"systems": count, "d": d, "m": m, "ms": measure(variants, run, 0.3)}


def fastest(row: dict[str, Any]) -> float:
    """Milliseconds of the fastest factorisation and the fastest solves."""
    ms = row["ms"]
    return sum(min(value for name, value in ms.items() if name.startswith(part)) for part in ("potrf", "trsm"))


def lines(rows: Rows, peak: float) -> list[dict[str, Any]]:
    return [
        {name: row[name] for name in ("systems", "d", "m")} | row["ms"] | {"LU/ours": row["ms"]["LU"] / fastest(row)}
        for row in rows.values()
    ]


def notes(rows: Rows, peak: float) -> list[str]:
    return ["ms of all systems, with a copy of each side."]


SOLVE = Section("solve", 0.06, rows, "Systems [d, d] with m right-hand sides", lines, notes)
