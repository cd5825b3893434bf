"""A layer's ridge systems: Cholesky, and triangular solves by the library and by blocks, beside LU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.sections import Row, Section
from bench.gpu.timing import Run, clock_note, measure
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
        cholesky.factor_(each)

    def factored() -> None:
        for each in a.copy_(systems):
            cholesky.factor_(each)

    def solved(solve: Callable[[Tensor, Tensor], object]) -> None:
        r.copy_(rights)
        for factor, right in zip(factors, r, strict=True):
            solve(factor, right.mT)

    variants: dict[str, Callable[[], object]] = {
        "LU": lambda: torch.linalg.solve(systems, rights.mT),
        "potrf library": factored,
        "trsm library": partial(solved, partial(cholesky.solve_, split=False)),
    }
    if run.dry or d > cholesky.BLOCK:
        variants["trsm blocks"] = partial(solved, cholesky.solve_blocked_)
    ms, host = measure(variants, run, 0.3)
    return {"systems": count, "d": d, "m": m, "ms": ms, "host ms": host}


def fastest(row: dict[str, Any]) -> float:
    """Milliseconds of the fastest factorisation and the fastest solves."""
    ms = row["ms"]
    return sum(min(value for name, value in ms.items() if name.startswith(part)) for part in ("potrf", "trsm"))


def lines(rows: Rows, peak: float) -> list[dict[str, Any]]:
    found = []
    for row in rows.values():
        line = {name: row[name] for name in ("systems", "d", "m")} | row["ms"]
        if "host ms" in row:
            line["blocks' host ms"] = row["host ms"].get("trsm blocks")
        found.append(line | {"LU/ours": row["ms"]["LU"] / fastest(row)})
    return found


def notes(rows: Rows, peak: float) -> list[str]:
    return [
        "Of all systems, with a copy of each side. LU/ours: LU beside the fastest of each part.",
        clock_note(rows.values()),
    ]


SOLVE = Section("solve", 0.06, rows, "Systems [d, d] with m right-hand sides", lines, notes)
