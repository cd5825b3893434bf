"""Samples that are set aside: what is fitted to the others is judged on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain

from torch import Tensor

from featcal_fast.errors import DataError

Batches = Mapping[str, Iterable[Mapping[str, Tensor]]]


class HeldOut(dict[str, Tensor]):
    """A batch that nothing is fitted to. A task's come after all of its others."""


def with_held_out(fitted: Batches, held_out: Batches) -> dict[str, Iterable[Mapping[str, Tensor]]]:
    """Each task's batches, and after them those that are held out.

    Raises:
        DataError: some are held out of a task that has none to fit to.
    """
    for task in held_out:
        if task not in fitted:
            raise DataError(f"task {task}: found held-out batches, but none to fit to; expected both")

    both = dict(fitted)
    for task, batches in held_out.items():
        if not isinstance(batches, Iterable):
            raise DataError(f"task {task}: found a {type(batches).__name__} of held-out batches, expected some")
        if isinstance(fitted[task], Iterable):  # else whoever reads them will say
            marked = (HeldOut(batch) if isinstance(batch, Mapping) else batch for batch in batches)
            both[task] = chain(fitted[task], marked)
    return both
