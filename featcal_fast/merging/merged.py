"""A merged checkpoint that exists one read at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featcal_fast.checkpoints import CachedExpert, Checkpoint, Metadata, TensorInfo, TensorSource, plain_files
from featcal_fast.errors import ModelMismatchError, UnsupportedModelError
from featcal_fast.merging.method import Method, Options
from featcal_fast.merging.methods import METHODS
from featcal_fast.merging.rows import Rows
from featcal_fast.merging.stack import Reader, Stack, part_size, whole
from featcal_fast.models.counterparts import counterparts, without_counterpart
from featcal_fast.models.meta import linear_tensors, stored_names
from featcal_fast.models.tokens import OwnTokens

WHOLE = 0  # times in parts: once, and at once
IN_MEMORY = 2**29  # bytes of a tensor of all models that are kept, not read again, by a method that needs them twice


def merge_stack(method: Method, options: Options, stack: Stack, dtype: torch.dtype) -> Tensor:
    """A tensor merged, on the host.

    Args:
        method: one of `METHODS`.
        options: for it.
        stack: the tensor.
        dtype: of the result.
    """
    merged, end = torch.empty(stack.shape, dtype=dtype), 0
    for part in method.merge(stack, options):
        start, end = end, end + len(part)
        merged.view(-1)[start:end].copy_(part if part.device == merged.device else part.to(dtype))
    assert end == stack.numel
    return merged


def merge_tensor(
    method: Method, options: Options, base: Tensor, experts: Mapping[str, Tensor], size: int | None = None
) -> Tensor:
    """A tensor that is in memory, merged, in the base's dtype; a matrix is taken for a linear weight.

    Args:
        method: one of `METHODS`.
        options: for it.
        base: of any shape and floating type.
        experts: the same tensor of each.
        size: elements of a part.
    """
    own = {task: whole(tensor) for task, tensor in experts.items()}
    transposed = False if base.dim() == 2 else None
    stack = Stack("tensor", base.shape, whole(base), own, torch.device("cpu"), transposed, size)
    return merge_stack(method, options, stack, base.dtype)


class MergedCheckpoint:
    """`base` and `experts` merged on the fly; takes the base's layout, config and side files.

    Sums are float32 whatever the checkpoints' dtype, in the order of `experts`. Tensors that are not floating point
    keep the base's values, and so do those that an expert lacks and that are no parameters. Where an expert has another
    vocabulary, its embedding's rows are those of the same tokens.

    A tensor is merged in parts, and read in parts where a model has it as it is. A method that needs it more than once
    reads it once all the same, where all models' have room in `IN_MEMORY`, and else again each time.

    Args:
        base: gives names, shapes, dtypes and shards.
        experts: by task.
        method: one of `METHODS`.
        options: for it.
        tokens: of the experts, by task: for each row of the base's embedding the expert's.
        device: where tensors are merged.

    Raises:
        ModelMismatchError: an expert lacks a tensor of the base, or has it in another shape.
        UnsupportedModelError: an expert's layout differs from the base's in more than names; the base is no model that
            can be built, and vocabularies differ, or the method has to know which tensors are linear weights.
    """

    label = "merged model"

    def __init__(
        self,
        base: Checkpoint,
        experts: Mapping[str, TensorSource],
        method: str,
        options: Options,
        tokens: Mapping[str, OwnTokens],
        device: torch.device,
    ) -> None:
        self.base, self.experts, self.tokens, self.device = base, experts, tokens, device
        self.method, self.options = METHODS[method], options
        self.tensors: dict[str, TensorInfo] = base.tensors
        self._sources: dict[str | None, TensorSource] = {None: base}
        self._sources.update(experts)
        self._names = {task: counterparts(base, expert) for task, expert in experts.items()}
        self._rows = Rows(base, experts, tokens)
        self._linear = linear_tensors(base) if self.method.matrix_bytes else {}
        self._kept: set[str] = set()
        for task in experts:
            for name, info in base.tensors.items():
                if not info.dtype.is_floating_point or (name not in self._names[task] and name in self._no_parameters):
                    self._kept.add(name)
                else:
                    self._check(task, name, info)

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def bytes_read(self) -> int:
        """Zero: reads count where they are made, with the base and the experts."""
        return 0

    @cached_property
    def names(self) -> dict[str, str]:
        return self.base.names

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, merged."""
        return {name: self._merge(name) if self._is_merged(name) else self.base.read([name])[name] for name in names}

    def stored_bytes(self, names: Iterable[str]) -> int:
        """What `read(names)` takes from files."""
        return sum(self._sources[model].stored_bytes(own) for model, own in self.reads(names).items())

    def reads(self, names: Iterable[str]) -> dict[str | None, list[str]]:
        """What `read(names)` reads of each expert, and of the base, under None: a tensor as often as it is read."""
        found: dict[str | None, list[str]] = {None: [], **{task: [] for task in self.experts}}
        for name in names:
            if not self._is_merged(name):
                found[None].append(name)
                continue
            for model, times in self._times(name).items():
                found[model] += [self._own(model, name)] * (times or 1)
        return found

    def read_whole(self, name: str) -> list[tuple[TensorSource, str]]:
        """The models whose tensor is formed or read as a whole where `name` is merged, and what they call it."""
        times = self._times(name) if self._is_merged(name) else {}
        return [(self._sources[model], self._own(model, name)) for model in times if times[model] == WHOLE]

    def merging_bytes(self, name: str) -> tuple[int, int]:
        """Memory that merging a tensor takes besides the result, and besides unpacking: the host's, and a GPU's."""
        if not self._is_merged(name):
            return 0, 0
        info, count = self.tensors[name], len(self.experts)
        held = sum(model.tensors[own].nbytes for model, own in self.read_whole(name))
        moved = max((self._info(task, name).nbytes for task in self.experts if self._rows.moves(task, name)), default=0)
        aligning = max(0, moved - info.nbytes)  # when there is no result yet
        working = 4 * min(part_size(self.device), torch.Size(info.shape).numel()) * self.method.rooms(count)
        if self.method.matrix_bytes and name in self._linear:
            rows, columns = reversed(info.shape[-2:]) if self._linear[name] else info.shape[-2:]
            working += 4 * rows * columns + self.method.matrix_bytes((rows, columns), count)
        if self.device.type == "cpu":
            return held + max(aligning, working), 0
        return held + aligning, working

    def not_merged(self) -> dict[str, list[str]]:
        """Weights that the base has not, though its model is of the experts' class, by task."""
        found = {task: without_counterpart(self.base, each, self._names[task]) for task, each in self.experts.items()}
        return {task: names for task, names in found.items() if names}

    def side_files(self) -> dict[str, Path]:
        return self.base.side_files()

    def left_out(self) -> list[str]:
        return self.base.left_out()

    def metadata(self) -> Metadata:
        """None: the base's would be of another model."""
        return Metadata()

    def _merge(self, name: str) -> Tensor:
        info, times = self.tensors[name], self._times(name)
        with ExitStack() as opened:
            held = self.base.read([name])[name] if times.get(None) == WHOLE else None
            base = whole(held) if held is not None else self._in_parts(None, name, opened) if None in times else None
            experts = {
                task: whole(self._expert_tensor(task, name, held))
                if times[task] == WHOLE
                else self._in_parts(task, name, opened)
                for task in self.experts
            }
            stack = Stack(name, info.shape, base, experts, self.device, self._linear.get(name))
            return merge_stack(self.method, self.options, stack, info.dtype)

    def _in_parts(self, model: str | None, name: str, opened: ExitStack) -> Reader:
        own = self._own(model, name)
        shards = plain_files(self._sources[model], own)
        assert shards is not None
        return opened.enter_context(shards.in_parts(own))

    def _expert_tensor(self, task: str, name: str, base: Tensor | None) -> Tensor:
        expert, own = self.experts[task], self._own(task, name)
        # The error of compressed storage stays out of the merged model.
        read = expert.read_exactly if isinstance(expert, CachedExpert) else expert.read
        tensor = read([own])[own]
        if not self._rows.moves(task, name):
            return tensor
        assert base is not None
        return self._rows.aligned(task, name, tensor, base)

    def _times(self, name: str) -> dict[str | None, int]:
        """How often a tensor is read in parts, or `WHOLE`, of every model that is needed; None is the base."""
        linear, passes = name in self._linear, self.method.passes(self.options)
        moved: set[str | None] = {task for task in self.experts if self._rows.moves(task, name)}
        needed = [model for model in self._sources if model is not None or self.method.needs_base or moved]
        held = moved | {model for model in needed if plain_files(self._sources[model], self._own(model, name)) is None}
        if moved or linear:
            held.add(None)
        elif passes > 1:
            held |= set(needed) if sum(self._info(model, name).nbytes for model in needed) <= IN_MEMORY else set()
        return {model: WHOLE if model in held else 1 if linear else passes for model in needed}

    def _is_merged(self, name: str) -> bool:
        return name not in self._kept

    @cached_property
    def _no_parameters(self) -> set[str]:
        """Tensors that the base's model makes nothing of, such as rotary angles that older versions wrote."""
        try:
            return set(stored_names(self.base).unknown)
        except UnsupportedModelError:  # no model that can be built
            return set()

    def _own(self, model: str | None, name: str) -> str:
        """An expert's name of a tensor of the base's, or the base's."""
        return name if model is None else self._names[model][name]

    def _info(self, model: str | None, name: str) -> TensorInfo:
        return self._sources[model].tensors[self._own(model, name)]

    def _check(self, task: str, name: str, info: TensorInfo) -> None:
        expert = self.experts[task]
        if name not in self._names[task]:
            raise ModelMismatchError(
                f"{expert.label}: {expert.path} has no tensor {name}, which {self.base.label} "
                f"({self.base.path}) has; experts to be "
                "merged must have the base's architecture"
            )
        own, found = self._own(task, name), self._info(task, name)
        if not self._rows.fits(task, name, found):
            raise ModelMismatchError(
                f"{expert.label}: tensor {own} in {expert.path / found.file} has shape {found.shape}, expected the "
                f"base's {info.shape}{self._hint(task, name, found, info)}"
            )

    def _hint(self, task: str, name: str, found: TensorInfo, info: TensorInfo) -> str:
        """What may help where only the number of rows differs."""
        if self.tokens[task].known or found.shape[1:] != info.shape[1:]:
            return ""
        missing = self.base.path if self.tokens[task].merged is None else self.experts[task].path
        return f"; if its rows are tokens, copy the files of the tokenizer that tells which ones into {missing}"
