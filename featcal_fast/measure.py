"""Drift, measured: a model's features against each expert's, and why they differ, layer by layer.

for each layer:
    for each task:    run the expert's layer on its own hidden states, and on each model's;
                      run each model's layer on its own; take the difference apart
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial

import torch
from torch import Tensor, nn

from featcal_fast.forward.hooks import Activations
from featcal_fast.forward.runner import BlockRunner
from featcal_fast.layer.layout import Layout, find_layout
from featcal_fast.layer.precision import ieee_float32
from featcal_fast.layer.split import ModuleErrors, split_sums
from featcal_fast.layer.tokens import Tokens
from featcal_fast.models.structure import Layer
from featcal_fast.reporting.drift_report import DriftReport
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.splits import CALIBRATED, MERGED, LayerSplit, ModuleError, Split
from featcal_fast.settings import Settings
from featcal_fast.streaming.chunks import Chunk, Chunks, explain_out_of_memory
from featcal_fast.streaming.held_out import HeldOut
from featcal_fast.streaming.hidden_states import HOST, HiddenStates
from featcal_fast.streaming.outcome import Followed, measure_outcome
from featcal_fast.streaming.prefetch import BlockPrefetcher
from featcal_fast.streaming.sources import Source, check_same_architecture
from featcal_fast.streaming.streams import Batch, check_tasks, checked
from featcal_fast.streaming.transfers import Transfers

Sums = dict[tuple[str, str], Tensor]  # by ("drift", model) or ("module", name), as `layer.split` has them


@torch.no_grad()
def measure_source(
    merged: Source,
    calibrated: Source | None,
    experts: Mapping[str, Source],
    batches: Mapping[str, Iterable[Batch]],
    settings: Settings,
    device: torch.device,
    progress: Progress,
    *,
    same_heads: bool = False,
) -> DriftReport:
    """Measure models whose blocks arrive one at a time, each being read while the one before it is in use.

    Args:
        merged: the merged model.
        calibrated: a model of its architecture to compare with it.
        experts: by task.
        batches: by task, as of `calibrate_model`, read once; of a task with some that are `HeldOut`, only these count.
        settings: of which only `forward_dtype` is used.
        device: where to compute; hidden states wait in host memory.
        progress: told how it goes, and closed at its end.
        same_heads: whether the calibrated model is the merged one outside of its layers, so that what the two give in
            the end can be compared too, on samples that are held out.

    Returns:
        What was measured.

    Raises:
        DataError: a task without batches, or batches without a task, or a batch that a model cannot take.
        ModelMismatchError: the models differ in architecture.
        UnsupportedModelError: a layer's forward fails.
        MemoryBudgetError: the device's memory will not do, however few samples it takes at a time.
    """
    check_tasks(list(experts), experts, batches)
    models = {MERGED: merged} if calibrated is None else {MERGED: merged, CALIBRATED: calibrated}
    check_same_architecture(merged, {each.label: each for each in (*models.values(), *experts.values())})
    measure = _Measure(models, experts, batches, settings, device, progress)
    report = DriftReport(merged.structure.family.name, str(device), measure.samples, measure.held_out)
    with ExitStack() as stack:
        for each in (closing(progress), ieee_float32(), explain_out_of_memory(device), measure.transfers):
            stack.enter_context(each)
        with measure.blocks:
            for layer in merged.structure.layers:
                measure.enter(layer)
                report.layers.append(measure.layer(layer))
        followed = measure.followed() if same_heads else {}
        if followed:
            report.outcome = measure_outcome(merged, experts, followed, device, settings.forward_dtype)
    return report


class _Measure:
    """All that streams past the loop."""

    def __init__(
        self,
        models: Mapping[str, Source],
        experts: Mapping[str, Source],
        batches: Mapping[str, Iterable[Batch]],
        settings: Settings,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.device, self.progress = device, progress
        self.samples, self.held_out = dict.fromkeys(experts, 0), dict.fromkeys(experts, 0)
        self.transfers = Transfers(device, "hidden-states")
        self._models, self._experts, self._batches = models, experts, batches
        self._structure = models[MERGED].structure
        layers, sources = self._structure.layers, [*models.values(), *experts.values()]
        self.blocks = BlockPrefetcher(((source, layer.index) for layer in layers for source in sources), device)
        self._chunks = Chunks(device, forward_dtype=settings.forward_dtype)
        self._runner = BlockRunner(compiled=False)
        states = partial(HiddenStates, device=device, transfers=self.transfers, runner=self._runner, offload=HOST)
        self._states = {model: {task: states(source, task) for task in experts} for model, source in models.items()}
        self._expert = {task: states(source, task) for task, source in experts.items()}
        self._inputs: dict[str, Sequence[Batch]] = {}  # which an encoder-decoder is given again, and heads may be
        self._tokens: dict[str, list[Tokens]] = {}

    def enter(self, layer: Layer) -> None:
        """Go on to a layer. With a stage's first one, every batch passes the models' own way to it."""
        if layer.number:
            return
        mask = layer.family.stages[layer.stage].mask
        for task, expert in self._experts.items():
            batches = self._inputs[task] if layer.stage else self._followed(task)
            for states in (*(each[task] for each in self._states.values()), self._expert[task]):
                states.enter(layer.stage, batches)
            expert.release_stage_inputs()
            before = self._tokens.get(task)
            self._tokens[task] = [
                Tokens(mask(batch), self._expert[task].shape(i), self.device, before[i] if before else None)
                for i, batch in enumerate(batches)
            ]
            if len(self._structure.paths) > 1 or self.held_out[task]:  # else one task's data at a time
                self._inputs[task] = batches
        for source in self._models.values():
            source.release_stage_inputs()
        total = sum(tokens.count for each in self._tokens.values() for tokens in each)
        self.progress.stage(len(self._structure.layers) - layer.index, total)

    def _followed(self, task: str) -> list[Batch]:
        """A task's batches that are held out; all, where none are."""
        batches = checked(task, self._batches[task], self._structure)
        held_out: list[Batch] = [batch for batch in batches if isinstance(batch, HeldOut)]
        self.samples[task] = sum(len(next(iter(batch.values()))) for batch in held_out or batches)
        self.held_out[task] = self.samples[task] if held_out else 0
        return held_out or list(batches)

    def layer(self, layer: Layer) -> LayerSplit:
        """All tasks' samples pass a layer of all models."""
        blocks = {model: self.blocks.next() for model in self._models}
        layout = self._layout(layer, blocks[CALIBRATED]) if CALIBRATED in blocks else None
        sums = {}
        for task in self._experts:
            self.progress.task(layer.index, task)
            expert = self.blocks.next()
            sums[task] = self._task(task, layer, expert, blocks, layout)
            del expert  # before the next but one is read
        return _read(layer, sums)

    def followed(self) -> dict[str, Followed]:
        """Held-out samples of each task with some, as they leave the last layer; none where there is no other model."""
        if CALIBRATED not in self._states:
            return {}
        chains = zip(*(self._states[model].values() for model in (MERGED, CALIBRATED)), strict=True)
        return {
            task: Followed(self._inputs[task], self._tokens[task], before, after, self._expert[task])
            for task, (before, after) in zip(self._experts, chains, strict=True)
            if self.held_out[task]
        }

    def _task(
        self, task: str, layer: Layer, expert: nn.Module, blocks: Mapping[str, nn.Module], layout: Layout | None
    ) -> Sums:
        """One task's samples pass a layer, chunk by chunk."""
        found: list[Sums] = []
        states = {model: each[task] for model, each in self._states.items()}
        for batch, tokens in enumerate(self._tokens[task]):
            for chunk in self._chunks.of(batch, tokens):
                sums: Sums = {}
                with chunk:
                    sums = self._pass(chunk, layer, states, self._expert[task], blocks, expert, layout)
                if not chunk.failed:
                    found.append(sums)
            self.progress.tokens(tokens.count)
        return {name: torch.stack([each[name] for each in found]).sum(0) for name in found[0]}

    def _pass(
        self,
        chunk: Chunk,
        layer: Layer,
        states: Mapping[str, HiddenStates],
        expert_states: HiddenStates,
        blocks: Mapping[str, nn.Module],
        expert: nn.Module,
        layout: Layout | None,
    ) -> Sums:
        """Run a chunk through a layer of the expert and of each model; hidden states advance once all is computed."""
        outputs, groups = Activations(), () if layout is None else layout.groups
        modules = [name for group in groups for name in group.modules]
        hidden, calls = expert_states.load(chunk.batch, chunk.rows)
        made = self._runner.capture(calls, layer.number, expert, hidden, (), _nothing, modules, outputs.__setitem__)
        assert made is not None
        errors = None if layout is None else ModuleErrors(layout, tuple(blocks.values()), chunk.tokens, outputs)
        sums, left = {}, {}
        for model, block in blocks.items():
            hidden, calls = states[model].load(chunk.batch, chunk.rows)
            mixed = self._runner.run(calls, layer.number, expert, hidden)
            watching = errors if model == CALIBRATED else None
            found = self._runner.capture(
                calls,
                layer.number,
                block,
                hidden,
                [group.leader for group in groups] if watching else (),
                watching.take if watching else _nothing,
            )
            assert found is not None
            sums["drift", model] = split_sums(found, mixed, made, chunk.tokens)
            left[model] = found
        sums |= {} if errors is None else {("module", name): each for name, each in errors.sums.items()}
        for model, found in left.items():
            states[model].keep(chunk, found)
        expert_states.keep(chunk, made)
        return sums

    def _layout(self, layer: Layer, block: nn.Module) -> Layout:
        """Every linear module that could be calibrated, whatever was."""
        task, one = next(iter(self._experts)), slice(0, 1)
        hidden, calls = self._states[CALIBRATED][task].load(0, one)
        return find_layout(block, layer, hidden, calls, self._tokens[task][0].part(one), Settings())[0]


def _nothing(_name: str, _tensor: Tensor) -> None:
    pass


def _read(layer: Layer, sums: Mapping[str, Sums]) -> LayerSplit:
    """What was summed on the device, read in one go."""
    every = [(task, *key, each) for task, found in sums.items() for key, each in found.items()]
    values = torch.cat([each for *_, each in every]).cpu().split([len(each) for *_, each in every])
    done = LayerSplit(layer.index, layer.path, {})
    for (task, kind, name, _), value in zip(every, values, strict=True):
        numbers = value.tolist()
        if kind == "drift":
            done.splits(name)[task] = Split.of_sums(numbers)
        else:
            before, after, energy = numbers
            scale = energy or 1e-60
            done.modules.setdefault(name, {})[task] = ModuleError(before / scale, after / scale)
    return done
