"""Hidden states between layers: a stream for each model and task, on the device, in host memory or on disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from featcal_fast.errors import DataError, FeatCalError, OutputError
from featcal_fast.models.stepping import BatchCalls, move
from featcal_fast.sources import Source

Place = torch.device | Path  # of hidden states: a device's memory, or a folder for scratch files
HOST = torch.device("cpu")


class Stream:
    """One model's hidden states on one task's batches, kept between layers in the model's dtype.

    Args:
        source: the model, whose own forward gives the states that enter a stage's first block.
        task: its name.
        batches: the task's batches.
        device: where blocks run.
        place: where hidden states wait meanwhile. Files in a folder have no name there and go with the process.

    Raises:
        DataError: the model cannot take a batch.
        OutputError: the disk that scratch files are on is full.
    """

    def __init__(
        self,
        source: Source,
        task: str,
        batches: Sequence[Mapping[str, Tensor]],
        device: torch.device,
        place: Place = HOST,
    ) -> None:
        self.device = device
        self._source, self._task, self._batches, self._place = source, task, batches, place
        self._states: _ScratchFile | _Memory | None = None
        self._calls: list[BatchCalls] = []
        self._shapes: list[tuple[int, int]] = []
        self.enter(0)

    def enter(self, stage: int) -> None:
        """Go on to a stage's first block; the states at hand left the last block of the stage before it."""
        before = self._states
        self._states = _ScratchFile(self._place) if isinstance(self._place, Path) else _Memory(self._place)
        self._calls, self._shapes = [], []
        for number, batch in enumerate(self._batches):
            previous = None if before is None else before.load(number).to(self.device)
            try:
                hidden, calls = self._source.first_hidden(batch, stage, previous)
            except FeatCalError:
                raise
            except Exception as error:  # whatever the model makes of inputs that are not its own
                found = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items())
                raise DataError(
                    f"task {self._task}, batch {number}: the {self._source.label} cannot take the inputs {found}: "
                    f"{error}"
                ) from error
            self._shapes.append((hidden.shape[0], hidden.shape[1]))
            self._states.store(number, hidden)
            self._calls.append(move(calls, HOST if isinstance(self._place, Path) else self._place))

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, batch: int) -> tuple[int, int]:
        """`(batch, tokens)` of a batch's hidden states."""
        return self._shapes[batch]

    def load(self, batch: int) -> tuple[Tensor, BatchCalls]:
        """A batch's hidden states and calls, on the device."""
        assert self._states is not None
        return self._states.load(batch).to(self.device), move(self._calls[batch], self.device)

    def store(self, batch: int, hidden: Tensor) -> None:
        assert self._states is not None
        self._states.store(batch, hidden)

    def advance(self, number: int, block: nn.Module, batch: int) -> Tensor:
        """Run a batch through `block`, of this number in its stage, and keep the result."""
        hidden, calls = self.load(batch)
        out = calls.run(number, block, hidden)
        self.store(batch, out)
        return out


class _Memory:
    """Batches in a device's or the host's memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states: dict[int, Tensor] = {}

    def store(self, batch: int, hidden: Tensor) -> None:
        self._states[batch] = hidden.to(self._device)

    def load(self, batch: int) -> Tensor:
        return self._states[batch]


class _ScratchFile:
    """Batches in an unnamed file, each in a slot of its own.

    Read and written, not mapped: mapped pages would count as this process's memory.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open as long as the stream)
        except OSError as error:
            raise OutputError(
                f"scratch: {folder} cannot hold hidden states: {error.strerror}; choose another"
            ) from error
        self._slots: dict[int, tuple[int, torch.Size, torch.dtype]] = {}
        self._end = 0

    def store(self, batch: int, hidden: Tensor) -> None:
        data = hidden.to("cpu").contiguous()
        if batch not in self._slots or self._slots[batch][1:] != (data.shape, data.dtype):
            self._slots[batch] = self._end, data.shape, data.dtype
            self._end += data.nbytes
        rest = data.reshape(-1).view(torch.uint8).numpy().data.cast("B")
        position = self._slots[batch][0]
        try:
            while rest:
                written = os.pwrite(self._file.fileno(), rest, position)
                rest, position = rest[written:], position + written
        except OSError as error:
            raise OutputError(f"scratch: hidden states cannot be written: {error.strerror}") from error

    def load(self, batch: int) -> Tensor:
        position, shape, dtype = self._slots[batch]
        hidden = torch.empty(shape, dtype=dtype)
        rest = hidden.reshape(-1).view(torch.uint8).numpy().data.cast("B")
        while rest:
            read = os.preadv(self._file.fileno(), [rest], position)
            rest, position = rest[read:], position + read
        return hidden
