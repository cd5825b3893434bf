"""Every merger as its paper writes it: whole tensors, float64, nothing of the engine's.

Each takes the base's tensor, those of the experts and what the method is told, and gives the merged tensor, float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

NOISE = 1e-6  # of the largest singular value: 0 to who was given float32


def changes(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """`tau_k = W_k - W_0`, stacked."""
    return torch.stack([expert.double() - base.double() for expert in experts])


def weighted(values: Tensor, weights: Sequence[float]) -> Tensor:
    """Each of the stacked tensors times its weight."""
    return values * torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * (values.ndim - 1))


def average(base: Tensor, experts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    stacked = torch.stack([expert.double() for expert in experts])
    return weighted(stacked, weights).sum(0) / sum(weights)


def task_arithmetic(base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], scaling: float) -> Tensor:
    return base.double() + scaling * weighted(changes(base, experts), weights).sum(0)


def trimmed(change: Tensor, density: float) -> Tensor:
    """The largest `density * numel` elements, at least one; of equal ones those that come first."""
    count = max(1, int(density * change.numel()))
    order = change.abs().flatten().sort(descending=True, stable=True).indices[:count]
    kept = torch.zeros(change.numel(), dtype=torch.bool)
    kept[order] = True
    return change * kept.view_as(change)


def elected(values: Tensor, weights: Sequence[float], normalize: bool) -> Tensor:
    """Stacked changes: where a weighted change has the sign of their sum it counts; `+` where the sum is 0."""
    shares = weighted(values, weights)
    agrees = shares.sign() == torch.where(shares.sum(0) >= 0, 1.0, -1.0)
    total = (shares * agrees).sum(0)
    mass = weighted(agrees.double(), weights).sum(0)
    return total / mass.masked_fill(mass == 0, 1.0) if normalize else total


def ties(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    scaling: float,
    density: float,
    normalize: bool = True,
) -> Tensor:
    kept = torch.stack([trimmed(change, density) for change in changes(base, experts)])
    return base.double() + scaling * elected(kept, weights, normalize)


def dropped(base: Tensor, experts: Sequence[Tensor], masks: Sequence[Tensor], density: float) -> Tensor:
    """DARE's changes: those that a mask keeps, larger by as much as the others are gone."""
    return changes(base, experts) * torch.stack(list(masks)) / density


def dare_linear(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    scaling: float,
    density: float,
    masks: Sequence[Tensor],
) -> Tensor:
    return base.double() + scaling * weighted(dropped(base, experts, masks, density), weights).sum(0)


def dare_ties(
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    scaling: float,
    density: float,
    masks: Sequence[Tensor],
    normalize: bool = False,
) -> Tensor:
    return base.double() + scaling * elected(dropped(base, experts, masks, density), weights, normalize)


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """Along the arc between the two; along a line where they are nearly parallel, or one is 0."""
    a, b = first.double(), second.double()
    norms = a.norm() * b.norm()
    cosine = ((a * b).sum() / norms).clamp(-1, 1) if norms else torch.ones((), dtype=torch.float64)
    if cosine.abs() > 0.9995:
        return (1 - t) * a + t * b
    angle = cosine.arccos()
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()


def model_stock(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """`t W_avg + (1 - t) W_0`, `t = K cos / (1 + (K - 1) cos)` of the mean cosine between changes, not below 0."""
    taus, cosines = changes(base, experts), []
    for one, other in combinations(taus, 2):
        norms = one.norm() * other.norm()
        cosines.append(float((one * other).sum() / norms) if norms else 0.0)
    cosine, count = max(0.0, sum(cosines) / len(cosines)), len(experts)
    return base.double() + count * cosine / (1 + (count - 1) * cosine) * taus.mean(0)


def wudi(base: Tensor, experts: Sequence[Tensor], scaling: float, steps: int = 300, rate: float = 1e-5) -> Tensor:
    """By autograd and torch's Adam on the paper's loss."""
    taus = changes(base, experts)
    taus = taus[taus.flatten(1).norm(dim=1) > 0]
    merged = taus.sum(0).requires_grad_()
    adam = torch.optim.Adam([merged], lr=rate)
    for _ in range(steps if len(taus) else 0):
        adam.zero_grad()
        interference = (merged - taus) @ taus.mT
        (interference.square().sum((1, 2)) / taus.square().sum((1, 2))).sum().backward()
        adam.step()
    return base.double() + scaling * merged.detach()


def compact(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Its singular value decomposition without what is 0."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((s > NOISE * s.max()).sum())
    return u[:, :rank], s[:rank], vh[:rank]


def iso_c(base: Tensor, experts: Sequence[Tensor], scaling: float) -> Tensor:
    total = changes(base, experts).sum(0)
    if not total.any():
        return base.double()
    u, s, vh = compact(total)
    return base.double() + scaling * s.mean() * u @ vh


def orthonormal(vectors: Tensor) -> Tensor:
    """What is nearest to columns and orthonormal, of the same span."""
    u, _, vh = compact(vectors)
    return u @ vh


def tsv(base: Tensor, experts: Sequence[Tensor], scaling: float) -> Tensor:
    taus = changes(base, experts)
    kept = max(1, min(base.shape) // len(experts))
    found = [compact(tau) for tau in taus if tau.any()]
    if not found:
        return base.double()
    left = orthonormal(torch.cat([u[:, :kept] for u, _, _ in found], 1))
    right = orthonormal(torch.cat([vh[:kept].mT for _, _, vh in found], 1))
    values = torch.cat([s[:kept] for _, s, _ in found])
    return base.double() + scaling * (left * values) @ right.mT
