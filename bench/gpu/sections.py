"""A section: rows to be measured one by one, each kept at once; what is not measured says why in one line."""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.gpu.budget import Budget
from bench.gpu.timing import Run
from bench.harness.process import TookTooLong
from bench.harness.results import Results, Rows


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
        device_bytes: about what it allocates on the device, at most.
        again: measure it though it was measured before.
    """

    key: str
    measure: Callable[[float], dict[str, Any]]
    seconds: float = 0.5
    device_bytes: float = 0
    again: bool = False


@dataclass(frozen=True)
class Section:
    """What belongs together.

    Attributes:
        name: of the section.
        share: of a budget, beside the other sections'.
        rows: what to measure, made as it is needed: the tensors that rows share live as long as the iterator.
        show: what was measured, for a terminal.
        needs_kernels: there is nothing to measure without them.
    """

    name: str
    share: float
    rows: Callable[[Run, Results], Iterator[Row]]
    show: Callable[[Rows, Run, Results], str]
    needs_kernels: bool = False


@dataclass
class Outcome:
    """How a section went.

    Attributes:
        measured: rows that were measured now.
        late: those that there was no time for, and why.
    """

    measured: int = 0
    late: dict[str, str] = field(default_factory=dict)


def run_section(section: Section, run: Run, results: Results, budget: Budget, retry: bool = False) -> Outcome:
    """Measure what of a section was not measured before.

    Raises:
        DeviceLost: the last row that failed, which is recorded, took the device with it.
    """
    outcome, left, failed = Outcome(), {}, dict(results.failed.get(section.name, {}))
    for row in section.rows(run, results):
        if row.key in results.of(section.name) and not row.again:
            continue
        if row.key in failed and not retry:
            say(section.name, row.key, f"failed before: {failed[row.key]} (--retry tries again)")
            continue
        if late := _late(row, run, budget):
            outcome.late[row.key] = late
            continue
        if short := _short(row, run):
            left[row.key] = short
            continue
        try:
            found = row.measure(budget.left)
            results.add(section.name, row.key, found)
            outcome.measured += 1
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
    results.leave_out(section.name, left | outcome.late)
    return outcome


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


def _short(row: Row, run: Run) -> str:
    """Why there is too little device memory."""
    if run.device.type == "cpu":
        return ""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(run.device)[0]
    if row.device_bytes <= free:
        return ""
    return f"takes about {row.device_bytes / 2**30:.1f} GiB of device memory, {free / 2**30:.1f} are free"


def _why(error: Exception) -> tuple[str, bool]:
    """An error in one line, and whether it is the machine that cannot do it, not the code."""
    first = str(error).strip().partition("\n")[0][:200]
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
