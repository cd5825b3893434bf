"""A model of how much sooner a job is done on several ranks; nothing of it is measured, but for the speeds put into it.

A layer takes, one after the other:

1.  until the sums of all tasks are complete: each rank's samples pass; the first rank's tasks are folded as they pass,
    the others' once the sums before arrive, a panel at a time, so that ranks overlap; before that, moments of a task
    whose samples are split go from rank to rank;
2.  the hand-out: each panel of the right-hand sides from the last owner, the left sides along those that solve;
3.  the solve of the rank that has most of it;
4.  new weights to all;
5.  each rank's samples through the calibrated layer.

Meanwhile the blocks of the next layer are read: where that takes longer, it is what counts. What comes before the first
layer and after the last, and what a rank may do ahead while it waits, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from featcal_fast.planning.plan import LayerPlan, Plan, format_bytes
from featcal_fast.planning.shared import Sharing
from featcal_fast.planning.wire import SumBytes
from featcal_fast.ranks.panels import PANEL_BYTES
from featcal_fast.ranks.shares import Shares

if TYPE_CHECKING:  # only terminals need it, and bench.gpu runs without
    from rich.table import Table

KINDS = ("forward", "moments", "fold", "solve")


@dataclass(frozen=True)
class Speeds:
    """What a rank and the ways between ranks are taken to do.

    Attributes:
        rates: operations a second of a rank, by kind of work (forward, moments, fold, solve).
        link: bytes a second from a rank to another.
        latency: seconds until a first byte arrives.
        reading: bytes a second that each rank reads.
    """

    rates: Mapping[str, float]
    link: float = math.inf
    latency: float = 0.0
    reading: float = math.inf

    @classmethod
    def at(cls, rate: float, link: float = math.inf, latency: float = 0.0, reading: float = math.inf) -> Speeds:
        """One rate for all work."""
        return cls(dict.fromkeys(KINDS, rate), link, latency, reading)


@dataclass(frozen=True)
class Scaled:
    """A job on some ranks, by the model.

    Attributes:
        ranks: how many.
        seconds: of all layers.
        speed_up: how many times sooner than one rank.
        received: bytes that a rank receives, of the one that does most.
        phases: of the seconds, those until sums are complete, of the hand-out, the solve, new weights, the pass through
            calibrated layers, and what reading adds.
    """

    ranks: int
    seconds: float
    speed_up: float
    received: int
    phases: dict[str, float]

    @property
    def efficiency(self) -> float:
        """Share of the ranks' time that one rank would have needed, too."""
        return self.speed_up / self.ranks


@dataclass(frozen=True)
class Scaling:
    """The model of a job, at several numbers of ranks."""

    rows: list[Scaled] = field(default_factory=list)

    def table(self) -> Table:
        """For a terminal."""
        from rich.table import Table

        table = Table(title="On several ranks", caption="a model, not measured: layers alone, at the speeds given")
        for name in ("ranks", "seconds", "speed-up", "efficiency", "a rank receives"):
            table.add_column(name, justify="right")
        for row in self.rows:
            cells = f"{row.seconds:,.3g}", f"{row.speed_up:.3g}", f"{row.efficiency:.0%}", format_bytes(row.received)
            table.add_row(f"{row.ranks:,}", *cells)
        return table


def scale(plan: Plan, ranks: Sequence[int], speeds: Speeds) -> Scaling:
    """How long a job's layers would take on some numbers of ranks.

    Args:
        plan: of the job, on any number of ranks.
        ranks: how many to tell of.
        speeds: of a rank, and between ranks.
    """
    tasks, shards = tuple(plan.layers[0].work), plan.settings.sample_shards
    alone, _ = _job(plan, Sharing(plan.settings, Shares(tasks, shards)), speeds)
    rows = []
    for size in ranks:
        phases, received = _job(plan, Sharing(plan.settings, Shares(tasks, shards, size)), speeds)
        seconds = sum(phases.values())
        rows.append(Scaled(size, seconds, sum(alone.values()) / seconds, received, phases))
    return Scaling(rows)


def _job(plan: Plan, sharing: Sharing, speeds: Speeds) -> tuple[dict[str, float], int]:
    """Seconds by phase, and the bytes that a rank receives at most."""
    total: dict[str, float] = {}
    received = [0] * sharing.shares.size
    for layer in plan.layers:
        for phase, seconds in _layer(layer, sharing, speeds).items():
            total[phase] = total.get(phase, 0.0) + seconds
        for rank in range(len(received)):
            received[rank] += sharing.traffic(layer, rank).received
    return total, max(received)


def _layer(layer: LayerPlan, sharing: Sharing, speeds: Speeds) -> dict[str, float]:
    shares, rates = sharing.shares, speeds.rates
    size = shares.size
    passed = []
    for rank in range(size):
        before = sharing.before(layer, rank)
        passed.append(sum(each / rates[kind] for kind, each in before.items()))
    folds = [sharing.folds(layer, rank) / rates["fold"] for rank in range(size)]
    phases = {
        "sums": _sums(layer, sharing, speeds, passed, folds),
        "hand-out": _hand_out(layer, sharing, speeds) if size > 1 else 0.0,
        "solve": max(sharing.solving(layer)) / rates["solve"],
        "new weights": _to_all(layer, size, speeds),
        "advance": max(sharing.after(layer, rank) for rank in range(size)) / rates["forward"],
    }
    most = max(layer.blocks[None] + sum(layer.blocks[task] for task in _tasks(sharing, rank)) for rank in range(size))
    return {**phases, "reading": max(0.0, most / speeds.reading - sum(phases.values()))}


def _tasks(sharing: Sharing, rank: int) -> set[str]:
    return {part.task for part in sharing.parts[rank]}


def _sums(layer: LayerPlan, sharing: Sharing, speeds: Speeds, passed: Sequence[float], folds: Sequence[float]) -> float:
    """Until the last owner has all of them."""
    shares, wire = sharing.shares, layer.wire
    assert wire is not None
    ready = list(passed)
    ready[0] += folds[0]
    for rank in range(1, shares.size):
        own, before = sharing.parts[rank], sharing.parts[rank - 1]
        if own and own[0].shard:  # of a task that the rank before has begun: panel by panel
            task, shard = before[-1].task, before[-1].shard
            size = wire.moments + sum(layer.rows.fitted[task][: shard + 1]) * wire.row
            last = max(ready[rank - 1] + min(size, PANEL_BYTES) / speeds.link, passed[rank - 1] + size / speeds.link)
            ready[rank] = max(ready[rank], last + speeds.latency)
    whole = sum(sums.whole(tokens) for sums, tokens in _all_sums(layer))
    count = max(1, math.ceil(whole / PANEL_BYTES))
    panel = whole / count / speeds.link
    first, *others = shares.owners
    # When the rank before has added its own; the first rank did so as they passed.
    arrives = [ready[first] + (folds[first] * (number + 1) / count if first else 0.0) for number in range(count)]
    for rank in others:
        leaves, done, fold = 0.0, ready[rank], folds[rank] / count
        for number, at in enumerate(arrives):
            leaves = max(leaves, at) + panel
            done = max(done, leaves + speeds.latency) + fold
            arrives[number] = done
    return max(arrives[-1], *ready)


def _hand_out(layer: LayerPlan, sharing: Sharing, speeds: Speeds) -> float:
    """All that the last owner sends, one after the other, and a panel's time for each that passes it on."""
    found, first = 0.0, sharing.shares.owners[-1]
    others = [items for rank, items in enumerate(sharing.dealt(layer)) if rank != first]
    for sums, tokens in _all_sums(layer):
        for index, each in enumerate(sums.systems):
            wanted = [[panel for number, panel in items if number == index] for items in others]
            if solvers := sum(map(bool, wanted)):
                left = each.left + tokens * each.row
                right = sum(each.right[panel] for panels in wanted for panel in panels) if each.right else 0
                found += _sent(left + (solvers - 1) * min(left, PANEL_BYTES) + right, speeds)
        found += _sent(sums.small, speeds)
    return found


def _all_sums(layer: LayerPlan) -> list[tuple[SumBytes, int]]:
    """A layer's sums, and how many tokens those have that are solved from the tokens' side."""
    assert layer.wire is not None
    found = [(layer.wire.fitted, sum(map(sum, layer.rows.fitted.values())))]
    if layer.wire.judged is not None:
        found.append((layer.wire.judged, sum(layer.rows.held_out.values())))
    return found


def _to_all(layer: LayerPlan, size: int, speeds: Speeds) -> float:
    """New weights, and a block that is merged on the fly: each panel to all, passed on while it arrives."""
    if size == 1:
        return 0.0
    assert layer.wire is not None
    panels = sum(map(len, layer.wire.new))
    steps = math.ceil(math.log2(size))
    return (sum(map(sum, layer.wire.new)) + layer.merged) / speeds.link + 3 * panels * steps * speeds.latency


def _sent(size: float, speeds: Speeds) -> float:
    return speeds.latency + size / speeds.link
