"""How far a student's features are from its experts', layer by layer, before and after calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from featcal_fast.forward.calls import BatchCalls
from featcal_fast.layer.tokens import Tokens
from featcal_fast.models.structure import Layer
from featcal_fast.streaming.chunks import Chunks
from featcal_fast.streaming.hidden_states import HiddenStates
from featcal_fast.streaming.sources import Source

PROBE_SAMPLES = 4  # a task; enough for a figure to watch, at a few per cent of a run's forward passes


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

    def enter(self, stage: int, task: str, batch: Mapping[str, Tensor]) -> None:
        """Go on to a stage of all three models with the first samples of `batch`."""
        samples = {name: tensor[:PROBE_SAMPLES] for name, tensor in batch.items()}
        for states in (self._merged, self._calibrated, self._expert):
            states[task].enter(stage, [samples])
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

    def advance_expert(self, layer: Layer, task: str, block: nn.Module) -> None:
        """The expert's samples pass its block."""
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
