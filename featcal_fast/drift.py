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
        self._merged: dict[str, Stream] = {}
        self._calibrated: dict[str, Stream] = {}
        self._expert: dict[str, Stream] = {}
        self._tokens: dict[str, Tokens] = {}
        for task, expert in experts.items():
            batch = {name: tensor[:PROBE_SAMPLES] for name, tensor in batches[task][0].items()}
            self._merged[task] = Stream(student, task, [batch], device)
            self._calibrated[task] = Stream(student, task, [batch], device)
            self._expert[task] = Stream(expert, task, [batch], device)
            self._tokens[task] = Tokens(batch, self._expert[task].shape(0), device)

    def sample(self, task: str) -> tuple[Tensor, BatchCalls]:
        """The merged model's hidden states of a task's samples, as they enter the layer."""
        return self._merged[task].load(0)

    def advance_expert(self, index: int, task: str, block: nn.Module) -> None:
        self._expert[task].advance(index, block, 0)

    def advance_merged(self, index: int, block: nn.Module) -> None:
        for stream in self._merged.values():
            stream.advance(index, block, 0)

    def advance_calibrated(self, index: int, block: nn.Module) -> None:
        for stream in self._calibrated.values():
            stream.advance(index, block, 0)

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
