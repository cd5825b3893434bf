"""TIES: trim each change, elect a sign for each element, average the changes that have it (arXiv 2306.01708).

`W = W_0 + scaling * sum_k w_k d_k / sum_k w_k` over the experts whose `w_k d_k` has the sign of `sum_k w_k d_k`, where
`d_k` is `W_k - W_0` with all but its `int(density * elements)` largest elements by magnitude set to 0. It is trimmed
tensor by tensor; of equal magnitudes those that come first stay.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from featcal_fast.merging.elect import elected, elected_rooms
from featcal_fast.merging.method import Method, Options
from featcal_fast.merging.stack import Part, Stack
from featcal_fast.merging.trim import find_trims


def ties(stack: Stack, options: Options) -> Iterator[Tensor]:
    """The merged tensor's parts."""
    trims = find_trims(stack, options.density)

    def trimmed(part: Part, expert: int, out: Tensor) -> Tensor:
        return trims[expert].apply(part.delta(expert, out))

    yield from elected(stack, options, trimmed, mean=True)


TIES = Method(
    ties,
    {"scaling": 1.0, "density": 0.2},
    weighted=True,
    divides=True,
    passes=lambda options: 3 if options.density < 1 else 1,
    rooms=lambda experts: elected_rooms(experts) + 3,
)
