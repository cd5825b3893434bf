"""How far two rows are from each other, and how sure that is: paired over test items and over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Items = Mapping[str, Sequence[float]]  # by task, of every test item


@dataclass(frozen=True)
class HeldOut:
    """The test items that all rows are measured on.

    Attributes:
        sizes: by task, what an item counts: its bytes, or 1.
        files: by task, the number of the file that an item is from: items of a file are not independent.
    """

    sizes: Items
    files: Mapping[str, Sequence[int]]

    def scores(self, items: Items) -> dict[str, float]:
        """By task, the items' sum by the sum of their sizes."""
        return {task: sum(items[task]) / sum(sizes) for task, sizes in self.sizes.items()}


def difference(test: HeldOut, ours: Sequence[Items], theirs: Sequence[Items]) -> tuple[float, float]:
    """The mean over tasks and seeds of ours less theirs, and its standard error.

    The error's square is the sum of two variances of that mean: over files, of what is left of an item's difference
    after the task's own (Cochran's for a ratio, of clusters), and over seeds. What belongs to a file and a seed
    together counts in both, so the error is rather too large than too small; of one seed only the first is known.

    Args:
        test: what was measured on.
        ours: by seed.
        theirs: of the same seeds.

    Returns:
        Both, in the score's unit.
    """
    apart = [
        {task: [a - b for a, b in zip(mine[task], other[task], strict=True)] for task in test.sizes}
        for mine, other in zip(ours, theirs, strict=True)
    ]
    scores = [test.scores(items) for items in apart]
    by_seed = [statistics.fmean(each.values()) for each in scores]
    variance = statistics.variance(by_seed) / len(by_seed) if len(by_seed) > 1 else 0.0
    for task, sizes in test.sizes.items():
        mean, total = statistics.fmean(each[task] for each in scores), sum(sizes)
        left: dict[int, float] = {}
        for i, (size, file) in enumerate(zip(sizes, test.files[task], strict=True)):
            found = statistics.fmean(items[task][i] for items in apart)
            left[file] = left.get(file, 0.0) + (found - mean * size) / total
        count = len(left)
        if count > 1:
            variance += count / (count - 1) * sum(value**2 for value in left.values()) / len(test.sizes) ** 2
    return statistics.fmean(by_seed), math.sqrt(variance)
