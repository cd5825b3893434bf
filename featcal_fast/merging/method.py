"""What an upstream merger is: a function of one tensor's parts, and what it has to be told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from featcal_fast.merging.stack import Stack


@dataclass(frozen=True)
class Options:
    """What a merger is told; each looks at those that it has.

    Attributes:
        weights: of the experts, in their order.
        scaling: of the change of the base.
        density: the share of a change's elements that stay.
        t: where between the first (0) and the second expert (1).
        seed: of a random choice of elements.
        steps: of a descent.
    """

    weights: tuple[float, ...]
    scaling: float = 1.0
    density: float = 1.0
    t: float = 0.5
    seed: int = 0
    steps: int = 300


@dataclass(frozen=True)
class Method:
    """A merge of one tensor after the other.

    Attributes:
        merge: gives the merged tensor's elements, float32, in order; each part may be overwritten by the next one.
        defaults: the options that it has, besides `weights`.
        weighted: whether it has those.
        divides: whether it divides by sums of weights, so that they must not be negative, nor all zero.
        experts: how many it takes, at least and at most.
        needs_base: whether it looks at the base's tensor.
        passes: how often it goes through a tensor, by its options.
        rooms: float32 parts that it holds at a time, with what is read of a model, of the number of experts.
        matrix_bytes: of a method of whole matrices, what it takes for one of a shape `(out, in)`, with so many experts,
            besides its result.
    """

    merge: Callable[[Stack, Options], Iterator[Tensor]]
    defaults: Mapping[str, float] = field(default_factory=dict)
    weighted: bool = False
    divides: bool = False
    experts: tuple[int, float] = (1, float("inf"))
    needs_base: bool = True
    passes: Callable[[Options], int] = lambda _options: 1
    rooms: Callable[[int], int] = lambda _experts: 4
    matrix_bytes: Callable[[tuple[int, int], int], int] | None = None


def weighted(change: Tensor, weight: float) -> Tensor:
    """`weight * change`, in place."""
    return change if weight == 1 else change.mul_(weight)
