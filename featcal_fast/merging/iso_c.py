"""Iso-C: the sum of all changes with all its singular values equal (No Task Left Behind, arXiv 2502.04959).

`sum_k tau_k = U S V^T`, and `tau = mean(S) U V^T`. Other tensors than linear weights: `tau = (1/K) sum_k tau_k`.
The decomposition is the compact one: of a sum of low rank, such as of adapters, only what it spans is made equal, where
directions beyond would be those of rounding errors.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from featcal_fast.merging.spectrum import largest, left_vectors, multiply, spectrum_bytes, wide


def iso_c(deltas: Iterable[Tensor], count: int) -> Tensor:
    """The merged change of a linear weight.

    Args:
        deltas: `expert - base` of each, float32 `[out, in]`, taken one at a time and left as they are.
        count: of experts.

    Returns:
        Float32 `[out, in]`, on the deltas' device.

    Raises:
        CheckpointError: the sum is not finite.
    """
    each = iter(deltas)
    total = next(each).clone()
    for delta in each:
        total += delta
        del delta
    if largest(total):
        values, vectors = left_vectors(wide(total))
        equal = (vectors * (values.mean() / values)) @ vectors.mT
        multiply(equal, wide(total), out=wide(total))
    return total


def iso_c_bytes(shape: tuple[int, int], count: int) -> int:
    """What it takes at most on the device beside its result: an expert's change at first, then the decomposition."""
    return max(4 * shape[0] * shape[1], spectrum_bytes(min(shape)))
