"""What an upstream merger is: a sum over experts, an element at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Method:
    """A merge of elements; everything float32, and in place: fresh memory for each part would be most of the time.

    Attributes:
        add: what an expert adds to the sum: of the expert's elements, which may be overwritten, and the base's.
        finish: what is made of the base's elements, the sum, which may be overwritten, the scaling and the number of
            experts.
    """

    add: Callable[[Tensor, Tensor], Tensor]
    finish: Callable[[Tensor, Tensor, float, int], Tensor]
