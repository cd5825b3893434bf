"""How fast this machine multiplies now, measured in a moment on what a job would multiply."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.nn.functional as F
from featcal_kernels import gram_cross_

from featcal_fast.layer.precision import ieee_float32
from featcal_fast.planning.footprint import triangle
from featcal_fast.planning.plan import Plan

WIDEST, ROWS = 1024, 256  # of a product that is measured; larger ones are about as fast
PATIENCE = 0.04  # seconds for a kind of work, unless two products take longer


@dataclass(frozen=True)
class Speeds:
    """Floating-point operations a second, by kind of work; what is of no kind of these goes as fast as the slowest."""

    by_kind: dict[str, float]

    def seconds(self, flops: Mapping[str, float]) -> float:
        """What so many operations of each kind would take if nothing else did."""
        slowest = min(self.by_kind.values())
        return sum(count / self.by_kind.get(kind, slowest) for kind, count in flops.items())


def measure_products(plan: Plan) -> tuple[Speeds, Speeds]:
    """How fast the CPU is at a plan's kinds of work, of the widths of its largest matrix and in its models' dtype.

    Takes about 0.2 seconds.

    Returns:
        At its best, and with what else the machine does now.
    """
    wide, high = (min(size, WIDEST) for size in plan.largest_matrix)
    rows = min(plan.chunk, ROWS)
    features, weight = (torch.ones(*shape, dtype=getattr(torch, plan.dtype)) for shape in ((rows, wide), (high, wide)))
    square, (s, q) = torch.eye(wide), torch.zeros(2, wide, wide)
    right = torch.ones(wide, rows)

    def solve() -> None:
        torch.cholesky_solve(right, torch.linalg.cholesky_ex(square)[0])

    works: dict[str, tuple[Callable[[], object], float]] = {
        # As modules have it: in float16, `features @ weight` may be twenty times slower.
        "forward": (lambda: F.linear(features, weight), 2 * rows * wide * high),
        "moments": (lambda: gram_cross_(s, q, features, features), 2 * rows * (triangle(wide) + wide**2)),
        "fold": (lambda: right.mT @ square, 2 * rows * wide**2),
        "solve": (solve, wide**3 / 3 + 2 * rows * wide**2),
    }
    with ieee_float32():
        times = {kind: _times(work) for kind, (work, _) in works.items()}
    best = {kind: works[kind][1] / min(each) for kind, each in times.items()}
    return Speeds(best), Speeds({kind: works[kind][1] / fmean(each) for kind, each in times.items()})


def _times(work: Callable[[], object]) -> list[float]:
    """Seconds that it takes again and again, without the first time, which also waits for libraries."""
    times: list[float] = []
    end = time.perf_counter() + PATIENCE
    while len(times) < 2 or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        times.append(max(time.perf_counter() - began, 1e-9))
    return times[1:]
