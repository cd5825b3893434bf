"""How far a student's features are from its experts', layer by layer, before and after calibration.

It is followed on samples that nothing is fitted to, where some are held out, else on a few of those that are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from featcal_fast.errors import UnsupportedModelError
from featcal_fast.forward.calls import BatchCalls
from featcal_fast.layer.tokens import Tokens
from featcal_fast.models.family import LastLayerWeights
from featcal_fast.models.structure import Layer
from featcal_fast.streaming.chunks import Chunk, Chunks
from featcal_fast.streaming.held_out import HeldOut
from featcal_fast.streaming.hidden_states import HiddenStates
from featcal_fast.streaming.outcome import Compared, Followed, compare_outputs
from featcal_fast.streaming.sources import Source

PROBE_SAMPLES = 4  # a task; enough for a figure to watch, at a few per cent of a run's forward passes
ELEMENTS = 2**22  # of hidden states that are float64 at a time
# By how much two runs on the same sample may differ. The bits need not be the same: a GPU's atomic additions come in
# any order, which changes a result by a few roundings, and so by a small share of what the layer adds. Dropout of one
# per cent changes a tenth of that.
STEADY = 0.02
UNSTEADY = (
    "the same sample gives other hidden states the second time: the forward draws random numbers (dropout that is left "
    "on, patches masked at random), expected one that always gives the same"
)


class Distance(NamedTuple):
    """Between two models' hidden states on one task's samples, on the device: float64.

    Attributes:
        samples: `[samples]`, of each the mean over its tokens of `||h - h_e||^2 / ||h_e||^2`: in `whole` the few tokens
            whose features are a hundred times as large, as language models have them, hide all others.
        whole: `||H - H_e||_F / ||H_e||_F`, of all of them, a scalar.
    """

    samples: Tensor
    whole: Tensor


class DriftProbe:
    """Follows some samples a task through three models: merged, calibrated, expert.

    Drift of a layer is `||H - H_e||_F / ||H_e||_F` over the tokens that count, `H` the hidden states after the layer
    and `H_e` the expert's, averaged over tasks. *Before* is the merged model left as it was, end to end; *after* is
    the calibrated one, end to end.

    Args:
        student: the merged model.
        experts: by task.
        device: where blocks run.
        chunks: how many samples pass a layer at a time.
        hidden_states: makes those of a model on a task.

    Attributes:
        held_out: samples by task that nothing is fitted to; 0 where those that are fitted to are followed.
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
        self._sources = student, experts
        self._batches: dict[str, list[Mapping[str, Tensor]]] = {}  # that are followed
        self._masks = [stage.mask for stage in student.structure.family.stages]
        self._merged = {task: hidden_states(student, task) for task in experts}
        self._calibrated = {task: hidden_states(student, task) for task in experts}
        self._expert = {task: hidden_states(expert, task) for task, expert in experts.items()}
        self._tokens: dict[str, list[Tokens]] = {}
        self._repeats: dict[str, Tensor] = {}  # by the model's label: two runs of the layer on one sample
        self._code: object = None  # of the merged model's layer
        self.held_out: dict[str, int] = {}

    def enter(self, stage: int, task: str, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Go on to a stage of all three models with the batches that are held out, or with some of the first one.

        Raises:
            UnsupportedModelError: hidden states differ from those that enter when one sample comes alone.
        """
        followed: list[Mapping[str, Tensor]] = [batch for batch in batches if isinstance(batch, HeldOut)]
        self.held_out[task] = sum(len(next(iter(batch.values()))) for batch in followed)
        if not followed:
            followed = [{name: tensor[:PROBE_SAMPLES] for name, tensor in batches[0].items()}]
        self._batches[task] = followed
        source, expert = self._sources[1][task], self._expert[task]
        previous = expert.load(0, slice(0, 1))[0] if stage else None
        for states in (self._merged, self._calibrated, self._expert):
            states[task].enter(stage, followed)
        _check_same_first(task, self._merged[task], self._calibrated[task].first)
        again, _ = source.stage_inputs({name: tensor[:1] for name, tensor in followed[0].items()}, stage, previous)
        _check_same_first(task, expert, again)
        before = self._tokens.get(task)
        self._tokens[task] = [
            Tokens(self._masks[stage](batch), expert.shape(i), self._device, before[i] if before else None)
            for i, batch in enumerate(followed)
        ]

    @property
    def tasks(self) -> list[str]:
        """Those that are followed here."""
        return list(self._expert)

    def chains(self, task: str) -> list[HiddenStates]:
        """A task's hidden states, always in the same order."""
        return [each[task] for each in (self._merged, self._calibrated, self._expert)]

    def compare(self, forward_dtype: str) -> dict[str, Compared]:
        """What the models make of held-out samples, which have passed the last layer, by task."""
        held_out = {
            task: Followed(
                self._batches[task],
                self._tokens[task],
                self._merged[task],
                self._calibrated[task],
                self._expert[task],
            )
            for task, samples in self.held_out.items()
            if samples
        }
        return compare_outputs(*self._sources, held_out, self._device, forward_dtype)

    def sample(self) -> tuple[Tensor, BatchCalls, Tokens]:
        """One sample of the first task as it enters the merged model's layer: hidden states, their calls, tokens."""
        task, first = next(iter(self._merged)), slice(0, 1)
        return *self._merged[task].load(0, first), self._tokens[task][0].part(first)

    def begin(self, layer: Layer, block: nn.Module, made: Tensor | None) -> None:
        """Before anything passes a layer: whether the merged model's block gives the same twice, if its kind is new.

        And in a stage's last layer: where layers are left out at random, the rate may grow with depth from zero.

        Args:
            layer: that begins.
            block: of the merged model.
            made: what it made of `sample()`; None on ranks that do not follow the first task.
        """
        code = _code(block)
        if code != self._code or layer.last:
            self._code = code
            if made is not None:
                self._repeat(self._merged, next(iter(self._merged)), layer, block, made)

    def counted(self, task: str) -> tuple[int, int]:
        """Those of a task, and of them in the stage before."""
        batches = self._tokens[task]
        return sum(each.count for each in batches), sum(each.memory.count for each in batches if each.memory)

    def chunks(self, task: str) -> Iterator[Chunk]:
        """A task's samples, chunk by chunk."""
        for batch, tokens in enumerate(self._tokens[task]):
            yield from self._chunks.of(batch, tokens)

    def states(self, task: str) -> tuple[HiddenStates, HiddenStates]:
        """A task's hidden states in its expert and in the calibrated model."""
        return self._expert[task], self._calibrated[task]

    def check_expert(self, layer: Layer, task: str, block: nn.Module) -> None:
        """Whether the expert's block gives the same twice, if its kind is another than the merged model's."""
        if _code(block) != self._code:
            self._repeat(self._expert, task, layer, block)

    def advance_expert(self, layer: Layer, task: str, block: nn.Module) -> None:
        """The expert's samples pass its block."""
        self._advance({task: self._expert[task]}, layer, block)

    def advance_merged(self, layer: Layer, block: nn.Module) -> None:
        """The merged model's samples pass its block as it was."""
        self._advance(self._merged, layer, block)

    def advance_calibrated(self, layer: Layer, block: nn.Module) -> None:
        """The calibrated model's samples pass its block as it is now."""
        self._advance(self._calibrated, layer, block)

    def distances(self) -> tuple[list[Tensor], list[Tensor]]:
        """Drift before and after, once all three models have passed the layer: of each task, scalars on the device."""
        before, after = (
            [self._distance(task, self._stored(states[task])).whole for task in states]
            for states in (self._merged, self._calibrated)
        )
        return before, after

    def trial(self, layer: Layer, block: nn.Module) -> dict[str, Distance]:
        """What the calibrated model's layer would make with this block of held-out samples, by task with some.

        Nothing is kept; the experts have passed the layer, the calibrated model has not.
        """

        def run(states: HiddenStates) -> Made:
            def made(chunk: Chunk) -> Tensor:
                return states.run(chunk, layer, block)

            return made

        rule = layer.token_weights
        return {
            task: self._distance(task, run(states), rule)
            for task, states in self._calibrated.items()
            if self.held_out[task]
        }

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
                for batch, tokens in enumerate(self._tokens[task]):
                    hidden, _ = each.load(batch, slice(0, tokens.shape[0]))
                    yield task, each.label + kind, hidden, tokens

    def _repeat(
        self,
        states: Mapping[str, HiddenStates],
        task: str,
        layer: Layer,
        block: nn.Module,
        made: Tensor | None = None,
    ) -> None:
        one, tokens = slice(0, 1), self._tokens[task][0]
        hidden, calls = states[task].load(0, one)
        runs = [calls.run(layer.number, block, hidden) if made is None else made]
        runs.append(calls.run(layer.number, block, hidden))
        entering, first, second = (tokens.part(one).rows(x) for x in (hidden, *runs))
        added = (first - entering).norm(dtype=torch.float64)
        rounding = torch.finfo(first.dtype).eps * first.norm(dtype=torch.float64)
        self._repeats[states[task].label] = (first - second).norm(dtype=torch.float64) / (STEADY * added + rounding)

    def _advance(self, states: Mapping[str, HiddenStates], layer: Layer, block: nn.Module) -> None:
        for task, each in states.items():
            for chunk in self.chunks(task):
                with chunk:
                    each.advance(chunk, layer, block)

    def _stored(self, states: HiddenStates) -> Made:
        return lambda chunk: states.load(chunk.batch, chunk.rows)[0]

    def _distance(self, task: str, made: Made, rule: LastLayerWeights | None = None) -> Distance:
        """Of what `made` gives for each chunk."""
        parts = []
        for chunk in self.chunks(task):
            found = torch.empty(0)
            with chunk:
                found = _squares(made(chunk), self._expert[task].load(chunk.batch, chunk.rows)[0], chunk.tokens, rule)
            if not chunk.failed:
                parts.append(found)
        error, energy, relative = torch.cat(parts, 1).unbind()
        return Distance(relative, (error.sum() / energy.sum().clamp_min(1e-60)).sqrt())


Made = Callable[[Chunk], Tensor]  # the hidden states of a chunk's samples as they leave the layer


def _squares(found: Tensor, expert: Tensor, tokens: Tokens, rule: LastLayerWeights | None) -> Tensor:
    """Of each sample, over the tokens that count: sums of `||h - h_e||^2` and of `||h_e||^2`, the mean of their ratio.

    The mean is weighted as the layer's tokens are.

    Returns:
        `[3, samples]`, float64.
    """
    samples = max(1, ELEMENTS // found[0].numel())
    parts = []
    for rows in (slice(start, start + samples) for start in range(0, len(found), samples)):
        h, h_e = found[rows].double(), expert[rows].double()
        error, energy = (h - h_e).square().sum(2), h_e.square().sum(2)
        weights = torch.ones_like(error)
        if rule is not None:
            weights[:, 1:] = rule.rest
        parts.append(torch.stack([error, energy, weights * error / energy.clamp_min(1e-60), weights]))
    error, energy, ratio, weight = (tokens.sums(each) for each in torch.cat(parts, 1))
    return torch.stack([error, energy, ratio / weight.clamp_min(1e-60)])


def _code(block: nn.Module) -> list[tuple[type, bool]]:
    """What runs when a block does, as far as that may differ: classes, and whether there are hooks."""
    return [(type(module), bool(module._forward_hooks or module._forward_pre_hooks)) for module in block.modules()]


def _check_same_first(task: str, states: HiddenStates, again: Tensor) -> None:
    """The first sample must enter a stage alike in two runs; rounding may differ."""
    a, b = states.first, again
    difference = float((a - b).norm(dtype=torch.float64) / a.norm(dtype=torch.float64).clamp_min(1e-30))
    if difference > max(STEADY, 8 * torch.finfo(a.dtype).eps):
        raise UnsupportedModelError(f"{states.label}, task {task}, batch 0, what enters the layers: {UNSTEADY}")
