"""`W = W_0 + scaling * sum_k w_k (W_k - W_0)`: task arithmetic (arXiv 2212.04089), of weights 1 by default."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from featcal_fast.merging.method import Method, Options, weighted
from featcal_fast.merging.stack import Stack


def task_arithmetic(stack: Stack, options: Options) -> Iterator[Tensor]:
    """The merged tensor's parts."""
    for part in stack.parts():
        total, own = part.rooms(2)
        total.zero_()
        for expert, weight in enumerate(options.weights):
            total += weighted(part.delta(expert, own), weight)
        yield total.mul_(options.scaling).add_(part.base)


TASK_ARITHMETIC = Method(task_arithmetic, {"scaling": 0.3}, weighted=True)
