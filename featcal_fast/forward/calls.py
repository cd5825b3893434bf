"""Run a model block by block: its own forward says what each block is called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from featcal_fast.errors import DataError, UnsupportedModelError
from featcal_fast.forward.failures import ModelCode, Passing, Refused
from featcal_fast.forward.shared import SharedTensors, SharedView
from featcal_fast.models import not_supported
from featcal_fast.models.structure import Structure


class Origin(NamedTuple):
    """Whose calls they are, for errors: a model's by its label, of the blocks at a path, on some samples of a batch."""

    model: str
    path: str
    task: str
    batch: int
    rows: slice

    def __str__(self) -> str:
        last = self.rows.stop - 1
        rows = f"sample {last}" if last <= self.rows.start else f"samples {self.rows.start} to {last}"
        return f"batch {self.batch}, {rows} of task {self.task}"


@dataclass
class BatchCalls:
    """What one batch's forward passes to a stage's blocks besides the hidden states (masks, rotary angles, ...).

    Attributes:
        args, kwargs: of each block.
        origin: whose they are; None where nobody said.
    """

    args: list[tuple[Any, ...]]
    kwargs: list[dict[str, Any]]
    origin: Origin | None = None

    def run(self, number: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """`block`, called as the model calls block `number` of the stage: `[batch, tokens, width]` in and out.

        Raises:
            UnsupportedModelError: what the block's own code raised, or it gives no hidden states of the shape that
                they had.
        """
        with ModelCode(UnsupportedModelError, lambda: self._doing(number, block)):
            out: Any = block(hidden, *self.args[number], **self.kwargs[number])
        out = out[0] if isinstance(out, tuple) and out else out
        if not isinstance(out, Tensor) or out.shape != hidden.shape:
            raise UnsupportedModelError(
                f"{self._doing(number, block)}: found {described(out)} to come out of it, expected hidden states "
                f"{tuple(hidden.shape)}"
            )
        return out

    def _doing(self, number: int, block: nn.Module) -> str:
        if self.origin is None:
            return f"running a {type(block).__name__}, block {number} of its stage"
        return f"{self.origin.model}, {self.origin.path}.{number}: running its layer on {self.origin}"

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


class _Stop(Passing):
    """Ends a forward that has shown all it is needed for."""


class _NotHandedOn(Passing):
    """A block was not given what the one before it returned."""


def stage_inputs(
    structure: Structure,
    batch: Mapping[str, Tensor],
    stage: int = 0,
    previous: Tensor | None = None,
    first_block: nn.Module | None = None,
    label: str = "model",
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
        label: what to call the model in an error.

    Returns:
        `[batch, tokens, width]` in the model's dtype, and the calls.

    Raises:
        DataError: what the model's own code raised; it has no such argument, though it may swallow any; or a number in
            the batch has no place in one of its tables.
        UnsupportedModelError: the model does more between two blocks than handing hidden states on, or does not call
            each once, in order.
    """
    known = _arguments(type(structure.entry).forward)
    for name in batch if known else ():
        if name not in known:
            raise DataError(
                f"the {label} cannot take the input {name}, expected some of {', '.join(known)}, which its "
                f"{type(structure.entry).__name__} takes"
            )
    for bare in (True, False):  # a model unpacks what its blocks return, or does not
        with suppress(_NotHandedOn):
            return _record_stage(structure, batch, stage, previous, first_block, bare, label)
    raise not_supported(
        structure.model,
        label,
        f"the blocks of {structure.paths[stage]} are not given what the one before returned; a model that changes "
        "hidden states between its blocks cannot be calibrated block by block",
    )


def _record_stage(
    structure: Structure,
    batch: Mapping[str, Tensor],
    stage: int,
    previous: Tensor | None,
    first_block: nn.Module | None,
    bare: bool,
    label: str,
) -> tuple[Tensor, BatchCalls]:
    blocks, relays = structure.stage(stage), structure.family.relays
    calls, first = BatchCalls([], []), []
    relayed: list[Any] = [None] * relays
    run_first = first_block or blocks[0].forward

    def doing() -> str:
        taken = ", ".join(f"{name} {tuple(value.shape)}{_range_of(value)}" for name, value in batch.items())
        return f"the {label} cannot take the inputs {taken}, says its {type(structure.model).__name__}"

    def returned(hidden: Tensor) -> Any:
        return hidden if bare and not relays else (hidden, *relayed)

    def record(number: int, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if number != len(calls.args):
            raise _not_in_order(structure, stage, label, len(calls.args))
        if number == 0:
            if not isinstance(hidden, Tensor) or hidden.ndim != 3:
                found = f"{structure.paths[stage]}.0 is given {described(hidden)}, expected [batch, tokens, width]"
                usual = "input_ids" in batch and all(value.ndim == 2 for value in batch.values())
                raise not_supported(structure.model, label, found) if usual else Refused(found)
            first.append(hidden)
            if relays:
                with ModelCode(DataError, doing):
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
            for number, block in enumerate(structure.stage(passed)):
                block.forward = partial(record, number) if passed == stage else pass_by
                stack.callback(block.__dict__.pop, "forward")
        for table in _tables(structure) if any(value.device.type in LATE for value in batch.values()) else ():
            stack.callback(table.register_forward_pre_hook(partial(_check_rows, structure)).remove)
        with suppress(_Stop):
            with ModelCode(DataError, doing):
                structure.entry(**batch, **structure.family.forward_kwargs)
            raise _not_in_order(structure, stage, label, len(calls.args))
    return first[0], calls


# Devices on which a number that has no row in a table ends the process's use of the device, and is told far from there;
# elsewhere the model's own code tells at once.
LATE = ("cuda",)


@lru_cache(maxsize=64)
def _arguments(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments of a model's forward, besides itself and those that it swallows unnamed."""
    found = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(each.name for each in found if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY))


def _range_of(value: Tensor) -> str:
    """What numbers integers are: those beyond the end of a table have no row in it."""
    if value.dtype not in (torch.int32, torch.int64) or not value.numel():
        return ""
    low, high = map(int, value.aminmax())
    return f" from {low} to {high}"


def _not_in_order(structure: Structure, stage: int, label: str, called: int) -> UnsupportedModelError:
    return not_supported(
        structure.model,
        label,
        f"its forward leaves the order after {called} of the {len(structure.stage(stage))} blocks of "
        f"{structure.paths[stage]}; expected it to call each once, one after the other: a model that skips or repeats "
        "blocks cannot be calibrated block by block",
    )


def _tables(structure: Structure) -> Iterator[nn.Embedding]:
    """What turns numbers of a batch into rows: embeddings outside of the blocks."""
    blocks = {id(structure.stage(stage)) for stage in range(len(structure.paths))}
    left: list[nn.Module] = [structure.entry]
    while left:
        module = left.pop()
        if isinstance(module, nn.Embedding):
            yield module
        elif id(module) not in blocks:
            left.extend(module.children())


def _check_rows(structure: Structure, table: nn.Embedding, args: tuple[Any, ...]) -> None:
    """Refuse numbers beyond a table's end."""
    numbers = args[0] if args else None
    if not isinstance(numbers, Tensor) or numbers.is_meta or numbers.dtype not in (torch.int32, torch.int64):
        return  # what a model's own code has to say to that
    low, high = map(int, numbers.aminmax()) if numbers.numel() else (0, 0)
    if low < 0 or high >= len(table.weight):
        name = next(name for name, module in structure.model.named_modules() if module is table)
        raise Refused(
            f"{name} is asked for row {low if low < 0 else high}, expected 0 to {len(table.weight) - 1}: a token "
            "outside of the vocabulary, or a sample longer than the model's positions"
        )


def described(value: object) -> str:
    """What something is, in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    empty = isinstance(value, (Mapping, list, tuple)) and not value  # of an array nobody can say whether it is true
    return f"an empty {type(value).__name__}" if empty else f"a {type(value).__name__}"


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
