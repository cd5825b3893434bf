"""What a sample must be for the model to take it: ids that it has, masks of their shape, finite numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from featcal_fast.checkpoints import is_finite
from featcal_fast.data.samples import Sample
from featcal_fast.errors import DataError


@dataclass(frozen=True)
class Limits:
    """What a model takes.

    Attributes:
        max_positions: the longest sequence, if it has a limit.
        vocab_size: rows of its embedding, if known.
        choices: by the name of another input of integers, how many values it chooses from.
        owner: whose vocabulary it is.
        advice: what to do about ids outside of it.
    """

    max_positions: int | None = None
    vocab_size: int | None = None
    choices: Mapping[str, int] = field(default_factory=dict)
    owner: str = "the model"
    advice: str = "use the model's own tokenizer"

    def checked(self, sample: Sample) -> Sample:
        """The sample, with masks as integers.

        Raises:
            DataError: names the sample, the tensor, and what is wrong with it.
        """
        return Sample(sample.where, {name: self._checked(sample, name) for name in sample.values})

    def _checked(self, sample: Sample, name: str) -> torch.Tensor:
        value: torch.Tensor = sample.values[name]
        where = f"{sample.where}, {name}"
        if name.endswith("input_ids"):
            self._check_token_ids(value, where)
        elif name == "labels" and value.ndim == 1 and not value.is_floating_point():
            if not (value != -100).any():
                raise DataError(f"{where}: found no target, expected at least one token; remove this sample")
            self._check_token_ids(value[value != -100], where)
        elif name.endswith("attention_mask"):
            _check_mask(value, sample.values.get(name.replace("attention_mask", "input_ids")), where)
            value = value.long()
        elif name in self.choices:
            self._check_choices(value, name, where)
        elif value.is_floating_point() and not is_finite(value):
            raise DataError(f"{where}: found values that are not finite; remove this sample")
        return value

    def _check_token_ids(self, ids: torch.Tensor, where: str) -> None:
        if ids.is_floating_point() or ids.ndim != 1 or not len(ids):
            raise DataError(f"{where}: found {ids.dtype} of shape {[*ids.shape]}, expected one or more integers")
        if self.max_positions is not None and len(ids) > self.max_positions:
            raise DataError(
                f"{where}: found {len(ids)} tokens, expected at most {self.max_positions}; shorten the samples"
            )
        if (odd := _outside(ids, self.vocab_size)) is not None:
            size = self.vocab_size
            limit = "0 or more" if size is None else f"0 to {size - 1} (vocabulary of {self.owner})"
            raise DataError(f"{where}: found token id {odd}, expected {limit}; {self.advice}")

    def _check_choices(self, value: torch.Tensor, name: str, where: str) -> None:
        most = self.choices[name] - 1
        if value.is_floating_point() or not value.numel():
            raise DataError(
                f"{where}: found {value.dtype} of shape {[*value.shape]}, expected integers from 0 to {most}"
            )
        if (odd := _outside(value, most + 1)) is not None:
            raise DataError(f"{where}: found {odd}, expected 0 to {most}, as the model has them; correct this sample")


def _outside(values: torch.Tensor, count: int | None) -> int | None:
    """A value that is not below `count`, or less than 0."""
    extremes = map(int, values.aminmax())
    return next((each for each in extremes if each < 0 or (count is not None and each >= count)), None)


def _check_mask(mask: torch.Tensor, ids: torch.Tensor | None, where: str) -> None:
    if mask.ndim != 1 or (ids is not None and mask.shape != ids.shape):
        expected = "one value a token" if ids is None else f"{[*ids.shape]} as the token ids"
        raise DataError(f"{where}: found shape {[*mask.shape]}, expected {expected}")
    if not mask.any():
        raise DataError(f"{where}: found only zeros, expected 1 for at least one token; remove this sample")
    if not ((mask == 0) | (mask == 1)).all():
        raise DataError(f"{where}: found other values than 0 and 1; expected 1 for tokens, 0 for padding")
