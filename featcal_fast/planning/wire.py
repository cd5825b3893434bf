"""Bytes that ranks send to each other of a layer: the engine's own ways (`layer/chain.py`), on tensors without storage.

Values that all ranks tell each other as JSON are not in it, as `World.sent` and `World.received` do not count them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from featcal_fast.layer.chain import Chain, Through
from featcal_fast.layer.choice import ALPHAS
from featcal_fast.layer.judge import Judge
from featcal_fast.layer.moments import RowMoments, TaskMoments
from featcal_fast.layer.systems import GroupSystem, LayerSystem, RowSystem
from featcal_fast.layer.tokens import TokenCounts
from featcal_fast.ranks.deal import Dealt
from featcal_fast.ranks.panels import row_panels
from featcal_fast.ranks.shares import Part, Shares, ring
from featcal_fast.ranks.world import World

SCALARS = 8  # bytes that go with a panel of new weights: its change and its sum


@dataclass(frozen=True)
class SystemBytes:
    """What is sent of one system: A and R, or Z and M.

    Attributes:
        left: of A; of Z and M, how many tokens they have.
        right: of each panel of R.
        row: of a token's rows of Z and M.
    """

    left: int
    right: tuple[int, ...]
    row: int

    def whole(self, tokens: int) -> int:
        """All of it, of Z and M of so many tokens."""
        return self.left + sum(self.right) + tokens * self.row


@dataclass(frozen=True)
class SumBytes:
    """What is sent of a layer's sums: of the fitted samples', or of those by which settings are chosen.

    Attributes:
        small: all but the systems' own.
        systems: in order.
    """

    small: int
    systems: tuple[SystemBytes, ...]

    def whole(self, tokens: int) -> int:
        """All of it, where systems have so many tokens."""
        return self.small + sum(each.whole(tokens) for each in self.systems)


@dataclass(frozen=True)
class LayerBytes:
    """What is sent of a layer.

    Attributes:
        fitted: its sums.
        judged: those of held-out samples, where settings choose themselves.
        moments: a task's, without rows.
        row: of a token, where moments are rows.
        new: by system, of each panel of new weights, with what belongs to it.
        largest: of what is sent at a time.
    """

    fitted: SumBytes
    judged: SumBytes | None
    moments: int
    row: int
    new: tuple[tuple[int, ...], ...]
    largest: int


@dataclass
class Traffic:
    """Bytes that a rank sends and receives; what all are sent counts once where it comes from."""

    sent: int = 0
    received: int = 0

    def add(self, other: Traffic) -> None:
        self.sent += other.sent
        self.received += other.received


@dataclass(frozen=True)
class Rows:
    """Tokens that moments from the token side are rows of.

    Attributes:
        fitted: of each task, by shard.
        held_out: of each task.
    """

    fitted: Mapping[str, Sequence[int]] = field(default_factory=dict)
    held_out: Mapping[str, int] = field(default_factory=dict)

    def share(self, part: Part) -> float:
        """Of its task's fitted samples."""
        own = self.fitted[part.task]
        return own[part.shard] / max(1, sum(own))


class _Scale(World):
    """Weighs what it is told to send."""

    largest = 0

    def send(self, tensor: Tensor, to: int) -> None:
        self.sent += tensor.nbytes
        self.largest = max(self.largest, tensor.nbytes)

    def weigh(self, way: Callable[[Through], Iterable[object]]) -> int:
        """Bytes that go this way."""
        before = self.sent
        for _ in way(Through(self, None, 1)):
            pass
        return self.sent - before


def weigh(
    system: LayerSystem, judge: Judge | None, moments: TaskMoments, block: nn.Module, counts: TokenCounts
) -> LayerBytes:
    """What is sent of a layer.

    Args:
        system, judge: its sums, on the meta device; their rows are used up.
        moments: of a task, likewise.
        block: of an expert.
        counts: of the layer's tokens.
    """
    scale = _Scale()
    moments.reset("")
    alone = _moments(scale, system, moments, block)
    rows = [0]  # bytes of panels of rows, as long as they may be
    for group in moments.groups.values():
        if isinstance(group, RowMoments):
            rows.append(_panel_bytes(group.more(1)[0], counts.largest))
    for each in (*system.systems, *([] if judge is None else judge.systems)):
        if isinstance(each, RowSystem):
            rows += [_panel_bytes(matrix, counts.total) for matrix in each.more(1)]
    return LayerBytes(
        fitted=_sums(scale, system),
        judged=None if judge is None else _sums(scale, judge),
        moments=alone,
        row=_moments(scale, system, moments, block) - alone,
        new=_new(system, len(ALPHAS) if judge is not None else 1),
        largest=max(scale.largest, *rows),
    )


def _panel_bytes(row: Tensor, count: int) -> int:
    """Of the first of `count` rows like this, as they are taken apart."""
    (panel, *_) = row_panels(max(1, count), row.shape[1])
    rows: int = panel.stop - panel.start
    return rows * row.nbytes


def _moments(scale: _Scale, system: LayerSystem, moments: TaskMoments, block: nn.Module) -> int:
    """A task's first half, as its rank passes it on to the one that has the second."""
    before = scale.sent
    chain = Chain(system, lambda: moments, [], Shares(("",), 2, 2, 0), scale)
    chain.add(Part("", 0), moments, block)
    chain.finish()
    return scale.sent - before


def _sums(scale: _Scale, system: LayerSystem) -> SumBytes:
    found = []
    for each in system.systems:
        if isinstance(each, RowSystem):
            each.clear()
            count = scale.weigh(partial(Through.rows, system=each))
            each.more(1)
            found.append(SystemBytes(count, (), scale.weigh(partial(Through.rows, system=each)) - count))
        else:
            panels = (scale.weigh(partial(_right, each, number)) for number in range(len(each.panels)))
            found.append(SystemBytes(scale.weigh(partial(Through.left, system=each)), tuple(panels), 0))
    return SumBytes(scale.weigh(partial(Through.small, system=system)), tuple(found))


def _right(system: GroupSystem, number: int, way: Through) -> Iterable[int]:
    return way.right(system, [number])


def _new(system: LayerSystem, updates: int) -> tuple[tuple[int, ...], ...]:
    """New weights and biases in the model's dtype (`dealt.py`); LayerNorms are solved by each rank."""
    merged = system.anchor.merged
    return tuple(
        tuple(
            updates
            * (
                merged[f"{panel.module}.weight"][panel.own].nbytes
                + (merged[f"{panel.module}.bias"][panel.own].nbytes if panel.module in each.biases else 0)
                + SCALARS
            )
            for panel in each.panels
        )
        for each in system.systems
    )


def layer_traffic(layer: LayerBytes, shares: Shares, dealt: Dealt, rows: Rows) -> list[Traffic]:
    """What each rank sends and receives in a layer.

    Args:
        layer: what there is to send.
        shares: whose samples are whose; of any rank.
        dealt: what each rank solves.
        rows: of the layer's stage.
    """
    found = [Traffic() for _ in range(shares.size)]
    if shares.size == 1:
        return found

    def pass_on(source: int, to: int, size: int) -> None:
        found[source].sent += size
        found[to].received += size

    for rank in range(shares.size):
        own = shares.parts_of(rank)
        if own and not shares.is_last(own[-1]):
            tokens = sum(rows.fitted[own[-1].task][: own[-1].shard + 1])
            pass_on(rank, rank + 1, layer.moments + tokens * layer.row)
    owner = {task: shares.owner(task) for task in shares.tasks}
    owners = sorted(set(owner.values()))
    fitted = {task: sum(tokens) for task, tokens in rows.fitted.items()}
    for sums, tokens_of in ((layer.fitted, fitted), (layer.judged, rows.held_out)):
        if sums is not None:
            for before, after in pairwise(owners):
                tokens = sum(tokens_of[task] for task in shares.tasks if owner[task] <= before)
                pass_on(before, after, sums.whole(tokens))
            _hand_out(sums, owners[-1], dealt, sum(tokens_of.values()), pass_on)
            _to_all(found, owners[-1], sums.small)
    for rank, items in enumerate(dealt):
        _to_all(found, rank, sum(layer.new[index][panel] for index, panel in items))
    return found


def _hand_out(sums: SumBytes, first: int, dealt: Dealt, tokens: int, pass_on: Callable[[int, int, int], None]) -> None:
    """From the last owner to those that solve something."""
    for index, each in enumerate(sums.systems):
        wanted = {rank: [panel for number, panel in items if number == index] for rank, items in enumerate(dealt)}
        others = [rank for rank, panels in wanted.items() if panels and rank != first]
        route = ring(first, [first, *others], len(dealt))
        for before, after in pairwise(route):
            pass_on(before, after, each.left + tokens * each.row)
            pass_on(first, after, sum(each.right[panel] for panel in wanted[after]) if each.right else 0)


def _to_all(found: Sequence[Traffic], source: int, size: int) -> None:
    for rank, each in enumerate(found):
        if rank == source:
            each.sent += size
        else:
            each.received += size
