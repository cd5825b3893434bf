"""The ops on a GPU: a path chosen, operands made ready, kernels launched.

Nothing here waits for the device, except once per shape, when the order of its tiles is copied there, and once per
device, to find out whether cuBLAS can be used.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from featcal_kernels import blas, schedule
from featcal_kernels.configs import PANEL_BYTES, Arch, Tile, arch_of
from featcal_kernels.moments_triton import descriptor_kernel, pointer_kernel, reduce_kernel
from featcal_kernels.operands_triton import COLUMN_PAD, ROW_PAD, Operand, in_place, operand, part_rows
from featcal_kernels.schedule import ceil_div
from featcal_kernels.triangle_triton import frobenius, symmetrize_

__all__ = ["frobenius", "moments_", "symmetrize_"]

MIN_PANEL = 4096  # tokens; shorter panels would read and write the sums too often
REDUCE_ROWS = 16


def moments_(
    gram: Tensor | None,
    cross: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    *,
    weights: Tensor | None = None,
    scale: Tensor | None = None,
    precision: str = "fp16x3",
    arch: Arch | None = None,
    path: str | None = None,
) -> None:
    """`gram += scale * x' diag(weights) x` (upper triangle) and `cross += scale * y' diag(weights) x`, either or both.

    Args:
        gram: `[d, d]` float32, or None.
        cross: `[m, d]` float32, or None; empty counts as None.
        x: `[n, d]`, n and d at least 1, any strides; 16-bit or float32.
        y: `[n, m]`, any strides; of the type of `x`, or of any if that is float32.
        weights: `[n]`, or None.
        scale: a scalar tensor, or None.
        precision: of float32 products, "fp16x3" or "ieee".
        arch: how to run it; the device's row of the table by default.
        path: "triton" or, for 16-bit operands without weights and scale, "blas"; what `arch` says by default.
    """
    arch = arch or arch_of(x.device)
    assert arch is not None, f"no kernels for {x.device}"
    cross = None if cross is None or not cross.numel() else cross
    y = None if cross is None else y
    weights = None if weights is None else weights.to(x.device, torch.float32).contiguous()
    scale = None if scale is None else scale.to(x.device, torch.float32)
    single = x.dtype == torch.float32
    split = precision == "fp16x3" if single else weights is not None
    dtype = torch.float16 if split else x.dtype
    plain = not (single or split) and scale is None
    path = path or (_path(gram, cross, x, arch) if plain else "triton")
    assert path == "triton" or plain, "cuBLAS is for 16-bit operands without weights and scale"
    with torch.cuda.device_of(x):
        for tokens in _panels(gram, x, y, dtype, weights is not None):
            right = operand(x[tokens], dtype, None if weights is None else weights[tokens])
            x_left = operand(x[tokens], dtype) if weights is not None and gram is not None else right
            y_left = operand(y[tokens], dtype) if y is not None else x_left
            if path == "triton":
                _launch(gram, cross, x_left if gram is not None else y_left, y_left, right, scale, arch)
            else:
                if gram is not None:
                    blas.add_gram_(gram, x_left.matrix)
                if cross is not None:
                    blas.add_product_(cross, y_left.matrix, right.matrix)
            # The next panel takes their place: there is memory for it if there was for the first.
            del right, x_left, y_left


def _path(gram: Tensor | None, cross: Tensor | None, x: Tensor, arch: Arch) -> str:
    if not blas.available(x.device):
        return "triton"
    n, d = x.shape
    flops = n * d * ((0 if gram is None else d) + (0 if cross is None else 2 * cross.shape[0]))
    rectangle = gram is None and arch.blas_rectangles
    wide = arch.blas_columns is not None and d >= arch.blas_columns
    return "blas" if rectangle or wide or flops < arch.blas_flops else "triton"


def _panels(gram: Tensor | None, x: Tensor, y: Tensor | None, dtype: torch.dtype, weighted: bool) -> Iterator[slice]:
    """All tokens at once if the operands are used as they lie; else so many that the copies stay small."""
    copied = weighted * x.shape[1]
    if not in_place(x, dtype) and (gram is not None or not weighted):
        copied += x.shape[1]
    if y is not None and not in_place(y, dtype):
        copied += y.shape[1]
    n = x.shape[0]
    size = max(MIN_PANEL, PANEL_BYTES // (4 * copied) // ROW_PAD * ROW_PAD) if copied else n
    for start in range(0, n, size):
        yield slice(start, start + size)


def _launch(
    gram: Tensor | None, cross: Tensor | None, x: Operand, y: Operand, b: Operand, scale: Tensor | None, arch: Arch
) -> None:
    half = b.data.dtype != torch.float32
    runs = 1 + (b.low is not None) + (x.low is not None or y.low is not None)
    tile = (arch.split if runs > 1 else arch.half) if half else arch.single
    n, m, d = b.tokens, y.columns, b.columns
    device = b.data.device
    table = _table(0 if gram is None else d, 0 if cross is None else m, d, tile, device)
    splits = schedule.token_splits(len(table), runs * ceil_div(n, tile.k), _slots(device))
    by_slabs = splits > 1 or d % COLUMN_PAD > 0
    slabs = torch.empty(len(table) * splits * tile.m * tile.n, device=device) if by_slabs else None
    outputs = (cross if gram is None else gram, gram if cross is None else cross)
    operands: list[Tensor | int] = []
    for side in (x, y, b):
        low, bound = _whole(device) if side.low is None or side.bound is None else (side.low, side.bound)
        operands += [side.data, low, bound, side.data.stride(0), len(side.data)]

    kernel: Any = pointer_kernel
    if arch.descriptors and half:
        kernel = descriptor_kernel
        triton.set_allocator(_descriptor_memory)
    kernel[(len(table), splits)](
        *outputs, slabs, table, *operands, scale, n, part_rows(n), m, d,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, HALVES=tile.halves, PROMOTE=tile.promote, SPLIT=runs > 1,
        SLABS=by_slabs, UPCAST=knobs.runtime.interpret and b.data.dtype == torch.bfloat16,
        num_warps=tile.warps, num_stages=tile.stages, **dict(tile.options),
    )  # fmt: skip
    if by_slabs:
        kernel = reduce_kernel
        kernel[(len(table), tile.m // REDUCE_ROWS)](
            *outputs, slabs, table, splits, m, d, BLOCK_M=tile.m, BLOCK_N=tile.n, ROWS=REDUCE_ROWS
        )


@lru_cache(maxsize=64)
def _table(gram_columns: int, cross_rows: int, columns: int, tile: Tile, device: torch.device) -> Tensor:
    order = schedule.tile_order(gram_columns, cross_rows, columns, tile.m, tile.n, tile.group)
    return torch.tensor(order, dtype=torch.int32).to(device)


@lru_cache(maxsize=16)
def _whole(device: torch.device) -> tuple[Tensor, Tensor]:
    """The flag and the bound of an operand that is not split: no low parts, and a power of 1."""
    return torch.zeros((), dtype=torch.int32, device=device), torch.full((), 2.0**14, device=device)


@lru_cache(maxsize=16)
def _slots(device: torch.device) -> int:
    """Programs that run at once: one on a multiprocessor, whose registers a tile takes up."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _descriptor_memory(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
