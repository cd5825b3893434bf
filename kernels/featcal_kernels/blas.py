"""The same sums by cuBLAS: 16-bit products accumulated in float32, in place, a Gram matrix as a triangle of blocks.

The baseline that the Triton kernels are held against, and the path where `configs` says that it is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

BLOCKS = 16  # column blocks of a triangle: 17 / 32 of the full product's work
MIN_BLOCK = 512  # narrower products leave a GPU idle


@cache
def available(device: torch.device) -> bool:
    """Whether this torch adds 16-bit products to a float32 matrix in place: found out once, by doing it."""
    x = torch.ones(16, 32, dtype=torch.float16, device=device)
    out = torch.ones(32, 32, device=device)
    try:
        add_product_(out[:16, 16:], [x[:, :16]], [x[:, 16:]])
    except (RuntimeError, TypeError):
        return False
    return bool((out[:16, 16:] == 17).all())


def add_product_(out: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """`out += sum(a)' sum(b)` but for the product of the low parts.

    Args:
        out: `[m, d]` float32, unit column stride.
        a: 16-bit parts of the left operand, `[tokens, m]` each: high, or high and low.
        b: parts of the right operand, `[tokens, d]`.
    """
    for left, right in [(a[0], b[0]), *((a[0], low) for low in b[1:]), *((low, b[0]) for low in a[1:])]:
        torch.addmm(out, left.mT, right, out_dtype=torch.float32, out=out)
    return out


def add_gram_(out: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """`add_product_` on the upper triangle of blocks."""
    d = out.shape[1]
    block = max(MIN_BLOCK, -(-d // (64 * BLOCKS)) * 64)
    for i in range(0, d, block):
        rows = slice(i, i + block)
        add_product_(out[rows, i:], [part[:, rows] for part in a], [part[:, i:] for part in b])
    return out
