"""Who solves what of a layer: panels of its right-hand sides, dealt out so that the slowest is soonest done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """One ridge system.

    Attributes:
        factor: operations that everybody pays who solves some of it.
        panels: operations of each panel of its right-hand side; a single one where it cannot be split.
    """

    factor: float
    panels: tuple[float, ...]


Dealt = list[list[tuple[int, int]]]  # by rank: (system, panel), in order


def deal(systems: Sequence[Work], size: int) -> Dealt:
    """Panels by rank, in runs of consecutive ones: few ranks have to do with a system, so that few are sent its sums.

    Args:
        systems: of a layer.
        size: how many ranks there are.

    Returns:
        For each rank its panels.
    """
    order = sorted(range(len(systems)), key=lambda index: (-systems[index].factor, index))
    items = [(index, panel) for index in order for panel in range(len(systems[index].panels))]
    low, high = 0.0, sum(each.factor + sum(each.panels) for each in systems)
    high *= 1 + 1e-9  # in another order they may add up to a little more
    best = _filled(systems, items, high, size)
    assert best is not None  # one rank may do it all
    for _ in range(50):
        middle = (low + high) / 2
        found = _filled(systems, items, middle, size)
        if found is None:
            low = middle
        else:
            high, best = middle, found
    return best


def _filled(systems: Sequence[Work], items: Sequence[tuple[int, int]], limit: float, size: int) -> Dealt | None:
    """Ranks filled one after the other up to `limit`; None where that does not do."""
    dealt: Dealt = [[]]
    spent = 0.0
    for index, panel in items:
        known = bool(dealt[-1]) and dealt[-1][-1][0] == index
        cost = systems[index].panels[panel] + (0 if known else systems[index].factor)
        if dealt[-1] and spent + cost > limit:
            dealt.append([])
            spent, cost = 0.0, systems[index].panels[panel] + systems[index].factor
        if spent + cost > limit or len(dealt) > size:
            return None
        dealt[-1].append((index, panel))
        spent += cost
    return dealt + [[] for _ in range(size - len(dealt))]
