"""Which block comes next, already on its way: one reader thread, one block ahead of the computation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from torch import nn

from featcal_fast.sources import Source


class BlockReader:
    """Hands out blocks in a given order; while one is used, the next one is read.

    At most two are alive as long as the caller drops a block before it asks for another. What goes wrong while a block
    is read is raised when that block is asked for. Used as a context manager.

    Args:
        order: the source and number of each block, in the order in which `next` will be called.
    """

    def __init__(self, order: Iterable[tuple[Source, int]]) -> None:
        self._order: Iterator[tuple[Source, int]] = iter(order)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="block-reader")
        self._coming: Future[nn.Module] | None = None

    def __enter__(self) -> BlockReader:
        self._request()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def next(self) -> nn.Module:
        """The next block in order, on its source's device; blocks until it is there."""
        assert self._coming is not None, "more blocks were asked for than announced"
        block = self._coming.result()
        self._request()
        return block

    def _request(self) -> None:
        following = next(self._order, None)
        self._coming = None if following is None else self._thread.submit(following[0].block, following[1])
