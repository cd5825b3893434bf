"""Whose fault it is that a number is not finite: looked for once one was found, so that a good run pays nothing."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor

from featcal_fast.errors import SolveError
from featcal_fast.forward.hooks import ActivationHooks
from featcal_fast.layer.layout import Layout
from featcal_fast.layer.solve import NotFinite
from featcal_fast.layer.tokens import Tokens
from featcal_fast.models.structure import Layer
from featcal_fast.streaming.streams import Streams


class Culprits:
    """Within the context a layer is solved; a `SolveError` then says which model, layer, module, task and sample.

    Hidden states are as they were when the layer began in the merged model, and past it in the experts.

    Args:
        streams: of the run.
        layer: that is solved.
        layout: of its block.
    """

    def __init__(self, streams: Streams, layer: Layer, layout: Layout) -> None:
        self._streams, self._layer, self._layout = streams, layer, layout
        self._largest = 0.0, ""  # of the merged model's features, and where

    def __enter__(self) -> None: ...

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if isinstance(error, NotFinite):
            raise SolveError(self._find(error)) from None
        if isinstance(error, SolveError):
            raise SolveError(f"{self._of(self._streams.label)}: {error}") from None

    def _of(self, model: str, modules: str = "") -> str:
        return f"{model}, {self._layer.path}{'.' if modules else ''}{modules}"

    @torch.no_grad()
    def _find(self, error: NotFinite) -> str:
        """The earliest that is not finite, in the order in which things were made."""
        if not error.groups:
            return self._first(self._in_drift()) or f"{self._of(self._streams.label)}: {error}"
        return self._first(self._in_student()) or self._first(self._in_experts(error)) or self._in_sums(error)

    def _first(self, found: str | None) -> str | None:
        """Of what all ranks have found, each among its own samples, the first in the order of tasks."""
        return next((each for each in self._streams.world.gather(found) if each), None)

    def _in_student(self) -> str | None:
        """What enters the layer, or what its modules are given."""
        # The block that was calibrated holds its new weights by now.
        block = self._streams.merged_block(self._layer)
        names = [name for group in self._layout.groups for name in group.modules] + list(self._layout.norms)
        for part, states in self._streams.student_states.items():
            task = part.task
            for chunk in self._streams.passes(part):
                with chunk:
                    hidden, calls = states.load(chunk.batch, chunk.rows)
                    if (sample := chunk.tokens.find_not_finite(hidden)) is not None:
                        found = f"{self._of(states.label)}: the hidden states that enter it are not finite"
                        return _told(found, hidden, task, states.offset + chunk.batch, chunk.rows.start + sample)
                    inputs: dict[str, Tensor] = {}
                    with ActivationHooks(block, names, inputs.__setitem__):
                        calls.run(self._layer.number, block, hidden)
                    for name, x in inputs.items():
                        tokens = self._tokens_of(name, chunk.tokens)
                        if (sample := tokens.find_not_finite(x)) is not None:
                            found = f"{self._of(states.label, name)}: its features are not finite"
                            return _told(found, x, task, states.offset + chunk.batch, chunk.rows.start + sample)
                        largest = float(tokens.rows(x).abs().max()) if tokens.count else 0.0
                        self._largest = max(
                            self._largest, (largest, f"{name}, batch {states.offset + chunk.batch} of task {task}")
                        )
        return None

    def _tokens_of(self, name: str, tokens: Tokens) -> Tokens:
        memory = tokens.memory if self._layer.reads_memory(name) else None
        return memory or tokens

    def _in_experts(self, error: NotFinite) -> str | None:
        """What leaves it, which is not finite if what its modules were given or made was not."""
        modules = ", ".join(error.groups[0].modules)
        for part, states in self._streams.expert_states.items():
            task = part.task
            for chunk in self._streams.passes(part):
                hidden, _ = states.load(chunk.batch, chunk.rows)
                if (sample := chunk.tokens.find_not_finite(hidden)) is not None:
                    entered = error.groups[0] == self._layout.groups[0]
                    what = "the hidden states that enter the layer, and so the" if entered else "the"
                    found = f"{self._of(states.label, modules)}: {what} features are not finite"
                    return _told(found, hidden, task, states.offset + chunk.batch, chunk.rows.start + sample)
        return None

    def _in_drift(self) -> str | None:
        """What leaves it of the samples whose drift is followed."""
        for task, name, hidden, tokens in self._streams.drift.followed():
            if (sample := tokens.find_not_finite(hidden)) is not None:
                found = f"{self._of(name)}: the hidden states that leave it are not finite"
                return _told(found, hidden, task, 0, sample)
        return None

    def _in_sums(self, error: NotFinite) -> str:
        modules = ", ".join(name for group in error.groups for name in group.modules)
        value, where = max(map(tuple, self._streams.world.gather(self._largest)))
        return (
            f"{self._of(self._streams.label, modules)}: sums over the features leave float32's range (3.4e+38), though "
            f"the features are finite, up to {value:.1e} ({where}); look at the weights of the merged model and the "
            "experts that make them so large"
        )


def _told(found: str, x: Tensor, task: str, batch: int, sample: int) -> str:
    hint = (
        "float16 ends at 65504: convert the models to bfloat16"
        if x.dtype == torch.float16
        else "look at this sample, and at the model's weights"
    )
    return f"{found} (NaN or Inf) in batch {batch}, sample {sample} of task {task}; {hint}"
