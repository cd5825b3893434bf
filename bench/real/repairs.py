"""Repairs: a merge and its calibration's settings, and many of them compared on the validation part."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import featcal_fast as ff
from bench.real.units import Rows

HELD_OUT = 0.2  # a recipe's own


@dataclass(frozen=True)
class Repair:
    """A merge that is calibrated, and how.

    Attributes:
        scaling: of task arithmetic, which makes the merge.
        settings: of the calibration.
        held_out: share of the samples that nothing is fitted to.
    """

    scaling: float
    settings: ff.Settings
    held_out: float = 0.0

    @property
    def anchor(self) -> float:
        """The scaling of task arithmetic that makes the anchor."""
        return self.scaling * self.settings.anchor_rho

    @property
    def name(self) -> str:
        s = self.settings
        return f"scaling {self.scaling:g}, lambda {s.ridge_lambda:g}, rho {s.anchor_rho:g}, alpha {s.teacher_alpha:g}"


def named(grid: Iterable[Repair]) -> dict[str, Repair]:
    """By name, what all samples are fitted to."""
    return {repair.name: repair for repair in grid}


def with_held_out(chosen: Repair) -> dict[str, Repair]:
    """By what they are called, repairs that are judged on held-out samples.

    `settings: auto` as it is, and with the chosen rho, which it does not look for; the chosen settings; and the last
    two without the gate: so the chosen settings are fitted to as few samples as `auto` is.
    """
    auto = ff.PRESETS["auto"]
    same_rho = replace(auto, anchor_rho=chosen.settings.anchor_rho)
    settings = {
        "auto": auto,
        "auto, chosen rho": same_rho,
        "auto, chosen rho, no gate": replace(same_rho, keep_better=False),
        "chosen": chosen.settings,
        "chosen, no gate": replace(chosen.settings, keep_better=False),
    }
    return {name: Repair(chosen.scaling, each, HELD_OUT) for name, each in settings.items()}


def decided(report: ff.Report) -> dict[str, Any]:
    """What held-out samples decided, and what became of them; nothing where none are.

    `ridges` says how many modules have a value, `alphas` how many layers; `kept`, by layer, which modules keep merged
    weights.
    """
    if report.outcome is None:
        return {}
    gates = {layer.index: layer.gate.kept for layer in report.layers if layer.gate is not None}
    ridges = Counter(each.ridge_lambda for layer in report.layers for each in layer.chosen.values())
    alphas = Counter(layer.alpha.teacher_alpha for layer in report.layers if layer.alpha is not None)
    return {
        "held_out": report.held_out,
        "outcome": asdict(report.outcome),
        "kept": {f"{index}": names for index, names in gates.items() if names},
        "ridges": {f"{ridge:g}": count for ridge, count in sorted(ridges.items())},
        "alphas": {f"{alpha:g}": count for alpha, count in sorted(alphas.items())},
    }


def compare(
    grid: Mapping[str, Repair],
    counts: Sequence[int],
    rows: Rows,
    measure: Callable[[Repair, int], dict[str, Any]],
    best: Callable[..., str],
) -> dict[str, Any]:
    """What `measure` found of each repair, by samples a task; their means, and the best one's name.

    Args:
        grid: what is compared, by name.
        counts: samples a task.
        rows: that are finished are kept.
        measure: gives the `mean` over tasks, and what else is to be kept.
        best: `max` or `min`.
    """
    scores = {
        f"{name}, {n}": rows.measure(f"{name}, {n}", lambda r=repair, n=n: measure(r, n))  # type: ignore[misc]
        for n in counts
        for name, repair in grid.items()
    }
    means = {name: statistics.fmean(scores[f"{name}, {n}"]["mean"] for n in counts) for name in grid}
    return {
        "samples": list(counts),
        "grid": {name: asdict(repair) for name, repair in grid.items()},
        "scores": scores,
        "means": means,
        "best": best(means, key=lambda name: means[name]),
    }
