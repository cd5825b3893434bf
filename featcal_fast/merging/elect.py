"""The sign that changes agree on, element by element: what TIES and DARE-TIES have in common (arXiv 2306.01708).

With `d_k = w_k * (what stays of W_k - W_0)` and the elected sign `s = sign(sum_k d_k)`, of which 0 counts as positive:
`W = W_0 + scaling * sum of the d_k whose sign is s`, and for a mean that sum is divided by that of their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from featcal_fast.merging.method import Options, weighted
from featcal_fast.merging.stack import Part, Stack


def elected(
    stack: Stack, options: Options, change: Callable[[Part, int, Tensor], Tensor], *, mean: bool
) -> Iterator[Tensor]:
    """The merged tensor's parts.

    Args:
        stack: the tensor.
        options: weights and scaling.
        change: what stays of an expert's change of a part, in the memory given.
        mean: whether the changes that agree are averaged, not added up.
    """
    for part in stack.parts():
        total, divisor, sign, *changes = part.rooms(3 + stack.count)
        total.zero_()
        for expert, weight in enumerate(options.weights):
            total += weighted(change(part, expert, changes[expert]), weight)
        sign.copy_(total).ge_(0).mul_(2).sub_(1)
        total.zero_()
        divisor.zero_()
        for each, weight in zip(changes, options.weights, strict=True):
            total += each.mul_(sign).clamp_(min=0)
            if mean:
                divisor.add_(each.gt_(0), alpha=weight)
        if mean:
            total /= divisor.clamp_(min=torch.finfo(divisor.dtype).tiny)  # where it is 0, so is the sum
        total *= sign
        yield total.mul_(options.scaling).add_(part.base)


def elected_rooms(experts: int) -> int:
    """Float32 parts that it holds: the base's, two sums, signs and the changes."""
    return 4 + experts
