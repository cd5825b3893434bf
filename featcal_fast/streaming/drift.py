"""How far a student's features are from its experts', layer by layer, before and after calibration."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from featcal_fast.forward.calls import BatchCalls
from featcal_fast.layer.tokens import Tokens
from featcal_fast.streaming.chunks import Chunks
from featcal_fast.streaming.hidden_states import HiddenStates, Run
from featcal_fast.streaming.sources import Source
from featcal_fast.streaming.transfers import Transfers

PROBE_SAMPLES = 4  # a task; enough for a figure to watch, at a few per cent of a run's forward passes


class DriftProbe:
    """Follows a few calibration samples a task through three models: merged, calibrated, expert.

    Drift of a layer is `||H - H_e||_F / ||H_e||_F` over the tokens that count, `H` the hidden states after the layer
    and `H_e` the expert's, averaged over tasks. *Before* is the merged model left as it was, end to end; *after* is
    the calibrated one, end to end.
    """

    def __init__(
        self,
        student: Source,
        experts: Mapping[str, Source],
        device: torch.device,
        chunks: Chunks,
        transfers: Transfers,
        run: Run,
    ) -> None:
        self._device, self._chunks, self._run = device, chunks, run
        self._masks = [stage.mask for stage in student.structure.family.stages]
        self._merged = {task: HiddenStates(student, task, device, transfers) for task in experts}
        self._calibrated = {task: HiddenStates(student, task, device, transfers) for task in experts}
        self._expert = {task: HiddenStates(expert, task, device, transfers) for task, expert in experts.items()}
        self._tokens: dict[str, Tokens] = {}

    def enter(self, stage: int, task: str, batch: Mapping[str, Tensor]) -> None:
        """Go on to a stage of all three models with the first samples of `batch`."""
        samples = {name: tensor[:PROBE_SAMPLES] for name, tensor in batch.items()}
        for streams in (self._merged, self._calibrated, self._expert):
            streams[task].enter(stage, [samples])
        shape = self._expert[task].shape(0)
        self._tokens[task] = Tokens(self._masks[stage](samples), shape, self._device, self._tokens.get(task))

    def sample(self, task: str) -> tuple[Tensor, BatchCalls, Tokens]:
        """The merged model's hidden states of one sample of a task, as they enter the layer, their calls and tokens."""
        first = slice(0, 1)
        return *self._merged[task].load(0, first), self._tokens[task].part(first)

    def advance_expert(self, number: int, task: str, block: nn.Module) -> None:
        self._advance(task, self._expert[task], number, block)

    def advance_merged(self, number: int, block: nn.Module) -> None:
        for task, stream in self._merged.items():
            self._advance(task, stream, number, block)

    def advance_calibrated(self, number: int, block: nn.Module) -> None:
        for task, stream in self._calibrated.items():
            self._advance(task, stream, number, block)

    def drift(self) -> list[Tensor]:
        """Drift before and after, once all three models have passed the layer: scalars on the device."""
        return [self._distance(self._merged), self._distance(self._calibrated)]

    def _advance(self, task: str, stream: HiddenStates, number: int, block: nn.Module) -> None:
        self._chunks.each(self._tokens[task].extent, partial(stream.advance, number, block, 0, run=self._run))

    def _distance(self, streams: Mapping[str, HiddenStates]) -> Tensor:
        distances = []
        for task, stream in streams.items():
            expert, found = (
                self._tokens[task].rows(each.load(0, slice(0, each.shape(0)[0]))[0]).double()
                for each in (self._expert[task], stream)
            )
            distances.append((found - expert).norm() / expert.norm().clamp_min(1e-30))
        return torch.stack(distances).mean()
