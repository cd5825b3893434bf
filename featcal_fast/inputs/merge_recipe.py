"""How a recipe says that base and experts are to be merged, checked."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches

from featcal_fast.errors import RecipeError, named, shown
from featcal_fast.merging.method import Method, Options
from featcal_fast.merging.methods import METHODS
from featcal_fast.settings import number

WEIGHTS = (-100, 100)
SMALLEST_SUM = 1e-6
OPTIONS: dict[str, tuple[float, float]] = {
    "scaling": (-100, 100),
    "density": (1e-6, 1),
    "t": (0, 1),
    "seed": (0, 2**63 - 1),
    "steps": (1, 100_000),
}
MERGEKIT = {"linear": "average"}  # what has another name there
WHOLE = ("seed", "steps")  # numbers without a fraction


@dataclass(frozen=True)
class MergeRecipe:
    """How to make the merged model on the fly. What a method has not must not be given, and what it has is never None.

    Attributes:
        method: `average`, `task_arithmetic`, `ties`, `dare_linear`, `dare_ties`, `slerp`, `model_stock`, `wudi`,
            `iso_c` or `tsv`; docs/recipes.md has formulas and defaults.
        scaling: of the change of the base, -100 to 100.
        weights: of each expert, by task, -100 to 100; 1 for all by default.
        density: the share of the elements of a change that stays, 1e-6 to 1.
        t: 0 for the first expert, 1 for the second, or between.
        seed: of the choice of elements, 0 to 2^63 - 1.
        steps: of the descent, 1 to 100,000.

    Raises:
        RecipeError: an unknown method, an option that it has not, a value of the wrong type or out of range.
    """

    method: str
    scaling: float | None = None
    weights: Mapping[str, float] | None = None
    density: float | None = None
    t: float | None = None
    seed: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        method = _find(self.method)
        known = [*(["weights"] if method.weighted else []), *method.defaults]
        for name in (item.name for item in fields(self) if item.name != "method"):
            value = getattr(self, name)
            if value is None:
                value = method.defaults.get(name)
            elif name not in known:
                has = f"it has {', '.join(known)}" if known else "it has none"
                raise RecipeError(f"merge.{name}: found {shown(value)}, but {self.method} has no such option; {has}")
            elif name != "weights":
                value = _number(f"merge.{name}", value, *OPTIONS[name], whole=name in WHOLE)
            object.__setattr__(self, name, value)
        if self.weights is not None:
            object.__setattr__(self, "weights", _weights(self.method, self.weights, method.divides))

    def options(self, tasks: Iterable[str]) -> Options:
        """What the method is told.

        Args:
            tasks: the experts' names, in their order.

        Returns:
            The options, with a weight for each.
        """
        weights = tuple(1.0 if self.weights is None else self.weights[task] for task in tasks)
        given = {name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None}
        return Options(weights, **given)

    def check(self, tasks: Collection[str]) -> None:
        """Refuse experts that this merge is not of.

        Args:
            tasks: their names.

        Raises:
            RecipeError: the method takes another number of them, or weights are given of others, or not of all.
        """
        least, most = METHODS[self.method].experts
        if not least <= len(tasks) <= most:
            expected = f"exactly {least}" if least == most else f"{least} or more"
            raise RecipeError(f"experts: found {len(tasks)}, expected {expected}, as {self.method} takes")
        if self.weights is None:
            return
        for task in self.weights:
            if task not in tasks:
                near = get_close_matches(task, tasks, n=1)
                hint = f"did you mean {shown(near[0])}?" if near else "expected names of experts"
                raise RecipeError(f"merge.weights: found {shown(task)}, which is no expert's; {hint}")
        if missing := [task for task in tasks if task not in self.weights]:
            raise RecipeError(
                f"merge.weights.{named(missing[0])}: missing; expected a weight for each expert, 0 to leave one out"
            )


def _find(name: object) -> Method:
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    near = get_close_matches(MERGEKIT.get(name.lower(), name.lower()), METHODS, n=1) if isinstance(name, str) else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise RecipeError(f"merge.method: found {shown(name)}, expected one of {', '.join(METHODS)}{hint}")


def _number(name: str, value: object, least: float, most: float, *, whole: bool) -> float:
    if whole and (isinstance(value, bool) or not isinstance(value, int)):
        raise RecipeError(f"{name}: found {shown(value)}, expected an integer")
    return number(name, value, least, most)


def _weights(method: str, given: object, divides: bool) -> dict[str, float]:
    if not isinstance(given, Mapping) or not given:
        raise RecipeError(f"merge.weights: found {shown(given)}, expected a number for each expert, by its name")
    least, most = (0 if divides else WEIGHTS[0]), WEIGHTS[1]
    found: dict[str, float] = {}
    for key, value in given.items():
        task = str(key) if type(key) is int else key  # as for experts' names
        if not isinstance(task, str) or task in found:
            raise RecipeError(f"merge.weights: found {shown(key)}, expected the name of each expert once")
        found[task] = number(f"merge.weights.{named(task)}", value, least, most)
    if divides and sum(found.values()) < SMALLEST_SUM:
        raise RecipeError(
            f"merge.weights: found a sum of {sum(found.values()):g}, expected at least {SMALLEST_SUM:g}, as {method} "
            "divides by it"
        )
    return found
