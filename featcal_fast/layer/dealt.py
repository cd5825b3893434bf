"""A layer's systems solved by all ranks together, each some panels of the right-hand sides (`docs/several-gpus.md`).

The sums are with the last owner. The left side of a system goes from there to the ranks that solve some of it, from one
to the next; the right-hand side's panels to those that they are dealt to; new weights, in the model's dtype, to all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from featcal_fast.errors import SolveError
from featcal_fast.layer.chain import Through, flat, unflatten
from featcal_fast.layer.choice import ALPHAS, choose
from featcal_fast.layer.judge import Judge
from featcal_fast.layer.layout import InputGroup
from featcal_fast.layer.moments import TaskMoments, token_side
from featcal_fast.layer.solve import NotFinite, Update, solve_norms
from featcal_fast.layer.systems import InputSystem, LayerSystem, RowSystem
from featcal_fast.layer.tokens import TokenCounts
from featcal_fast.ranks.deal import Dealt, Work, deal
from featcal_fast.ranks.panels import row_panels
from featcal_fast.ranks.shares import Shares, ring
from featcal_fast.ranks.world import World
from featcal_fast.reporting.forms import build
from featcal_fast.reporting.report import ChosenReport
from featcal_fast.settings import Settings


def dealt_to(groups: Sequence[InputGroup], counts: TokenCounts, settings: Settings, shares: Shares) -> Dealt:
    """Which (system, panel) each rank solves.

    A group's modules stay together where their solutions depend on one another: where ridges are chosen, and where
    changes are limited.
    """
    first, size = shares.owners[-1], shares.size
    whole = settings.auto or settings.max_change is not None
    found = deal([_work(group, counts, whole) for group in groups], size)
    if whole:
        panels = [sum(len(row_panels(out, group.in_features)) for out in group.out_features) for group in groups]
        found = [[(index, panel) for index, _ in each for panel in range(panels[index])] for each in found]
    else:
        found = [
            [(index, panel) for index, piece in each for panel in _panels(groups[index], piece, counts)]
            for each in found
        ]
    return [found[(rank - first) % size] for rank in range(size)]


def _panels(group: InputGroup, piece: int, counts: TokenCounts) -> Sequence[int]:
    """Of a piece of work: one, or all where a system is solved from the token side."""
    if not token_side(group, counts):
        return [piece]
    return range(sum(len(row_panels(out, group.in_features)) for out in group.out_features))


def _work(group: InputGroup, counts: TokenCounts, whole: bool) -> Work:
    factor, row = solve_cost(group, counts)
    if token_side(group, counts):
        return Work(0.0, (factor + row * sum(group.out_features),))
    sizes = (each for out in group.out_features for each in row_panels(out, group.in_features))
    panels = tuple(row * (each.stop - each.start) for each in sizes)
    return Work(factor, (sum(panels),) if whole else panels)


def solve_cost(group: InputGroup, counts: TokenCounts) -> tuple[float, float]:
    """Operations that a system takes once, by Cholesky, and those of each row of its right-hand side.

    Two triangular solves; from the token side two more products.
    """
    size, n = group.in_features, counts.total
    if token_side(group, counts):
        return 2.0 * n * n * size + n**3 / 3, 2.0 * n * n + 4.0 * n * size
    return size**3 / 3, 2.0 * size * size


class Solved(NamedTuple):
    """A layer, solved.

    Attributes:
        updates: by teacher_alpha; with all parameters.
        chosen: for each module.
    """

    updates: dict[float, Update]
    chosen: dict[str, ChosenReport]


def solve_together(
    system: LayerSystem,
    moments: TaskMoments,
    counts: TokenCounts,
    judge: Judge | None,
    shares: Shares,
    world: World,
) -> Solved:
    """What `choose` returns, on all ranks.

    Args:
        system: sums, complete with the last owner.
        moments: scratch.
        counts: of the layer's tokens.
        judge: held-out sums, likewise, where settings choose themselves.
        shares: whose samples are whose.
        world: all ranks.

    Raises:
        NotFinite, SolveError: on all ranks, what one of them raised.
    """
    if world.size == 1:
        return Solved(*choose(system, moments, counts.tasks, judge))
    dealt = dealt_to([each.group for each in system.systems], counts, system.settings, shares)
    for sums in (system, judge):
        if sums is not None:
            _hand_out(sums, dealt, shares, world)
    own = copy(system)
    own.systems = []
    for index, each in enumerate(system.systems):
        each.own = [panel for number, panel in dealt[world.rank] if number == index]
        own.systems += [each] if each.own else []
    updates: dict[float, Update] = {}
    chosen: dict[str, ChosenReport] = {}
    status: dict[str, Any] = {}
    try:
        updates, chosen = choose(own, moments, counts.tasks, judge) if own.systems else ({}, {})
    except NotFinite as error:
        status = {"not finite": [group.leader for group in error.groups]}
    except SolveError as error:
        status = {"error": str(error)}
    _raise_together(world.gather(status), [each.group for each in system.systems])
    alphas = ALPHAS if judge is not None and system.systems else (system.settings.teacher_alpha,)
    norms = solve_norms(system)
    found = {alpha: _gathered(system, updates.get(alpha), dealt, world) for alpha in alphas}
    for update in found.values():
        update.parameters |= norms
    own_choices = {name: asdict(each) for name, each in chosen.items()}
    every = world.merge(own_choices) if judge is not None else {}
    order = (name for each in system.systems for name in each.group.modules)
    return Solved(found, {name: build(ChosenReport, every[name]) for name in order if name in every})


def _raise_together(statuses: Sequence[dict[str, Any]], groups: Sequence[InputGroup]) -> None:
    broken = {leader for each in statuses for leader in each.get("not finite", ())}
    if any("not finite" in each for each in statuses):
        raise NotFinite([group for group in groups if group.leader in broken])
    for each in statuses:
        if "error" in each:
            raise SolveError(each["error"])


def _hand_out(system: LayerSystem, dealt: Dealt, shares: Shares, world: World) -> None:
    """Give those that solve something of a system its sums."""
    first, rank = shares.owners[-1], world.rank
    for index, each in enumerate(system.systems):
        wanted = {other: [panel for number, panel in dealt[other] if number == index] for other in range(world.size)}
        route = ring(first, [first, *(other for other in wanted if wanted[other] and other != first)], world.size)
        if rank not in route:
            continue
        place = route.index(rank)
        before = route[place - 1] if place else None
        after = route[place + 1] if place + 1 < len(route) else None
        if isinstance(each, RowSystem):
            for _ in Through(world, before, after).rows(each):
                pass
            continue
        for _ in Through(world, before, after).left(each):
            pass
        for other in route[1:]:
            if rank in (first, other):
                way = Through(world, *((None, other) if rank == first else (first, None)))
                for _ in way.right(each, wanted[other]):
                    pass
    world.flush()
    small = system.small()
    values = flat(small)
    world.broadcast(values, first)
    unflatten(small, values)


def _gathered(system: LayerSystem, own: Update | None, dealt: Dealt, world: World) -> Update:
    """All parameters, of what each rank has solved."""
    update = Update()
    merged = system.anchor.merged
    for index, each in enumerate(system.systems):
        solvers = {panel: rank for rank in range(world.size) for number, panel in dealt[rank] if number == index}
        for module in each.group.modules:
            for name in (f"{module}.weight", f"{module}.bias"):
                if name.endswith("weight") or module in each.biases:
                    update.parameters[name] = torch.empty_like(merged[name], memory_format=torch.contiguous_format)
        for number, panel in enumerate(each.panels):
            for name in (f"{panel.module}.weight", f"{panel.module}.bias"):
                if name in update.parameters:
                    rows = update.parameters[name][panel.own]
                    if own is not None and solvers[number] == world.rank:
                        rows.copy_(own.parameters[name][panel.own])
                    world.broadcast(rows, solvers[number])
        _gather_scalars(update, each, own, solvers, world)
    notes = world.gather([{}, {}, {}] if own is None else [own.solver, own.raised, own.steps])
    for into, number in ((update.solver, 0), (update.raised, 1), (update.steps, 2)):
        for each_notes in notes:
            into.update(each_notes[number])
    return update


def _gather_scalars(
    update: Update, system: InputSystem, own: Update | None, solvers: Mapping[int, int], world: World
) -> None:
    """Of each panel the change and the sum of its weights."""
    seen: dict[str, int] = {}
    for number, panel in enumerate(system.panels):
        pair = torch.zeros(2, device=update.parameters[f"{panel.module}.weight"].device)
        if own is not None and solvers[number] == world.rank:
            place = seen.get(panel.module, 0)
            seen[panel.module] = place + 1
            pair = torch.stack([own.changes[panel.module][place], own.sums[panel.module][place]])
        world.broadcast(pair, solvers[number])
        update.changes.setdefault(panel.module, []).append(pair[0])
        update.sums.setdefault(panel.module, []).append(pair[1])
