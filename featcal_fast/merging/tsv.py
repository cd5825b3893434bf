"""TSV-Merge: each expert's first singular vectors, made orthogonal to the others' (arXiv 2412.00081).

`tau_k = U_k S_k V_k^T`, of which the first `min(out, in) / K` singular values and vectors stay, at least one. Side by
side, `U = [U_1 ... U_K]` and `V` likewise, they are replaced by what is nearest to them and orthonormal, as Procrustes
has it: `U (U^T U)^(-1/2)`. Then `tau = U_orth diag(S_1 ... S_K) V_orth^T`. Other tensors than linear weights:
`tau = (1/K) sum_k tau_k`.

Vectors of singular values that are 0 to float32 are left out, and the inverse root is one on the vectors' span:
otherwise directions of rounding errors would count. So identical experts give the expert, of its first vectors.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from featcal_fast.merging.spectrum import (
    DOUBLE,
    gram,
    largest,
    left_vectors,
    multiply,
    spectrum_bytes,
    whitening,
    wide,
)


def tsv(deltas: Iterable[Tensor], count: int) -> Tensor:
    """The merged change of a linear weight.

    Args:
        deltas: `expert - base` of each, float32 `[out, in]`, taken one at a time and left as they are.
        count: of experts.

    Returns:
        Float32 `[out, in]`, on the deltas' device.

    Raises:
        CheckpointError: a change is not finite.
    """
    factors: _Factors | None = None
    for delta in deltas:
        tall = delta.shape[0] > delta.shape[1]
        factors = factors or _Factors(wide(delta), count)
        factors.add(wide(delta))
        del delta
    assert factors is not None
    return factors.merged().mT if tall else factors.merged()


def tsv_bytes(shape: tuple[int, int], count: int) -> int:
    """What it takes at most on the device beside its result, which comes last: vectors, and one decomposition."""
    rows, columns = min(shape), max(shape)
    held, result = _rank(rows, count) * count, 4 * rows * columns
    vectors = held * (DOUBLE * rows + 4 * columns)
    return vectors + max(result + spectrum_bytes(rows), spectrum_bytes(held) + DOUBLE * held**2) - result


def _rank(rows: int, count: int) -> int:
    return max(1, rows // count)


class _Factors:
    """The vectors and values that stay of all experts: `[rows, held]`, `[held]` and `[held, columns]`."""

    def __init__(self, matrix: Tensor, count: int) -> None:
        rows, columns = matrix.shape
        self._rank, self._held = _rank(rows, count), 0
        self._left = matrix.new_empty(rows, self._rank * count, dtype=torch.float64)
        self._values = matrix.new_empty(self._rank * count, dtype=torch.float64)
        self._right = matrix.new_empty(self._rank * count, columns)

    def add(self, matrix: Tensor) -> None:
        if not largest(matrix):
            return
        values, vectors = left_vectors(matrix)
        values, vectors = values[: self._rank], vectors[:, : self._rank]
        new = slice(self._held, self._held + len(values))
        self._left[:, new], self._values[new] = vectors, values
        multiply((vectors / values).mT, matrix, out=self._right[new])
        self._held = new.stop

    def merged(self) -> Tensor:
        """Float32 `[rows, columns]`."""
        left, right = self._left[:, : self._held], self._right[: self._held]
        core = whitening(left.mT @ left) * self._values[: self._held]
        left = left @ (core @ whitening(gram(right)))
        return multiply(left, right, out=right.new_zeros(len(left), right.shape[1]))
