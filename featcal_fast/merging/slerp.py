"""SLERP: from one expert to the other along the arc between them (Shoemake, 1985), tensor by tensor.

`W = (sin((1 - t) a) W_1 + sin(t a) W_2) / sin(a)`, where `a` is the angle between `W_1` and `W_2` as vectors. Where
`|cos(a)|` is above 0.9995, or one of them is 0, `W = (1 - t) W_1 + t W_2`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from featcal_fast.merging.method import Method, Options
from featcal_fast.merging.stack import Part, Stack

STRAIGHT = 0.9995  # of a cosine; mergekit's


def slerp(stack: Stack, options: Options) -> Iterator[Tensor]:
    """The merged tensor's parts."""
    first, second = _shares(options.t, _cosine(stack))
    for part in stack.parts():
        one, other = part.rooms(2)
        yield part.expert(0, one).mul_(first).add_(part.expert(1, other).mul_(second))


def _cosine(stack: Stack) -> float:
    """Of the angle between the two; 1 where there is none."""
    inner = squares = others = 0.0
    for part in stack.parts():
        found = _products(part)
        inner, squares, others = inner + found[0], squares + found[1], others + found[2]
    length = math.sqrt(squares) * math.sqrt(others)
    return inner / length if length else 1.0


def _products(part: Part) -> tuple[float, float, float]:
    one, other = (part.expert(number, room).double() for number, room in enumerate(part.rooms(2)))
    return float(one @ other), float(one @ one), float(other @ other)


def _shares(t: float, cosine: float) -> tuple[float, float]:
    """Of the two experts."""
    if abs(cosine) > STRAIGHT:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


SLERP = Method(slerp, {"t": 0.5}, experts=(2, 2), needs_base=False, passes=lambda _options: 2, rooms=lambda _experts: 7)
