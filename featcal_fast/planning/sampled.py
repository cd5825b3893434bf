"""What a few samples say of a merge: how far it is from its experts, and whether a linear update can help."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from featcal_fast.layer.captured import RIDGES

if TYPE_CHECKING:  # only terminals need it, and bench.gpu runs without
    from rich.table import Table

NOTHING = 0.01  # of the experts' features: what rounding to 16 bits takes, and no distance to repair
# Shares of the weights' mismatch, and what calibration then took of the distance, in 114 merges of three kinds of small
# models (`bench.helps`): 32% to 78% from the first share on, 14% to 62% from the second on, 10% to 46% below.
MUCH, SOME = 0.5, 0.2
UNCLEAR = 0.4  # where samples are fitted to: with more, less than `SOME` elsewhere may come to as much as that


@dataclass(frozen=True)
class SampledGroup:
    """Linear modules that share an input.

    Attributes:
        modules: their names in the block.
        mismatch: `E||(W_t - W) x||^2 / E||W_t x||^2`, the mean over tasks, `x` as the merged model has it.
        total: of all tasks, what their weights differ by, each task weighing what it weighs in calibration.
        left: what a linear update leaves of that, by ridge.
        fitted: likewise for the samples that it is fitted to, as a share of what it was for them.
    """

    modules: tuple[str, ...]
    mismatch: float
    total: float
    left: list[float]
    fitted: list[float]

    def captured(self, ridge: int) -> float:
        """What a linear update removes, a share: 1 is all, below 0 it does harm; 0 where there is nothing to remove."""
        return 1 - self.left[ridge] / self.total if self.total > 0 else 0.0


@dataclass(frozen=True)
class SampledLayer:
    """One layer.

    Attributes:
        index: its number, in forward order.
        path: its full name.
        drift: by task, `||H - H_e||_F / ||H_e||_F` of the hidden states that leave it, the merged model's and the
            expert's, each its own way.
        groups: of linear modules.
    """

    index: int
    path: str
    drift: dict[str, float]
    groups: list[SampledGroup]

    @property
    def distance(self) -> float:
        """The mean drift over tasks."""
        return statistics.fmean(self.drift.values())

    @property
    def mismatch(self) -> float:
        """All groups'."""
        return sum(group.mismatch for group in self.groups)

    def removed(self, ridge: int) -> float:
        """What a linear update removes of that."""
        return sum(group.mismatch * group.captured(ridge) for group in self.groups)

    def removed_where_fitted(self, ridge: int) -> float:
        """The same for the samples that the update is fitted to."""
        return sum(group.mismatch * (1 - group.fitted[ridge]) for group in self.groups)


@dataclass
class Sampled:
    """A few samples of each task, passed through the merged model and its experts.

    Attributes:
        fitted, judged: samples by task: what a linear update was fitted to, and what it was judged by.
        layers: one entry a layer.
    """

    fitted: dict[str, int]
    judged: dict[str, int]
    layers: list[SampledLayer] = field(default_factory=list)

    @property
    def distance(self) -> float:
        """How far the merge is from its experts: the mean drift over tasks after the last layer."""
        return self.layers[-1].distance

    @cached_property
    def ridge(self) -> int:
        """Of `RIDGES` the one whose updates, in all layers alike, remove most: its place."""
        return max(range(len(RIDGES)), key=lambda ridge: sum(layer.removed(ridge) for layer in self.layers))

    @property
    def captured(self) -> float:
        """Share of what all modules differ by that a linear update removes, for samples that it is not fitted to."""
        return self._share([layer.removed(self.ridge) for layer in self.layers])

    @property
    def fitted_captured(self) -> float:
        """The same for those that it is fitted to: with more samples, the two come together from both sides."""
        return self._share([layer.removed_where_fitted(self.ridge) for layer in self.layers])

    def _share(self, removed: Sequence[float]) -> float:
        mismatch = sum(layer.mismatch for layer in self.layers)
        return sum(removed) / mismatch if mismatch > 0 else 0.0

    @property
    def span(self) -> tuple[int, int] | None:
        """The first and the last of the fewest neighbouring layers where half of that is; None where there is none."""
        removed = [max(0.0, layer.removed(self.ridge)) for layer in self.layers]
        half, count = sum(removed) / 2, len(removed)
        spans = [(last - first, first, last) for first in range(count) for last in range(first, count)]
        found = (span for span in sorted(spans) if sum(removed[span[1] : span[2] + 1]) >= half > 0)
        _, first, last = next(found, (0, 0, None))
        return None if last is None else (self.layers[first].index, self.layers[last].index)

    @property
    def verdict(self) -> str:
        """What to do, in a few words."""
        if self.distance < NOTHING:
            return "nothing to repair"
        if self.captured >= MUCH:
            return "worth a run"
        if self.captured >= SOME:
            return "likely worth a run"
        if self.fitted_captured >= UNCLEAR:
            samples = max(self.fitted[task] + self.judged[task] for task in self.fitted)
            return f"too few samples to tell: try --sample {4 * samples}"
        return "the experts want different weights for the same inputs: expect less, or merge fewer of them"

    def line(self) -> str:
        """All of it in one sentence."""
        told = f"will it help: the merge is {self.distance:.2f} away from its experts after the last layer"
        if self.distance < NOTHING:
            return f"{told}; {self.verdict}"
        least, most = (max(0.0, each) for each in (self.captured, self.fitted_captured))
        share = f"{least:.0%} to {most:.0%} of what their weights differ by"
        return f"{told}; a linear update can remove {share}{self._where()}; {self.verdict}"

    def _where(self) -> str:
        if self.span is None:
            return ""
        first, last = self.span
        if 2 * (last - first + 1) >= len(self.layers):
            return ", spread over the layers"
        return f", half of it in layer {first}" if first == last else f", half of it in layers {first} to {last}"

    def table(self) -> Table:
        """For a terminal: layer by layer."""
        from rich.table import Table

        judged = max(self.judged.values())
        table = Table(
            title="Will it help?",
            caption=f"by {judged} samples a task, at most, other than those that the update is fitted to",
        )
        for name in ("layer", "distance", "weights differ by", "a linear update removes", "at most"):
            table.add_column(name, justify="right")
        for layer in self.layers:
            share, most = (
                each / layer.mismatch if layer.mismatch > 0 else 0.0
                for each in (layer.removed(self.ridge), layer.removed_where_fitted(self.ridge))
            )
            mean = layer.mismatch / max(1, len(layer.groups))
            table.add_row(str(layer.index), f"{layer.distance:.3f}", f"{mean:.3f}", f"{share:.0%}", f"{most:.0%}")
        return table
