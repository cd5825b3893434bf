"""How far a student's features are from its experts', layer by layer, before and after calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from featcal_fast.activations import Stream
from featcal_fast.models.stepping import BatchCalls
from featcal_fast.sources import Source
from featcal_fast.tokens import Tokens

PROBE_SAMPLES = 4  # a task; enough for a figure to watch, at a few per cent of a run's forward passes


class Probe:
    """Follows a few calibration samples a task through three models: merged, calibrated, expert.

    Drift of a layer is `||H - H_e||_F / ||H_e||_F` over the tokens that count, `H` the hidden states after the layer
    and `H_e` the expert's, averaged over tasks. *Before* is the merged model left as it was, end to end; *after* is
    the calibrated one, end to end.
    """

    def __init__(
        self,
        student: Source,
        experts: Mapping[str, Source],
        batches: Mapping[str, Sequence[Mapping[str, Tensor]]],
        device: torch.device,
    ) -> None:
        self._device, self._masks = device, [stage.mask for stage in student.structure.family.stages]
        self._batches = {
            task: {name: tensor[:PROBE_SAMPLES] for name, tensor in items[0].items()} for task, items in batches.items()
        }
        begin = {task: [batch] for task, batch in self._batches.items()}
        self._merged = {task: Stream(student, task, begin[task], device) for task in experts}
        self._calibrated = {task: Stream(student, task, begin[task], device) for task in experts}
        self._expert = {task: Stream(expert, task, begin[task], device) for task, expert in experts.items()}
        self._tokens: dict[str, Tokens] = {}
        self._see_tokens(0)

    def enter(self, stage: int) -> None:
        """Go on to the next stage of all three models."""
        for streams in (self._merged, self._calibrated, self._expert):
            for stream in streams.values():
                stream.enter(stage)
        self._see_tokens(stage)

    def _see_tokens(self, stage: int) -> None:
        self._tokens = {
            task: Tokens(self._masks[stage](self._batches[task]), stream.shape(0), self._device, self._tokens.get(task))
            for task, stream in self._expert.items()
        }

    def sample(self, task: str) -> tuple[Tensor, BatchCalls, Tokens]:
        """The merged model's hidden states of a task's samples, as they enter the layer, their calls and tokens."""
        return *self._merged[task].load(0), self._tokens[task]

    def advance_expert(self, number: int, task: str, block: nn.Module) -> None:
        self._expert[task].advance(number, block, 0)

    def advance_merged(self, number: int, block: nn.Module) -> None:
        for stream in self._merged.values():
            stream.advance(number, block, 0)

    def advance_calibrated(self, number: int, block: nn.Module) -> None:
        for stream in self._calibrated.values():
            stream.advance(number, block, 0)

    def drift(self) -> tuple[float, float]:
        """Drift before and after, once all three models have passed the layer."""
        return self._distance(self._merged), self._distance(self._calibrated)

    def _distance(self, streams: Mapping[str, Stream]) -> float:
        distances = []
        for task, stream in streams.items():
            expert = self._tokens[task].rows(self._expert[task].load(0)[0]).double()
            found = self._tokens[task].rows(stream.load(0)[0]).double()
            distances.append(float((found - expert).norm() / expert.norm().clamp_min(1e-30)))
        return sum(distances) / len(distances)
