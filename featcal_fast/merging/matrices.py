"""Methods of whole matrices: linear weights one by one, and the mean of the changes for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from featcal_fast.errors import CheckpointError
from featcal_fast.layer.precision import ieee_float32
from featcal_fast.merging.method import Method, Options
from featcal_fast.merging.stack import Stack

Change = Callable[[Iterable[Tensor], int, Options], Tensor]


def matrix_method(change: Change, nbytes: Callable[[tuple[int, int], int], int], **defaults: float) -> Method:
    """`W = W_0 + scaling * change(W_1 - W_0, ..., W_K - W_0)` for linear weights, else with the mean of the changes.

    Args:
        change: the merged change, float32 `[out, in]`, of all experts', taken one at a time, their number and options.
        nbytes: what that takes for a matrix of a shape, with so many experts, besides its result.
        defaults: of the options that it has, besides a scaling of 1.
    """

    def merge(stack: Stack, options: Options) -> Iterator[Tensor]:
        if stack.transposed is None:
            yield from _mean(stack, options)
            return
        for matrix in stack.matrices():
            try:
                with ieee_float32():
                    found = change(matrix.deltas(), stack.count, options)
            except CheckpointError as error:
                raise CheckpointError(f"tensor {stack.name} cannot be merged: {error}") from error
            flat = (found.mT if stack.transposed else found).reshape(-1)
            del found
            for part in matrix.parts():
                yield flat[part.start : part.stop].mul_(options.scaling).add_(part.base)

    return Method(merge, {"scaling": 1.0, **defaults}, matrix_bytes=nbytes)


def _mean(stack: Stack, options: Options) -> Iterator[Tensor]:
    count = torch.tensor(float(stack.count), device=stack.device)
    for part in stack.parts():
        total, delta = part.rooms(2)
        total.zero_()
        for expert in range(stack.count):
            total += part.delta(expert, delta)
        yield total.div_(count).mul_(options.scaling).add_(part.base)
