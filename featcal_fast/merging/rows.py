"""Embeddings of an expert as the base's vocabulary has them: rows by token, where vocabularies differ."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from featcal_fast.checkpoints import Checkpoint, TensorInfo, TensorSource
from featcal_fast.errors import ModelMismatchError
from featcal_fast.models.configs import first_position
from featcal_fast.models.meta import token_tensors
from featcal_fast.models.tokens import OwnTokens, vocabulary_size


class Rows:
    """What has a row for each token, and which rows of the experts they are.

    Args:
        base: gives the vocabulary.
        experts: by task.
        tokens: of the experts, by task: for each row of the base's embedding the expert's.

    Attributes:
        tensors: the base's names of what has a row for each token; none where all vocabularies are the same.

    Raises:
        ModelMismatchError: nobody can tell which rows of an expert are which tokens.
        UnsupportedModelError: the base's model cannot be built, which would tell which tensors have such rows.
    """

    def __init__(self, base: Checkpoint, experts: Mapping[str, TensorSource], tokens: Mapping[str, OwnTokens]) -> None:
        self._base, self._experts, self._tokens = base, experts, tokens
        self._size = vocabulary_size(base.config) if any(each.known for each in tokens.values()) else 0
        differing = [task for task, each in tokens.items() if each.known and self._differ(task)]
        found, unknown = token_tensors(base) if differing else ([], [])
        self.tensors = frozenset(found)
        for name in found:
            self._check_rows(name, base.tensors[name].shape[:1] == (self._size,))
        for name in unknown:
            self._check_rows(name, base.tensors[name].shape[:1] != (self._size,))
        for task in differing:
            self._check_positions(experts[task])

    def fits(self, task: str, name: str, info: TensorInfo) -> bool:
        """Whether an expert's tensor can be made one of the base's form.

        Args:
            task: the expert's.
            name: the base's.
            info: the expert's.
        """
        shape = self._base.tensors[name].shape
        if info.shape == shape:
            return True
        rows = vocabulary_size(self._experts[task].config)
        known = name in self.tensors and self._tokens[task].known
        return known and info.shape[1:] == shape[1:] and info.shape[0] == rows

    def moves(self, task: str, name: str) -> bool:
        """Whether an expert's rows of a tensor are not the base's as they are."""
        return name in self.tensors and self._tokens[task].known and self._differ(task)

    def aligned(self, task: str, name: str, own: Tensor, base: Tensor) -> Tensor:
        """An expert's tensor in the base's form: rows of the same tokens; the base's where it has no such token.

        Args:
            task: the expert's.
            name: the base's, of one of `tensors`.
            own: the expert's, `[rows, ...]`.
            base: the base's, likewise.
        """
        table = self._tokens[task].table
        rows = torch.arange(len(base)) if table is None else table
        lacking = (rows < 0) | (rows >= len(own))
        found = own.index_select(0, rows.masked_fill(lacking, 0))
        found[lacking] = base[lacking].to(found.dtype)
        return found

    def _differ(self, task: str) -> bool:
        return self._tokens[task].table is not None or vocabulary_size(self._experts[task].config) != self._size

    def _check_rows(self, name: str, right: bool) -> None:
        if not right:
            raise ModelMismatchError(
                f"{self._base.label}: {self._base.path}: nobody can tell which tokens the rows of {name} are, of shape "
                f"{self._base.tensors[name].shape}, where config.json describes a model of {self._size} tokens, and "
                "experts have other ones; remove this tensor, or correct config.json"
            )

    def _check_positions(self, expert: TensorSource) -> None:
        found, expected = first_position(expert.config), first_position(self._base.config)
        if found != expected:  # their tables are merged row by row
            raise ModelMismatchError(
                f"{expert.label}: {expert.path / 'config.json'}: positions begin with row {found} (pad_token_id), "
                f"expected {expected} as in the {self._base.label}; experts to be merged must have its padding token"
            )
