"""One tensor of a base and of all its experts, in parts: what an upstream merger is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# Elements at a time: on the host as many as its caches hold, on a GPU enough to keep it busy.
PART, GPU_PART = 2**17, 2**21

Reader = Callable[[int, int], Tensor]  # elements of a tensor, in its own dtype, on the host, from one to before another


def part_size(device: torch.device) -> int:
    """Elements of a part."""
    return PART if device.type == "cpu" else GPU_PART


def whole(tensor: Tensor) -> Reader:
    """Reads from memory."""
    flat = tensor.reshape(-1)
    return lambda start, stop: flat[start:stop]


class Stack:
    """A tensor of the base and of every expert.

    Args:
        name: of the tensor, as the base calls it.
        shape: of it.
        base: reads the base's; None where the method does not look at it.
        experts: likewise, by task.
        device: where it is merged.
        transposed: of linear weights alone, whether they are `[in, out]`; None of everything else.
        size: elements of a part; no result depends on it, but for rounding where elements are summed up.
    """

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        base: Reader | None,
        experts: dict[str, Reader],
        device: torch.device,
        transposed: bool | None = None,
        size: int | None = None,
    ) -> None:
        self.name, self.shape, self.device, self.transposed = name, torch.Size(shape), device, transposed
        self.tasks, self._readers = list(experts), [base or _unneeded, *experts.values()]
        self.size = size or part_size(device)
        self._rooms: list[Tensor] = []

    @property
    def count(self) -> int:
        """Experts."""
        return len(self.tasks)

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return self.shape.numel()

    def parts(self) -> Iterator[Part]:
        """All parts in order; each time they are read again, where they are not in memory."""
        for start in range(0, self.numel, self.size):
            yield Part(self, start, min(start + self.size, self.numel))

    def matrices(self) -> Iterator[Stack]:
        """The matrices of a linear weight, or of several stacked along the first axes, in order."""
        size = self.shape[-2:].numel()
        for start in range(0, self.numel, max(size, 1)):
            base, *experts = (_shifted(reader, start) for reader in self._readers)
            own = dict(zip(self.tasks, experts, strict=True))
            yield Stack(self.name, self.shape[-2:], base, own, self.device, self.transposed, self.size)

    def deltas(self) -> Iterator[Tensor]:
        """`expert - base` of one matrix, expert by expert, float32 `[out, in]`, in memory of its own."""
        for expert in range(self.count):
            delta = torch.empty(self.shape, device=self.device)
            flat = delta.view(-1)
            for part in self.parts():
                part.delta(expert, flat[part.start : part.stop])
            yield delta.mT if self.transposed else delta
            del delta, flat

    def read(self, model: int, start: int, stop: int) -> Tensor:
        """Elements of the base (0) or of an expert (1, ...), in their own dtype, on the device."""
        return self._readers[model](start, stop).to(self.device, non_blocking=True)

    def room(self, number: int, size: int) -> Tensor:
        """Float32 memory that serves all parts: fresh memory for each would be most of the time."""
        while len(self._rooms) <= number:
            self._rooms.append(torch.empty(min(self.size, self.numel), device=self.device))
        return self._rooms[number][:size]


class Part:
    """Elements `start` to `stop` of a stack's tensor. Everything is float32 `[elements]`, in memory of the stack's.

    What it gives may be overwritten, and is good until the next part. `base` is read once, when it is first needed.
    """

    def __init__(self, stack: Stack, start: int, stop: int) -> None:
        self._stack, self.start, self.stop = stack, start, stop
        self._base: Tensor | None = None

    @property
    def base(self) -> Tensor:
        """The base's elements; not to be overwritten before the last `delta`."""
        if self._base is None:
            self._base = self._room(0).copy_(self._stack.read(0, self.start, self.stop))
        return self._base

    def expert(self, number: int, out: Tensor) -> Tensor:
        """An expert's elements, in `out`."""
        return out.copy_(self._stack.read(1 + number, self.start, self.stop))

    def delta(self, number: int, out: Tensor) -> Tensor:
        """`expert - base`, in `out`."""
        return self.expert(number, out).sub_(self.base)

    def rooms(self, count: int) -> list[Tensor]:
        """So many tensors of this part's size, with whatever they hold."""
        return [self._room(1 + number) for number in range(count)]

    def _room(self, number: int) -> Tensor:
        return self._stack.room(number, self.stop - self.start)


def _unneeded(_start: int, _stop: int) -> Tensor:
    raise AssertionError("a method that needs no base looked at it")


def _shifted(reader: Reader, by: int) -> Reader:
    return lambda start, stop: reader(by + start, by + stop)
