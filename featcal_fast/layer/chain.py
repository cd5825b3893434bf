"""Tasks are added to a layer's sums in their order, wherever their samples pass (`docs/several-gpus.md`).

The sums go from rank to rank, a panel at a time: each adds its own tasks to a panel and passes it on while the next one
arrives. A task whose samples are split passes its moments on likewise, from shard to shard, before it is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from featcal_fast.layer.fold import GroupFold, RowFold, TaskFold
from featcal_fast.layer.moments import GroupMoments, RowMoments, TaskMoments
from featcal_fast.layer.systems import GroupSystem, LayerSystem, RowSystem
from featcal_fast.ranks.panels import row_panels
from featcal_fast.ranks.shares import Part, Shares
from featcal_fast.ranks.world import World


class Chain:
    """What is added up of one layer.

    The first rank adds a task as soon as its samples have passed; the others keep the moments of theirs, and with them
    the experts' blocks, until the sums of the tasks before them arrive.

    Args:
        system: the sums.
        new: makes scratch for a task's moments.
        free: scratch that nobody needs for now.
        shares: whose samples are whose.
        world: all ranks.
        split: whether a task's samples may be; held-out ones are with the task's owner.
    """

    def __init__(
        self,
        system: LayerSystem,
        new: Callable[[], TaskMoments],
        free: list[TaskMoments],
        shares: Shares,
        world: World,
        split: bool = True,
    ) -> None:
        self._system, self._new, self._free = system, new, free
        self._shares, self._world, self._split = shares, world, split
        self._waiting: list[tuple[Part, TaskMoments, nn.Module]] = []
        first = next(iter(shares.parts), None)
        # A task whose first shards other ranks have: this one's are kept apart, to be added in order.
        self._elsewhere = first.task if split and first is not None and first.shard else None

    def moments(self, task: str) -> TaskMoments:
        """Scratch, for a part of a task."""
        found = self._free.pop() if self._free else self._new()
        found.reset(task)
        return found

    def add(self, part: Part, moments: TaskMoments, expert: nn.Module) -> None:
        """A part of a task has passed its expert's block: `moments` is complete, and used up."""
        if self._waiting and self._waiting[-1][0].task == part.task != self._elsewhere:
            whole = self._waiting.pop()[1]
            whole.join(moments)
            self._free.append(moments)
            moments = whole
        self._waiting.append((part, moments, expert))
        if not self._shares.rank and self._shares.is_last(part):
            TaskFold(self._system, *self._waiting.pop()[1:]).add()
            self._free.append(moments)

    def finish(self) -> TaskMoments:
        """All parts have passed: add what waits, and pass the sums on. Complete ones are with the last owner.

        Returns:
            Scratch that nobody needs any more.
        """
        shares, waiting = self._shares, self._waiting
        if begun := [each for each in waiting if each[0].task == self._elsewhere]:
            part, _, expert = begun[-1]
            after = None if shares.is_last(part) else shares.rank + 1
            whole = self._with_those_before(part.task, [moments for _, moments, _ in begun], after)
            waiting[: len(begun)] = [] if after else [(part, whole, expert)]
        if waiting and not shares.is_last(waiting[-1][0]):
            self._send(waiting.pop()[1])
        if self._world.size > 1 and shares.rank in shares.owners:
            self._pass_on([TaskFold(self._system, moments, expert) for _, moments, expert in waiting])
        free = self._free or [moments for _, moments, _ in waiting]
        return free[0] if free else self._new()

    def _with_those_before(self, task: str, own: Sequence[TaskMoments], after: int | None) -> TaskMoments:
        """A task's moments, of the shards that ranks before this one have and of its own, in that order.

        Args:
            task: its name.
            own: of each shard.
            after: a rank to pass them on to, as they come; None for none.
        """
        world, before = self._world, self._shares.rank - 1
        found = self.moments(task)
        counts = torch.zeros_like(_counts(found))
        for _ in world.receive([counts], before):
            _set_counts(found, counts)
        rows = {leader: group.tokens for leader, group in found.groups.items() if isinstance(group, RowMoments)}
        if after is not None:
            world.send(counts + sum(map(_counts, own)), after)
        for number, view in enumerate(world.receive(_sums(found), before)):
            for each in own:
                view += _sums(each)[number]
            if after is not None:
                world.send(view, after)
        for leader, count in rows.items():
            group = found.groups[leader]
            assert isinstance(group, RowMoments)
            group.more(count)
            for _ in world.receive(_rows(group), before):
                pass
            for each in own:
                group.append(each.groups[leader])
            if after is not None:
                for view in _rows(group):
                    world.send(view, after)
        _set_counts(found, counts + sum(map(_counts, own)))
        world.flush()
        self._free += own
        return found

    def _send(self, moments: TaskMoments) -> None:
        after = self._shares.rank + 1
        rows = [_rows(group) for group in moments.groups.values() if isinstance(group, RowMoments)]
        for each in (_counts(moments), *_sums(moments), *chain(*rows)):
            self._world.send(each, after)
        self._world.flush()

    def _pass_on(self, folds: Sequence[TaskFold]) -> None:
        """Add tasks to what comes from the owner before, and give it to the one after."""
        owners = self._shares.owners
        own = owners.index(self._shares.rank)
        before = owners[own - 1] if own else None
        after = owners[own + 1] if own + 1 < len(owners) else None
        through = Through(self._world, before, after)
        for _ in through.small(self._system):
            for fold in folds:
                fold.add_small()
        for system in self._system.systems:
            of = [fold.of[system.group.leader] for fold in folds]
            if isinstance(system, RowSystem):
                for _ in through.rows(system):
                    for each in of:
                        assert isinstance(each, RowFold)
                        each.add()
                continue
            whole = [each for each in of if isinstance(each, GroupFold)]
            for rows in through.left(system):
                for group in whole:
                    group.add_to_a(rows)
            for number in through.right(system, range(len(system.panels))):
                for group in whole:
                    group.add_to_r([system.panels[number]])
        self._world.flush()


class Through:
    """Sums that come from a rank, and go on to another once something is done with them, in the same order at all.

    Args:
        world: all ranks.
        before: where they come from; None for those that are here.
        after: where they go to; None for nowhere.
    """

    def __init__(self, world: World, before: int | None, after: int | None) -> None:
        self._world, self._before, self._after = world, before, after

    def small(self, system: LayerSystem) -> Iterator[None]:
        """All but A and R, Z and M."""
        own = system.small()
        if self._before is not None:
            for found in self._world.receive([flat(own)], self._before):
                unflatten(own, found)
        yield
        if self._after is not None:
            self._world.send(flat(own), self._after)

    def left(self, system: GroupSystem) -> Iterator[slice]:
        """A, by rows."""
        size = system.group.in_features
        rows = row_panels(size, size)
        views = [system.a[each, each.start :] for each in rows]
        for each, view in zip(rows, self._coming(views), strict=True):
            yield each
            self._leave(view)

    def right(self, system: GroupSystem, numbers: Sequence[int]) -> Iterator[int]:
        """R, by the numbers of its panels."""
        views = [system.parts[:, system.panels[number].rows] for number in numbers]
        for number, view in zip(numbers, self._coming(views), strict=True):
            yield number
            self._leave(view)

    def rows(self, system: RowSystem) -> Iterator[None]:
        """Z and M, of which there may be more afterwards."""
        if self._before is not None:
            (count,) = (int(each) for each in self._world.receive([torch.zeros((), dtype=torch.int64)], self._before))
            system.clear()
            system.more(count)
            for _ in self._coming(_row_views(system)):
                pass
        yield
        if self._after is not None:
            self._world.send(torch.tensor(len(system.z)), self._after)
            for view in _row_views(system):
                self._leave(view)

    def _coming(self, views: Sequence[Tensor]) -> Iterator[Tensor]:
        return iter(views) if self._before is None else self._world.receive(views, self._before)

    def _leave(self, view: Tensor) -> None:
        if self._after is not None:
            self._world.send(view, self._after)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All of them as one vector, float64."""
    return torch.cat([each.double().flatten() for each in tensors]) if tensors else torch.empty(0)


def unflatten(tensors: Sequence[Tensor], values: Tensor) -> None:
    """Give tensors the values that `flat` made of others like them."""
    parts = values.split([each.numel() for each in tensors])
    for each, part in zip(tensors, parts, strict=True):
        each.copy_(part.view(each.shape))


def _row_views(system: RowSystem) -> list[Tensor]:
    return [matrix[rows] for matrix in (system.z, system.m) for rows in row_panels(*matrix.shape)]


def _counts(moments: TaskMoments) -> Tensor:
    """What the host knows of a task's moments: they add up, but for which kind of features there were."""
    values: list[float] = []
    for group in moments.groups.values():
        values += [group.n, group.tokens, isinstance(group, GroupMoments) and group.whole]
    for norm in moments.norms.values():
        values += [norm.n, norm.tokens]
    return torch.tensor(values, dtype=torch.float64)


def _set_counts(moments: TaskMoments, counts: Tensor) -> None:
    values = iter(counts.tolist())
    for group in moments.groups.values():
        group.n, group.tokens, whole = next(values), int(next(values)), bool(next(values))
        if isinstance(group, GroupMoments):
            group.whole = whole
    for norm in moments.norms.values():
        norm.n, norm.tokens = next(values), int(next(values))


def _sums(moments: TaskMoments) -> list[Tensor]:
    """What the device has of them and adds up."""
    found: list[Tensor] = []
    for group in moments.groups.values():
        found += [group.sum_student, group.sum_expert]
        if isinstance(group, GroupMoments):
            found += [group.s[rows, rows.start :] for rows in row_panels(*group.s.shape)]
            found += [group.t[rows] for rows in row_panels(*group.t.shape)]
    for norm in moments.norms.values():
        found += [norm.mean, norm.energy]
    return found


def _rows(group: RowMoments) -> list[Tensor]:
    return [each[rows] for each in (group.xs, group.difference) for rows in row_panels(*each.shape)]
