"""Experts kept in host memory after their first read, as they are or compressed: for disks that are the bottleneck."""

from __future__ import annotations

from collections.abc import Iterable
from threading import Lock

import torch
from torch import Tensor

from featcal_fast.checkpoints.bnb import dequantise
from featcal_fast.checkpoints.reader import TensorSource, WrappedSource
from featcal_fast.checkpoints.shards import TensorInfo

STORAGES = ("disk", "host", "host-int8", "host-nf4")
SMALLEST = 4096  # values; smaller tensors, and vectors of any size, are kept as they are
BLOCKSIZES = {"host-int8": 256, "host-nf4": 64}  # values that share a float32 scale
BITS = {"host-int8": 8, "host-nf4": 4}


def cached_bytes(info: TensorInfo, storage: str) -> int:
    """What a tensor takes in host memory."""
    if not _compressed(info.shape, info.dtype, storage):
        return info.nbytes
    numel = torch.Size(info.shape).numel()
    return numel * BITS[storage] // 8 + 4 * -(-numel // BLOCKSIZES[storage])


class CachedExpert(WrappedSource):
    """An expert whose tensors are read from its files once, and come from host memory from then on.

    The first read gives the kept form too, so that results do not depend on what was read before.

    Args:
        source: the expert.
        storage: `host`, exact; `host-int8`, blockwise 8-bit codes; or `host-nf4`, blockwise 4-bit codes.
    """

    def __init__(self, source: TensorSource, storage: str) -> None:
        super().__init__(source)
        self.storage = storage
        self._cache: dict[str, _CachedTensor] = {}
        self._reading = Lock()  # two threads that want a tensor read it once
        self._difference = self._energy = 0.0

    @property
    def error(self) -> float:
        """`||W_kept - W||_F / ||W||_F` over the tensors kept so far."""
        return (self._difference / self._energy) ** 0.5 if self._energy else 0.0

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors as they are kept, in memory of their own."""
        found = {}
        with self._reading:
            for name in names:
                if name not in self._cache:
                    self._keep(name, self.source.read([name])[name])
                found[name] = self._cache[name].value()
        return found

    def read_exactly(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors without compression, for a merge; they are kept all the same."""
        found = {}
        with self._reading:
            for name in names:
                if name in self._cache and self._cache[name].exact:
                    found[name] = self._cache[name].value()
                else:
                    found |= self.source.read([name])
                    self._keep(name, found[name].clone())
        return found

    def _keep(self, name: str, tensor: Tensor) -> None:
        if name in self._cache:
            return
        self._cache[name] = kept = _CachedTensor(tensor, self.storage)
        if tensor.is_floating_point():
            self._energy += float(tensor.float().square().sum())
            self._difference += 0.0 if kept.exact else float((kept.value().float() - tensor.float()).square().sum())


class _CachedTensor:
    """One tensor in host memory."""

    def __init__(self, tensor: Tensor, storage: str) -> None:
        self.exact = not _compressed(tuple(tensor.shape), tensor.dtype, storage)
        self._tensor, self._shape, self._dtype, self._bits = tensor, tensor.shape, tensor.dtype, BITS.get(storage, 0)
        if not self.exact:
            from bitsandbytes import functional

            size = BLOCKSIZES[storage]
            if self._bits == 4:
                self._tensor, state = functional.quantize_4bit(tensor, blocksize=size, quant_type="nf4")
            else:
                self._tensor, state = functional.quantize_blockwise(tensor, blocksize=size)
            self._scales = state.code.cpu(), state.absmax, size

    def value(self) -> Tensor:
        """The tensor in its own dtype, in memory of the caller's own."""
        if self.exact:
            return self._tensor.clone()
        return dequantise(self._tensor, self._bits, *self._scales, tuple(self._shape), self._dtype)


def _compressed(shape: tuple[int, ...], dtype: torch.dtype, storage: str) -> bool:
    return storage in BITS and dtype.is_floating_point and len(shape) >= 2 and torch.Size(shape).numel() > SMALLEST
