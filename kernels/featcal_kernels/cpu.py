"""bfloat16 features on a CPU whose matrix units multiply bfloat16 and add up in float32 (Intel's AMX).

torch has no product of that kind on a CPU. But oneDNN, told that float32 products may be as precise as bfloat16's,
rounds float32 operands to bfloat16 and sums in float32: for operands that are bfloat16 already, the exact products.

The switch is the whole process's, and float32 products of other threads are rounded while it is on. So nothing
here is used until a program that knows its threads calls `allow_bf16_units`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 256  # rows of the triangle at a time; narrower products leave the units waiting

_allowed = False


def allow_bf16_units(allowed: bool = True) -> None:
    """Let this process's bfloat16 sums on the CPU use matrix units, where it has them.

    Other threads must not multiply float32 matrices on the CPU meanwhile: their operands could be rounded.

    Args:
        allowed: whether they may.
    """
    global _allowed
    _allowed = allowed


def supports(x: Tensor, weights: Tensor | None) -> bool:
    """Whether these features are for the functions here: weighted ones are no longer bfloat16."""
    return _allowed and x.dtype == torch.bfloat16 and weights is None and x.device.type == "cpu" and _available()


def gram_(out: Tensor, x: Tensor) -> Tensor:
    with _exact_bf16_products():
        return _triangle_(out, x.float())


def cross_(out: Tensor, y: Tensor, x: Tensor) -> Tensor:
    with _exact_bf16_products():
        return out.addmm_(y.float().mT, x.float())


def gram_cross_(s: Tensor, h: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x, y = x.float(), y.float()
    with _exact_bf16_products():
        return _triangle_(s, x), h.addmm_(y.mT, x)


def _triangle_(out: Tensor, x: Tensor) -> Tensor:
    for i in range(0, x.shape[1], BLOCK):
        out[i : i + BLOCK, i:].addmm_(x[:, i : i + BLOCK].mT, x[:, i:])
    return out


@contextmanager
def _exact_bf16_products() -> Iterator[None]:
    backend: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set by torch at import
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


@cache
def _available() -> bool:
    """Whether there are such units, and torch can be told to use them: found out by a product that shows it."""
    if not getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)():
        return False
    try:
        with _exact_bf16_products():
            # 1 + 2^-12 is no bfloat16 number: rounded, the product loses it; the sum of 256 ones is exact.
            ones = torch.ones(256, 256)
            return bool(((ones + 2**-12) @ ones == 256).all())
    except (AttributeError, RuntimeError):
        return False
