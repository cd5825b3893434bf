"""`ridge_lambda` chosen for each module: of several solutions, the one that is best on held-out samples."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from featcal_fast.errors import SolveError
from featcal_fast.layer.judge import Judge
from featcal_fast.layer.moments import TaskMoments
from featcal_fast.layer.solve import NotFinite, Update, solve_layer, solve_norms
from featcal_fast.layer.systems import LayerSystem
from featcal_fast.reporting.report import ChosenReport
from featcal_fast.settings import Settings

RIDGES = (
    1e-3,
    1e-2,
    1e-1,
    1.0,
)  # of the mean diagonal; smaller ones fit noise, however good they look (`docs/notes.md`)
START = 1  # the one of these that is tried first


def hardest(settings: Settings) -> Settings:
    """With the smallest ridge that a module may be solved with."""
    return replace(settings, ridge_scale="trace", ridge_lambda=RIDGES[0]) if settings.auto else settings


def choose(
    system: LayerSystem, moments: TaskMoments, tasks: int, judge: Judge | None
) -> tuple[Update, dict[str, ChosenReport]]:
    """Solve a layer, and what was chosen for each module if there is a judge; arguments are those of `Choice`."""
    if judge is None:
        return solve_layer(system, moments, tasks), {}
    judge.complete()
    choice = Choice(system, moments, tasks, judge)
    return choice.update, {
        module: ChosenReport(choice.chosen(module), {f"{ridge:g}": error for ridge, error in curve.items()})
        for module, curve in choice.curves.items()
    }


class Choice:
    """A layer solved with three values of `RIDGES`, and with more as long as a module gets better.

    Each is relative to the mean diagonal (`ridge_scale: trace`). LayerNorms are solved with the settings' own value: it
    means something else for them.

    Args:
        system: complete sums; in the end their right-hand sides hold the new weights, as `solve_layer` leaves them.
        moments: scratch, as `solve_layer` takes it.
        tasks: how many tasks were folded.
        judge: complete.

    Attributes:
        update: each module's best solution.
        curves: by module and value, in the order that they were tried, `Judge.errors`; Inf where there was no solution.

    Raises:
        NotFinite: features are not, or their sums.
        SolveError: there is no solution for any value.
    """

    def __init__(self, system: LayerSystem, moments: TaskMoments, tasks: int, judge: Judge) -> None:
        self._system, self._moments, self._tasks, self._judge = system, moments, tasks, judge
        self.update = Update()
        self.curves: dict[str, dict[float, float]] = {
            name: {} for each in system.systems for name in each.group.modules
        }
        self._error: SolveError | None = None
        self._best: dict[str, Tensor] = {}  # by group leader, `[sum of out, in]`
        self._walk()
        if len(self._best) < len(system.systems) and self._error is not None:
            raise self._error
        for each in system.systems:
            each.r = self._best[each.group.leader]
            self.update.parameters |= {f"{name}.weight": each.r[rows] for name, rows in each.rows().items()}
            self.update.sums.append(each.r.sum())
        self.update.parameters |= solve_norms(system)

    def chosen(self, module: str) -> float:
        """The value that was best for a module."""
        curve = self.curves[module]
        return min(curve, key=curve.__getitem__)

    def _walk(self) -> None:
        self._attempt(RIDGES[START])
        for step in (-1, 1):
            at = START
            while at + step in range(len(RIDGES)) and (at == START or RIDGES[at] in map(self.chosen, self.curves)):
                at += step
                self._attempt(RIDGES[at])

    def _attempt(self, ridge: float) -> None:
        settings = replace(self._system.settings, ridge_scale="trace", ridge_lambda=ridge)
        own = self._system.copied(settings)
        try:
            found = solve_layer(own, self._moments, self._tasks)
        except NotFinite:
            raise
        except SolveError as error:
            self._error = error
            for curve in self.curves.values():
                curve[ridge] = math.inf
            return
        errors = self._judge.errors(found)
        values = torch.stack(list(errors.values())).tolist() if errors else []
        for name, value in zip(errors, values, strict=True):
            self.curves[name][ridge] = value if math.isfinite(value) else math.inf
        for each in own.systems:
            leader = each.group.leader
            better = [name for name in each.group.modules if self.chosen(name) == ridge]
            if leader not in self._best:  # whatever it is: that it is not finite is found out later
                self._best[leader], better = torch.empty_like(each.r), list(each.group.modules)
            for name in better:
                rows = each.rows()[name]
                self._best[leader][rows] = each.r[rows]
                self.update.parameters |= {k: v for k, v in found.parameters.items() if k == f"{name}.bias"}
            if better:
                self.update.solver[leader], self.update.steps[leader] = found.solver[leader], found.steps[leader]
                self.update.raised |= {k: v for k, v in found.raised.items() if k == leader}
