"""What the sections share: the device at hand, a clock, and a measure of error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bench.phases import Clock

if TYPE_CHECKING:
    from featcal_kernels.configs import Arch

    from bench.gpu.compiling import Compiling
    from bench.harness.runs import Way

CALLS_MS = 2.0  # short calls are timed in groups of this length
ROUNDS = (3, 25)
CYCLES_PER_MS = 2_000_000  # of a device, about
MOST_AHEAD_MS = 50.0  # that the host may queue ahead; more would be of a call that waits for the device


@dataclass(frozen=True)
class Run:
    """What the sections share.

    Attributes:
        device: what is measured.
        dry: go through the motions, at toy sizes.
        arch: the device's row of `featcal_kernels.configs.TABLE`; None where the kernels cannot run.
        peak: TFLOP/s of a large bfloat16 product.
        compiling: tiles on their way to Triton's cache, if any are to be timed.
        folders: where jobs may be written, the best first.
        official: how to run the official demo's code, if there is a checkout.
    """

    device: torch.device
    dry: bool
    arch: Arch | None = None
    peak: float = 0.0
    compiling: Compiling | None = None
    folders: tuple[Path, ...] = ()
    official: Way | None = None


class Times(NamedTuple):
    """Median milliseconds of a call, by variant: what the device is at it, and how long the host takes to queue it."""

    device: dict[str, float]
    host: dict[str, float]


def measure(variants: dict[str, Callable[[], object]], run: Run, budget_s: float = 0.5) -> Times:
    """Time each variant; they take turns, so that a drifting clock meets all.

    As in the engine, the device has work until the host has queued the calls, so that the host's time is not counted
    in the device's. A call that waits for the device has its own time in the host's, too.
    """
    counts, ahead, host, round_ms = {}, {}, {}, 0.0
    for name, call in variants.items():
        call()
        once, _ = _milliseconds(call, 1, run.device)
        counts[name] = max(1, min(50, int(CALLS_MS / max(once, 1e-3))))
        host[name] = median(_milliseconds(call, counts[name], run.device)[1] for _ in range(ROUNDS[0]))
        ahead[name] = min(1.5 * counts[name] * host[name], MOST_AHEAD_MS)
        round_ms += counts[name] * once + ahead[name]
    rounds = 1 if run.dry else int(max(ROUNDS[0], min(ROUNDS[1], budget_s * 1e3 / round_ms)))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            times[name].append(_milliseconds(call, counts[name], run.device, ahead[name])[0])
    return Times({name: median(values) for name, values in times.items()}, host)


def _milliseconds(
    call: Callable[[], object], count: int, device: torch.device, ahead_ms: float = 0.0
) -> tuple[float, float]:
    """Of a call, on the device and of the host, which starts `ahead_ms` before an idle device does."""
    if device.type == "cuda":
        torch.cuda._sleep(int(ahead_ms * CYCLES_PER_MS))
    clock, began = Clock(device), time.perf_counter()
    with clock("calls"):
        for _ in range(count):
            call()
        queued = time.perf_counter() - began
    return clock.read()["calls"] / count, 1e3 * queued / count


def clock_note(rows: Iterable[dict[str, Any]]) -> str:
    """What milliseconds in a table are."""
    if all("host ms" in row for row in rows):
        return "ms: of the device. host ms: what the host takes to queue a call, beside the device."
    return (
        "ms: by a clock that started with an idle device, so that the host's 0.1 to 0.4 ms before the first kernel "
        "count where calls are short; in a run they pass beside earlier work."
    )


def refusal(call: Callable[[], object]) -> str:
    """Why a kernel cannot be timed: it does not compile, or does not fit; empty if it runs."""
    try:
        call()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler has many ways to refuse a tile
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:100]}"
    return ""


def apart(found: Tensor, exact: Tensor) -> float:
    """How far `found` is from `exact`, of any shape and in float64: relative, Frobenius."""
    return float((found.double() - exact).norm() / exact.norm())


def measure_peak(run: Run) -> float:
    """TFLOP/s of large square bfloat16 products of random values."""
    best = 0.0
    for size in (64,) if run.dry else (8192, 12288):
        a, b = (torch.randn(size, size, device=run.device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)

        def product(a: Tensor = a, b: Tensor = b, out: Tensor = out) -> None:
            torch.mm(a, b, out=out)

        best = max(best, 2 * size**3 / measure({"product": product}, run, 2.0).device["product"] * 1e-9)
    return best
