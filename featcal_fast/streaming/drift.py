"""How far a student's features are from its experts', layer by layer, before and after calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from featcal_fast.errors import UnsupportedModelError
from featcal_fast.forward.calls import BatchCalls
from featcal_fast.layer.tokens import Tokens
from featcal_fast.models.structure import Layer
from featcal_fast.streaming.chunks import Chunks
from featcal_fast.streaming.hidden_states import HiddenStates
from featcal_fast.streaming.sources import Source

PROBE_SAMPLES = 4  # a task; enough for a figure to watch, at a few per cent of a run's forward passes
# By how much two runs on the same sample may differ. The bits need not be the same: a GPU's atomic additions come in
# any order, which changes a result by a few roundings, and so by a small share of what the layer adds. Dropout of one
# per cent changes a tenth of that.
STEADY = 0.02
UNSTEADY = (
    "the same sample gives other hidden states the second time: the forward draws random numbers (dropout that is left "
    "on, patches masked at random), expected one that always gives the same"
)


class DriftProbe:
    """Follows a few calibration samples a task through three models: merged, calibrated, expert.

    Drift of a layer is `||H - H_e||_F / ||H_e||_F` over the tokens that count, `H` the hidden states after the layer
    and `H_e` the expert's, averaged over tasks. *Before* is the merged model left as it was, end to end; *after* is
    the calibrated one, end to end.

    Args:
        student: the merged model.
        experts: by task.
        device: where blocks run.
        chunks: how many samples pass a layer at a time.
        hidden_states: makes those of a model on a task.
    """

    def __init__(
        self,
        student: Source,
        experts: Mapping[str, Source],
        device: torch.device,
        chunks: Chunks,
        hidden_states: Callable[[Source, str], HiddenStates],
    ) -> None:
        self._device, self._chunks = device, chunks
        self._masks = [stage.mask for stage in student.structure.family.stages]
        self._merged = {task: hidden_states(student, task) for task in experts}
        self._calibrated = {task: hidden_states(student, task) for task in experts}
        self._expert = {task: hidden_states(expert, task) for task, expert in experts.items()}
        self._tokens: dict[str, Tokens] = {}
        self._repeats: dict[str, Tensor] = {}  # by the model's label: two runs of the layer on one sample
        self._code: object = None  # of the merged model's layer

    def enter(
        self, stage: int, task: str, batch: Mapping[str, Tensor], student: HiddenStates, expert: HiddenStates
    ) -> None:
        """Go on to a stage of all three models with the first samples of a batch, the first of `student` and `expert`.

        Raises:
            UnsupportedModelError: hidden states differ from those that entered with all of the batch's samples.
        """
        samples = {name: tensor[:PROBE_SAMPLES] for name, tensor in batch.items()}
        for states in (self._merged, self._calibrated, self._expert):
            states[task].enter(stage, [samples])
        _check_same_first(task, student, self._merged[task])
        _check_same_first(task, expert, self._expert[task])
        shape = self._expert[task].shape(0)
        self._tokens[task] = Tokens(self._masks[stage](samples), shape, self._device, self._tokens.get(task))

    @property
    def chains(self) -> list[HiddenStates]:
        """All hidden states, always in the same order."""
        return [states for each in (self._merged, self._calibrated, self._expert) for states in each.values()]

    def sample(self) -> tuple[Tensor, BatchCalls, Tokens]:
        """One sample of the first task as it enters the merged model's layer: hidden states, their calls, tokens."""
        task, first = next(iter(self._merged)), slice(0, 1)
        return *self._merged[task].load(0, first), self._tokens[task].part(first)

    def begin(self, layer: Layer, block: nn.Module, made: Tensor) -> None:
        """Before anything passes a layer: whether the merged model's block gives the same twice, if its kind is new.

        And in a stage's last layer: where layers are left out at random, the rate may grow with depth from zero.

        Args:
            layer: that begins.
            block: of the merged model.
            made: what it made of `sample()`.
        """
        code = _code(block)
        if code != self._code or layer.last:
            self._code = code
            self._repeat(self._merged, next(iter(self._merged)), layer, block, made)

    def advance_expert(self, layer: Layer, task: str, block: nn.Module) -> None:
        """The expert's samples pass its block."""
        if _code(block) != self._code:
            self._repeat(self._expert, task, layer, block)
        self._advance({task: self._expert[task]}, layer, block)

    def advance_merged(self, layer: Layer, block: nn.Module) -> None:
        """The merged model's samples pass its block as it was."""
        self._advance(self._merged, layer, block)

    def advance_calibrated(self, layer: Layer, block: nn.Module) -> None:
        """The calibrated model's samples pass its block as it is now."""
        self._advance(self._calibrated, layer, block)

    def distances(self) -> list[Tensor]:
        """Drift before and after, once all three models have passed the layer: scalars on the device."""
        return [self._distance(self._merged), self._distance(self._calibrated)]

    def repeats(self) -> list[Tensor]:
        """By how much two runs of the layer differ, a share of what may be: scalars on the device."""
        return list(self._repeats.values())

    def check_repeats(self, layer: Layer, values: Sequence[float]) -> None:
        """Refuse a layer that draws random numbers, told by `repeats`, which is over with that.

        Raises:
            UnsupportedModelError: names the model and the layer.
        """
        labels, self._repeats = list(self._repeats), {}
        for label, value in zip(labels, values, strict=True):
            if value > 1:
                raise UnsupportedModelError(f"{label}, {layer.path}: {UNSTEADY}")

    def followed(self) -> Iterator[tuple[str, str, Tensor, Tokens]]:
        """All samples as they leave the layer: the task, the model, hidden states, tokens."""
        kinds = (self._expert, ""), (self._merged, ", not calibrated"), (self._calibrated, ", calibrated so far")
        for states, kind in kinds:
            for task, each in states.items():
                hidden, _ = each.load(0, slice(0, each.shape(0)[0]))
                yield task, each.label + kind, hidden, self._tokens[task]

    def _repeat(
        self,
        states: Mapping[str, HiddenStates],
        task: str,
        layer: Layer,
        block: nn.Module,
        made: Tensor | None = None,
    ) -> None:
        one, tokens = slice(0, 1), self._tokens[task]
        hidden, calls = states[task].load(0, one)
        runs = [calls.run(layer.number, block, hidden) if made is None else made]
        runs.append(calls.run(layer.number, block, hidden))
        entering, first, second = (tokens.part(one).rows(x) for x in (hidden, *runs))
        added = (first - entering).norm(dtype=torch.float64)
        rounding = torch.finfo(first.dtype).eps * first.norm(dtype=torch.float64)
        self._repeats[states[task].label] = (first - second).norm(dtype=torch.float64) / (STEADY * added + rounding)

    def _advance(self, states: Mapping[str, HiddenStates], layer: Layer, block: nn.Module) -> None:
        for task, each in states.items():
            for chunk in self._chunks.of(0, self._tokens[task]):
                with chunk:
                    each.advance(chunk, layer, block)

    def _distance(self, states: Mapping[str, HiddenStates]) -> Tensor:
        distances = []
        for task, own in states.items():
            expert, found = (
                self._tokens[task].rows(each.load(0, slice(0, each.shape(0)[0]))[0]).double()
                for each in (self._expert[task], own)
            )
            distances.append((found - expert).norm() / expert.norm().clamp_min(1e-30))
        return torch.stack(distances).mean()


def _code(block: nn.Module) -> list[tuple[type, bool]]:
    """What runs when a block does, as far as that may differ: classes, and whether there are hooks."""
    return [(type(module), bool(module._forward_hooks or module._forward_pre_hooks)) for module in block.modules()]


def _check_same_first(task: str, whole: HiddenStates, followed: HiddenStates) -> None:
    """The first sample must enter a stage alike in two runs, of all of its batch and of a few; rounding may differ."""
    a, b = whole.first, followed.first
    difference = float((a - b).norm(dtype=torch.float64) / a.norm(dtype=torch.float64).clamp_min(1e-30))
    if difference > max(STEADY, 8 * torch.finfo(a.dtype).eps):
        raise UnsupportedModelError(f"{whole.label}, task {task}, batch 0, what enters the layers: {UNSTEADY}")
