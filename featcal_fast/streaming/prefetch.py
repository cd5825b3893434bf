"""Blocks read and copied one ahead of the computation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from featcal_fast.streaming.sources import Source
from featcal_fast.streaming.transfers import Transfers, empty_pinned


class BlockPrefetcher:
    """Hands out blocks in a given order; while one is used, the next one is read and copied to the device.

    What goes wrong while a block is read is raised when that block is asked for. Used as a context manager.

    Args:
        order: the source and number of each block, in the order in which `next` will be called.
        device: where blocks are wanted.
    """

    def __init__(self, order: Iterable[tuple[Source, int]], device: torch.device) -> None:
        self._order: Iterator[tuple[Source, int]] = iter(order)
        self._device = device
        self._transfers = Transfers(device, "block-reader")
        self._coming: Callable[[], nn.Module] | None = None

    def __enter__(self) -> BlockPrefetcher:
        self._request()
        return self

    def __exit__(self, *error: object) -> None:
        self._transfers.__exit__(*error)

    def next(self) -> nn.Module:
        """The next block in order, on the device; blocks until it was read. Blocks no longer used must be gone."""
        assert self._coming is not None, "more blocks were asked for than announced"
        block = self._coming()
        self._request()
        return block

    def _request(self) -> None:
        following = next(self._order, None)
        if following is None:
            self._coming = None
            return
        source, index = following
        if self._device.type != "cuda":
            self._coming = self._transfers.submit(partial(source.block, index)).result
        elif next(source.structure.blocks[index].parameters()).is_cuda:  # nothing to read: copied when its turn comes
            self._coming = lambda: source.block(index).to(self._device)
        else:
            targets = {
                name: torch.empty_like(tensor, device=self._device)
                for name, tensor in _tensors(source.structure.blocks[index]).items()
            }
            self._coming = self._transfers.submit(partial(_read_to, targets, source, index)).result


def _read_to(targets: dict[str, Tensor], source: Source, index: int) -> nn.Module:
    block = source.block(index)
    for name, tensor in _tensors(block).items():
        target = targets[name]
        pinned = empty_pinned(tuple(tensor.shape), tensor.dtype, target.device).copy_(tensor)
        target.copy_(pinned, non_blocking=True)
        tensor.data = target
    return block


def _tensors(block: nn.Module) -> dict[str, Tensor]:
    return dict(chain(block.named_parameters(), block.named_buffers()))
