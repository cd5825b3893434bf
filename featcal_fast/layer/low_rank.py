"""The best product of two thin matrices in place of a change of a weight: its leading singular vectors."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 512  # the smaller side of a matrix up to which all of its singular vectors are had, in float64
MORE, ROUNDS = 16, 4  # beyond: directions that are followed besides, and how often the matrix is applied
ROWS = 2048  # of a change that are compared at a time


@torch.no_grad()
def low_rank(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`B` and `A` so that `||change - B A||_F` is least, with the singular values shared between them.

    From the whole decomposition where `change` is small; else by randomised subspace iteration (arXiv 0909.4061,
    `torch.svd_lowrank`) from a fixed seed, which comes close to it.

    Args:
        change: `[out, in]`, floating point.
        rank: from 1 to the smaller of its sides.

    Returns:
        `B`, `[out, rank]`, and `A`, `[rank, in]`, in float32.
    """
    if min(change.shape) <= EXACT:
        u, s, vh = torch.linalg.svd(change.double(), full_matrices=False)
    else:
        with torch.random.fork_rng([change.device] if change.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(change.float(), min(rank + MORE, *change.shape), ROUNDS)
        vh = v.mT
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).float(), (root[:, None] * vh[:rank]).float()


@torch.no_grad()
def energies(change: Tensor, b: Tensor, a: Tensor) -> tuple[float, float]:
    """`||change||_F^2` and `||change - B A||_F^2`, in float64."""
    total = lost = 0.0
    a = a.double()
    for part, own in zip(change.split(ROWS), b.split(ROWS), strict=True):
        rows = part.double()
        total += float(rows.square().sum())
        lost += float((rows - own.double() @ a).square().sum())
    return total, lost
