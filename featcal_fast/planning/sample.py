"""Whether it will help: a few samples pass the merged model and the experts, before anything is solved for good.

for each layer:
    for each task:    half of the samples are fitted to, the others are judged by: second moments of what the merged
                      model gives its linear modules, and what the expert's weights would make of it
    fit one linear update to all tasks, judge it; advance the merged model through its own layer
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from featcal_fast.errors import DataError, SolveError
from featcal_fast.forward.runner import BlockRunner
from featcal_fast.inputs.load import load_data
from featcal_fast.inputs.models import RecipeModels
from featcal_fast.inputs.recipe import Recipe
from featcal_fast.layer.captured import CapturedEnergy, Energies
from featcal_fast.layer.layout import find_layout
from featcal_fast.layer.precision import ieee_float32
from featcal_fast.layer.split import split_sums
from featcal_fast.layer.tokens import Tokens
from featcal_fast.models.structure import Layer
from featcal_fast.planning.sampled import Sampled, SampledGroup, SampledLayer
from featcal_fast.reporting.progress import Progress
from featcal_fast.settings import Settings
from featcal_fast.streaming.chunks import Chunk, Chunks, explain_out_of_memory
from featcal_fast.streaming.held_out import HeldOut
from featcal_fast.streaming.hidden_states import HOST, HiddenStates
from featcal_fast.streaming.prefetch import BlockPrefetcher
from featcal_fast.streaming.sources import CheckpointSource, Source, check_same_architecture
from featcal_fast.streaming.streams import Batch, check_tasks, checked
from featcal_fast.streaming.transfers import Transfers

LEAST = 3  # samples of a task: fewer are not taken apart


def sample_recipe(
    recipe: Recipe, models: RecipeModels, device: torch.device, samples: int, chunk: int, progress: Progress
) -> Sampled:
    """What `sample_source` finds of a recipe's models and of as many samples of each task.

    Args:
        recipe: the job.
        models: its models.
        device: where to compute.
        samples: of a task, of which the second half is judged by.
        chunk: tokens that pass a layer at a time.
        progress: told how it goes.

    Raises:
        FeatCalError: as `sample_source`, or a task's data is not usable.
    """
    experts = {  # no more than the plan is of
        task: replace(each, samples=min(samples, each.samples or recipe.samples))
        for task, each in recipe.experts.items()
    }
    batches, _ = load_data(replace(recipe, experts=experts, held_out=0.5), models, device)
    sources = {
        task: CheckpointSource(expert, device, models.tokens[task].table) for task, expert in models.experts.items()
    }
    merged = CheckpointSource(models.merged, device)
    return sample_source(merged, sources, batches, recipe.settings, device, progress, chunk)


@torch.no_grad()
def sample_source(
    merged: Source,
    experts: Mapping[str, Source],
    batches: Mapping[str, Iterable[Batch]],
    settings: Settings,
    device: torch.device,
    progress: Progress,
    chunk: int | None = None,
) -> Sampled:
    """Measure models whose blocks arrive one at a time, each being read while the one before it is in use.

    Args:
        merged: the merged model.
        experts: by task.
        batches: by task, as of `calibrate_model`, read once: those that are `HeldOut` are judged by.
        settings: which modules to look at, and `forward_dtype`.
        device: where to compute; hidden states wait in host memory.
        progress: told how it goes, and closed at its end.
        chunk: tokens that pass a layer at a time; None for a batch's.

    Returns:
        What was measured.

    Raises:
        DataError: a task without batches, or none of them is `HeldOut`; or batches without a task, or a batch that a
            model cannot take.
        ModelMismatchError: the models differ in architecture.
        UnsupportedModelError: a layer's forward fails, or does not give each module every token once.
        SolveError: numbers that are not finite.
        MemoryBudgetError: the device's memory will not do, however few samples it takes at a time.
    """
    check_tasks(list(experts), experts, batches)
    check_same_architecture(merged, {each.label: each for each in experts.values()})
    sample = _Sample(merged, experts, batches, settings, device, progress, chunk)
    found = Sampled(sample.fitted, sample.judged)
    with ExitStack() as stack:
        for each in (closing(progress), ieee_float32(), explain_out_of_memory(device), sample.transfers, sample.blocks):
            stack.enter_context(each)
        for layer in merged.structure.layers:
            sample.enter(layer)
            found.layers.append(sample.layer(layer))
    return found


class _Chain:
    """Some batches of one task on their way through a model.

    Args:
        states: of the model.
        device: where blocks run.
    """

    def __init__(self, states: HiddenStates, device: torch.device) -> None:
        self.states, self._device = states, device
        self.tokens: list[Tokens] = []

    def enter(self, layer: Layer, batches: Sequence[Batch]) -> None:
        """The layer is a stage's first."""
        self.states.enter(layer.stage, batches)
        mask, before = layer.family.stages[layer.stage].mask, self.tokens
        self.tokens = [
            Tokens(mask(batch), self.states.shape(i), self._device, before[i] if before else None)
            for i, batch in enumerate(batches)
        ]

    @property
    def counted(self) -> tuple[int, int]:
        """Tokens that count, and of those in the stage before it."""
        own = sum(each.count for each in self.tokens)
        return own, sum(each.memory.count for each in self.tokens if each.memory is not None)


class _Sample:
    """All that streams past the loop."""

    def __init__(
        self,
        merged: Source,
        experts: Mapping[str, Source],
        batches: Mapping[str, Iterable[Batch]],
        settings: Settings,
        device: torch.device,
        progress: Progress,
        chunk: int | None,
    ) -> None:
        self._merged, self._experts, self._batches = merged, experts, batches
        self._device, self._progress = device, progress
        self._settings = replace(settings, calibrate_layernorm=False)
        self.fitted, self.judged = dict.fromkeys(experts, 0), dict.fromkeys(experts, 0)
        self.transfers = Transfers(device, "hidden-states")
        layers, sources = merged.structure.layers, [merged, *experts.values()]
        self.blocks = BlockPrefetcher(((source, layer.index) for layer in layers for source in sources), device)
        self._chunks = Chunks(device, chunk, settings.forward_dtype)
        self._runner = BlockRunner(compiled=False)
        states = partial(HiddenStates, device=device, transfers=self.transfers, runner=self._runner, offload=HOST)
        self._fit = {task: _Chain(states(merged, task), device) for task in experts}
        self._judge = {task: _Chain(states(merged, task), device) for task in experts}
        self._expert = {task: _Chain(states(source, task), device) for task, source in experts.items()}
        self._inputs: dict[str, tuple[list[Batch], list[Batch]]] = {}  # which an encoder-decoder is given again

    def enter(self, layer: Layer) -> None:
        """Go on to a layer. With a stage's first one, every batch passes the models' own way to it."""
        if layer.number:
            return
        for task, expert in self._experts.items():
            fitted, judging = self._inputs[task] if layer.stage else self._halves(task)
            self._fit[task].enter(layer, fitted)
            for chain in (self._judge[task], self._expert[task]):
                chain.enter(layer, judging)
            expert.release_stage_inputs()
            if len(self._merged.structure.paths) > 1:  # else one task's data at a time
                self._inputs[task] = fitted, judging
        self._merged.release_stage_inputs()
        chains = (*self._fit.values(), *self._judge.values())
        total = sum(chain.counted[0] for chain in chains)
        self._progress.stage(len(self._merged.structure.layers) - layer.index, total)

    def _halves(self, task: str) -> tuple[list[Batch], list[Batch]]:
        batches = checked(task, self._batches[task], self._merged.structure)
        halves: list[list[Batch]] = [
            [batch for batch in batches if isinstance(batch, HeldOut) is judging] for judging in (False, True)
        ]
        self.fitted[task], self.judged[task] = (
            sum(len(next(iter(batch.values()))) for batch in half) for half in halves
        )
        if not halves[1]:
            raise DataError(
                f"task {task}: found {self.fitted[task]} samples that differ, expected at least {LEAST}: a linear "
                "update is fitted to some, and judged by others; add data, or raise `samples` of the recipe"
            )
        return halves[0], halves[1]

    def layer(self, layer: Layer) -> SampledLayer:
        """All tasks' samples pass a layer of all models."""
        block = self.blocks.next()
        first, one = next(iter(self._fit.values())), slice(0, 1)
        layout, _ = find_layout(block, layer, *first.states.load(0, one), first.tokens[0].part(one), self._settings)
        captured = CapturedEnergy(layout, block, self._device)
        for task in self._experts:
            self._progress.task(layer.index, task)
            expert = self.blocks.next()
            captured.begin(task, expert)
            self._pass(self._fit[task], layer, block, captured.fit, captured.leaders)
            self._pass(self._judge[task], layer, block, captured.aim, captured.leaders, stop_at=layout.last)
            captured.fold(*self._fit[task].counted)
            self._pass(self._expert[task], layer, expert)
            del expert  # before the next but one is read
            self._progress.tokens(self._fit[task].counted[0] + self._judge[task].counted[0])
        captured.solve()
        for task, chain in self._judge.items():
            self._pass(chain, layer, block, partial(captured.judge, task), captured.leaders)
        drift = {task: self._drift(task) for task in self._experts}
        return _read(layer, drift, captured.energies())

    def _pass(
        self,
        chain: _Chain,
        layer: Layer,
        block: nn.Module,
        take: Take | None = None,
        leaders: Sequence[str] = (),
        stop_at: str | None = None,
    ) -> None:
        """A task's samples pass a block, and what modules are given is taken; unless it ends early, they advance."""
        names = dict.fromkeys([*leaders, *([] if stop_at is None else [stop_at])])
        for batch, tokens in enumerate(chain.tokens):
            for chunk in self._chunks.of(batch, tokens):
                on_input = partial(_hand_over, take, leaders, chunk)
                with chunk:
                    made = chain.states.capture(chunk, layer, block, names, on_input, stop_at=stop_at)
                    if made is not None:
                        chain.states.keep(chunk, made)

    def _drift(self, task: str) -> Tensor:
        """`||H - H_e||^2` and `||H_e||^2` of the hidden states that leave the layer: `[2]`, float64."""
        sums = []
        for batch, tokens in enumerate(self._judge[task].tokens):
            for chunk in self._chunks.of(batch, tokens):
                with chunk:
                    found, theirs = (
                        each[task].states.load(chunk.batch, chunk.rows)[0] for each in (self._judge, self._expert)
                    )
                    sums.append(split_sums(found, theirs, theirs, chunk.tokens)[[0, 5]])
        return torch.stack(sums).sum(0)


Take = Callable[[str, Tensor, Tokens, tuple[int, int]], None]


def _hand_over(take: Take | None, leaders: Sequence[str], chunk: Chunk, name: str, x: Tensor) -> None:
    if take is not None and name in leaders:
        take(name, x, chunk.tokens, chunk.end)


def _read(layer: Layer, drift: Mapping[str, Tensor], energies: Mapping[tuple[str, ...], Energies]) -> SampledLayer:
    """What was summed on the device, read in one go.

    Raises:
        SolveError: it is not finite.
    """
    parts = [*drift.values()]
    for each in energies.values():
        parts += [each.mismatch, each.total[None], each.left, each.fitted]
    values = iter(torch.cat(parts).cpu().split([len(each) for each in parts]))
    distances = {
        task: (float(error) / max(float(energy), 1e-60)) ** 0.5 for task in drift for error, energy in [next(values)]
    }
    groups = []
    for modules in energies:
        mismatch, total, left, fitted = (next(values).tolist() for _ in range(4))
        groups.append(SampledGroup(modules, sum(mismatch) / len(mismatch), total[0], left, fitted))
    numbers = [*distances.values(), *(number for group in groups for number in (group.total, *group.left))]
    if not all(map(math.isfinite, numbers)):
        raise SolveError(
            f"{layer.path}: what the merged model or an expert makes of a sample is not finite (NaN or Inf), or leaves "
            "float32's range; calibrate, which stops there too, says whose it is"
        )
    return SampledLayer(layer.index, layer.path, distances, groups)
