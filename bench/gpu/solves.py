"""A layer's ridge systems: Cholesky and triangular solves, by the library and by blocks, beside LU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.sections import Row, Section
from bench.gpu.timing import Run, apart, extra_bytes, measure
from bench.harness.results import Results, Rows
from bench.harness.tables import table
from featcal_fast.layer import cholesky

SIZES = ((4096, 4096, 3), (14336, 4096, 1), (1024, 1024, 3), (768, 768, 3))  # columns, right-hand sides, systems
EXACT = 4096  # columns up to which float64 is the judge


def rows(run: Run, results: Results) -> Iterator[Row]:
    for d, m, count in ((64, 48, 2),) if run.dry else SIZES:
        matrices = count * d * (d + m) * 4
        need = 4 * matrices + d * (d + m) * 4 + (3 * d * (d + m) * 8 if d <= EXACT else 0)
        yield Row(f"{count} {d} {m}", lambda left, size=(d, m, count): _measure(*size, run), 4.0, need)


def _ways(d: int, run: Run) -> dict[str, tuple[Callable[[Tensor], object], Callable[[Tensor, Tensor], object]]]:
    """Factorisations and solves: the library's, and by blocks of some sizes."""
    found = {"library": (partial(cholesky.factor_, split=False), partial(cholesky.solve_, split=False))}
    for size in (32,) if run.dry else (cholesky.BLOCK, cholesky.BLOCK // 2):
        if d > size:
            found[f"blocks {size}"] = tuple(
                partial(_by_blocks_of, size, call) for call in (cholesky.factor_blocked_, cholesky.solve_blocked_)
            )
    return found


def _by_blocks_of(size: int, call: Callable[..., object], *arguments: Tensor) -> None:
    usual, cholesky.BLOCK = cholesky.BLOCK, size
    try:
        call(*arguments)
    finally:
        cholesky.BLOCK = usual


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

    ways = _ways(d, run)
    variants: dict[str, Callable[[], object]] = {
        "potrf batched": lambda: cholesky.factor_(a.copy_(systems), split=False),
        "LU": lambda: torch.linalg.solve(systems, rights.mT),
    }
    for name, (factor, solve) in ways.items():
        variants |= {f"potrf {name}": partial(factored, factor), f"trsm {name}": partial(solved, solve)}
    row: dict[str, Any] = {"systems": count, "d": d, "m": m, "ms": measure(variants, run, 0.3)}
    if run.device.type == "cuda":
        row["extra MiB"] = extra_bytes(*(call for name, call in variants.items() if name != "LU")) / 2**20
    if d <= EXACT:
        exact = torch.linalg.solve(systems[0].double(), rights[0].mT.double())
        row["error"] = {"LU": apart(torch.linalg.solve(systems[0], rights[0].mT), exact)}
        for name, (factor, solve) in ways.items():
            one, right = systems[0].clone(), rights[0].clone()
            factor(one)
            solve(one, right.mT)
            row["error"][name] = apart(right.mT, exact)
    return row


def fastest(row: dict[str, Any]) -> float:
    """Milliseconds of the fastest factorisation and the fastest solves."""
    ms = row["ms"]
    return sum(min(value for name, value in ms.items() if name.startswith(part)) for part in ("potrf", "trsm"))


def show(rows: Rows, run: Run, results: Results) -> str:
    lines = [
        {name: row[name] for name in ("systems", "d", "m")}
        | row["ms"]
        | {"LU/ours": row["ms"]["LU"] / fastest(row), "extra MiB": row.get("extra MiB")}
        | {f"error, {way}": value for way, value in row.get("error", {}).items()}
        for row in rows.values()
    ]
    notes = ["ms of all systems, with a copy of each side. error: relative, Frobenius, against float64."]
    return table("Systems [d, d] with m right-hand sides", lines, notes)


SOLVE = Section("solve", 0.06, rows, show)
