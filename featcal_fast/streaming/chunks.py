"""How batches pass a layer: how many tokens at a time, and what is said when even the fewest are too many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from featcal_fast.errors import MemoryBudgetError
from featcal_fast.layer.tokens import Tokens

PLAIN = nullcontext()


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


class Chunk:
    """Samples of a batch that pass a layer together.

    What is done with them is done in it as a context: products are rounded there if settings say so, and where memory
    runs out with more than one sample, the context ends without an error and `failed`. A class, not a generator: from
    Python 3.12 on a generator's context that swallows an exception keeps its frames, and so every activation.

    Args:
        batch: its number.
        rows: the samples.
        tokens: of the whole batch.
        autocast: the context for products; by default they are as the models have them.
    """

    def __init__(self, batch: int, rows: slice, tokens: Tokens, autocast: AbstractContextManager[Any] = PLAIN) -> None:
        self.batch, self.rows = batch, rows
        self.failed = False
        self._tokens, self._autocast = tokens, autocast

    def __enter__(self) -> Chunk:
        self._autocast.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> bool:
        self._autocast.__exit__(kind, *error)
        out_of_memory = kind is not None and issubclass(kind, torch.OutOfMemoryError)
        self.failed = out_of_memory and self.rows.stop - self.rows.start > 1
        return self.failed

    @property
    def tokens(self) -> Tokens:
        """Which tokens of the samples count."""
        return self._tokens.part(self.rows)

    @property
    def end(self) -> tuple[int, int]:
        """How far a task has come once the chunk is done: batches before this one, and samples of this one."""
        return self.batch, self.rows.stop


class Chunks:
    """Takes batches apart: whole until memory runs out, then into half as many samples, from then on and for good.

    Args:
        device: whose memory it is.
        limit: tokens at a time to begin with, padding included, in whole samples; None for whole batches.
        forward_dtype: "bfloat16" for products in bfloat16, "auto" for the models' own.
    """

    def __init__(self, device: torch.device, limit: int | None = None, forward_dtype: str = "auto") -> None:
        self.device, self.limit = device, limit
        self._lower = forward_dtype == "bfloat16"

    def of(self, batch: int, tokens: Tokens) -> Iterator[Chunk]:
        """Chunks that cover a batch in order; of one that failed, the samples come again, in halves.

        What is done with a chunk must be able to start over with the first half of its samples.

        Args:
            batch: its number.
            tokens: the batch's.
        """
        samples, length = tokens.extent
        start, stops = 0, [samples]
        while stops:  # what failed is finished, in halves, before anything after it begins
            end = min(stops[-1], samples if self.limit is None else start + max(1, self.limit // length))
            autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self._lower)
            chunk = Chunk(batch, slice(start, end), tokens, autocast)
            yield chunk
            if chunk.failed:  # its memory is free only now: the error held on to its frames
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                self.limit = (end - start) // 2 * length
                stops.append(end)
            else:
                start = end
                while stops and stops[-1] == start:
                    stops.pop()
