"""Operands as the tensor cores want them: 16 bits, weighted, aligned.

A float32 value is split in two float16 ones, high and low, which together hold 22 bits of it; the product of two such
sums without the term low * low takes three 16-bit products and is good to 2^-22; three bfloat16 products, the usual
way, are good to 2^-17 only. (Of the sums, matrix units are left no more than they add up well: `promote` in
`configs`.) Float16's narrow range is met by a power of two: the largest value is brought to between 2^14 and 2^15, so
that of anything down to 2^-18 of it no bit of the 22 is lost; the sum takes the powers off again (see
`moments_triton`).

Splitting ahead of the product touches each element once, instead of once for every tile that it is part of, and leaves
one kernel for all types of input. Weighted 16-bit features are split likewise, since 16 bits seldom hold the product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from featcal_kernels.configs import ROW_PAD
from featcal_kernels.schedule import ceil_div

COLUMN_PAD = 16  # elements: by multiples of 16, Triton knows that 16-byte copies are aligned
BLOCK = 64


@dataclass(frozen=True)
class Operand:
    """Some tokens of one side of a product.

    Attributes:
        data: the matrix, or its high parts and, `part_rows(tokens)` rows further down, its low parts. Aligned; a
            copy is padded with zeros to whole multiples of `ROW_PAD` and `COLUMN_PAD`.
        tokens: rows of the matrix.
        columns: of the matrix.
        low: of values in two parts, int32 flag on the device, 1 if any low part is not zero; else None.
        bound: of float16 parts, float32 on the device, no smaller than any of the values; the parts are of the values
            times `power_of_two(bound)`.
    """

    data: Tensor
    tokens: int
    columns: int
    low: Tensor | None = None
    bound: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        """`[tokens, columns]`; of values in parts the high ones."""
        return self.data[: self.tokens, : self.columns]


def part_rows(tokens: int) -> int:
    """Rows that one part of a copied operand takes."""
    return ceil_div(tokens, ROW_PAD) * ROW_PAD


@triton.jit
def power_of_two(bound):
    """The power of two that brings `bound` to between 2^14 and 2^15, kept between 2^-63 and 2^60.

    Values beyond become infinite, as their squares are in float32. The inverse of a product of two powers is finite.
    """
    exponent = (bound.to(tl.int32, bitcast=True) >> 23) & 0xFF  # of 2, plus 127
    return (tl.minimum(tl.maximum(268 - exponent, 64), 187) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["n", "rows"])
def pack_kernel(
    x, weights, bound, out, low, n, d, row_stride, column_stride, rows, out_stride,
    WEIGHTS: tl.constexpr, SCALE: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x += row[:, None].to(tl.int64) * row_stride + col[None, :].to(tl.int64) * column_stride
    value = tl.load(x, mask=(row < n)[:, None] & (col < d)[None, :], other=0.0).to(tl.float32)
    if WEIGHTS:
        value *= tl.load(weights + row, mask=row < n, other=0.0)[:, None]
    if SCALE:
        value *= power_of_two(tl.load(bound))
    high = value.to(out.dtype.element_ty)
    out += row[:, None].to(tl.int64) * out_stride + col[None, :]
    inside = (row < rows)[:, None] & (col < out_stride)[None, :]
    tl.store(out, high, mask=inside)
    if SPLIT:
        rest = (value - high.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(out + rows.to(tl.int64) * out_stride, rest, mask=inside)
        if tl.max((rest != 0).to(tl.int32)) > 0:
            tl.store(low, 1)


def needs_no_copy(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether `x` is an operand of type `dtype` as it is: unit column stride, aligned rows."""
    return (
        x.dtype == dtype
        and x.stride(1) == 1
        and x.shape[1] % COLUMN_PAD == 0
        and x.stride(0) % COLUMN_PAD == 0
        and 0 < x.stride(0) < 2**31 // ROW_PAD
        and x.data_ptr() % 16 == 0
    )


class OperandPanels:
    """`diag(weights) x` in `dtype`, a panel of tokens at a time: views of `x` where they will do, else packed copies.

    All the memory it takes is taken here, so that a product is not cut short half way through its tokens.

    Args:
        x: `[n, d]`, n and d at least 1, any strides, any floating type.
        dtype: that of `x`, float32, or float16.
        weights: `[n]` float32, or None.
        parts: float16 ones that another type's or weighted values are split in: 2 hold 22 bits, 1 holds 11.
        tokens: of a panel; all by default.
    """

    def __init__(
        self, x: Tensor, dtype: torch.dtype, weights: Tensor | None = None, parts: int = 2, tokens: int | None = None
    ) -> None:
        self.x, self.dtype, self.weights = x, dtype, weights
        self.low = self.bound = self._buffer = None
        self._packed: Operand | None = None
        changed = weights is not None or x.dtype != dtype
        self.parts = parts if changed and dtype != torch.float32 else 1
        if not changed and needs_no_copy(x, dtype):
            return
        n, d = x.shape
        if changed and dtype != torch.float32:
            self.bound = _bound(x, weights)
        if self.parts == 2:
            self.low = torch.zeros((), dtype=torch.int32, device=x.device)
        rows, width = part_rows(n if tokens is None else min(tokens, n)), ceil_div(d, COLUMN_PAD) * COLUMN_PAD
        self._buffer = torch.empty(self.parts * rows, width, dtype=dtype, device=x.device)

    def packed(self) -> OperandPanels:
        """Itself, with all of its tokens packed now: from now on they are the one panel, and not packed again."""
        self._packed = self[:]
        return self

    def __getitem__(self, tokens: slice) -> Operand:
        """The panel of these tokens; a copy overwrites the one before it."""
        if self._packed is not None:
            return self._packed
        x = self.x[tokens]
        n, d = x.shape
        if self._buffer is None:
            return Operand(x, n, d)
        rows = part_rows(n)
        out = self._buffer[: self.parts * rows]
        weights = None if self.weights is None else self.weights[tokens]
        pack_kernel[(ceil_div(rows, BLOCK), ceil_div(out.shape[1], BLOCK))](
            x, weights, self.bound, out, self.low, n, d, x.stride(0), x.stride(1), rows, out.shape[1],
            WEIGHTS=weights is not None, SCALE=self.bound is not None, SPLIT=self.parts == 2, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
        return Operand(out, n, d, self.low, self.bound)


def _bound(x: Tensor, weights: Tensor | None) -> Tensor:
    largest: Tensor = torch.linalg.vector_norm(x, torch.inf).float()
    return largest if weights is None else largest * torch.linalg.vector_norm(weights, torch.inf)
