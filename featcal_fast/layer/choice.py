"""Settings that choose themselves: for each module the ridge that is best on held-out samples, and several alphas."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from featcal_fast.errors import SolveError
from featcal_fast.layer.judge import Judge
from featcal_fast.layer.moments import TaskMoments
from featcal_fast.layer.solve import NotFinite, Update, new_parameters, solve_layer, solve_norms
from featcal_fast.layer.systems import LayerSystem
from featcal_fast.reporting.report import ChosenReport
from featcal_fast.settings import Settings

# Of the mean diagonal; smaller ones fit noise, however good they look (`docs/notes.md`).
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
# Of the teacher. A module's own error says nothing of it: least squares against features that the student does not have
# shrinks its own. So the layer's output chooses (`streaming/gate.py`).
ALPHAS = (0.2, 0.3, 0.4)
MIDDLE = 0.3  # with which ridges are judged


def hardest(settings: Settings) -> Settings:
    """With the smallest ridge that a module may be solved with."""
    return replace(settings, ridge_scale="trace", ridge_lambda=RIDGES[0]) if settings.auto else settings


def choose(
    system: LayerSystem, moments: TaskMoments, tasks: int, judge: Judge | None
) -> tuple[dict[float, Update], dict[str, ChosenReport]]:
    """Solve a layer; arguments are those of `Choice`.

    Returns:
        By teacher_alpha, the layer's update: one, or those of `ALPHAS` if there is a judge. And then, what was chosen
        for each module.
    """
    if judge is None:
        return {system.settings.teacher_alpha: solve_layer(system, moments, tasks)}, {}
    judge.complete()
    choice = Choice(system, moments, tasks, judge)
    return choice.updates(), {
        module: ChosenReport(choice.chosen(module), {f"{ridge:g}": error for ridge, error in curve.items()})
        for module, curve in choice.curves.items()
    }


class Choice:
    """A layer solved with the two smallest of `RIDGES`, and with more as long as a module gets better.

    Each is relative to the mean diagonal (`ridge_scale: trace`). LayerNorms are solved with the settings' own value: it
    means something else for them.

    Args:
        system: complete sums, what alpha multiplies apart; in the end they hold what was chosen.
        moments: scratch, as `solve_layer` takes it.
        tasks: how many tasks were folded.
        judge: complete.

    Attributes:
        curves: by module and value, in the order that they were tried, `Judge.errors`; Inf where there was no solution.

    Raises:
        NotFinite: features are not, or their sums.
        SolveError: there is no solution for any value.
    """

    def __init__(self, system: LayerSystem, moments: TaskMoments, tasks: int, judge: Judge) -> None:
        self._system, self._moments, self._tasks, self._judge = system, moments, tasks, judge
        self.curves: dict[str, dict[float, float]] = {
            name: {} for each in system.systems for name in each.group.modules
        }
        self._error: SolveError | None = None
        self._best: dict[str, Tensor] = {}  # by group leader, `[2, sum of out, in]`
        self._ridges: dict[str, float | Tensor] = {}  # by module, what the chosen value amounts to
        self._notes = Update()
        for number, ridge in enumerate(RIDGES):
            self._attempt(ridge)
            if number and not any(curve[ridge] == min(curve.values()) for curve in self.curves.values()):
                break
        if len(self._best) < len(system.systems) and self._error is not None:
            raise self._error
        for each in system.systems:
            each.r = self._best[each.group.leader].flatten(0, 1)

    def chosen(self, module: str) -> float:
        """The value that was best for a module."""
        curve = self.curves[module]
        return min(curve, key=curve.__getitem__)

    def updates(self) -> dict[float, Update]:
        """The layer's updates with each module's best ridge, by alpha."""
        norms = solve_norms(self._system)
        found = {}
        for alpha in ALPHAS:
            update = found[alpha] = replace(self._notes, parameters={}, sums=[])
            for each in self._system.systems:
                for name in each.group.modules:
                    update.parameters |= new_parameters(
                        self._system, each, name, self._tasks, alpha, self._ridges[name]
                    )
                weights = (update.parameters[f"{name}.weight"] for name in each.group.modules)
                update.sums.append(torch.stack([weight.sum() for weight in weights]).sum())
            update.parameters |= norms
        return found

    def _attempt(self, ridge: float) -> None:
        settings = replace(self._system.settings, ridge_scale="trace", ridge_lambda=ridge, teacher_alpha=MIDDLE)
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
                self._best[leader], better = torch.empty_like(each.parts), list(each.group.modules)
            for name in better:
                rows = each.rows()[name]
                self._best[leader][:, rows] = each.parts[:, rows]
                self._ridges[name] = each.ridge
            if better:
                self._notes.solver[leader], self._notes.steps[leader] = found.solver[leader], found.steps[leader]
                self._notes.raised |= {k: v for k, v in found.raised.items() if k == leader}
