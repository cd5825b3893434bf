"""Cholesky factorisation and triangular solves, in place; those of large systems on a GPU are mostly products.

Matrices are row-major and their upper triangle counts, `A = U'U`: the lower one of the column-major view that LAPACK
wants. What is below the diagonal is never used.

By blocks, a system is halved until a library can take what is left: blocks of `BLOCK` on the diagonal, and their
right-hand sides. All between them are products, `addmm_` in split float16 parts, in place too. Halving copies less of
the operands than going from block to block, and its products are longer.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from featcal_kernels import addmm_
from torch import Tensor

# Estimates for an 8B layer (n = 4096 three times, 14336 once): 3.6 TFLOP of products at 150 TFLOP/s, 0.57 TFLOP left to
# a library at 28 to 38, and 16 GB of copied operands take 44 ms; all of it in a library 122 ms. Timed on no GPU.
# Half of BLOCK would save 4 ms, for three times the launches.
BLOCK = 1024
MIN_BLOCKED = 3 * BLOCK  # of two blocks, a library would still do half of a solve


def factor_(a: Tensor, *, split: bool = True) -> Tensor:
    """Cholesky of `[..., n, n]` where it lies.

    Args:
        a: float32 or float64, the upper triangle counts; overwritten by U.
        split: large float32 systems on a GPU may go by blocks, in split products.

    Returns:
        Per matrix, 0 or where the factorisation stopped: int32 on the device, which is not waited for.
    """
    if split and by_blocks(a):
        return torch.stack([factor_blocked_(each) for each in a.view(-1, *a.shape[-2:])]).view(a.shape[:-2])
    info = torch.empty(a.shape[:-2], dtype=torch.int32, device=a.device)
    torch.linalg.cholesky_ex(a.mT, out=(a.mT, info))
    return info


def solve_(factor: Tensor, right: Tensor, *, split: bool = True) -> None:
    """`right = A^-1 right` in place; `torch.cholesky_solve` would copy both sides.

    Args:
        factor: of A `[n, n]`, by `factor_`.
        right: `[n, m]`, row- or column-major.
        split: as in `factor_`.
    """
    if split and by_blocks(factor):
        solve_blocked_(factor, right)
    else:
        torch.linalg.solve_triangular(factor.mT, right, upper=False, out=right)
        torch.linalg.solve_triangular(factor, right, upper=True, out=right)


def by_blocks(a: Tensor) -> bool:
    """Whether `a` is large, and where split products are faster than a library's float32."""
    return a.is_cuda and a.dtype == torch.float32 and a.shape[-1] >= MIN_BLOCKED


def factor_blocked_(a: Tensor) -> Tensor:
    """`factor_` of one float32 matrix `[n, n]` by blocks: returns an int32 scalar. Where it stops, NaN may follow."""
    n = len(a)
    if n <= BLOCK:
        return factor_(a, split=False)
    h = _half(n)
    first = factor_blocked_(a[:h, :h])
    _forward_(a[:h, :h], a[:h, h:])
    for i in range(h, n, BLOCK):
        rows = slice(i, i + BLOCK)
        _subtract_product_(a[rows, i:], a[:h, rows].mT, a[:h, i:])
    second = factor_blocked_(a[h:, h:])
    return torch.where(first != 0, first, torch.where(second != 0, second + h, second))


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
