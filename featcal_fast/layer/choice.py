"""Settings that choose themselves: for each module the ridge that is best on held-out samples, and several alphas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from featcal_fast.errors import SolveError
from featcal_fast.layer.judge import Judge
from featcal_fast.layer.moments import TaskMoments
from featcal_fast.layer.solve import NotFinite, Update, set_parameters, solve_layer, solve_norms, solve_systems
from featcal_fast.layer.systems import GroupSystem, LayerSystem, RowSystem
from featcal_fast.reporting.report import ChosenReport
from featcal_fast.settings import Settings

# Of the mean diagonal; smaller ones fit noise, however good they look (`docs/notes.md`).
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
# Of the teacher. A module's own error says nothing of it: least squares against features that the student does not have
# shrinks its own. So the layer's output chooses (`streaming/gate.py`).
ALPHAS = (0.2, 0.3, 0.4)
JUDGED_ALPHA = 0.3  # with which ridges are judged

Curve = dict[float, float]  # of a module: by ridge, in the order that they were tried, `Judge.errors`


def hardest(settings: Settings) -> Settings:
    """With the smallest ridge that a module may be solved with."""
    return replace(settings, ridge_scale="trace", ridge_lambda=RIDGES[0]) if settings.auto else settings


def choose(
    system: LayerSystem, moments: TaskMoments, tasks: int, judge: Judge | None
) -> tuple[dict[float, Update], dict[str, ChosenReport]]:
    """Solve a layer; arguments are those of `Choice`.

    Returns:
        By teacher_alpha, the layer's update: one, or those of `ALPHAS` if there are a judge and modules. And then, what
        was chosen for each module.
    """
    if judge is None or not system.systems:
        return {system.settings.teacher_alpha: solve_layer(system, moments, tasks)}, {}
    judge.complete()
    choice = Choice(system, moments, tasks, judge)
    return choice.updates(), {
        module: ChosenReport(best(curve), {f"{ridge:g}": error for ridge, error in curve.items()})
        for module, curve in choice.curves.items()
    }


def best(curve: Mapping[float, float]) -> float:
    """The ridge with the smallest error, the smaller one of equals."""
    return min(curve, key=curve.__getitem__)


class Choice:
    """A layer solved with each module's best ridge, one input group after the other.

    Ridges are relative to the mean diagonal (`ridge_scale: trace`). LayerNorms are solved with the settings' own value:
    it means something else for them.

    Args:
        system: complete sums, what alpha multiplies apart; solved in the end.
        moments: scratch, as `solve_layer` takes it.
        tasks: how many tasks were folded.
        judge: complete.

    Attributes:
        curves: by module; Inf where there was no solution.

    Raises:
        NotFinite: features are not, or their sums, those of held-out samples included.
        SolveError: there is no solution for any value.
    """

    def __init__(self, system: LayerSystem, moments: TaskMoments, tasks: int, judge: Judge) -> None:
        self._system, self._moments, self._tasks, self._judge = system, moments, tasks, judge
        self.curves: dict[str, Curve] = {}
        self._ridges: dict[str, float | Tensor] = {}  # by module, what the best value amounts to
        self._notes = Update()
        for each in system.systems:
            curves = self._try(each)
            self.curves |= curves
            self._solve(each, {module: best(curve) for module, curve in curves.items()})

    def updates(self) -> dict[float, Update]:
        """The layer's updates with each module's best ridge, by alpha."""
        norms = solve_norms(self._system)
        found = {}
        for alpha in ALPHAS:
            update = found[alpha] = replace(self._notes, parameters={}, changes={}, sums={})
            for each in self._system.systems:
                for name in each.group.modules:
                    set_parameters(update, self._system, each, name, self._tasks, alpha, self._ridges[name])
            update.parameters |= norms
        return found

    def _settings(self, ridge: float) -> Settings:
        return replace(self._system.settings, ridge_scale="trace", ridge_lambda=ridge)

    def _try(self, system: GroupSystem | RowSystem) -> dict[str, Curve]:
        """With the two smallest of `RIDGES`, and more as long as a module gets better.

        In float32 where it goes: what that gets wrong lies where features hardly are, and so does not show in errors.
        """
        curves: dict[str, Curve] = {name: {} for name in system.group.modules}
        failed = None
        for number, ridge in enumerate(RIDGES):
            settings = self._settings(ridge)
            if settings.solve_dtype == "auto":
                settings = replace(settings, solve_dtype="float32")
            values = [math.inf] * len(curves)
            try:
                found = solve_layer(self._system.alone(system.at(JUDGED_ALPHA), settings), self._moments, self._tasks)
                values = torch.stack(list(self._judge.errors(found).values())).tolist()
            except NotFinite:
                raise
            except SolveError as error:
                failed = error
            for curve, value in zip(curves.values(), values, strict=True):
                curve[ridge] = value if math.isfinite(value) else math.inf
            if number and not any(curve[ridge] == min(curve.values()) for curve in curves.values()):
                break
        if all(math.isinf(min(curve.values())) for curve in curves.values()):
            raise failed or NotFinite()  # of held-out samples, or their sums
        return curves

    def _solve(self, system: GroupSystem | RowSystem, chosen: Mapping[str, float]) -> None:
        """For both parts of the right-hand side, each module with its own ridge. The smallest one's solve is told."""
        leader, solution = system.group.leader, None
        for ridge in sorted(set(chosen.values()), reverse=True):
            own = system.copied()
            notes = solve_systems(self._system.alone(own, self._settings(ridge)), self._moments, self._tasks)
            if solution is None:
                solution = own.parts
            for name, rows in system.rows().items():
                if chosen[name] == ridge:
                    solution[:, rows] = own.parts[:, rows]
                    self._ridges[name] = own.ridge
            self._notes.solver[leader], self._notes.steps[leader] = notes.solver[leader], notes.steps[leader]
            self._notes.raised.pop(leader, None)
            self._notes.raised |= notes.raised
            del own  # before the next is copied
        assert solution is not None
        system.r = solution.flatten(0, 1)
