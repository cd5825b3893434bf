"""Passes over a symmetric matrix kept as its upper triangle, bound by memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from featcal_kernels.schedule import ceil_div

BLOCK = 64
PARTS = 16  # programs that share a row of blocks


@triton.jit
def frobenius_kernel(s, sums, d, BLOCK: tl.constexpr):
    """Each program's sum of squares, in float64; what lies above the diagonal counts twice."""
    i = tl.program_id(0)
    row = i * BLOCK + tl.arange(0, BLOCK)
    start = s + row[:, None].to(tl.int64) * d
    total = tl.zeros((BLOCK, BLOCK), tl.float64)
    for j in tl.range(i + tl.program_id(1), tl.cdiv(d, BLOCK), tl.num_programs(1)):
        col = j * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(start + col[None, :], mask=(row < d)[:, None] & (col < d)[None, :], other=0.0)
        square = value.to(tl.float64) * value
        above = col[None, :] - row[:, None]
        total += tl.where(above > 0, 2 * square, tl.where(above == 0, square, 0.0))
    tl.store(sums + i * tl.num_programs(1) + tl.program_id(1), tl.sum(total))


@triton.jit
def symmetrize_kernel(s, d, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    j = tl.program_id(1)
    if j >= i:
        row = i * BLOCK + tl.arange(0, BLOCK)
        col = j * BLOCK + tl.arange(0, BLOCK)
        upper = s + row[:, None].to(tl.int64) * d + col[None, :]
        lower = s + col[:, None].to(tl.int64) * d + row[None, :]
        value = tl.load(upper, mask=(row < d)[:, None] & (col < d)[None, :], other=0.0)
        tl.store(lower, tl.trans(value), mask=(col < d)[:, None] & (col[:, None] > row[None, :]))


def frobenius(s: Tensor) -> Tensor:
    """See `ops.frobenius`."""
    d = s.shape[0]
    sums = torch.empty(ceil_div(d, BLOCK) * PARTS, dtype=torch.float64, device=s.device)
    with torch.cuda.device_of(s):
        frobenius_kernel[(ceil_div(d, BLOCK), PARTS)](s, sums, d, BLOCK=BLOCK)
    return sums.sum().sqrt()


def symmetrize_(s: Tensor) -> Tensor:
    """See `ops.symmetrize_`."""
    d = s.shape[0]
    with torch.cuda.device_of(s):
        symmetrize_kernel[(ceil_div(d, BLOCK), ceil_div(d, BLOCK))](s, d, BLOCK=BLOCK)
    return s
