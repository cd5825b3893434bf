"""Singular vectors from a Gram matrix in float64: of the shorter side alone, and small ones as exact as float32 holds.

A float32 decomposition takes as long, or several times as long where one side is longer, holds both sides' vectors, and
errs by the largest singular value's last digit. The Gram matrix's `eigh` is `syevd`, LAPACK's on a CPU and cuSOLVER's
on a GPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from featcal_fast.errors import CheckpointError

BLOCK = 2**20  # elements that are float64 at a time
NOISE = 1e-6  # of the largest singular value: what float32 cannot tell from 0
DOUBLE = 8  # bytes


def largest(delta: Tensor) -> float:
    """The largest magnitude of a change of weights.

    Raises:
        CheckpointError: it is not finite.
    """
    found = float(torch.linalg.vector_norm(delta, torch.inf)) if delta.numel() else 0.0
    if not math.isfinite(found):
        raise CheckpointError(
            "weights of the experts differ from the base's by more than float32 holds (3e38); no model that works has "
            "such weights: look for a damaged checkpoint"
        )
    return found


def wide(matrix: Tensor) -> Tensor:
    """A view that has no more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def gram(matrix: Tensor) -> Tensor:
    """`matrix @ matrix.mT` in float64, `[rows, rows]`, of float32 or float64 `[rows, columns]`."""
    found = torch.zeros(len(matrix), len(matrix), dtype=torch.float64, device=matrix.device)
    for part in _blocks(matrix):
        exact = part.double()
        found.addmm_(exact, exact.mT)
    return found


def multiply(left: Tensor, matrix: Tensor, out: Tensor) -> Tensor:
    """`left @ matrix` formed in float64, `left` float64, into float32 `out`, which may be `matrix` itself."""
    for part, result in zip(_blocks(matrix), out.split(_columns(matrix), 1), strict=True):
        result.copy_(left @ part.double())
    return out


def left_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values above the noise, the largest first, and their left vectors: float64 `[rank]`, `[rows, rank]`.

    Args:
        matrix: float32 `[rows, columns]`, finite, with no more rows than columns.
    """
    squares, vectors = _eigen(gram(matrix))
    return squares.flip(0).sqrt(), vectors.flip(1)


def whitening(inner: Tensor) -> Tensor:
    """`inner^(-1/2)` on the span of its eigenvectors above the noise: float64 `[size, size]` of a Gram matrix.

    `vectors @ whitening(vectors.mT @ vectors)` is what is nearest to `vectors` and orthonormal: Procrustes' answer.
    """
    squares, vectors = _eigen(inner)
    return (vectors / squares.sqrt()) @ vectors.mT


def spectrum_bytes(rows: int) -> int:
    """What `left_vectors` takes beside its argument, and a product with it: two matrices and what `eigh` works in."""
    return DOUBLE * max(4 * rows**2, 2 * rows**2 + 2 * BLOCK)


def _eigen(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    squares, vectors = torch.linalg.eigh(symmetric)
    count = int((squares > NOISE**2 * squares[-1:].clamp(min=0)).sum()) if len(squares) else 0
    return squares[len(squares) - count :], vectors[:, len(squares) - count :]


def _columns(matrix: Tensor) -> int:
    return max(1, BLOCK // max(1, len(matrix)))


def _blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = matrix.split(_columns(matrix), 1)
    return found
