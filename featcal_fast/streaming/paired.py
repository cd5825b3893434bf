"""Two models on the same samples: means, and how far their difference can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


def mean(numbers: Sequence[Sequence[float]]) -> float:
    """Over samples, tasks weighing the same."""
    return math.fsum(sum(each) / len(each) for each in numbers) / len(numbers)


class Paired(NamedTuple):
    """Two means over samples, tasks weighing the same, and the standard error of their difference."""

    first: float
    second: float
    spread: float

    @property
    def worse(self) -> bool:
        """Whether the second is larger by more than the spread."""
        return self.second - self.first > self.spread


def paired(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Paired:
    """Compare numbers of the same samples, by task.

    Args:
        first, second: a number a sample of each task; larger is worse.

    Returns:
        Means and spread; a task with one sample adds nothing to the latter.
    """
    variances = []
    for one, other in zip(first, second, strict=True):
        count, differences = len(one), [b - a for a, b in zip(one, other, strict=True)]
        middle = math.fsum(differences) / count if all(map(math.isfinite, differences)) else math.nan
        variances.append(math.fsum((each - middle) ** 2 for each in differences) / max(1, count - 1) / count)
    return Paired(mean(first), mean(second), math.sqrt(math.fsum(variances)) / len(variances))
