"""DARE: drop elements of each change at random, and make up for them (arXiv 2311.03099).

`d_k = m_k * (W_k - W_0) / density`, where `m_k` is 1 for a share `density` of the elements, chosen at random, and 0 for
the others. Then as task arithmetic, `W = W_0 + scaling * sum_k w_k d_k`; or, with TIES, only over the experts whose
`w_k d_k` has the sign of `sum_k w_k d_k`.

Whether an element stays is a hash of seed, task, tensor and the element's place: the same in whatever order and parts
tensors are merged, by however many threads, and on a GPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from featcal_fast.merging.elect import elected, elected_rooms
from featcal_fast.merging.method import Method, Options, weighted
from featcal_fast.merging.stack import Part, Stack

BLOCK = 2**20  # elements whose places are hashed with one key
# Shifts and odd factors of a mixing of 32 bits (Wellons' `lowbias32`).
MIXING = ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32))


def dare_linear(stack: Stack, options: Options) -> Iterator[Tensor]:
    """The merged tensor's parts."""
    for part in stack.parts():
        total, own = part.rooms(2)
        total.zero_()
        for expert, weight in enumerate(options.weights):
            total += weighted(_dropped(stack, options, part, expert, own), weight)
        yield total.mul_(options.scaling).add_(part.base)


def dare_ties(stack: Stack, options: Options) -> Iterator[Tensor]:
    """The merged tensor's parts."""

    def change(part: Part, expert: int, out: Tensor) -> Tensor:
        return _dropped(stack, options, part, expert, out)

    yield from elected(stack, options, change, mean=False)


def kept(seed: int, task: str, name: str, start: int, stop: int, density: float, device: torch.device) -> Tensor:
    """Which of the elements `start` to `stop` of a tensor's change stay: boolean `[elements]`.

    Args:
        seed: of the merge.
        task: of the expert.
        name: of the tensor.
        start, stop: among all of the tensor's elements.
        density: the share that stays, 0 to 1.
        device: where it is wanted.
    """
    parts = []
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        first = block * BLOCK
        key = hashlib.sha256(f"{seed}\0{task}\0{name}\0{block}".encode()).digest()
        places = torch.arange(max(start - first, 0), min(stop - first, BLOCK), dtype=torch.int32, device=device)
        hashed = _mixed(places.mul_(_int32(key[:4]) | 1).add_(_int32(key[4:8])))
        parts.append(hashed.bitwise_and_(2**31 - 1) < min(round(density * 2**31), 2**31 - 1))
    return torch.cat(parts) if len(parts) != 1 else parts[0]


def _dropped(stack: Stack, options: Options, part: Part, expert: int, out: Tensor) -> Tensor:
    change = part.delta(expert, out)
    if options.density == 1:
        return change
    task = stack.tasks[expert]
    stays = kept(options.seed, task, stack.name, part.start, part.stop, options.density, stack.device)
    return change.mul_(stays).mul_(1 / options.density)


def _mixed(values: Tensor) -> Tensor:
    """Int32, in place; products wrap, and shifts bring in zeros."""
    moved = torch.empty_like(values)
    for shift, factor in MIXING:
        _shift_in(values, shift, moved).mul_(factor)
    return _shift_in(values, 16, moved)


def _shift_in(values: Tensor, shift: int, moved: Tensor) -> Tensor:
    torch.bitwise_right_shift(values, shift, out=moved)
    return values.bitwise_xor_(moved.bitwise_and_((1 << 32 - shift) - 1))


def _int32(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


DEFAULTS = {"scaling": 0.3, "density": 0.5, "seed": 0}
DARE_LINEAR = Method(dare_linear, DEFAULTS, weighted=True, rooms=lambda _experts: 6)
DARE_TIES = Method(dare_ties, DEFAULTS, weighted=True, rooms=lambda experts: elected_rooms(experts) + 3)
