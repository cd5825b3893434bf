"""The ops on a GPU: a path chosen, operands made ready, kernels launched.

Nothing here waits for the device, except once per shape, when the order of its tiles is copied there, and once per
device, to find out whether cuBLAS can be used. An op takes all its memory before a sum changes: one that finds none
has done nothing, and may be tried again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton import knobs

from featcal_kernels import blas, schedule
from featcal_kernels.configs import PANEL_BYTES, ROW_PAD, Arch, Tile, arch_of
from featcal_kernels.moments_triton import descriptor_kernel, pointer_kernel, reduce_kernel
from featcal_kernels.operands_triton import COLUMN_PAD, Operand, OperandPanels, needs_no_copy, part_rows
from featcal_kernels.schedule import ceil_div
from featcal_kernels.triangle_triton import frobenius, symmetrize_

__all__ = ["addmm_", "frobenius", "moments_", "pack", "symmetrize_"]

MIN_PANEL = 4096  # tokens; shorter panels would read and write the sums too often
REDUCE_ROWS = 16
PATHS = ("triton", "squares")


def moments_(
    gram: Tensor | None,
    cross: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    *,
    weights: Tensor | None = None,
    precision: str = "fp16x3",
    arch: Arch | None = None,
    path: str | None = None,
) -> None:
    """`gram += x' diag(weights) x` (upper triangle) and `cross += y' diag(weights) x`, either or both.

    Args:
        gram: `[d, d]` float32, or None.
        cross: `[m, d]` float32, or None; empty counts as None.
        x: `[n, d]`, n and d at least 1, any strides; 16-bit or float32.
        y: `[n, m]`, of the type of `x`, any strides.
        weights: `[n]`, or None.
        precision: of float32 products, "fp16x3" or "ieee".
        arch: how to run it; the device's row of the table by default.
        path: "triton" or, for 16-bit operands without weights, "squares" by cuBLAS; what `arch` says by default.
    """
    arch = arch or arch_of(x.device)
    assert arch is not None, f"no kernels for {x.device}"
    cross = None if cross is None or not cross.numel() else cross
    y = None if cross is None else y
    weights = None if weights is None else weights.to(x.device, torch.float32).contiguous()
    single = x.dtype == torch.float32
    split = precision == "fp16x3" if single else weights is not None
    dtype = torch.float16 if split else x.dtype
    plain = not (single or split)
    path = path or (_path(gram, cross, x, arch) if plain else "triton")
    assert path == "triton" or plain, "cuBLAS is for 16-bit operands without weights"
    with torch.cuda.device_of(x):
        if path == "squares" and all(needs_no_copy(each, dtype) for each in (x, y) if each is not None):
            _add_squares(gram, cross, x, y)
            return
        size = _panel(gram, x, y, dtype, weights is not None)
        parts = 2 if single else 1  # which hold all the bits of any 16-bit value
        right = OperandPanels(x, dtype, weights, tokens=size)
        x_left = OperandPanels(x, dtype, None, parts, size) if weights is not None and gram is not None else right
        y_left = x_left if y is None else OperandPanels(y, dtype, None, parts, size)
        _add(gram, cross, x_left if gram is not None else y_left, y_left, right, None, arch, path, size)


def pack(b: Tensor) -> OperandPanels:
    """`b` `[k, d]` float32 as a right operand of `addmm_`, packed once for several."""
    with torch.cuda.device_of(b):
        return OperandPanels(b, torch.float16).packed()


def addmm_(
    out: Tensor,
    a: Tensor,
    b: Tensor | OperandPanels,
    scale: Tensor,
    *,
    precision: str = "fp16x3",
    arch: Arch | None = None,
) -> None:
    """`out += scale * (a @ b)`.

    Args:
        out: `[m, d]` float32, unit column stride.
        a: `[m, k]`, any floating type, any strides.
        b: `[k, d]` float32, any strides; or packed.
        scale: a scalar tensor.
        precision: "fp16x3", "fp16x2" (`a` rounded to 11 bits), or "ieee".
        arch: how to run it; the device's row of the table by default.
    """
    arch = arch or arch_of(out.device)
    assert arch is not None, f"no kernels for {out.device}"
    scale = scale.to(out.device, torch.float32)
    with torch.cuda.device_of(out):
        parts = 1 if precision == "fp16x2" or a.dtype.itemsize == 2 else 2
        if isinstance(b, OperandPanels):
            size, right = a.shape[1], b
            left = OperandPanels(a.mT, torch.float16, None, parts)
        else:
            dtype = torch.float32 if precision == "ieee" else torch.float16
            size = _panel(None, b, a.mT, dtype, False)
            left, right = OperandPanels(a.mT, dtype, None, parts, size), OperandPanels(b, dtype, tokens=size)
        _add(None, out, left, left, right, scale, arch, "triton", size)


def _path(gram: Tensor | None, cross: Tensor | None, x: Tensor, arch: Arch) -> str:
    if not blas.available(x.device):
        return "triton"
    n, d = x.shape
    flops = n * d * ((0 if gram is None else d) + (0 if cross is None else 2 * cross.shape[0]))
    rectangle = gram is None and arch.blas_rectangles
    narrow = cross is None and d <= arch.blas_grams
    wide = arch.blas_columns is not None and d >= arch.blas_columns
    return "squares" if rectangle or narrow or wide or flops < arch.blas_flops else "triton"


def _panel(gram: Tensor | None, x: Tensor, y: Tensor | None, dtype: torch.dtype, weighted: bool) -> int:
    """Tokens at a time: all if the operands are used as they lie; else so many that the copies stay small."""
    copied = weighted * x.shape[1]
    if not needs_no_copy(x, dtype) and (gram is not None or not weighted):
        copied += x.shape[1]
    if y is not None and not needs_no_copy(y, dtype):
        copied += y.shape[1]
    return max(MIN_PANEL, PANEL_BYTES // (4 * copied) // ROW_PAD * ROW_PAD) if copied else x.shape[0]


def _add(
    gram: Tensor | None,
    cross: Tensor | None,
    x: OperandPanels,
    y: OperandPanels,
    b: OperandPanels,
    scale: Tensor | None,
    arch: Arch,
    path: str,
    size: int,
) -> None:
    """`gram += scale * x' b` and `cross += scale * y' b`, `size` tokens at a time."""
    n = b.x.shape[0]
    launch = _Launcher.of(gram, cross, x, y, b, arch, min(size, n)) if path == "triton" else None
    for tokens in _slices(n, size):
        right = b[tokens]
        x_left = right if x is b else x[tokens]
        y_left = right if y is b else x_left if y is x else y[tokens]
        if launch is not None:
            launch(gram, cross, x_left, y_left, right, scale)
            continue
        _add_squares(gram, cross, right.matrix, y_left.matrix)


def _add_squares(gram: Tensor | None, cross: Tensor | None, x: Tensor, y: Tensor | None) -> None:
    if gram is not None:
        blas.add_gram_(gram, x)
    if cross is not None:
        assert y is not None
        blas.add_product_(cross, y, x)


def _slices(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


@dataclass
class _Launcher:
    """Launches the kernels on each panel of an op, with the same tiles, programs and memory.

    Attributes:
        arch: how the device runs the op.
        tile: what one program computes.
        half: whether operands are 16-bit.
        table: `[tiles]` int32, which tile each program takes, as `schedule` codes it.
        splits: programs that share a tile's tokens (split-K).
        workspace: float32, where programs leave partial tiles to be added up; None where each adds to the sums itself.
        m, d: rows of the rectangular sum, and columns of both sums.
        ld: stride of the rectangular sum's rows.
        descriptors: memory for tensor descriptors.
    """

    arch: Arch
    tile: Tile
    half: bool
    table: Tensor
    splits: int
    workspace: Tensor | None
    m: int
    d: int
    ld: int
    descriptors: _DescriptorAllocator

    @classmethod
    def of(
        cls,
        gram: Tensor | None,
        cross: Tensor | None,
        x: OperandPanels,
        y: OperandPanels,
        b: OperandPanels,
        arch: Arch,
        tokens: int,
    ) -> _Launcher:
        device, d = b.x.device, b.x.shape[1]
        half = b.dtype != torch.float32
        runs = b.parts + max(x.parts, y.parts) - 1
        m, ld = (0, d) if cross is None else (cross.shape[0], cross.stride(0))
        sizes = 0 if gram is None else d, m, d
        tile, splits = choose_tile(sizes, tokens, runs, arch, half, _slots(device))
        table = _tile_table(*sizes, tile, device)
        by_workspace = splits > 1 or d % COLUMN_PAD > 0 or ld % COLUMN_PAD > 0
        workspace = torch.empty(table.shape[0] * splits * tile.m * tile.n, device=device) if by_workspace else None
        return cls(arch, tile, half, table, splits, workspace, y.x.shape[1], d, ld, _DescriptorAllocator(device))

    def __call__(
        self, gram: Tensor | None, cross: Tensor | None, x: Operand, y: Operand, b: Operand, scale: Tensor | None
    ) -> None:
        tile, m, d = self.tile, self.m, self.d
        outputs = (cross if gram is None else gram, gram if cross is None else cross)
        operands: list[Tensor | int] = []
        for side in (x, y, b):
            low, bound = _unsplit(b.data.device)
            low, bound = low if side.low is None else side.low, bound if side.bound is None else side.bound
            operands += [side.data, low, bound, side.data.stride(0), side.data.shape[0]]
        kernel = pointer_kernel
        if self.arch.descriptors and self.half:
            kernel = descriptor_kernel
            triton.set_allocator(self.descriptors)
        kernel[(self.table.shape[0], self.splits)](
            *outputs, self.workspace, self.table, *operands, scale, b.tokens, part_rows(b.tokens), m, d, self.ld,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, HALVES=tile.halves, PROMOTE=tile.promote,
            SCALED=any(side.bound is not None for side in (x, y, b)), A_LOW=x.low is not None or y.low is not None,
            B_LOW=b.low is not None, TRIPLE=tile.triple, PARTIAL=self.workspace is not None,
            UPCAST=knobs.runtime.interpret and b.data.dtype == torch.bfloat16,
            num_warps=tile.warps, num_stages=tile.stages, **dict(tile.options),
        )  # fmt: skip
        if self.workspace is not None:
            reduce_kernel[(self.table.shape[0], tile.m // REDUCE_ROWS)](
                *outputs, self.workspace, self.table, self.splits, m, d, self.ld,
                BLOCK_M=tile.m, BLOCK_N=tile.n, ROWS=REDUCE_ROWS,
            )  # fmt: skip


class _DescriptorAllocator:
    """Memory for tensor descriptors, the same for each panel: later ones ask for none. Triton keeps the last op's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: Tensor | None = None

    def __call__(self, size: int, alignment: int, stream: int | None) -> Tensor:
        if self._memory is None or self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.int8, device=self._device)
        return self._memory


@lru_cache(maxsize=1024)
def choose_tile(
    sizes: tuple[int, int, int], tokens: int, runs: int, arch: Arch, half: bool, slots: int
) -> tuple[Tile, int]:
    """The tile, and how many programs share its tokens (split-K).

    Args:
        sizes: columns of the Gram matrix, rows and columns of the cross moment; 0 for none.
        tokens: of a launch.
        runs: products that a pair of operands takes.
        arch: of the device.
        half: 16-bit operands.
        slots: programs that run at once.
    """
    tiles = [arch.single] if not half else [arch.split] if runs > 1 else [arch.half, arch.small]
    found = []
    for tile in tiles:
        if tile is not None:
            count = schedule.tile_count(*sizes, tile.m, tile.n)
            steps, step = ceil_div(tokens, tile.k), tile.step
            steps, step = (steps, step * runs) if tile.triple else (steps * runs, step)
            size = tile.m * tile.n / (arch.half.m * arch.half.n)
            splits, cost = schedule.token_splits(count, steps, slots, size, step)
            found.append((cost, tile, splits))
    _, tile, splits = min(found, key=lambda each: each[0])
    return tile, splits


@lru_cache(maxsize=64)
def _tile_table(gram_columns: int, cross_rows: int, columns: int, tile: Tile, device: torch.device) -> Tensor:
    order = schedule.tile_order(gram_columns, cross_rows, columns, tile.m, tile.n, tile.group)
    return torch.tensor(order, dtype=torch.int32).to(device)


@lru_cache(maxsize=16)
def _unsplit(device: torch.device) -> tuple[Tensor, Tensor]:
    """The `low` flag and the bound of an operand that is not split: no low parts, and a power of 1."""
    return torch.zeros((), dtype=torch.int32, device=device), torch.full((), 2.0**14, device=device)


@lru_cache(maxsize=16)
def _slots(device: torch.device) -> int:
    """Programs that run at once: one on a multiprocessor, whose registers a tile takes up."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
