"""Hidden states between layers, for each model and task: on the device, or offloaded to host memory or to disk.

Where they do not wait on the device, the next chunk's arrive and the last one's leave while a chunk is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from featcal_fast.checkpoints import is_finite
from featcal_fast.errors import DataError, ResumeError, SolveError
from featcal_fast.forward.calls import BatchCalls, Origin, move, pinned
from featcal_fast.forward.hooks import Activations, OnActivation
from featcal_fast.forward.runner import BlockRunner
from featcal_fast.models.family import attention_mask
from featcal_fast.models.structure import Layer
from featcal_fast.streaming.chunks import Chunk
from featcal_fast.streaming.scratch import Saved, Scratch, Snapshots, StateFile, checksum
from featcal_fast.streaming.sources import Source
from featcal_fast.streaming.transfers import Transfer, Transfers, empty_pinned

Offload = torch.device | Path  # where hidden states wait: a device's memory, or a folder for scratch files
HOST = torch.device("cpu")


class HiddenStates:
    """One model's hidden states on one task's batches, kept between layers in the model's dtype.

    Args:
        source: the model, whose own forward gives the states that enter a stage's first block.
        task: its name.
        device: where blocks run.
        transfers: what brings states there and back.
        runner: runs the blocks.
        offload: where hidden states wait meanwhile: in a device's memory or in files.

    Attributes:
        first: the first sample of the first batch as it entered the stage, `[1, tokens, width]` on the device.
        offset: how many of the task's batches come before these.
    """

    first: Tensor
    offset: int

    def __init__(
        self,
        source: Source,
        task: str,
        device: torch.device,
        transfers: Transfers,
        runner: BlockRunner,
        offload: torch.device | Scratch | Snapshots = HOST,
    ) -> None:
        self.device, self._runner = device, runner
        self._source, self._task, self._transfers, self._offload = source, task, transfers, offload
        self._states: _OnDevice | _Offloaded | None = None
        self._calls: list[BatchCalls] = []
        self._shapes: list[tuple[int, int]] = []
        self._path = ""  # of the stage's blocks
        self._ahead: _Ahead | None = None
        self._clears = False  # whether no token attends to those that do not count; a target that is left out is seen

    @property
    def label(self) -> str:
        """The model's."""
        return self._source.label

    def enter(self, stage: int, batches: Iterable[Mapping[str, Tensor]], offset: int = 0) -> None:
        """Go on to a stage's first block; the states at hand left the last block of the stage before it.

        Args:
            stage: its number.
            batches: of the models' inputs.
            offset: how many of the task's batches come before these.

        Raises:
            DataError: the model cannot take a batch.
            SolveError: what it makes of one is not finite.
            OutputError: the disk that scratch files are on is full.
        """
        before = self._states
        self._states, self._path = self._empty(), self._source.structure.paths[stage]
        self._clears = self._source.structure.family.stages[stage].mask is attention_mask
        self._calls, self._shapes, self.offset = [], [], offset
        for number, batch in enumerate(batches):
            previous = None if before is None else before.load(number, None)
            try:
                hidden, calls = self._source.stage_inputs(batch, stage, previous)
            except DataError as error:
                raise DataError(f"task {self._task}, batch {offset + number}: {error}") from error.__cause__
            if not is_finite(hidden):
                sample = int((~hidden.isfinite()).flatten(1).any(1).nonzero()[0])
                raise SolveError(
                    f"task {self._task}, batch {offset + number}, sample {sample}: what the {self.label} makes of it "
                    f"is not finite (NaN or Inf) as it enters {self._path}.0; look at this sample and the model's "
                    "embeddings"
                )
            if number == 0:
                self.first = hidden[:1].clone()
            self._shapes.append((hidden.shape[0], hidden.shape[1]))
            self._states.store(number, slice(0, len(hidden)), hidden, len(hidden))
            self._calls.append(pinned(calls) if self.device.type == "cuda" and self._offload != self.device else calls)

    def _empty(self) -> _OnDevice | _Offloaded:
        if self._offload == self.device:
            return _OnDevice()
        memory = _HostMemory() if isinstance(self._offload, torch.device) else _Disk(self._offload)
        return _Offloaded(self.device, self._transfers, memory)

    def shape(self, batch: int) -> tuple[int, int]:
        """`(batch, tokens)` of a batch's hidden states."""
        return self._shapes[batch]

    def load(self, batch: int, rows: slice) -> tuple[Tensor, BatchCalls]:
        """The hidden states and calls of some samples of a batch, on the device."""
        assert self._states is not None
        samples, calls = self._shapes[batch][0], self._calls[batch]
        if rows.stop - rows.start < samples:
            calls = calls.part(rows, samples)
        calls = move(calls, self.device)
        calls.origin = Origin(self.label, self._path, self._task, self.offset + batch, rows)
        return self._states.load(batch, rows), calls

    def store(self, batch: int, rows: slice, hidden: Tensor) -> None:
        """Keep what a layer made of some samples, the ones that follow those of the call before.

        They are not loaded again before the whole batch is stored. Some layers give another dtype than they were given.
        """
        assert self._states is not None
        self._states.store(batch, rows, hidden, self._shapes[batch][0])

    @property
    def nbytes(self) -> int:
        """Of all batches."""
        assert self._states is not None
        return self._states.nbytes

    def save(self, into: StateFile) -> list[Saved]:
        """Write every batch to a file, unless that is where they are; where each is in it."""
        assert self._states is not None
        return self._states.save(into)

    def restore(self, source: StateFile, saved: Sequence[Saved]) -> None:
        """Take the hidden states of every batch from a file, in place of those that entered the stage.

        Raises:
            ResumeError: they are not those of these batches, or not those that were kept.
        """
        found = [(each.shape[0], each.shape[1]) for each in saved]
        if found != self._shapes:
            raise ResumeError(
                f"task {self._task}: hidden states that were kept are of other batches; --fresh starts over"
            )
        for batch, each in enumerate(saved):
            self.store(batch, slice(0, each.shape[0]), source.get(each).to(self.device))

    def capture(
        self,
        chunk: Chunk,
        layer: Layer,
        block: nn.Module,
        inputs: Iterable[str],
        on_input: OnActivation,
        outputs: Iterable[str] = (),
        on_output: OnActivation | None = None,
        stop_at: str | None = None,
    ) -> Tensor | None:
        """Run a chunk through a layer's `block`, and hand over activations as `BlockRunner.capture` does."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.of == (layer.index, chunk.batch, chunk.rows, set(inputs), set(outputs)):
            for name, x in ahead.inputs.items():
                on_input(name, x)
            for name, y in ahead.outputs.items():
                assert on_output is not None
                on_output(name, y)
            return ahead.hidden
        hidden, calls = self.load(chunk.batch, chunk.rows)
        return self._runner.capture(calls, layer.number, block, hidden, inputs, on_input, outputs, on_output, stop_at)

    def run_ahead(
        self, chunk: Chunk, layer: Layer, block: nn.Module, inputs: Iterable[str], outputs: Iterable[str]
    ) -> None:
        """Do what `capture` will be asked for next."""
        found, made = Activations(), Activations()
        of = layer.index, chunk.batch, chunk.rows, set(inputs), set(outputs)
        hidden = self.capture(chunk, layer, block, inputs, found.__setitem__, outputs, made.__setitem__)
        assert hidden is not None
        self._ahead = _Ahead(of, found, made, hidden)

    def keep(self, chunk: Chunk, hidden: Tensor) -> None:
        """Keep what a layer made of a chunk, but for padding, of which it may have made NaN (of a row of attention that
        is masked all over): the next layer gives padding the weight 0, and 0 * NaN is NaN."""
        self.store(chunk.batch, chunk.rows, chunk.tokens.clear_padding(hidden) if self._clears else hidden)

    def advance(self, chunk: Chunk, layer: Layer, block: nn.Module) -> None:
        """Run a chunk through a layer's `block`, and keep the result."""
        self.keep(chunk, self.run(chunk, layer, block))

    def run(self, chunk: Chunk, layer: Layer, block: nn.Module) -> Tensor:
        """What a layer's `block` makes of a chunk: `[samples, tokens, width]`."""
        hidden, calls = self.load(chunk.batch, chunk.rows)
        return self._runner.run(calls, layer.number, block, hidden)


class _Ahead(NamedTuple):
    """What a capture gave, before anybody asked for it: of which layer, batch, rows, inputs and outputs it is."""

    of: tuple[int, int, slice, set[str], set[str]]
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    hidden: Tensor


class _OnDevice:
    """Batches where blocks run. What is loaded is a view, so a batch's new states never overwrite the old ones."""

    def __init__(self) -> None:
        self._states: dict[int, Tensor] = {}
        self._coming: Tensor | None = None  # a batch's new states, part by part

    def load(self, batch: int, rows: slice | None) -> Tensor:
        return self._states[batch] if rows is None else self._states[batch][rows]

    def store(self, batch: int, rows: slice, hidden: Tensor, samples: int) -> None:
        if rows.stop - rows.start < samples:
            if self._coming is None:
                self._coming = hidden.new_empty(samples, *hidden.shape[1:])
            self._coming[rows] = hidden
            hidden = self._coming
        if rows.stop == samples:
            self._states[batch], self._coming = hidden, None

    @property
    def nbytes(self) -> int:
        return sum(hidden.nbytes for hidden in self._states.values())

    def save(self, into: StateFile) -> list[Saved]:
        return [into.add(self._states[batch]) for batch in sorted(self._states)]


class _Slot(NamedTuple):
    """The room for one batch's states of one form, in one generation of files."""

    batch: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    generation: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Memory(Protocol):
    """Where batches are away from the device. Only `Transfers` call it, one job after the other.

    What is written in one generation does not overwrite what was in those before.
    """

    @property
    def generation(self) -> int: ...

    def write(self, slot: _Slot, rows: slice, hidden: Tensor) -> None: ...

    def read(self, slot: _Slot, rows: slice, into: Tensor) -> None: ...

    def drop(self, slot: _Slot) -> None: ...

    def save(self, slot: _Slot, into: StateFile) -> Saved: ...


class _Offloaded:
    """Batches that are fetched one chunk ahead, and whose new states are stored while the next chunk is computed."""

    def __init__(self, device: torch.device, transfers: Transfers, memory: _Memory) -> None:
        self._device, self._transfers, self._memory = device, transfers, memory
        self._slots: dict[int, _Slot] = {}
        self._coming: tuple[int, slice, Transfer[Tensor]] | None = None

    def load(self, batch: int, rows: slice | None) -> Tensor:
        samples = self._slots[batch].shape[0]
        rows = rows or slice(0, samples)
        hidden = self._take(batch, rows)
        size = rows.stop - rows.start
        if rows.stop < samples:
            following = batch, slice(rows.stop, min(rows.stop + size, samples))
        elif batch + 1 in self._slots:
            whole = self._slots[batch + 1].shape[0]
            following = batch + 1, slice(0, whole if size == samples else min(size, whole))
        else:
            return hidden
        self._coming = *following, self._fetch(*following)
        return hidden

    def store(self, batch: int, rows: slice, hidden: Tensor, samples: int) -> None:
        if self._coming is not None and self._coming[0] == batch and self._coming[1].start < rows.stop:
            self._take(batch, rows)  # out of date
        slot = _Slot(batch, (samples, *hidden.shape[1:]), hidden.dtype, self._memory.generation)
        before = self._slots.get(batch)
        complete = rows.stop == samples

        def leave() -> None:
            self._memory.write(slot, rows, hidden)
            if complete and before is not None and before != slot:
                self._memory.drop(before)

        self._transfers.offload(hidden, leave)
        if complete:
            self._slots[batch] = slot

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slot in self._slots.values())

    def save(self, into: StateFile) -> list[Saved]:
        slots = [self._slots[batch] for batch in sorted(self._slots)]
        return self._transfers.submit(lambda: [self._memory.save(slot, into) for slot in slots]).result()

    def _take(self, batch: int, rows: slice) -> Tensor:
        coming, self._coming = self._coming, None
        if coming is not None:
            hidden = coming[2].result()  # even one that nobody wants: its memory is free from here on
            if coming[:2] == (batch, rows):
                return hidden
        return self._fetch(batch, rows).result()

    def _fetch(self, batch: int, rows: slice) -> Transfer[Tensor]:
        slot = self._slots[batch]
        into = torch.empty((rows.stop - rows.start, *slot.shape[1:]), dtype=slot.dtype, device=self._device)

        def arrive() -> Tensor:
            self._memory.read(slot, rows, into)
            return into

        return self._transfers.submit(arrive)


class _HostMemory:
    """Batches in pinned host memory."""

    generation = 0

    def __init__(self) -> None:
        self._held: dict[_Slot, Tensor] = {}

    def write(self, slot: _Slot, rows: slice, hidden: Tensor) -> None:
        if slot not in self._held:
            self._held[slot] = empty_pinned(slot.shape, slot.dtype, hidden.device)
        self._held[slot][rows].copy_(hidden, non_blocking=True)

    def read(self, slot: _Slot, rows: slice, into: Tensor) -> None:
        into.copy_(self._held[slot][rows], non_blocking=True)

    def drop(self, slot: _Slot) -> None:
        del self._held[slot]

    def save(self, slot: _Slot, into: StateFile) -> Saved:
        held = self._held[slot]
        if held.is_pinned():
            torch.cuda.current_stream().synchronize()  # the copies' own
        return into.add(held)


class _Disk:
    """Batches in files. Read and written, not mapped: mapped pages would count as this process's memory."""

    def __init__(self, scratch: Scratch | Snapshots) -> None:
        self._scratch = scratch
        self._rooms: dict[_Slot, tuple[StateFile, int]] = {}
        self._checksums: dict[_Slot, int] = {}

    @property
    def generation(self) -> int:
        return self._scratch.generation

    def write(self, slot: _Slot, rows: slice, hidden: Tensor) -> None:
        if slot not in self._rooms:
            file = self._scratch.current
            self._rooms[slot] = file, file.room(slot.nbytes)
        data = hidden.contiguous()
        if hidden.is_cuda:
            data = empty_pinned(tuple(hidden.shape), hidden.dtype, hidden.device).copy_(hidden, non_blocking=True)
            torch.cuda.current_stream(hidden.device).synchronize()  # the copy's own
        file, position = self._place(slot, rows)
        file.write(data, position)
        self._checksums[slot] = checksum(data, self._checksums[slot] if rows.start else 0)  # rows come in order

    def read(self, slot: _Slot, rows: slice, into: Tensor) -> None:
        data = empty_pinned(tuple(into.shape), into.dtype, into.device) if into.is_cuda else into
        file, position = self._place(slot, rows)
        file.read_to(data, position)
        if data is not into:
            into.copy_(data, non_blocking=True)

    def drop(self, slot: _Slot) -> None:
        """Its room stays empty: batches change their form once, if at all."""
        del self._rooms[slot], self._checksums[slot]

    def save(self, slot: _Slot, into: StateFile) -> Saved:
        file, position = self._rooms[slot]
        assert file is into, "hidden states of a layer before"
        return Saved(position, slot.shape, str(slot.dtype).removeprefix("torch."), self._checksums[slot])

    def _place(self, slot: _Slot, rows: slice) -> tuple[StateFile, int]:
        file, start = self._rooms[slot]
        return file, start + int(rows.start) * math.prod(slot.shape[1:]) * slot.dtype.itemsize
