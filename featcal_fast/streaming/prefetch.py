"""Blocks read and copied one ahead of the computation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from featcal_fast.ranks.world import World
from featcal_fast.streaming.sources import Source, block_for_all
from featcal_fast.streaming.transfers import Transfer, Transfers, empty_pinned


class BlockPrefetcher:
    """Hands out blocks in a given order; while one is used, the next one is read and copied to the device.

    What goes wrong while a block is read is raised when that block is asked for. Used as a context manager.

    Args:
        order: the source and number of each block, in the order in which `next` will be called.
        device: where blocks are wanted.
        world: all ranks; what they say to each other here is said by the thread that reads.
    """

    def __init__(self, order: Iterable[tuple[Source, int]], device: torch.device, world: World | None = None) -> None:
        self._order: Iterator[tuple[Source, int]] = iter(order)
        self._world = world or World()
        self._device = device
        self._transfers = Transfers(device, "block-reader")
        self._coming: Callable[[], nn.Module] | None = None
        self._reading: Transfer[nn.Module] | None = None  # of what is coming, if it is read

    def __enter__(self) -> BlockPrefetcher:
        self._request()
        return self

    def __exit__(self, *error: object) -> None:
        self._transfers.__exit__(*error)

    @property
    def ready(self) -> bool:
        """Whether `next` need not wait for a file."""
        return self._reading is None or self._reading.done

    def next(self) -> nn.Module:
        """The next block in order, on the device; blocks until it was read. Blocks no longer used must be gone."""
        assert self._coming is not None, "more blocks were asked for than announced"
        block = self._coming()
        self._request()
        return block

    def _request(self) -> None:
        following, self._reading = next(self._order, None), None
        if following is None:
            self._coming = None
            return
        source, index = following
        if self._device.type != "cuda":
            self._read(partial(block_for_all, source, index, self._world))
        elif next(source.structure.blocks[index].parameters()).is_cuda:  # nothing to read: copied when its turn comes
            self._coming = lambda: source.block(index).to(self._device)
        else:
            targets = {
                name: torch.empty_like(tensor, device=self._device)
                for name, tensor in _tensors(source.structure.blocks[index]).items()
            }
            self._read(partial(_read_to, targets, source, index, self._world))

    def _read(self, job: Callable[[], nn.Module]) -> None:
        self._reading = self._transfers.submit(job)
        self._coming = self._reading.result


def _read_to(targets: dict[str, Tensor], source: Source, index: int, world: World) -> nn.Module:
    block = block_for_all(source, index, world)
    for name, tensor in _tensors(block).items():
        target = targets[name]
        pinned = empty_pinned(tuple(tensor.shape), tensor.dtype, target.device).copy_(tensor)
        target.copy_(pinned, non_blocking=True)
        tensor.data = target
    return block


def _tensors(block: nn.Module) -> dict[str, Tensor]:
    return dict(chain(block.named_parameters(), block.named_buffers()))
