"""A job that several ranks share: what each has of it, computes, and sends."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar, cast

from featcal_fast.inputs.task_data import TaskData
from featcal_fast.layer.dealt import dealt_to
from featcal_fast.layer.layout import InputGroup
from featcal_fast.layer.moments import token_side
from featcal_fast.planning.footprint import solve_flops
from featcal_fast.planning.plan import LayerPlan, RankPlan
from featcal_fast.planning.wire import Traffic, layer_traffic
from featcal_fast.ranks.deal import Dealt
from featcal_fast.ranks.panels import row_panels
from featcal_fast.ranks.shares import Part, Shares, in_turn
from featcal_fast.settings import Settings

MOST = 1024  # ranks that are planned for
ON_ONE = 8  # ranks of one machine, unless something else is known
Made = TypeVar("Made")
UNDER_WAY = 5  # panels: two that arrive, two that leave, and the next that does


@dataclass(frozen=True)
class Role:
    """What a rank has to do with, as far as its memory and its reads depend on it.

    Attributes:
        size: how many ranks there are.
        rank: its own number; the first one writes.
        tasks: of which it has samples, with their share of those that are fitted to.
        owned: the tasks whose sums it completes, and whose held-out samples it follows.
        moments: of how many parts of tasks it holds at a time, at most.
    """

    size: int
    rank: int
    tasks: Mapping[str, float]
    owned: Collection[str]
    moments: int

    @property
    def alone(self) -> bool:
        """Whether there is no other rank."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether it adds its tasks as they pass; others keep their experts' blocks until the sums before arrive."""
        return not self.rank

    def merges(self, index: int) -> bool:
        """Whether it merges a layer on the fly for all (`streaming/sources.py`)."""
        return in_turn(index, self.size) == self.rank


@dataclass(frozen=True)
class Crew:
    """The ranks that share a job.

    Args:
        shares: whose samples are whose; of any rank.
        parts: the share of its task's samples that each part has.
        local: how many are on a machine.
        running: how many of these hold memory there by now: all in a run, only this process where one is planned.
    """

    shares: Shares
    parts: Mapping[Part, float]
    local: int = 1
    running: int = 1

    def rows(self, tokens: Mapping[str, int]) -> dict[str, list[int]]:
        """Tokens by task, taken apart by shard."""
        found = {}
        for task, count in tokens.items():
            shares = [self.parts[Part(task, shard)] for shard in range(self.shares.shards)]
            ends = [0, *(round(count * sum(shares[: shard + 1])) for shard in range(len(shares)))]
            found[task] = [stop - start for start, stop in pairwise(ends)]
        return found

    def roles(self, held_out: Collection[str], auto: bool) -> list[Role]:
        """Of each rank.

        Args:
            held_out: tasks with samples by which settings may be chosen.
            auto: whether they are.
        """
        found, size = [], self.shares.size
        for rank in range(size):
            own = self.shares.parts_of(rank)
            tasks = {part.task: 0.0 for part in own}
            for part in own:
                tasks[part.task] += self.parts[part]
            owned = [part.task for part in own if self.shares.is_last(part)]
            if rank:
                judged = sum(task in held_out for task in owned) if auto else 0
                kept = sum(part.task == own[0].task for part in own) if own and own[0].shard else 0
                # And one more: for what comes from the rank before, or for a shard that is joined to those before.
                more = bool(kept) or len(own) > len(tasks)
                moments = max(1, kept + len(tasks) - bool(kept) + judged + more)
            else:
                moments = 1 + (len(own) > len(tasks))
            found.append(Role(size, rank, tasks, owned, moments))
        return found


def samples_by_part(data: Mapping[str, TaskData], shares: Shares) -> dict[Part, float]:
    """The share of its task's samples that each part has, where batches are of one size, as loaded."""
    found = {}
    for task, each in data.items():
        samples = max(1, each.rows - each.held_out)
        count = max(1, -(-samples // each.batch_size))
        for shard in range(shares.shards):
            own = shares.batches(Part(task, shard), count)
            start, stop = (min(samples, batch * each.batch_size) for batch in (own.start, own.stop))
            found[Part(task, shard)] = (stop - start) / samples
    return found


def local_ranks(size: int) -> int:
    """How many of a run's ranks share this machine's memory: as torchrun says, or else all."""
    found = os.environ.get("LOCAL_WORLD_SIZE", "")
    return min(size, int(found)) if found.isdecimal() and int(found) else size


def panels_of(group: InputGroup) -> list[int]:
    """Rows of each panel of a group's right-hand side."""
    parts = (part for out in group.out_features for part in row_panels(out, group.in_features))
    return [part.stop - part.start for part in parts]


class Sharing:
    """How a job's layers are shared.

    Args:
        settings: of the job.
        shares: whose samples are whose; of any rank.
    """

    def __init__(self, settings: Settings, shares: Shares) -> None:
        self._settings, self.shares = settings, shares
        self.parts = [shares.parts_of(rank) for rank in range(shares.size)]
        self._known: dict[object, object] = {}  # of layers that are alike

    def dealt(self, layer: LayerPlan) -> Dealt:
        """What of a layer each rank solves."""
        return self._once(
            ("dealt", layer.layout.groups, layer.counts),
            lambda: dealt_to(layer.layout.groups, layer.counts, self._settings, self.shares),
        )

    def traffic(self, layer: LayerPlan, rank: int) -> Traffic:
        """What a rank sends and receives of a layer."""
        assert layer.wire is not None
        wire, rows = layer.wire, layer.rows
        key = ("traffic", layer.layout.groups, layer.counts, wire, id(rows))
        found = self._once(key, lambda: layer_traffic(wire, self.shares, self.dealt(layer), rows))[rank]
        merges = in_turn(layer.index, self.shares.size) == rank
        return Traffic(found.sent + merges * layer.merged, found.received + (not merges) * layer.merged)

    def solving(self, layer: LayerPlan) -> list[float]:
        """Operations by which each rank solves its panels of a layer."""
        return self._once(("solving", layer.layout.groups, layer.counts), lambda: self._solving(layer))

    def _solving(self, layer: LayerPlan) -> list[float]:
        groups, found = layer.layout.groups, []
        for items in self.dealt(layer):
            rows: Counter[int] = Counter()
            for index, panel in items:
                rows[index] += panels_of(groups[index])[panel]
            found.append(
                sum(
                    solve_flops(
                        groups[index],
                        layer.counts,
                        self._settings,
                        None if token_side(groups[index], layer.counts) else own,
                    )
                    for index, own in rows.items()
                )
            )
        return found

    def before(self, layer: LayerPlan, rank: int) -> dict[str, float]:
        """Operations of a rank in a layer until its moments are complete, by kind."""
        found = dict.fromkeys(("forward", "moments"), 0.0)
        for part in self.parts[rank]:
            work, share = layer.work[part.task], layer.rows.share(part)
            for kind in found:
                found[kind] += share * work.fitted[kind] + self.shares.is_last(part) * work.followed[kind]
        return found

    def folds(self, layer: LayerPlan, rank: int) -> float:
        """Operations by which a rank adds its tasks to a layer's sums."""
        return sum(layer.work[part.task].fold for part in self.parts[rank] if self.shares.is_last(part))

    def after(self, layer: LayerPlan, rank: int) -> float:
        """Operations of a rank once a layer is solved."""
        own = self.parts[rank]
        found = sum(layer.rows.share(part) * layer.work[part.task].advance for part in own)
        return found + sum(layer.work[part.task].followed_after for part in own if self.shares.is_last(part))

    def _once(self, key: object, make: Callable[[], Made]) -> Made:
        if key not in self._known:
            self._known[key] = make()
        return cast(Made, self._known[key])


def rank_plans(layers: Sequence[LayerPlan], sharing: Sharing) -> list[RankPlan]:
    """What each rank has, computes, sends and receives; none for one rank alone. Memory is for others to say."""
    shares = sharing.shares
    if shares.size == 1:
        return []
    found = []
    for rank, parts in enumerate(sharing.parts):
        flops, traffic = dict.fromkeys(("forward", "moments", "fold", "solve"), 0.0), Traffic()
        for layer in layers:
            before = sharing.before(layer, rank)
            flops["forward"] += before["forward"] + sharing.after(layer, rank)
            flops["moments"] += before["moments"]
            flops["fold"] += sharing.folds(layer, rank)
            flops["solve"] += sharing.solving(layer)[rank]
            traffic.add(sharing.traffic(layer, rank))
        samples = [part.task + (f" {part.shard + 1}/{shares.shards}" if shares.shards > 1 else "") for part in parts]
        found.append(RankPlan(samples, 0, 0, traffic.sent, traffic.received, flops))
    return found
