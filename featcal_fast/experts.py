"""Which block comes next, already on its way: one reader thread, one block ahead of the computation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import nn

from featcal_fast.models.stepping import pinned
from featcal_fast.sources import Source


class BlockReader:
    """Hands out blocks in a given order; while one is used, the next one is read.

    The one ahead waits where its model is, in pinned memory if that is the host's and it is for a GPU, and is copied
    when its turn comes, in order with the computation: neither the host nor the device waits for it. What goes wrong
    while a block is read is raised when that block is asked for. Used as a context manager.

    Args:
        order: the source and number of each block, in the order in which `next` will be called.
        device: where blocks are wanted.
    """

    def __init__(self, order: Iterable[tuple[Source, int]], device: torch.device) -> None:
        self._order: Iterator[tuple[Source, int]] = iter(order)
        self._device = device
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="block-reader")
        self._coming: Future[nn.Module] | None = None

    def __enter__(self) -> BlockReader:
        self._request()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def next(self) -> nn.Module:
        """The next block in order, on the device; blocks until it was read."""
        assert self._coming is not None, "more blocks were asked for than announced"
        block = self._coming.result().to(self._device, non_blocking=self._device.type == "cuda")
        self._request()
        return block

    def _request(self) -> None:
        following = next(self._order, None)
        self._coming = None if following is None else self._thread.submit(self._read, *following)

    def _read(self, source: Source, index: int) -> nn.Module:
        block = source.block(index)
        if self._device.type == "cuda":
            for parameter in block.parameters():
                parameter.data = pinned(parameter.data)
        return block
