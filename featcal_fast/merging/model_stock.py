"""Model Stock: as far from the base to the experts' mean as the angle between them tells (arXiv 2403.19522).

`W = r * mean_k W_k + (1 - r) * W_0`, with `r = K c / (1 + (K - 1) c)` and `c` the mean cosine between the changes
`W_k - W_0` of two experts, tensor by tensor. Where that is negative, it counts as 0: `W` would be beyond the base.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from featcal_fast.merging.method import Method, Options
from featcal_fast.merging.stack import Stack

COLUMNS = 2**17  # of the products at a time, in float64


def model_stock(stack: Stack, _options: Options) -> Iterator[Tensor]:
    """The merged tensor's parts."""
    cosine, count = _mean_cosine(stack), stack.count
    ratio = count * cosine / (1 + (count - 1) * cosine)
    divisor = torch.tensor(float(count), device=stack.device)
    for part in stack.parts():
        total, own = part.rooms(2)
        total.zero_()
        for expert in range(count):
            total += part.delta(expert, own)
        yield total.div_(divisor).mul_(ratio).add_(part.base)


def _mean_cosine(stack: Stack) -> float:
    """Of all pairs of changes; one that is 0 has a cosine of 0 with all others."""
    count = stack.count
    products = torch.zeros(count, count, dtype=torch.float64, device=stack.device)
    for part in stack.parts():
        changes = [part.delta(expert, room) for expert, room in enumerate(part.rooms(count))]
        for columns in zip(*(each.split(COLUMNS) for each in changes), strict=True):
            exact = torch.stack(columns).double()
            products.addmm_(exact, exact.mT)
    norms = products.diagonal().sqrt()
    cosines = products / torch.outer(norms, norms).masked_fill_(products == 0, 1)
    pairs = cosines.triu(diagonal=1).sum() / (count * (count - 1) / 2)
    return max(0.0, float(pairs))


MODEL_STOCK = Method(
    model_stock,
    experts=(2, float("inf")),
    passes=lambda _options: 2,
    rooms=lambda experts: experts + experts // 4 + 3,  # with the products
)
