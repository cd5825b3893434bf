"""Run a model block by block: its own forward says what each block is called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featcal_fast.errors import UnsupportedModelError
from featcal_fast.forward.shared import SharedTensors, SharedView
from featcal_fast.models.structure import Structure


@dataclass
class BatchCalls:
    """What one batch's forward passes to a stage's blocks besides the hidden states (masks, rotary angles, ...)."""

    args: list[tuple[Any, ...]]
    kwargs: list[dict[str, Any]]

    def run(self, number: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """`block`, called as the model calls block `number` of the stage: `[batch, tokens, width]` in and out."""
        out: Tensor | tuple[Tensor, ...] = block(hidden, *self.args[number], **self.kwargs[number])
        return out[0] if isinstance(out, tuple) else out

    def part(self, rows: slice, size: int) -> BatchCalls:
        """The calls for some of the batch's `size` samples: matrices and larger with a row a sample are cut.

        A `[tokens, ...]` tensor of exactly as many tokens as samples would be cut, too; no family here is given one.
        """

        def cut(x: Tensor | SharedView) -> Tensor | SharedView:
            if isinstance(x, SharedView):
                return x.part(rows)
            return x[rows] if x.ndim >= 2 and len(x) == size else x

        return BatchCalls(*_mapped((self.args, self.kwargs), cut, {}))

    def sharing(self, shared: SharedTensors, size: int) -> BatchCalls:
        """The calls of a batch of `size` samples without what other batches' have, too; `move` makes them whole."""
        return BatchCalls(*_mapped((self.args, self.kwargs), lambda x: shared.share(x, size), {}))


class _Stop(Exception):
    """Ends a forward that has shown all it is needed for."""


class _NotHandedOn(Exception):
    """A block was not given what the one before it returned."""


def stage_inputs(
    structure: Structure,
    batch: Mapping[str, Tensor],
    stage: int = 0,
    previous: Tensor | None = None,
    first_block: nn.Module | None = None,
) -> tuple[Tensor, BatchCalls]:
    """The hidden states that enter a stage, and the calls of its blocks, by the model's own forward.

    Each block is replaced by a recorder that hands its input on, so masks, rotary angles and whatever differs from
    block to block are the model's own. Nothing after the stage's last block runs.

    Args:
        structure: the model.
        batch: its keyword arguments.
        stage: which one.
        previous: the hidden states that leave the last block of the stage before it.
        first_block: the stage's first block with its weights, for a family whose first block makes values for the
            others; by default the model's own.

    Returns:
        `[batch, tokens, width]` in the model's dtype, and the calls.

    Raises:
        UnsupportedModelError: the model does more between two blocks than handing hidden states on.
    """
    for bare in (True, False):  # a model unpacks what its blocks return, or does not
        with suppress(_NotHandedOn):
            return _record_stage(structure, batch, stage, previous, first_block, bare)
    raise UnsupportedModelError(
        f"{type(structure.model).__name__}: the blocks of {structure.paths[stage]} are not given what the one before "
        "returned; a model that changes hidden states between its blocks cannot be calibrated block by block"
    )


def _record_stage(
    structure: Structure,
    batch: Mapping[str, Tensor],
    stage: int,
    previous: Tensor | None,
    first_block: nn.Module | None,
    bare: bool,
) -> tuple[Tensor, BatchCalls]:
    blocks, relays = structure.stage(stage), structure.family.relays
    calls, first = BatchCalls([], []), []
    relayed: list[Any] = [None] * relays
    run_first = first_block or blocks[0].forward

    def returned(hidden: Tensor) -> Any:
        return hidden if bare and not relays else (hidden, *relayed)

    def record(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        number = len(calls.args)
        if number == 0:
            first.append(hidden)
            if relays:
                relayed[:] = run_first(*args, **kwargs)[1 : 1 + relays]
                relayed.extend([None] * (relays - len(relayed)))
        elif hidden is not first[0]:
            raise _NotHandedOn
        calls.args.append(args[1:])
        calls.kwargs.append({key: value for key, value in kwargs.items() if key != "hidden_states"})
        if number == len(blocks) - 1:
            raise _Stop
        return returned(hidden)

    def pass_by(*args: Any, **kwargs: Any) -> Any:
        assert previous is not None
        return returned(previous)

    with ExitStack() as stack:
        for passed in range(stage + 1):
            for block in structure.stage(passed):
                block.forward = record if passed == stage else pass_by
                stack.callback(block.__dict__.pop, "forward")
        with suppress(_Stop):
            structure.entry(**batch, **structure.family.forward_kwargs)
    return first[0], calls


def move(value: Any, device: torch.device) -> Any:
    """`value` with its tensors on `device`, in tuples, lists, dicts and calls; what is shared stays shared."""
    ordered = device.type == "cuda"  # copies to a GPU stay in order by themselves; the host must wait for those from it

    def moved(x: Tensor | SharedView) -> Tensor:
        return (x.tensor() if isinstance(x, SharedView) else x).to(device, non_blocking=ordered)

    return _mapped(value, moved, {})


def pinned(value: Any) -> Any:
    """`value`, its tensors in pinned host memory, where there is some: copies to a GPU then need not wait."""

    def pin(x: Tensor | SharedView) -> Tensor | SharedView:
        if isinstance(x, SharedView):
            return x
        try:
            return x.to("cpu").pin_memory()
        except RuntimeError:  # no more of it; ordinary memory will do
            return x.to("cpu")

    return _mapped(value, pin, {})


def _mapped(value: Any, change: Callable[[Any], Any], seen: dict[int, Any]) -> Any:
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, (Tensor, SharedView)):
        mapped: Any = change(value)
    elif isinstance(value, (tuple, list)):
        mapped = type(value)(_mapped(item, change, seen) for item in value)
    elif isinstance(value, dict):
        mapped = {key: _mapped(item, change, seen) for key, item in value.items()}
    elif isinstance(value, BatchCalls):
        mapped = BatchCalls(_mapped(value.args, change, seen), _mapped(value.kwargs, change, seen))
    else:
        mapped = value
    seen[id(value)] = mapped
    return mapped
