"""How batches pass a layer: how many tokens at a time, and what is said when even the fewest are too many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from featcal_fast.errors import MemoryBudgetError


@contextmanager
def explain_out_of_memory(device: torch.device) -> Iterator[None]:
    """Turns torch's error into one that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        trouble = str(error).partition("\n")[0]
        raise MemoryBudgetError(
            f"{device}: out of memory, however few samples pass at a time ({trouble}); shorten the samples "
            "(max_length), keep hidden states elsewhere (--scratch), or use a device with more memory: "
            "`featcal-fast plan` says what is needed"
        ) from error


class Chunks:
    """Hands out a batch's samples, all at once until memory runs out, and half as many from then on, for good.

    Args:
        device: whose memory it is.
        limit: tokens at a time to begin with, padding included, in whole samples; None for whole batches.
        forward_dtype: "bfloat16" for products in bfloat16, "auto" for the models' own.
    """

    def __init__(self, device: torch.device, limit: int | None = None, forward_dtype: str = "auto") -> None:
        self.device, self.limit = device, limit
        self._lower = forward_dtype == "bfloat16"

    def each(self, shape: tuple[int, int], step: Callable[[slice], None]) -> None:
        """Call `step` for slices that cover a batch's samples in order.

        Args:
            shape: of the batch: its samples, and the tokens of each.
            step: may run out of memory, and must then be able to start over with the first half of its samples.

        Raises:
            torch.OutOfMemoryError: one sample is too much.
        """
        self._cover(0, *shape, step)

    def _cover(self, start: int, stop: int, length: int, step: Callable[[slice], None]) -> None:
        while start < stop:
            end = stop if self.limit is None else min(start + max(1, self.limit // length), stop)
            try:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self._lower):
                    step(slice(start, end))
            except torch.OutOfMemoryError:
                if end - start == 1:
                    raise
            else:
                start = end
                continue
            # Only here is the failed step's memory free: the error held on to its frames.
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.limit = (end - start) // 2 * length
            self._cover(start, end, length, step)
            start = end
