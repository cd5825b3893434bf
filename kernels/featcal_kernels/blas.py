"""The same sums by cuBLAS: 16-bit products accumulated in float32, in place, a Gram matrix as a triangle of blocks.

The baseline that the Triton kernels are held against, and the path where `configs` says that it is faster.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

LEVELS = 3  # of squares: 9 / 16 of the full product's work, most of it in large products
MIN_BLOCK = 512  # narrower products leave a GPU idle
MIN_WORK = 2e10  # multiplications of a square that is worth two launches more: halved, it takes a quarter less


@cache
def available(device: torch.device) -> bool:
    """Whether this torch adds 16-bit products to a float32 matrix in place: found out once, by doing it."""
    x = torch.ones(16, 32, dtype=torch.float16, device=device)
    out = torch.ones(32, 32, device=device)
    try:
        add_product_(out[:16, 16:], x[:, :16], x[:, 16:])
    except (RuntimeError, TypeError):
        return False
    return bool((out[:16, 16:] == 17).all())


def add_product_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`out += a' b`.

    Args:
        out: `[m, d]` float32, unit column stride.
        a: `[tokens, m]`, 16-bit.
        b: `[tokens, d]`, of the same type.
    """
    return torch.addmm(out, a.mT, b, out_dtype=torch.float32, out=out)


def add_gram_(out: Tensor, x: Tensor, levels: int = LEVELS) -> Tensor:
    """`out += x' x` on the upper triangle: the square off the diagonal, then both halves likewise."""
    n, d = x.shape
    if levels == 0 or d < 2 * MIN_BLOCK or n * d * d < MIN_WORK:
        return add_product_(out, x, x)
    half = -(-d // 128) * 64
    add_product_(out[:half, half:], x[:, :half], x[:, half:])
    add_gram_(out[:half, :half], x[:, :half], levels - 1)
    add_gram_(out[half:, half:], x[:, half:], levels - 1)
    return out
