"""What folds a task's moments into a layer's system: the ops on finished sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from featcal_kernels import add_scaled_, addmm_, frobenius, pack, symmetrize_

from bench.gpu.sections import Row, Section
from bench.gpu.timing import Run, clock_note, measure
from bench.harness.results import Results, Rows

SIZES = ((4096, 6144), (4096, 28672), (14336, 4096))  # columns, rows of the weights


def rows(run: Run, results: Results) -> Iterator[Row]:
    for d, m in ((48, 32),) if run.dry else SIZES:
        yield Row(f"{d} {m}", lambda left, size=(d, m): _measure(*size, run), 3.0)


def _measure(d: int, m: int, run: Run) -> dict[str, Any]:
    s, a, out = (torch.randn(size, d, device=run.device) for size in (d, d, m))
    weight, scale = torch.randn(m, d, device=run.device), torch.full((), 1e-3, device=run.device)
    packed = pack(s)  # as the engine does, once for a group's modules
    gflop, megabyte = 2 * m * d * d * 1e-9, d * d * 4 * 1e-6

    def plain() -> object:
        return out.addcmul_(weight @ s, scale)

    ops: dict[str, tuple[Callable[[], object], Callable[[], object], float, str]] = {
        "pack": (lambda: pack(s), lambda: s.half(), 2 * megabyte, "GB/s"),
        "addmm_, 3 products": (lambda: addmm_(out, weight, packed, scale), plain, gflop, "TFLOP/s"),
        "addmm_, 2 products": (
            lambda: addmm_(out, weight, packed, scale, precision="fp16x2"),
            plain,
            gflop,
            "TFLOP/s",
        ),
        "add_scaled_": (lambda: add_scaled_(a, s, scale), lambda: a.add_(s * scale), 3 * megabyte, "GB/s"),
        "frobenius": (lambda: frobenius(s), lambda: torch.linalg.norm(s), megabyte / 2, "GB/s"),
        "symmetrize_": (lambda: symmetrize_(s), lambda: s.triu() + s.triu(1).mT, megabyte, "GB/s"),
    }
    found = {}
    for name, (ours, plain, work, unit) in ops.items():
        ms, host = measure({"ours": ours, "torch": plain}, run, 0.2)
        rate = {"rate": work / ms["ours"], "unit": unit}
        found[name] = {"ms": ms["ours"], "torch ms": ms["torch"], "host ms": host["ours"], **rate}
    return {"d": d, "m": m, "ops": found}


def lines(rows: Rows, peak: float) -> list[dict[str, Any]]:
    return [
        {"op": name, "d": row["d"], "m": row["m"], **op, "torch/ours": op["torch ms"] / op["ms"]}
        for row in rows.values()
        for name, op in row["ops"].items()
    ]


def notes(rows: Rows, peak: float) -> list[str]:
    return [
        clock_note(op for row in rows.values() for op in row["ops"].values()),
        "rate: FLOPs of the plain product (of float16 parts on matrix units 3 or 2), or bytes that must move.",
    ]


TITLE = "Folding a task: sums [d, d], weights [m, d]"
FOLD = Section("fold", 0.04, rows, TITLE, lines, notes, needs_kernels=True)
