"""What the sections share: the device at hand, a clock, and a measure of error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench.phases import Clock

if TYPE_CHECKING:
    from featcal_kernels.configs import Arch

    from bench.gpu.compiling import Compiling
    from bench.harness.runs import Way

CALLS_MS = 2.0  # short calls are timed in groups of this length
ROUNDS = (3, 25)


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


def measure(variants: dict[str, Callable[[], object]], run: Run, budget_s: float = 0.5) -> dict[str, float]:
    """Median milliseconds of a call of each variant; the variants take turns, so that a drifting clock meets all."""
    calls = {}
    for name, call in variants.items():
        call()
        once = _milliseconds(call, 1, run.device)
        calls[name] = (max(1, min(50, int(CALLS_MS / max(once, 1e-3)))), once)
    round_ms = sum(count * once for count, once in calls.values())
    rounds = 1 if run.dry else int(max(ROUNDS[0], min(ROUNDS[1], budget_s * 1e3 / round_ms)))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            times[name].append(_milliseconds(call, calls[name][0], run.device))
    return {name: median(values) for name, values in times.items()}


def _milliseconds(call: Callable[[], object], count: int, device: torch.device) -> float:
    clock = Clock(device)
    with clock("calls"):
        for _ in range(count):
            call()
    return clock.read()["calls"] / count


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

        best = max(best, 2 * size**3 / measure({"product": product}, run, 2.0)["product"] * 1e-9)
    return best
