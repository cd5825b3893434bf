"""Cholesky factorisation and triangular solves, in place; large solves on a GPU are mostly products.

Matrices are row-major and their upper triangle counts, `A = U'U`: the lower one of the column-major view that LAPACK
wants. What is below the diagonal is never used.

By blocks, a triangular system is halved until a library can take what is left: blocks of `BLOCK` on the diagonal, and
their right-hand sides. All between them are products, `addmm_` in split float16 parts, in place too. Halving copies
less of the operands than going from block to block, and its products are longer.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from featcal_kernels import addmm_
from torch import Tensor

# Milliseconds on an H200, with 4,096 right-hand sides and a copy of each side.
#
#                   library      by blocks of 1,024    of 512
#     Cholesky
#     3 x  4,096        5.4                    12.5      30.8
#     1 x 14,336       30.1                    44.6     107
#     solves
#     3 x  4,096       17.1                    13.4      22.6
#     1 x 14,336       43.8                    27.8      51.5
#
# So a factorisation is the library's, one system after the other: batched, three of 4,096 take 16.3, and even three of
# 768 take longer.
BLOCK = 1024
BY_BLOCKS = ", by blocks"
MIN_BLOCKED = 3 * BLOCK  # of two blocks, a library would still do half of a solve


def factor_(a: Tensor) -> Tensor:
    """Cholesky of `[n, n]` where it lies.

    Args:
        a: float32 or float64, the upper triangle counts; overwritten by U.

    Returns:
        0 or where the factorisation stopped: an int32 scalar on the device, which is not waited for.
    """
    info = torch.empty((), dtype=torch.int32, device=a.device)
    torch.linalg.cholesky_ex(a.mT, out=(a.mT, info))
    return info


def solve_(factor: Tensor, right: Tensor, *, split: bool = True) -> None:
    """`right = A^-1 right` in place; `torch.cholesky_solve` would copy both sides.

    Args:
        factor: of A `[n, n]`, by `factor_`.
        right: `[n, m]`, row- or column-major.
        split: large float32 systems on a GPU may go by blocks, in split products.
    """
    if split and by_blocks(factor):
        solve_blocked_(factor, right)
    else:
        torch.linalg.solve_triangular(factor.mT, right, upper=False, out=right)
        torch.linalg.solve_triangular(factor, right, upper=True, out=right)


def by_blocks(factor: Tensor) -> bool:
    """Whether `factor` is large, and where split products are faster than a library's float32."""
    return factor.is_cuda and factor.dtype == torch.float32 and factor.shape[-1] >= MIN_BLOCKED


def arithmetic(factor: Tensor, *, split: bool = True) -> str:
    """What `solve_` does with such a factor: `float32`, `float32, by blocks` or `float64`."""
    return str(factor.dtype).removeprefix("torch.") + BY_BLOCKS * (split and by_blocks(factor))


def solve_blocked_(factor: Tensor, right: Tensor) -> None:
    """`solve_` of float32 by blocks, for a few right-hand sides at a time: products copy their operands."""
    for part in right.split(8 * BLOCK, dim=1):
        _forward_(factor, part)
        _backward_(factor, part)


def _forward_(u: Tensor, right: Tensor) -> None:
    """`right = U'^-1 right`."""
    if len(u) <= BLOCK:
        torch.linalg.solve_triangular(u.mT, right, upper=False, out=right)
        return
    h = _half(len(u))
    _forward_(u[:h, :h], right[:h])
    _subtract_product_(right[h:], u[:h, h:].mT, right[:h])
    _forward_(u[h:, h:], right[h:])


def _backward_(u: Tensor, right: Tensor) -> None:
    """`right = U^-1 right`."""
    if len(u) <= BLOCK:
        torch.linalg.solve_triangular(u, right, upper=True, out=right)
        return
    h = _half(len(u))
    _backward_(u[h:, h:], right[h:])
    _subtract_product_(right[:h], u[:h, h:], right[h:])
    _backward_(u[:h, :h], right[:h])


def _half(n: int) -> int:
    """About half of `n`, in whole blocks."""
    return BLOCK * (-(-n // BLOCK) // 2)


def _subtract_product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """`out -= a @ b`; `out` is row- or column-major."""
    if out.stride(1) != 1:
        out, a, b = out.mT, b.mT, a.mT
    addmm_(out, a, b, _minus_one(out.device))


@lru_cache(maxsize=16)
def _minus_one(device: torch.device) -> Tensor:
    return torch.full((), -1.0, device=device)
