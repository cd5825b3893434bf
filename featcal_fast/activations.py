"""Hidden states between layers: a stream for each model and task, on the device, in host memory or on disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from featcal_fast.errors import DataError, FeatCalError, OutputError
from featcal_fast.models.stepping import BatchCalls, move, pinned
from featcal_fast.sources import Source

Place = torch.device | Path  # of hidden states: a device's memory, or a folder for scratch files
HOST = torch.device("cpu")


class Stream:
    """One model's hidden states on one task's batches, kept between layers in the model's dtype.

    Args:
        source: the model, whose own forward gives the states that enter a stage's first block.
        task: its name.
        device: where blocks run.
        place: where hidden states wait meanwhile. Files in a folder have no name there and go with the process.
    """

    def __init__(self, source: Source, task: str, device: torch.device, place: Place = HOST) -> None:
        self.device = device
        self._source, self._task, self._place = source, task, place
        self._states: _ScratchFile | _Memory | None = None
        self._calls: list[BatchCalls] = []
        self._shapes: list[tuple[int, int]] = []
        self._parts: list[Tensor] = []

    def enter(self, stage: int, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Go on to a stage's first block; the states at hand left the last block of the stage before it.

        Raises:
            DataError: the model cannot take a batch.
            OutputError: the disk that scratch files are on is full.
        """
        before = self._states
        self._states = self._new_place()
        self._calls, self._shapes = [], []
        for number, batch in enumerate(batches):
            previous = None if before is None else before.load(number).to(self.device, non_blocking=True)
            try:
                hidden, calls = self._source.first_hidden(batch, stage, previous)
            except (FeatCalError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # whatever the model makes of inputs that are not its own
                found = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items())
                raise DataError(
                    f"task {self._task}, batch {number}: the {self._source.label} cannot take the inputs {found}: "
                    f"{error}"
                ) from error
            self._shapes.append((hidden.shape[0], hidden.shape[1]))
            self._states.store(number, hidden)
            self._calls.append(self._kept(calls))

    def _kept(self, calls: BatchCalls) -> BatchCalls:
        if isinstance(self._place, torch.device) and self._place != HOST:
            return move(calls, self._place)
        return pinned(move(calls, HOST)) if self.device.type == "cuda" else move(calls, HOST)

    def _new_place(self) -> _ScratchFile | _Memory:
        return _ScratchFile(self._place) if isinstance(self._place, Path) else _Memory(self._place, self.device)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, batch: int) -> tuple[int, int]:
        """`(batch, tokens)` of a batch's hidden states."""
        return self._shapes[batch]

    def load(self, batch: int, rows: slice) -> tuple[Tensor, BatchCalls]:
        """The hidden states and calls of some samples of a batch, on the device."""
        assert self._states is not None
        hidden, calls = self._states.load(batch), self._calls[batch]
        if rows.stop - rows.start < len(hidden):
            hidden, calls = hidden[rows], calls.part(rows, len(hidden))
        return hidden.to(self.device, non_blocking=True), move(calls, self.device)

    def store(self, batch: int, rows: slice, hidden: Tensor) -> None:
        """Keep what a layer made of some samples, the ones that follow those of the call before.

        A batch's old states stay until the new ones are complete: samples are taken from them again should memory run
        out, and some layers give another dtype than they were given.
        """
        assert self._states is not None
        if self._parts or rows.stop < self._shapes[batch][0]:
            hidden = hidden.to(self._place if isinstance(self._place, torch.device) else HOST)
        if rows.stop < self._shapes[batch][0]:
            self._parts.append(hidden)
        else:
            self._states.store(batch, torch.cat([*self._parts, hidden]) if self._parts else hidden)
            self._parts.clear()

    def advance(self, number: int, block: nn.Module, batch: int, rows: slice) -> None:
        """Run some samples of a batch through `block`, of this number in its stage, and keep the result."""
        hidden, calls = self.load(batch, rows)
        self.store(batch, rows, calls.run(number, block, hidden))


class _Memory:
    """Batches in a device's or the host's memory.

    On the host they are pinned if they come from a GPU: copies then run in order with the computation, which neither
    side waits for. So the host must not read them.
    """

    def __init__(self, place: torch.device, device: torch.device) -> None:
        self._place = place
        self._pinned = place == HOST and device.type == "cuda"
        self._states: dict[int, Tensor] = {}

    def store(self, batch: int, hidden: Tensor) -> None:
        if not self._pinned:
            self._states[batch] = hidden.to(self._place)
            return
        held = self._states.get(batch)
        if held is None or held.shape != hidden.shape or held.dtype != hidden.dtype:
            held = pinned(torch.empty(hidden.shape, dtype=hidden.dtype))
        self._states[batch] = held.copy_(hidden, non_blocking=held.is_pinned())

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
