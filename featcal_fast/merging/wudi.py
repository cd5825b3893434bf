"""WUDI-Merging: the change that interferes least with each expert's (arXiv 2503.08099).

`tau` minimises `sum_k ||(tau - tau_k) tau_k^T||_F^2 / ||tau_k||_F^2`, by 300 steps of Adam at a rate of 1e-5 from
`tau = sum_k tau_k`. Other tensors than linear weights: `tau = (1/K) sum_k tau_k`.

The gradient is `2 (tau M - N)`, with `M = sum_k tau_k^T tau_k / ||tau_k||^2` and `N = sum_k tau_k tau_k^T tau_k /
||tau_k||^2`: a step costs one product, whatever the number of experts, and needs no expert any more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from featcal_fast.merging.spectrum import largest

STEPS, RATE = 300, 1e-5
_MEAN, _SQUARE, _EPSILON = 0.9, 0.999, 1e-8  # Adam's


def wudi(deltas: Iterable[Tensor], count: int, steps: int = STEPS, rate: float = RATE) -> Tensor:
    """The merged change of a linear weight.

    Args:
        deltas: `expert - base` of each, float32 `[out, in]`, taken one at a time and left as they are.
        count: of experts.
        steps: of Adam.
        rate: of Adam: about what an element moves in a step, so it fits weights that fine-tuning moved by 1e-4 or so.

    Returns:
        Float32 `[out, in]`, on the deltas' device.

    Raises:
        CheckpointError: a change is not finite.
    """
    sums: _Sums | None = None
    for delta in deltas:
        sums = sums or _Sums(delta)
        sums.add(delta)
        del delta
    assert sums is not None
    return sums.descend(steps, rate)


def wudi_bytes(shape: tuple[int, int], count: int) -> int:
    """What it takes at most on the device beside its result: an expert's change, sums and products, or Adam's state."""
    rows, columns = shape
    return 4 * (4 * rows * columns + columns**2 + min(shape) ** 2)


class _Sums:
    """`sum_k tau_k`, `N` and `M`: float32 `[out, in]`, `[out, in]` and `[in, in]`."""

    def __init__(self, like: Tensor) -> None:
        self._total, self._target = torch.zeros_like(like), torch.zeros_like(like)
        self._inner = like.new_zeros(like.shape[1], like.shape[1])
        self._changed = 0

    def add(self, delta: Tensor) -> None:
        """An expert, with values of any size."""
        self._total += delta
        scale = largest(delta)
        if scale:
            self._changed += 1
            unit = delta / scale
            square = float(torch.linalg.vector_norm(unit)) ** 2
            self._inner.addmm_(unit.mT, unit, alpha=1 / square)
            self._target.add_(torch.linalg.multi_dot((unit, unit.mT, unit)), alpha=scale / square)

    def descend(self, steps: int, rate: float) -> Tensor:
        """Adam in place, on the total: written out, it takes three tensors, and the same ones everywhere."""
        merged = self._total
        if self._changed < 2:  # the minimum itself, which rounding errors would lead away from
            return merged
        gradient, mean, square = torch.empty_like(merged), torch.zeros_like(merged), torch.zeros_like(merged)
        for step in range(1, steps + 1):
            torch.addmm(self._target, merged, self._inner, beta=-2, alpha=2, out=gradient)
            mean.lerp_(gradient, 1 - _MEAN)
            square.mul_(_SQUARE).addcmul_(gradient, gradient, value=1 - _SQUARE)
            spread = torch.sqrt(square, out=gradient).div_(math.sqrt(1 - _SQUARE**step)).add_(_EPSILON)
            merged.addcdiv_(mean, spread, value=-rate / (1 - _MEAN**step))
        return merged
