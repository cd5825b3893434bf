"""Run a model block by block: its own forward says what each block is called with."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class BatchCalls:
    """What one batch's forward passes to each block besides the hidden states (masks, rotary angles, ...)."""

    args: list[tuple[Any, ...]]
    kwargs: list[dict[str, Any]]

    def run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """`block`, called as the model calls its block `index`: hidden states `[batch, tokens, width]` in and out."""
        out = block(hidden, *self.args[index], **self.kwargs[index])
        return out[0] if isinstance(out, tuple) else out


class _Stop(Exception):
    """Ends a forward that has shown all it is needed for."""


def first_hidden(
    model: nn.Module, blocks: nn.ModuleList, batch: Mapping[str, Tensor], forward_kwargs: Mapping[str, Any]
) -> tuple[Tensor, BatchCalls]:
    """The hidden states that enter block 0, and the calls of every block, by the model's own forward.

    Each block is replaced by a recorder that hands its input on, so masks, rotary angles and whatever differs from
    block to block are the model's own. Nothing after the last block runs.

    Returns:
        `[batch, tokens, width]` in the model's dtype, and the calls.
    """
    calls = BatchCalls([], [])
    first: list[Tensor] = []

    def recorder(index: int):
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if index == 0:
                first.append(hidden)
            calls.args.append(args[1:])
            calls.kwargs.append(kwargs)
            if index == len(blocks) - 1:
                raise _Stop
            return hidden

        return forward

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            block.forward = recorder(index)
            stack.callback(block.__dict__.pop, "forward")
        with suppress(_Stop):
            model(**batch, **forward_kwargs)
    return first[0], calls


def move(value: Any, device: torch.device, seen: dict[int, Any] | None = None) -> Any:
    """`value` with its tensors on `device`, in tuples, lists, dicts and calls; what is shared stays shared."""
    seen = {} if seen is None else seen
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, Tensor):
        moved: Any = value.to(device)
    elif isinstance(value, (tuple, list)):
        moved = type(value)(move(item, device, seen) for item in value)
    elif isinstance(value, dict):
        moved = {key: move(item, device, seen) for key, item in value.items()}
    elif isinstance(value, BatchCalls):
        moved = BatchCalls(move(value.args, device, seen), move(value.kwargs, device, seen))
    else:
        moved = value
    seen[id(value)] = moved
    return moved
