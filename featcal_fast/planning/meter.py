"""Computations without storage: the bytes that they would allocate and their operations are counted."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")


class Meter:
    """Counts, within its context, the bytes of meta tensors alive and the floating-point operations of products.

    Attention is taken as fused: it allocates its output only.

    Args:
        present: whatever holds tensors that were there before, which do not count.
    """

    def __init__(self, *present: Any) -> None:
        self.live = self.peak = 0
        self.flops = 0.0
        self._known = {leaf.untyped_storage()._cdata for leaf in tree_leaves(present) if isinstance(leaf, Tensor)}
        self._modes: tuple[AbstractContextManager[Any], ...] = (_Dispatch(self), _Attention(self))

    def __enter__(self) -> Meter:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def lap(self) -> tuple[int, float]:
        """The highest number of bytes above those alive now, and the operations, since the last lap."""
        found = self.peak, self.flops
        self.peak, self.flops = self.live, 0.0
        return found

    def note(self, tensor: Tensor) -> None:
        """Count a tensor's storage as long as it lives."""
        if tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _Dispatch(TorchDispatchMode):
    def __init__(self, meter: Meter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.meter = meter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            a, b = args[-2:] if name in ("mm", "bmm") else args[1:3]
            self.meter.flops += 2.0 * a.numel() * b.shape[-1]
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.meter.note(leaf)
        return result


class _Attention(TorchFunctionMode):
    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = args[:3] if len(args) >= 3 else (kwargs[name] for name in ("query", "key", "value"))
            self.meter.flops += 2.0 * query.numel() * key.shape[-2] * (1 + value.shape[-1] / query.shape[-1])
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        if func is getattr(torch, "_grouped_mm", None):  # of routed experts; on meta it takes bfloat16 only
            rows, matrices = args[:2]
            self.meter.flops += 2.0 * rows.numel() * matrices.shape[-1]
            return rows.new_empty(rows.shape[0], matrices.shape[-1])
        return func(*args, **(kwargs or {}))
