"""A section: rows to be measured one by one, each kept at once; what is not measured says why in one line."""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu.budget import Budget
from bench.gpu.timing import Run
from bench.harness.process import TookTooLong
from bench.harness.results import Results, Rows
from bench.harness.tables import table


class LeftOut(Exception):
    """Why a row cannot be measured here; nothing is wrong with the code."""


class DeviceLost(Exception):
    """The device answers this process no more; another one may go on."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        key: names it in its section.
        measure: does it; told the seconds that are left for it.
        seconds: about how long it takes; it is not begun with less time left than that.
        again: measure it though it was measured before.
    """

    key: str
    measure: Callable[[float], dict[str, Any]]
    seconds: float = 0.5
    again: bool = False


@dataclass(frozen=True)
class Section:
    """What belongs together.

    Attributes:
        name: of the section.
        share: of a budget, beside the other sections'.
        rows: what to measure, made as it is needed: the tensors that rows share live as long as the iterator.
        title: of the table of what was measured.
        lines: of that table, given the rows and TFLOP/s at the peak.
        notes: below it.
        needs_kernels: there is nothing to measure without them.
    """

    name: str
    share: float
    rows: Callable[[Run, Results], Iterator[Row]]
    title: str
    lines: Callable[[Rows, float], list[dict[str, Any]]]
    notes: Callable[[Rows, float], Sequence[str]] = lambda rows, peak: ()
    needs_kernels: bool = False

    def show(self, rows: Rows, peak: float) -> str:
        """For a terminal."""
        return table(self.title, self.lines(rows, peak), self.notes(rows, peak))


def run_section(section: Section, run: Run, results: Results, budget: Budget) -> tuple[int, dict[str, str]]:
    """Measure what of a section was not measured before.

    Returns:
        How many rows were measured now; which there was no time for, and why.

    Raises:
        DeviceLost: the last row that failed, which is recorded, took the device with it.
    """
    measured, late, left = 0, {}, {}
    failed = dict(results.failed.get(section.name, {}))
    for row in section.rows(run, results):
        if row.key in results.of(section.name) and not row.again:
            continue
        if row.key in failed:
            say(section.name, row.key, f"failed before: {failed[row.key]} (--fresh measures all again)")
            continue
        if why := _late(row, run, budget):
            late[row.key] = why
            continue
        if run.device.type == "cuda":
            torch.cuda.empty_cache()  # for rows that are processes of their own
        try:
            found = row.measure(budget.left)
            results.add(section.name, row.key, found)
            measured += 1
            continue
        except Exception as error:  # whatever it is, the next row may do
            why, nothing_wrong = _why(error)
        if nothing_wrong:
            left[row.key] = why
        else:
            results.fail(section.name, row.key, why)
            say(section.name, row.key, f"failed: {why}")
        gc.collect()  # the error's frames held tensors
        if _lost(run):
            raise DeviceLost(row.key)
    say_left_out(section.name, left)
    before = results.left_out.get(section.name, {})  # says more of a row that there is no time for once more
    results.leave_out(section.name, left | {key: before.get(key, why) for key, why in late.items()})
    return measured, late


def say_left_out(section: str, left: dict[str, str]) -> None:
    """A line for each reason."""
    for why in dict.fromkeys(left.values()):
        keys = [key for key, each in left.items() if each == why]
        more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
        say(section, "; ".join(keys[:4]) + more, f"left out: {why}")


def say(section: str, what: str, why: str) -> None:
    """One line."""
    print(f"{section}: {what}: {why}", flush=True)


def _late(row: Row, run: Run, budget: Budget) -> str:
    if budget.left <= 0:
        return "no time left"
    if run.dry or row.seconds <= budget.left:
        return ""
    return f"takes about {row.seconds:.0f} s, more than was left"


def _why(error: Exception) -> tuple[str, bool]:
    """An error in one line, and whether it is the machine that cannot do it, not the code."""
    first = str(error).strip().partition("\n")[0][:400]
    if isinstance(error, (LeftOut, TookTooLong)):
        return first, True
    if isinstance(error, torch.OutOfMemoryError):
        return "ran out of device memory", True
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left on device" in first:
        return "no space left on the disk", True
    return f"{type(error).__name__}: {first}", False


def _lost(run: Run) -> bool:
    """Whether the device no longer answers this process: an illegal access ends that for good."""
    try:
        if run.device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
