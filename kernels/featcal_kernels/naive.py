"""The ops in plain torch: the specification, and what runs on a CPU.

The symmetric update is a block triangle of `addmm_`: torch exposes no BLAS syrk, and numpy's own BLAS brings a
second thread pool that slows the first one's products down.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 384  # rows of the triangle at a time: (d/384 + 1) / (2 d/384) of the work; narrower products are slow on a CPU
PANEL = 2048  # rows of a product's right side at a time, so that little is copied
PASS = 512  # rows at a time of what only passes over a matrix


def gram_(out: Tensor, x: Tensor, weights: Tensor | None) -> Tensor:
    x = x.float()
    return _triangle_(out, x, _weighted(x, weights))


def cross_(out: Tensor, y: Tensor, x: Tensor, weights: Tensor | None) -> Tensor:
    return out.addmm_(y.float().mT, _weighted(x.float(), weights))


def gram_cross_(s: Tensor, h: Tensor, x: Tensor, y: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Every copy is made before the first sum changes: who runs out of memory here can start over."""
    x, y = x.float(), y.float()
    right = _weighted(x, weights)
    return _triangle_(s, x, right), h.addmm_(y.mT, right)


def _weighted(x: Tensor, weights: Tensor | None) -> Tensor:
    return x if weights is None else x * weights.to(torch.float32)[:, None]


def _triangle_(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    for i in range(0, left.shape[1], BLOCK):
        out[i : i + BLOCK, i:].addmm_(left[:, i : i + BLOCK].mT, right[:, i:])
    return out


def frobenius(s: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=s.device)
    for i in range(0, s.shape[0], PASS):
        # Not a norm of the block: torch adds a norm's squares up one after the other, a sum's in a tree.
        rows = s[i : i + PASS, i:].square()
        square, rest = rows[:, : rows.shape[0]], rows[:, rows.shape[0] :]
        total += 2 * (square.triu().sum().double() + rest.sum().double()) - square.diagonal().sum().double()
    return total.sqrt()


def symmetrize_(s: Tensor) -> Tensor:
    for i in range(0, s.shape[0], PASS):
        j = min(i + PASS, s.shape[0])
        square = s[i:j, i:j]
        square.copy_(square.triu() + square.triu(1).mT)
        s[j:, i:j] = s[i:j, j:].mT
    return s


def add_scaled_(out: Tensor, s: Tensor, scale: Tensor) -> Tensor:
    return out.addcmul_(s, scale.to(out.dtype))


def addmm_(out: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return out.addmm_(a.float() * scale.to(torch.float32), b)
