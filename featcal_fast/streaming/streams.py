"""All that streams past the loop: blocks, hidden states and chunks of batches, no more at a time than a layer needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featcal_fast.errors import DataError
from featcal_fast.forward.calls import described
from featcal_fast.forward.runner import BlockRunner, should_compile
from featcal_fast.layer.layout import Layout, find_layout
from featcal_fast.layer.moments import TaskMoments
from featcal_fast.layer.precision import ieee_float32
from featcal_fast.layer.tokens import TokenCounts, Tokens
from featcal_fast.models import Structure
from featcal_fast.models.structure import Layer
from featcal_fast.ranks.shares import Part, Shares
from featcal_fast.ranks.world import World
from featcal_fast.reporting.clock import Clock
from featcal_fast.reporting.progress import Progress
from featcal_fast.settings import Settings
from featcal_fast.streaming.chunks import Chunk, Chunks, explain_out_of_memory
from featcal_fast.streaming.drift import DriftProbe
from featcal_fast.streaming.held_out import HeldOut
from featcal_fast.streaming.hidden_states import HiddenStates, Offload
from featcal_fast.streaming.malloc import caching_malloc, trim_malloc
from featcal_fast.streaming.prefetch import BlockPrefetcher
from featcal_fast.streaming.scratch import Saved, Scratch, Snapshots
from featcal_fast.streaming.sources import Source, block_for_all
from featcal_fast.streaming.transfers import Transfer, Transfers, empty_pinned

Batch = Mapping[str, Tensor]
# In a report of what was read and written:
SCRATCH = "hidden states"
TO_RESUME = "hidden states, to resume from"


class Streams:
    """The models and the data of a run.

    Used as a context: within it blocks are prefetched, float32 products are not rounded, and an error of the device's
    memory says what to do.

    Args:
        student: the merged model.
        base: what the experts were fine-tuned from.
        experts: by task, those of which this rank has samples.
        batches: by task, likewise; gone through once.
        settings: the method's constants.
        device: where to compute.
        progress: told how the run goes, and closed at its end.
        clock: told what each moment is for.
        offload: where hidden states wait between layers.
        chunk: tokens that pass a layer at a time; None for a batch's.
        snapshots: for a part of a task, by its number, where hidden states are kept that a run can go on from, if they
            are to be.
        first: the layer that the run goes on from; all before it are done.
        shares: whose samples are whose.
        world: all ranks.

    Attributes:
        device: where to compute.
        clock, shares, world: as given.
        student_states: the merged model's hidden states, by part of a task.
        expert_states: those of each task's expert.
        drift: what follows a few samples through all models.
        counts: tokens that count, in the stage that was entered, of all ranks' samples.
        held_out_counts: likewise, of those that are held out.
        held_out: samples by task that nothing is fitted to, of all tasks.
    """

    counts: TokenCounts
    held_out_counts: TokenCounts
    held_out: Mapping[str, int]

    def __init__(
        self,
        student: Source,
        base: Source,
        experts: Mapping[str, Source],
        batches: Mapping[str, Iterable[Batch]],
        settings: Settings,
        device: torch.device,
        progress: Progress,
        clock: Clock,
        offload: Offload,
        chunk: int | None,
        snapshots: Callable[[int], Snapshots] | None = None,
        first: int = 0,
        shares: Shares | None = None,
        world: World | None = None,
    ) -> None:
        self.device, self.clock = device, clock
        self.shares, self.world = shares or Shares(tuple(experts), settings.sample_shards), world or World()
        self._source, self._experts, self._batches = student, experts, batches
        self._progress, self._first, self._offloaded = progress, first, isinstance(offload, Path)
        parts = self.shares.parts
        kept = {part: snapshots(self.shares.number(part)) for part in parts} if snapshots is not None else {}
        scratch = Scratch(offload) if isinstance(offload, Path) and not kept else None
        transfers = Transfers(device, "hidden-states")
        self._snapshots, self._scratch, self._transfers = kept, scratch, transfers
        self._chunks = Chunks(device, chunk, settings.forward_dtype)
        runner = BlockRunner(should_compile(settings, device))

        def states(source: Source, part: Part) -> HiddenStates:  # holds nothing of this object: no cycle keeps memory
            where = (scratch or kept[part]) if isinstance(offload, Path) else offload
            return HiddenStates(source, part.task, device, transfers, runner, where)

        self.student_states = {part: states(student, part) for part in parts}
        self.expert_states = {part: states(experts[part.task], part) for part in parts}
        last = {part.task: part for part in parts if self.shares.is_last(part)}
        owned = {task: experts[task] for task in self.shares.owned}
        self.drift = DriftProbe(student, owned, device, self._chunks, lambda model, task: states(model, last[task]))
        self._layers = student.structure.layers
        # Several ranks take a layer's first expert first: it may run while the layer before is being solved.
        self._early = self.world.size > 1 and bool(experts)
        self._first_expert: nn.Module | None = None  # that expert's block
        models = [student, base, *experts.values()]
        if self._early:
            models.insert(0, models.pop(2))
        order = ((model, layer.index) for layer in self._layers[first:] for model in models)
        self._apart = self.world.apart() if student.made_once else None
        self._blocks = BlockPrefetcher(order, device, self._apart or self.world)
        self._inputs: dict[str, Sequence[Batch]] = {}  # of an encoder-decoder: they are needed again
        self._tokens: dict[Part, list[Tokens]] = {}
        self._trim: Callable[[], None] = trim_malloc

    def __enter__(self) -> Streams:
        with ExitStack() as stack:
            stack.enter_context(closing(self._progress))
            stack.enter_context(
                ieee_float32()
            )  # longer than the thread that reads: merging has such contexts of its own
            stack.enter_context(self._transfers)
            stack.enter_context(self._blocks)
            if self._apart is not None:  # or its reader might wait for a block of a rank that waits for this one
                stack.callback(self._apart.end)
            stack.enter_context(explain_out_of_memory(self.device))
            self._contexts = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> bool | None:
        return self._contexts.__exit__(*error)  # type: ignore[arg-type]

    def enter(self, layer: Layer) -> dict[str, int]:
        """Go on to a layer. With a stage's first one, every batch passes the models' own way to it.

        Returns:
            Tokens that count, by task, where a stage begins: most models have one, an encoder-decoder two.

        Raises:
            DataError: a batch is not one of the model's, or no token of a task counts.
            SolveError: what enters is not finite.
            UnsupportedModelError: what enters is not the same in two runs.
        """
        if layer.number:
            return {}
        with self.clock("entering"):
            return self._enter(layer)

    def _enter(self, layer: Layer) -> dict[str, int]:
        structure = self._source.structure
        for snapshots in self._snapshots.values():
            snapshots.begin(layer.stage)
        for task, expert in self._experts.items():
            batches = self._inputs[task] if layer.stage else checked(task, self._batches[task], structure)
            fitted = [batch for batch in batches if not isinstance(batch, HeldOut)]
            for part in self.parts(task):
                own = fitted[self.shares.batches(part, len(fitted))]
                for states in (self.student_states[part], self.expert_states[part]):
                    states.enter(layer.stage, own, self.shares.batches(part, len(fitted)).start)
                    trim_malloc()
                self._tokens[part] = self._tokens_of(part, own, layer)
            if task in self.shares.owned:
                self.drift.enter(layer.stage, task, batches)
            expert.release_stage_inputs()
            if len(structure.paths) > 1:  # else one task's data at a time
                self._inputs[task] = batches
            del batches, fitted
        self._source.release_stage_inputs()
        found = self._count(structure.paths[layer.stage])
        own_tokens = sum(batch.count for tokens in self._tokens.values() for batch in tokens)
        self._progress.stage(len(self._layers) - max(layer.index, self._first), own_tokens)
        for part, snapshots in self._snapshots.items():
            snapshots.reserve(sum(states.nbytes for states in self._chains(part)))
        return found

    def _count(self, path: str) -> dict[str, int]:
        """Tokens of all ranks' samples that count, by task.

        Raises:
            DataError: none of a task does.
        """
        parts = [[*part, sum(batch.count for batch in tokens)] for part, tokens in self._tokens.items()]
        drift = {task: [samples, self.drift.counted(task)[0]] for task, samples in self.drift.held_out.items()}
        found, held_out = dict.fromkeys(self.shares.tasks, 0), dict[str, list[int]]()
        for their_parts, their_drift in self.world.gather([parts, drift]):
            for task, _, count in their_parts:
                found[task] += count
            held_out |= their_drift
        for task, count in found.items():
            if not count:
                raise DataError(
                    f"task {task}: no token counts in {path} (every position is padding, or "
                    "without a target); check its attention_mask and labels"
                )
            if held_out[task][0] and not held_out[task][1]:
                raise DataError(
                    f"task {task}: no token of its held-out samples counts in {path}; check their attention_mask and "
                    "labels"
                )
        self.held_out = {task: held_out[task][0] for task in found}
        self.counts = TokenCounts.of(found)
        self.held_out_counts = TokenCounts.of(
            {task: held_out[task][1] if some else 0 for task, some in self.held_out.items()}
        )
        return found

    def save(self) -> dict[str, Any]:
        """Make this rank's hidden states that leave a layer durable: where they are, for `restore`, as JSON has it.

        Returns:
            By the number of the part of a task.

        Raises:
            OutputError: they cannot be written.
        """
        found = {}
        for part, snapshots in self._snapshots.items():
            chains = [states.save(snapshots.current) for states in self._chains(part)]
            found[str(self.shares.number(part))] = {"file": snapshots.keep(), "chains": chains}
        return found

    def saved(self) -> None:
        """What `save` wrote last is known to be there: what it wrote before may be overwritten."""
        for snapshots in self._snapshots.values():
            snapshots.turn()

    def restore(self, saved: Mapping[str, Any]) -> None:
        """The hidden states that left a layer, as `save` kept them, of all ranks.

        Raises:
            OutputError: they are those of other batches.
            ResumeError: they are not as they were kept.
        """
        for part, snapshots in self._snapshots.items():
            own = saved[str(self.shares.number(part))]
            source = snapshots.saved(own["file"])
            for states, found in zip(self._chains(part), own["chains"], strict=True):
                states.restore(source, [Saved(position, tuple(shape), *rest) for position, shape, *rest in found])

    @property
    def tasks(self) -> Sequence[str]:
        """All ranks', in order."""
        return self.shares.tasks

    @property
    def last_layer(self) -> Layer:
        """The one that is not advanced through."""
        return self._layers[-1]

    def parts(self, task: str) -> list[Part]:
        """This rank's parts of a task, in order."""
        return [part for part in self.shares.parts if part.task == task]

    @property
    def chunk(self) -> int | None:
        """Tokens that pass a layer at a time by now: fewer than at the beginning, if memory ran out."""
        return self._chunks.limit

    def find_layout(self, layer: Layer, block: nn.Module, settings: Settings) -> Layout:
        """What there is to calibrate in a layer, seen with a sample of the first task; and whether the merged model's
        `block` gives the same twice."""
        owner = self.shares.owner(self.tasks[0])
        if owner == self.shares.rank:
            layout, made = find_layout(block, layer, *self.drift.sample(), settings)
            self.drift.begin(layer, block, made)
            self.world.tell(layout.to_dict(), owner)
            return layout
        self.drift.begin(layer, block, None)
        return Layout.from_dict(self.world.tell(None, owner), layer.token_weights)

    def of_all_tasks(self, *numbers: Sequence[float]) -> list[list[float]]:
        """Lists with a number for each task that is followed here, as lists with one for each task of all."""
        own = {task: [each[number] for each in numbers] for number, task in enumerate(self.drift.tasks)}
        every = self.world.merge(own)
        return [[every[task][number] for task in self.tasks] for number in range(len(numbers))]

    def next_block(self) -> nn.Module:
        """The layer's next block: the student's, the base's; then each expert's, which `experts` hands out."""
        self.world.idle = None
        with self.clock("reading"):
            if self._early and self._first_expert is None:
                self._first_expert = self._blocks.next()
            return self._blocks.next()

    def experts(self, layer: Layer) -> Iterator[tuple[str, nn.Module]]:
        """Each task with its expert's block, which must be gone when the next is asked for.

        Activations of a task use the memory of the ones before.
        """
        for task in self._experts:
            self._progress.task(layer.index, task)
            first, self._first_expert = self._first_expert, None
            with self.clock("reading"):  # into a list, to be taken out below: a local of this frame would live on
                block = [self._blocks.next() if first is None else first]
            del first
            with caching_malloc() as self._trim:
                yield task, block.pop()

    def look_ahead(self, layer: Layer, moments: TaskMoments) -> None:
        """While this rank waits for others, its first expert runs the next layer on its first samples.

        Args:
            layer: whose samples have all passed.
            moments: of it: what they needed will be needed again.
        """
        following = self._layers[layer.index + 1 : layer.index + 2]
        part = next(iter(self.shares.parts), None)
        if not self._early or part is None or not self._tokens[part] or not following or not following[0].number:
            return
        inputs, outputs = [*moments.groups, *moments.layout.unused], list(moments.outputs)

        def run() -> None:
            if not self._blocks.ready:
                return
            self.world.idle = None
            self._first_expert = self._blocks.next()
            chunk = next(self._chunks.of(0, self._tokens[part][0]))
            with suppress(torch.OutOfMemoryError), chunk:
                self.expert_states[part].run_ahead(chunk, following[0], self._first_expert, inputs, outputs)

        self.world.idle = run

    def chunks(self, part: Part) -> Iterator[Chunk]:
        """The data of a part of a task, chunk by chunk."""
        for batch, tokens in enumerate(self._tokens[part]):
            yield from self._chunks.of(batch, tokens)
            self._trim()
            self._progress.tokens(tokens.count)

    def passes(self, part: Part) -> Iterator[Chunk]:
        """The same once more, to look at: it is no progress."""
        for batch, tokens in enumerate(self._tokens[part]):
            yield from self._chunks.of(batch, tokens)

    def counted(self, part: Part) -> tuple[int, int]:
        """How many tokens of it count in the stage, and in its memory: the stage before it."""
        batches = self._tokens[part]
        return sum(each.count for each in batches), sum(each.memory.count for each in batches if each.memory)

    @property
    def label(self) -> str:
        """The merged model's."""
        return self._source.label

    def merged_block(self, layer: Layer) -> nn.Module:
        """The merged model's block once more, as it was."""
        return block_for_all(self._source, layer.index, self.world).to(self.device)

    def advance_student(self, layer: Layer, block: nn.Module) -> None:
        """The student's hidden states pass its calibrated block, unless it is the last."""
        if layer is self._layers[-1]:
            return
        with self.clock("advancing"), caching_malloc() as trim:
            for part, states in self.student_states.items():
                for batch, tokens in enumerate(self._tokens[part]):
                    for chunk in self._chunks.of(batch, tokens):
                        with chunk:
                            states.advance(chunk, layer, block)
                    trim()

    def to_host(self, parameters: dict[str, Tensor]) -> Transfer[dict[str, Tensor]]:
        """Parameters on their way to the host, while the device goes on."""

        def copy() -> dict[str, Tensor]:
            return {
                name: empty_pinned(tuple(value.shape), value.dtype, value.device).copy_(value, non_blocking=True)
                for name, value in parameters.items()
            }

        return self._transfers.submit(copy)

    @property
    def traffic(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes of hidden states that were read from files and written to them."""
        files = [self._scratch] if self._scratch is not None else list(self._snapshots.values())
        kind = SCRATCH if self._offloaded else TO_RESUME
        read, written = (sum(each.traffic[i] for each in files) for i in range(2))
        return {kind: read} if read else {}, {kind: written} if written else {}

    def _chains(self, part: Part) -> list[HiddenStates]:
        """All of a part that passes from layer to layer, always in the same order."""
        drift = self.drift.chains(part.task) if self.shares.is_last(part) else []
        return [self.student_states[part], self.expert_states[part], *drift]

    def _tokens_of(self, part: Part, batches: Sequence[Batch], layer: Layer) -> list[Tokens]:
        """The tokens of every batch in the layer's stage, which know those of the stage before it."""
        mask = layer.family.stages[layer.stage].mask
        before = self._tokens.get(part)
        found: list[Tokens] = []
        for i, batch in enumerate(batches):
            try:
                shape = self.student_states[part].shape(i)
                found.append(Tokens(mask(batch), shape, self.device, before[i] if before else None))
            except DataError as error:
                raise DataError(f"task {part.task}, batch {self.student_states[part].offset + i}: {error}") from None
        return found


def check_tasks(tasks: Sequence[str], experts: Mapping[str, Source], batches: Mapping[str, object]) -> None:
    """Every expert must have batches, and all batches an expert.

    Args:
        tasks: all ranks'.
        experts, batches: this one's.

    Raises:
        DataError: names a task that has only one of the two, or there is none.
    """
    if not tasks:
        raise DataError("no experts: at least one is needed")
    for task in experts.keys() ^ batches.keys():
        there = "an expert but no batches" if task in experts else "batches but no expert"
        raise DataError(f"task {task}: found {there}; experts and batches must name the same tasks")


def checked(task: str, batches: Iterable[Batch], structure: Structure) -> Sequence[Batch]:
    """A task's batches, read, each with tensors that have a row a sample, and with what the family needs."""
    if not isinstance(batches, Iterable):
        raise DataError(f"task {task}: found a {type(batches).__name__}, expected batches, one after the other")
    items = list(batches)
    if not any(not isinstance(batch, HeldOut) for batch in items):
        found = "held-out batches alone" if items else "no batch"
        raise DataError(f"task {task}: found {found}, expected at least one to fit to")
    for number, batch in enumerate(items):
        _check_tensors(f"task {task}, batch {number}", batch)
    if structure.family.needs is not None:
        keys, why = structure.family.needs
        for number, batch in enumerate(items):
            if not any(key in batch for key in keys):
                found, wanted = ", ".join(batch), " or ".join(keys)
                raise DataError(f"task {task}, batch {number}: found {found}, expected {wanted} too: {why}")
    return items


def _check_tensors(where: str, batch: object) -> None:
    """A batch must be tensors by name, each with a sample a row."""
    if not isinstance(batch, Mapping) or not batch:
        raise DataError(
            f"{where}: found {described(batch)}, expected a dict of tensors by the names of the model's inputs"
        )
    for name, value in batch.items():
        if isinstance(value, Tensor) and (value.is_meta or value.is_nested or value.layout != torch.strided):
            raise DataError(f"{where}, {name}: found a tensor that is nested, sparse or meta, expected a dense one")
        if not isinstance(value, Tensor) or not value.numel() or value.ndim == 0:
            raise DataError(
                f"{where}, {name}: found {described(value)}, expected a tensor [samples, ...] that is not empty"
            )
