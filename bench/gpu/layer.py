"""A whole Llama-3.1-8B-shaped layer, five tasks of 32k tokens: the engine, and the reference schedules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch

from bench.gpu import schedules
from bench.gpu.results import Results, Rows
from bench.gpu.sections import Row, Section
from bench.gpu.tables import table
from bench.gpu.timing import Run
from featcal_fast.forward import compiled as forwards

ENGINE, COMPILED = "engine, blocks as they are", "engine, blocks compiled"
OFFICIAL, FUSIONEVAL = "official, as published", "FusionEval, as published"
PHASES = ("forward", "moments", "fold", "solve", "advance")
GIB = 2**30
ONE_TASK = ("forward", "moments", "advance")  # what a baseline is run through for one task, and counted for all


def rows(run: Run, results: Results) -> Iterator[Row]:
    @cache
    def work() -> schedules.Workload:
        return schedules.Workload(run.device, run.dry)

    def baseline(schedule: Callable[..., None]) -> Callable[[float], dict[str, Any]]:
        def measured(left: float) -> dict[str, Any]:
            return {"ms": schedules.milliseconds(schedule, work(), dict.fromkeys(ONE_TASK, work().tasks))}

        return measured

    yield Row(ENGINE, lambda left: engine(work(), run), 8.0, 12 * GIB * (not run.dry))
    yield Row(COMPILED, lambda left: engine(work(), run, compiled=True), 60.0, 12 * GIB * (not run.dry))
    each = 24 * GIB * (not run.dry)
    yield Row(OFFICIAL, baseline(schedules.official), 15.0, each)
    yield Row(FUSIONEVAL, baseline(schedules.fusioneval), 12.0, each)
    yield Row("official, bfloat16 forward", baseline(schedules.official_bfloat16), 12.0, each)


def engine(work: schedules.Workload, run: Run, compiled: bool = False) -> dict[str, Any]:
    """The engine's phases, what each needs to compute, and what it all takes of the device's memory."""
    with really_compiling(run) if compiled else nullcontext():
        schedule = partial(schedules.engine, compiled=compiled)
        need = schedules.flops(work, schedule(work, schedules.Clock(run.device)))
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        row = {"tasks": work.tasks, "tokens": work.tokens, "flops": need}
        row["ms"] = schedules.milliseconds(schedule, work, {})
    if run.device.type == "cuda":
        row["device GiB"] = torch.cuda.max_memory_allocated() / GIB
    return row


@contextmanager
def really_compiling(run: Run) -> Iterator[None]:
    """An error where blocks cannot be compiled, instead of blocks as they are; in a dry run, no compiler."""
    backend = forwards.BACKEND
    forwards.BACKEND = "eager" if run.dry else backend
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*compile_blocks: false does not try")
            yield
    finally:
        forwards.BACKEND = backend


def ours(rows: Rows) -> dict[str, Any] | None:
    """The engine as it is on a GPU: with blocks compiled, if that was measured."""
    return rows.get(COMPILED, rows.get(ENGINE))


def total(row: dict[str, Any]) -> float:
    return sum(row["ms"].values())


def ideal(rows: Rows, peak: float) -> dict[str, float]:
    """Milliseconds of each phase if all that it needs were computed at the peak."""
    row = ours(rows)
    return {phase: row["flops"][phase] / peak * 1e-9 for phase in PHASES} if row else {}


def lines(rows: Rows, peak: float) -> list[dict[str, Any]]:
    """A way a line, and the ideal."""
    best, engine = ideal(rows, peak), ours(rows)
    ways = {**rows, "ideal": {"ms": best}} if best else rows
    return [
        {"way": name}
        | {phase: row["ms"].get(phase) for phase in PHASES}
        | {
            "ms": total(row),
            "share of ideal": sum(best.values()) / total(row) if best else None,
            "engine's": total(row) / total(engine) if engine else None,
        }
        for name, row in ways.items()
    ]


def notes(rows: Rows, peak: float) -> list[str]:
    found = [
        f"ideal: FLOPs needed at the measured {peak:.3g} TFLOP/s. engine's: times slower than the engine, with blocks "
        "compiled if they were.",
        "The baselines' fold is in their solve. As published: but for what bench/gpu/schedules.py names, which makes "
        "them faster.",
    ]
    if row := ours(rows):
        found.insert(0, f"{row['tasks']} tasks of {row['tokens']} tokens.")
        if "device GiB" in row:
            memory = f"{row['device GiB']:.2f} GiB"
            found.append(f"Peak device memory of the engine, hidden states of one task included: {memory}.")
    return found


def show(rows: Rows, run: Run, results: Results) -> str:
    title = "One Llama-3.1-8B-shaped layer, milliseconds"
    return table(title, lines(rows, run.peak), notes(rows, run.peak))


LAYER = Section("layer", 0.12, rows, show)
