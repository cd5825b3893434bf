"""The ops in plain torch: the specification, and what runs on a CPU.

The symmetric update is a block triangle of `addmm_`: torch exposes no BLAS syrk, and numpy's own BLAS brings a
second thread pool that slows the first one's products down.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128  # rows of the triangle at a time: (d/128 + 1) / (2 d/128) of the full product's work


def gram_(out: Tensor, x: Tensor, weights: Tensor | None) -> Tensor:
    x = x.float()
    if weights is not None:
        x = x * weights.to(torch.float32).sqrt()[:, None]
    for i in range(0, x.shape[1], BLOCK):
        out[i : i + BLOCK, i:].addmm_(x[:, i : i + BLOCK].mT, x[:, i:])
    return out


def cross_(out: Tensor, y: Tensor, x: Tensor, weights: Tensor | None) -> Tensor:
    x = x.float()
    if weights is not None:
        x = x * weights.to(torch.float32)[:, None]
    return out.addmm_(y.float().mT, x)


def frobenius(s: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=s.device)
    for i in range(0, s.shape[0], BLOCK):
        # Not a norm of the block: torch adds a norm's squares up one after the other, a sum's in a tree.
        rows = s[i : i + BLOCK, i:].square()
        square, rest = rows[:, : rows.shape[0]], rows[:, rows.shape[0] :]
        total += square.triu().sum().double() + square.triu(1).sum().double() + 2 * rest.sum().double()
    return total.sqrt()


def symmetrize_(s: Tensor) -> Tensor:
    for i in range(0, s.shape[0], 2 * BLOCK):
        j = min(i + 2 * BLOCK, s.shape[0])
        square = s[i:j, i:j]
        square.copy_(square.triu() + square.triu(1).mT)
        s[j:, i:j] = s[i:j, j:].mT
    return s


def add_scaled_(out: Tensor, s: Tensor, scale: Tensor) -> Tensor:
    return out.addcmul_(s, scale.to(out.dtype))


def addmm_(out: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    product = a.float() @ b
    return out.addcmul_(product, scale.to(out.dtype))
