"""`W = sum_k w_k W_k / sum_k w_k`: the mean of K experts (model soups, arXiv 2203.05482), of weights 1 by default."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from featcal_fast.merging.method import Method, Options, weighted
from featcal_fast.merging.stack import Stack


def average(stack: Stack, options: Options) -> Iterator[Tensor]:
    """The merged tensor's parts."""
    # A tensor, since a GPU divides by a number inexactly.
    divisor = torch.tensor(sum(options.weights), device=stack.device)
    for part in stack.parts():
        total, own = part.rooms(2)
        total.zero_()
        for expert, weight in enumerate(options.weights):
            total += weighted(part.expert(expert, own), weight)
        yield total.div_(divisor)


AVERAGE = Method(average, weighted=True, divides=True, needs_base=False)
