"""Hidden states between layers: one stream a model and task, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from featcal_fast.errors import DataError, FeatCalError
from featcal_fast.models.stepping import BatchCalls, move
from featcal_fast.sources import Source


class Stream:
    """One model's hidden states on one task's batches, kept in host memory between layers.

    Args:
        source: the model, whose own forward gives the states that enter block 0.
        task: its name.
        batches: the task's batches.
        device: where blocks run.

    Raises:
        DataError: the model cannot take a batch.
    """

    def __init__(
        self, source: Source, task: str, batches: Sequence[Mapping[str, Tensor]], device: torch.device
    ) -> None:
        self.device = device
        self._hidden: list[Tensor] = []
        self._calls: list[BatchCalls] = []
        host = torch.device("cpu")
        for number, batch in enumerate(batches):
            try:
                hidden, calls = source.first_hidden(batch)
            except FeatCalError:
                raise
            except Exception as error:  # whatever the model makes of inputs that are not its own
                found = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items())
                raise DataError(
                    f"task {task}, batch {number}: the {source.label} cannot take the inputs {found}: {error}"
                ) from error
            self._hidden.append(hidden.to(host))
            self._calls.append(move(calls, host))

    def __len__(self) -> int:
        return len(self._hidden)

    def shape(self, batch: int) -> tuple[int, int]:
        """`(batch, tokens)` of a batch's hidden states."""
        return self._hidden[batch].shape[0], self._hidden[batch].shape[1]

    def load(self, batch: int) -> tuple[Tensor, BatchCalls]:
        """A batch's hidden states and calls, on the device."""
        return self._hidden[batch].to(self.device), move(self._calls[batch], self.device)

    def store(self, batch: int, hidden: Tensor) -> None:
        self._hidden[batch] = hidden.to("cpu")

    def advance(self, index: int, block: nn.Module, batch: int) -> Tensor:
        """Run a batch through `block`, number `index` of the model, and keep the result."""
        hidden, calls = self.load(batch)
        out = calls.run(index, block, hidden)
        self.store(batch, out)
        return out
