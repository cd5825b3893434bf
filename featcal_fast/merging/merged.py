"""A merged checkpoint that exists one read at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featcal_fast.checkpoints import CachedExpert, Checkpoint, Metadata, TensorInfo, TensorSource, canonical
from featcal_fast.errors import ModelMismatchError
from featcal_fast.merging.average import AVERAGE
from featcal_fast.merging.method import Method
from featcal_fast.merging.rows import Rows
from featcal_fast.merging.task_arithmetic import TASK_ARITHMETIC
from featcal_fast.models.tokens import OwnTokens

METHODS = {"average": AVERAGE, "task_arithmetic": TASK_ARITHMETIC}
PART = 2**20  # elements at a time


def _add(method: Method, total: Tensor, expert: Tensor, base: Tensor, buffers: Tensor) -> None:
    for sums, own, origin in zip(total.split(PART), expert.split(PART), base.split(PART), strict=True):
        first, second = buffers[:, : len(sums)]
        sums += method.add(first.copy_(own), second.copy_(origin))


def merge_tensor(method: Method, base: Tensor, experts: Iterable[Tensor], scaling: float, count: int) -> Tensor:
    """One tensor merged, in the base's dtype; besides base and one expert it takes a float32 sum.

    Args:
        method: one of `METHODS`.
        base: of any shape and floating type.
        experts: the same tensor of each, taken one at a time.
        scaling: of task arithmetic.
        count: of experts.
    """
    flat, total = base.reshape(-1), torch.zeros(base.numel())
    buffers = torch.empty(2, min(PART, base.numel()))
    for expert in experts:
        _add(method, total, expert.reshape(-1), flat, buffers)
        del expert  # before the next one is read
    merged = total if base.dtype == total.dtype else torch.empty_like(flat)
    for out, sums, origin in zip(merged.split(PART), total.split(PART), flat.split(PART), strict=True):
        out.copy_(method.finish(buffers[0, : len(sums)].copy_(origin), sums, scaling, count))
    return merged.view_as(base)


class MergedCheckpoint:
    """`base` and `experts` merged on the fly; takes the base's layout, config and side files.

    Sums are float32 whatever the checkpoints' dtype, in the order of `experts`. Tensors that are not floating point
    keep the base's values. Where an expert has another vocabulary, its embedding's rows are those of the same tokens.

    Args:
        base: gives names, shapes, dtypes and shards.
        experts: by task.
        method: `average`, the mean of the experts, or `task_arithmetic`, base + scaling * sum (expert - base).
        scaling: of task arithmetic.
        tokens: of the experts, by task: for each row of the base's embedding the expert's.

    Raises:
        ModelMismatchError: an expert lacks a tensor of the base, or has it in another shape.
        UnsupportedModelError: vocabularies differ, and the base is no model that can be built.
    """

    label = "merged model"

    def __init__(
        self,
        base: Checkpoint,
        experts: Mapping[str, TensorSource],
        method: str,
        scaling: float,
        tokens: Mapping[str, OwnTokens],
    ) -> None:
        self.base, self.experts, self.tokens = base, experts, tokens
        self.method, self.scaling = METHODS[method], scaling
        self.tensors: dict[str, TensorInfo] = base.tensors
        self._rows = Rows(base, experts, tokens)
        for task in experts:
            for name, info in base.tensors.items():
                if info.dtype.is_floating_point:
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
        """The named tensors, merged; one tensor of every expert is in memory at a time."""
        merged = {}
        for name in names:
            base = self.base.read([name])[name]
            if base.is_floating_point():
                experts = (self._expert_tensor(task, name, base) for task in self.experts)
                base = merge_tensor(self.method, base, experts, self.scaling, len(self.experts))
            merged[name] = base
        return merged

    def stored_bytes(self, names: Iterable[str]) -> int:
        """What `read(names)` takes from files."""
        total = 0
        for name in names:
            total += self.base.stored_bytes([name])
            if self.tensors[name].dtype.is_floating_point:
                total += sum(e.stored_bytes([e.names[canonical(name)]]) for e in self.experts.values())
        return total

    def side_files(self) -> dict[str, Path]:
        return self.base.side_files()

    def left_out(self) -> list[str]:
        return self.base.left_out()

    def metadata(self) -> Metadata:
        """None: the base's would be of another model."""
        return Metadata()

    def aligned_bytes(self, name: str) -> int:
        """The most memory that a tensor takes besides itself to have an expert's rows in the base's order."""
        moved = [task for task in self.experts if self._rows.moves(task, name)]
        return max((self._own(task, name)[1].nbytes for task in moved), default=0)

    def _own(self, task: str, name: str) -> tuple[str, TensorInfo]:
        """An expert's name of a tensor of the base's, and its form."""
        expert = self.experts[task]
        own = expert.names[canonical(name)]
        return own, expert.tensors[own]

    def _expert_tensor(self, task: str, name: str, base: Tensor) -> Tensor:
        expert, own = self.experts[task], self._own(task, name)[0]
        # The error of compressed storage stays out of the merged model.
        read = expert.read_exactly if isinstance(expert, CachedExpert) else expert.read
        tensor = read([own])[own]
        return self._rows.aligned(task, name, tensor, base) if self._rows.moves(task, name) else tensor

    def _check(self, task: str, name: str, info: TensorInfo) -> None:
        expert = self.experts[task]
        if canonical(name) not in expert.names:
            raise ModelMismatchError(
                f"{expert.label}: {expert.path} has no tensor {name}, which {self.base.label} "
                f"({self.base.path}) has; experts to be "
                "merged must have the base's architecture"
            )
        own, found = self._own(task, name)
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
