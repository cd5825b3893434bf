"""Which tokens of a batch count, and how much: the diagonal D of the method."""

from __future__ import annotations

import torch
from torch import Tensor

from featcal_fast.models.family import LastLayerWeights


class Tokens:
    """The tokens of one batch `[batch, tokens, ...]`: padding never counts, and a last layer may weigh the rest less.

    Args:
        mask: `[batch, tokens]`, 0 where a token does not count; None where all do.
        shape: `(batch, tokens)` of the hidden states.
        device: where features will be.
        memory: the tokens of the previous stage's final output, for the modules that are given it.
    """

    def __init__(
        self, mask: Tensor | None, shape: tuple[int, int], device: torch.device, memory: Tokens | None = None
    ) -> None:
        self.shape, self.memory = shape, memory
        valid = None if mask is None else mask.reshape(-1).cpu() != 0
        if valid is not None and (bool(valid.all()) or valid.numel() != shape[0] * shape[1]):
            valid = None
        self._index = None if valid is None else valid.nonzero()[:, 0]
        self._index_on_device = None if self._index is None else self._index.to(device)
        self._device = device
        self._weights: dict[LastLayerWeights, tuple[Tensor, float]] = {}

    @property
    def count(self) -> int:
        """Tokens that count."""
        return self.shape[0] * self.shape[1] if self._index is None else len(self._index)

    def fit(self, x: Tensor) -> bool:
        """Whether `x` has one row a token: `[batch, tokens, d]` or `[batch * tokens, d]`."""
        return x.shape[:-1] in (self.shape, (self.shape[0] * self.shape[1],))

    def rows(self, x: Tensor) -> Tensor:
        """The features of the tokens that count, `[count, d]`: a view where nothing is padded."""
        if not self.fit(x):
            raise ValueError(f"features of shape {tuple(x.shape)} do not belong to a batch of {self.shape} tokens")
        x = x.reshape(-1, x.shape[-1])
        return x if self._index_on_device is None else x.index_select(0, self._index_on_device)

    def weights(self, rule: LastLayerWeights | None) -> tuple[Tensor | None, float]:
        """The diagonal of D as `[count]` float32 on the device, None where it is all ones, and its sum."""
        if rule is None:
            return None, float(self.count)
        if rule not in self._weights:
            weights = torch.full(self.shape, rule.rest, dtype=torch.float32)
            weights[:, 0] = 1.0
            flat = weights.reshape(-1)
            flat = flat if self._index is None else flat[self._index]
            self._weights[rule] = flat.to(self._device), float(flat.double().sum())
        return self._weights[rule]
