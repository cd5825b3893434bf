"""Which tokens of a batch count, and how much: the diagonal D of the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from featcal_fast.errors import DataError
from featcal_fast.forward.calls import move, pinned
from featcal_fast.models.family import LastLayerWeights


@dataclass(frozen=True)
class TokenCounts:
    """How many tokens count, in a stage: of the task with most, of all, and how many tasks there are."""

    largest: int
    total: int
    tasks: int

    @classmethod
    def of(cls, by_task: Mapping[str, int]) -> TokenCounts:
        return cls(max(by_task.values()), sum(by_task.values()), len(by_task))

    def at_least(self, other: TokenCounts) -> TokenCounts:
        """Enough for either."""
        return TokenCounts(max(self.largest, other.largest), max(self.total, other.total), self.tasks)


class Tokens:
    """The tokens of one batch `[batch, tokens, ...]`: padding never counts, and a last layer may weigh the rest less.

    Once made, the host knows how many there are and the device which: neither waits for the other.

    Args:
        mask: `[batch, tokens]`, 0 where a token does not count; None where all do.
        shape: `(batch, tokens)` of the hidden states.
        device: where features will be.
        memory: the tokens of the previous stage's final output, for the modules that are given it.
        index: of those that count, in `[batch * tokens]`, on the device; by default it is found from the mask.

    Raises:
        DataError: the mask has another shape.
    """

    def __init__(
        self,
        mask: Tensor | None,
        shape: tuple[int, int],
        device: torch.device,
        memory: Tokens | None = None,
        index: Tensor | None = None,
    ) -> None:
        if mask is not None and tuple(mask.shape) != shape:
            raise DataError(
                f"mask: found shape {tuple(mask.shape)}, expected {shape}, one value a token: 1 where it counts, else 0"
            )
        self.shape, self.memory = shape, memory
        valid = None if mask is None else mask.cpu() != 0
        self._valid = None if valid is None or bool(valid.all()) else valid
        if self._valid is None:
            index = None
        elif index is None:
            index = _positions(self._valid, device)
        self._index = index
        self._padding: Tensor | None = None  # of those that do not count, once it is asked for
        self._device = device
        self._weights: dict[LastLayerWeights, tuple[Tensor, float]] = {}
        self._parts: dict[tuple[int, int], Tokens] = {}

    def part(self, rows: slice) -> Tokens:
        """The tokens of some of the batch's samples."""
        if rows.stop - rows.start == self.shape[0]:
            return self
        key = rows.start, rows.stop
        if key not in self._parts:
            memory = None if self.memory is None else self.memory.part(rows)
            mask = index = None
            if self._valid is not None and self._index is not None:
                mask, before = self._valid[rows], int(self._valid[: rows.start].sum())
                index = self._index[before : before + int(mask.sum())] - rows.start * self.shape[1]
            self._parts[key] = Tokens(mask, (rows.stop - rows.start, self.shape[1]), self._device, memory, index)
        return self._parts[key]

    @property
    def extent(self) -> tuple[int, int]:
        """Samples, and the tokens that a layer sees of each: the stage's own, or those of a longer memory."""
        return self.shape[0], self.shape[1] if self.memory is None else max(self.shape[1], self.memory.shape[1])

    @property
    def count(self) -> int:
        """Tokens that count."""
        return self.shape[0] * self.shape[1] if self._index is None else len(self._index)

    def fit(self, x: Tensor) -> bool:
        """Whether `x` has one row a token: `[batch, tokens, d]` or `[batch * tokens, d]`."""
        return x.shape[:-1] in (self.shape, (self.shape[0] * self.shape[1],))

    def rows(self, x: Tensor) -> Tensor:
        """The features of the tokens that count, `[count, d]`: a view where nothing is padded."""
        if not self.fit(x):
            raise ValueError(f"features of shape {tuple(x.shape)} do not belong to a batch of {self.shape} tokens")
        x = x.reshape(-1, x.shape[-1])
        return x if self._index is None else x.index_select(0, self._index)

    def sums(self, values: Tensor) -> Tensor:
        """`values`, `[batch, tokens]`, summed for each sample over its tokens that count: `[batch]`."""
        if self._index is None:
            return values.sum(1)
        counted = torch.zeros_like(values).view(-1).index_copy_(0, self._index, values.reshape(-1)[self._index])
        return counted.view(self.shape).sum(1)

    def clear_padding(self, hidden: Tensor) -> Tensor:
        """`hidden` with zeros, in place, for the tokens that do not count."""
        if self._valid is None:
            return hidden
        if self._padding is None:
            self._padding = _positions(~self._valid, self._device)
        hidden = hidden.contiguous()
        hidden.view(-1, hidden.shape[-1]).index_fill_(0, self._padding, 0.0)
        return hidden

    def find_not_finite(self, x: Tensor) -> int | None:
        """The first sample with a token that counts, but whose features in `x` are not finite; None without any."""
        bad = (~self.rows(x).isfinite().all(1)).nonzero()[:1, 0]
        if not len(bad):
            return None
        return int(bad if self._index is None else self._index[bad]) // self.shape[1]

    def weights(self, rule: LastLayerWeights | None) -> tuple[Tensor | None, float]:
        """The diagonal of D as `[count]` float32 on the device, None where it is all ones, and its sum."""
        if rule is None:
            return None, float(self.count)
        if rule not in self._weights:
            weights = torch.full(self.shape, rule.rest, dtype=torch.float32, device=self._device)
            weights[:, 0].fill_(1.0)
            first = self.shape[0] if self._valid is None else int(self._valid[:, 0].sum())
            rest = float(torch.tensor(rule.rest, dtype=torch.float32))  # as it is rounded there
            self._weights[rule] = self.rows(weights[..., None])[:, 0], first + rest * (self.count - first)
        return self._weights[rule]


def _positions(mask: Tensor, device: torch.device) -> Tensor:
    """Where a mask is true, in `[batch * tokens]`, on a device."""
    index = mask.reshape(-1).nonzero()[:, 0]
    found: Tensor = move(pinned(index) if device.type == "cuda" else index, device)
    return found
