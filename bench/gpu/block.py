"""The forward of one Llama block, as it is and compiled: milliseconds, and the memory that it takes on top."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.gpu import layer, schedules
from bench.gpu.results import Results, Rows
from bench.gpu.sections import Row, Section
from bench.gpu.tables import table
from bench.gpu.timing import Run, extra_bytes, measure
from featcal_fast.forward.compiled import BlockRunner


def rows(run: Run, results: Results) -> Iterator[Row]:
    yield Row("forward", lambda left: _measure(run), 40.0, 10 * 2**30 * (not run.dry))


@torch.no_grad()
def _measure(run: Run) -> dict[str, Any]:
    work = schedules.Workload(run.device, run.dry)
    hidden = work.student_hidden[0]
    ways: dict[str, Callable[[], object]] = {
        name: lambda runner=runner: runner.run(work.calls, 0, work.merged, hidden)
        for name, runner in {"eager": BlockRunner(False), "compiled": BlockRunner(True)}.items()
    }
    with layer.really_compiling(run):
        ways["compiled"]()
        ms = measure(ways, run, 1.0)
    row: dict[str, Any] = {"tokens": hidden.shape[0] * hidden.shape[1], "ms": ms}
    if run.device.type == "cuda":
        row["MiB"] = {name: extra_bytes(way) / 2**20 for name, way in ways.items()}
    return row


def show(rows: Rows, run: Run, results: Results) -> str:
    lines = [
        {"way": way, "tokens": row["tokens"], "ms": ms, "MiB": row.get("MiB", {}).get(way)}
        for row in rows.values()
        for way, ms in row["ms"].items()
    ]
    return table("The forward of one Llama block", lines)


BLOCK = Section("block", 0.06, rows, show)
