"""The largest elements of a tensor by magnitude, exactly so many, without sorting it.

The magnitudes of float32 numbers are in the order of their bits. The bits of the smallest magnitude that stays are
found by counting: first how many elements have each upper half, then how many of those have each lower half.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from featcal_fast.merging.stack import Stack

LOW = 15  # bits; of the 31 of a magnitude the other 16 are counted first


class Trim:
    """Sets all but the largest elements of a tensor to 0, part by part in order.

    Args:
        least: the bits of the smallest magnitude that stays.
        equal: how many elements of that magnitude stay: those that come first.
    """

    def __init__(self, least: int, equal: int) -> None:
        self._least, self._equal = least, equal

    def apply(self, part: Tensor) -> Tensor:
        """The next part, float32 `[elements]`, in place."""
        bits = part.abs().view(torch.int32)
        stays = bits > self._least
        if self._equal:
            equal = bits == self._least
            count = int(equal.count_nonzero())
            if count > self._equal:
                equal &= equal.cumsum(0, dtype=torch.int32) <= self._equal
            self._equal -= min(count, self._equal)
            stays |= equal
        return part.mul_(stays)


def find_trims(stack: Stack, density: float) -> list[Trim]:
    """What leaves `int(density * elements)` of each change, one at least, in two passes; in none where all do.

    Args:
        stack: the tensor.
        density: above 0, up to 1.
    """
    keep = max(1, int(density * stack.numel))
    if density >= 1:
        return [Trim(-1, 0) for _ in range(stack.count)]
    upper = torch.zeros(stack.count, 1 << (31 - LOW), dtype=torch.int64, device=stack.device)
    for expert, bits in _magnitudes(stack):
        upper[expert] += torch.bincount(bits >> LOW, minlength=upper.shape[1])
    found = [_reach(counts, keep) for counts in upper]
    lower = torch.zeros(stack.count, 1 << LOW, dtype=torch.int64, device=stack.device)
    for expert, bits in _magnitudes(stack):
        inside = bits[bits >> LOW == found[expert][0]]
        lower[expert] += torch.bincount(inside & (1 << LOW) - 1, minlength=lower.shape[1])
    trims = []
    for (high, left), counts in zip(found, lower, strict=True):
        low, equal = _reach(counts, left)
        trims.append(Trim((high << LOW) + low, equal))
    return trims


def _magnitudes(stack: Stack) -> Iterable[tuple[int, Tensor]]:
    """The bits of the magnitudes of each expert's changes, part by part."""
    for part in stack.parts():
        (room,) = part.rooms(1)
        for expert in range(stack.count):
            yield expert, part.delta(expert, room).abs_().view(torch.int32)


def _reach(counts: Tensor, keep: int) -> tuple[int, int]:
    """The highest place from which on, counted from the end, there are `keep` or more; how many of it that takes."""
    from_here = counts.flip(0).cumsum(0).flip(0)
    place = max(int((from_here >= keep).sum()) - 1, 0)
    return place, keep - int(from_here[place] - counts[place])
