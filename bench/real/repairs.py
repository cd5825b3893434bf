"""Repairs: a merge and its calibration's settings, and many of them compared on the validation part."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import featcal_fast as ff
from bench.real.units import Rows


@dataclass(frozen=True)
class Repair:
    """A merge that is calibrated, and how.

    Attributes:
        scaling: of task arithmetic, which makes the merge.
        settings: of the calibration.
    """

    scaling: float
    settings: ff.Settings

    @property
    def anchor(self) -> float:
        """The scaling of task arithmetic that makes the anchor."""
        return self.scaling * self.settings.anchor_rho

    @property
    def name(self) -> str:
        s = self.settings
        return f"scaling {self.scaling:g}, lambda {s.ridge_lambda:g}, rho {s.anchor_rho:g}, alpha {s.teacher_alpha:g}"


def compare(
    grid: Iterable[Repair],
    counts: Sequence[int],
    rows: Rows,
    measure: Callable[[Repair, int], dict[str, Any]],
    best: Callable[..., str],
) -> dict[str, Any]:
    """What `measure` found of each repair, by samples a task; their means, and the best one's name.

    Args:
        grid: what is compared.
        counts: samples a task.
        rows: that are finished are kept.
        measure: gives the `mean` over tasks, and what else is to be kept.
        best: `max` or `min`.
    """
    named = {repair.name: repair for repair in grid}
    scores = {
        f"{name}, {n}": rows.measure(f"{name}, {n}", lambda r=repair, n=n: measure(r, n))  # type: ignore[misc]
        for n in counts
        for name, repair in named.items()
    }
    means = {name: statistics.fmean(scores[f"{name}, {n}"]["mean"] for n in counts) for name in named}
    return {
        "samples": list(counts),
        "grid": {name: asdict(repair) for name, repair in named.items()},
        "scores": scores,
        "means": means,
        "best": best(means, key=lambda name: means[name]),
    }
