"""The op list: what each op computes, what it accepts, and which implementation runs.

`naive` is plain torch and the specification: it runs on any device. On CUDA and ROCm devices Triton kernels run instead
(float64 features excepted). All accumulate in float32, in place, and give the same bits every time on the same device.

A *triangle* is the upper one of a row-major buffer, which is the lower one of its column-major view `out.mT`:
`torch.linalg.cholesky_ex(out.mT, out=(out.mT, info))` factors it in place. Entries below the diagonal are unspecified
after `gram_` and `gram_cross_`, and never read by `frobenius` and `symmetrize_`.

How exact the products are, before sums are rounded:

- 16-bit features: exact. Matrix units may round their sums more coarsely than float32 (NVIDIA's cut them off at 24 or
  25 bits: simulated, 8e-6 of a sum over 2,048 tokens), here as in cuBLAS. On a GPU a weighted feature that 16 bits
  cannot hold is split in two, good to 2^-22, which costs a second product (weights of 0 and 1 cost none). A CPU
  multiplies them in float32; bfloat16 in matrix units, if `allow_bf16_units` was called.
- float32 features: on a GPU `precision="fp16x3"` splits each value into two float16 parts and leaves out the product of
  the low ones, good to 2^-22 of the largest values' products, and what matrix units sum up is added up in float32 every
  128 tokens or sooner; `"ieee"` multiplies in float32, many times slower. A CPU always multiplies in float32.

Column sums are no by-product here: the tensor cores take their tiles from shared memory, and a sum in the same pass
would pull each tile through registers too. `x.sum(0, dtype=torch.float32)` reads `x` once.

Operands that do not fit together are a ValueError that says what was found and expected. Equations are those of FeatCal
(arXiv 2605.13030), which the ops were written for: `S_t` and `C_t` are a task's second moments, `w_t` its weight.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from featcal_kernels import cpu, naive
from featcal_kernels.configs import PANEL_BYTES, ROW_PAD, arch_of

if TYPE_CHECKING:  # Triton is only needed, and only there for certain, where there is a GPU
    from featcal_kernels.operands_triton import OperandPanels

_INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PRECISIONS = ("fp16x3", "ieee")
_TRITON = (3, 6)  # the oldest release the kernels are checked with


def gram_(out: Tensor, x: Tensor, weights: Tensor | None = None, *, precision: str = "fp16x3") -> Tensor:
    """`out += x' diag(weights) x`, upper triangle: the sum of `S_t` in eq. 13, a chunk of tokens at a time.

    Args:
        out: `[d, d]` float32, contiguous; the running sum.
        x: `[n, d]` float16, bfloat16, float32 or float64, unit column stride; `n` may be 0.
        weights: `[n]`, any dtype, non-negative token weights; None for ones.
        precision: of float32 products on a GPU, "fp16x3" or "ieee".

    Returns:
        `out`, `[d, d]` float32.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit, or the precision is unknown.
    """
    _check_features("x", x)
    _check_sum("out", out, (x.shape[1], x.shape[1]), x)
    _check_weights(weights, x)
    _check_precision(precision)
    if (gpu := _gpu(x, out)) is None:
        return cpu.gram_(out, x) if cpu.supports(x, weights) else naive.gram_(out, x, weights)
    gpu.moments_(out, None, x, None, weights=weights, precision=precision)
    return out


def cross_(out: Tensor, y: Tensor, x: Tensor, weights: Tensor | None = None, *, precision: str = "fp16x3") -> Tensor:
    """`out += y' diag(weights) x`: the sum of `C_t'` in eq. 13, with the target's features as `y`.

    Args:
        out: `[m, d]` float32, contiguous; the running sum.
        y: `[n, m]`, of the dtype of `x`, unit column stride.
        x: `[n, d]` float16, bfloat16, float32 or float64, unit column stride; `n` may be 0.
        weights: `[n]`, any dtype, non-negative token weights; None for ones.
        precision: of float32 products on a GPU, "fp16x3" or "ieee".

    Returns:
        `out`, `[m, d]` float32.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit, or the precision is unknown.
    """
    _check_pair(y, x)
    _check_sum("out", out, (y.shape[1], x.shape[1]), x)
    _check_weights(weights, x)
    _check_precision(precision)
    if (gpu := _gpu(x, out)) is None:
        return cpu.cross_(out, y, x) if cpu.supports(x, weights) else naive.cross_(out, y, x, weights)
    gpu.moments_(None, out, x, y, weights=weights, precision=precision)
    return out


def gram_cross_(
    s: Tensor, h: Tensor, x: Tensor, y: Tensor, weights: Tensor | None = None, *, precision: str = "fp16x3"
) -> tuple[Tensor, Tensor]:
    """`gram_(s, x, weights)` and `cross_(h, y, x, weights)`, on a GPU in one launch: both sums of eq. 13.

    Args:
        s: `[d, d]` float32, contiguous; the running sum of `x' diag(weights) x`, upper triangle.
        h: `[m, d]` float32, contiguous; the running sum of `y' diag(weights) x`.
        x: `[n, d]` float16, bfloat16, float32 or float64, unit column stride; `n` may be 0.
        y: `[n, m]`, of the dtype of `x`, unit column stride.
        weights: `[n]`, any dtype, non-negative token weights; None for ones.
        precision: of float32 products on a GPU, "fp16x3" or "ieee".

    Returns:
        `s`, `[d, d]` float32, and `h`, `[m, d]` float32.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit, or the precision is unknown.
    """
    _check_pair(y, x)
    _check_sum("s", s, (x.shape[1], x.shape[1]), x)
    _check_sum("h", h, (y.shape[1], x.shape[1]), x)
    _check_weights(weights, x)
    _check_precision(precision)
    if (gpu := _gpu(x, s, h)) is None:
        return cpu.gram_cross_(s, h, x, y) if cpu.supports(x, weights) else naive.gram_cross_(s, h, x, y, weights)
    gpu.moments_(s, h, x, y, weights=weights, precision=precision)
    return s, h


def frobenius(s: Tensor) -> Tensor:
    """Frobenius norm of a symmetric matrix, from its upper triangle: of `S_t`, for the task weight `w_t` in eq. 17.

    Args:
        s: `[d, d]` float32, contiguous.

    Returns:
        A float64 scalar on the device of `s`.

    Raises:
        ValueError: `s` is not square, contiguous and float32.
    """
    _check_sum("s", s, (s.shape[0], s.shape[0]))
    if (gpu := _gpu(s)) is None:
        return naive.frobenius(s)
    return gpu.frobenius(s)


def symmetrize_(s: Tensor) -> Tensor:
    """Mirror the upper triangle into the lower one, in place.

    Args:
        s: `[d, d]` float32, contiguous.

    Returns:
        `s`, `[d, d]` float32.

    Raises:
        ValueError: `s` is not square, contiguous and float32.
    """
    _check_sum("s", s, (s.shape[0], s.shape[0]))
    if (gpu := _gpu(s)) is None:
        return naive.symmetrize_(s)
    return gpu.symmetrize_(s)


def add_scaled_(out: Tensor, s: Tensor, scale: Tensor) -> Tensor:
    """`out += scale * s`: a task folded into the left side of eq. 17, with `w_t` for `scale`.

    One pass of torch on every device: it is bound by memory, and moves no more than its operands.

    Args:
        out: `[m, d]` float32, contiguous.
        s: `[m, d]`, any floating dtype.
        scale: a scalar of any floating dtype, never read by the host.

    Returns:
        `out`, `[m, d]` float32.

    Raises:
        ValueError: the shapes differ, or `out` is not contiguous and float32.
    """
    _check_sum("out", out, tuple(s.shape))
    return naive.add_scaled_(out, s, scale)


def pack(b: Tensor) -> Tensor | OperandPanels:
    """Make a right operand ready for several `addmm_`.

    Args:
        b: `[k, d]` float32, any strides.

    Returns:
        On a GPU a copy, `[k, d]` in float16 parts, that takes the memory of a contiguous `b`; else `b` itself.

    Raises:
        ValueError: `b` is not a float32 matrix.
    """
    if b.ndim != 2 or b.dtype != torch.float32:
        raise ValueError(f"b must be [k, d] in fp32; found {tuple(b.shape)} {b.dtype}")
    return b if (gpu := _gpu(b)) is None else gpu.pack(b)


def panel_rows(device: torch.device, columns: int) -> int:
    """How many rows of `b` to pack and multiply at a time: as many as 512 MiB of copies hold, but at least 2,048.

    Args:
        device: where the product is computed.
        columns: of the copies together: those of every `b` that is packed at the same time, and of `a.mT`.

    Returns:
        The number of rows.
    """
    if device.type != "cuda":
        return naive.PANEL
    return max(naive.PANEL, PANEL_BYTES // (4 * columns) // ROW_PAD * ROW_PAD)


def addmm_(out: Tensor, a: Tensor, b: Tensor | OperandPanels, scale: Tensor, *, precision: str = "fp16x3") -> Tensor:
    """`out += scale * (a @ b)`: a task folded into the right side of eq. 17, with its weights as `a`.

    Args:
        out: `[m, d]` float32, unit column stride: a block of a larger matrix will do.
        a: `[m, k]`, any floating dtype; 16 bits take two products instead of three.
        b: `[k, d]` float32, any strides; or what `pack` made of it.
        scale: a scalar of any floating dtype, never read by the host.
        precision: of the products on a GPU, "fp16x3", "ieee" (which takes no packed `b`), or "fp16x2": two products,
            with each value of `a` rounded to 11 bits; a CPU multiplies in float32.

    Returns:
        `out`, `[m, d]` float32.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit, the precision is unknown, or "ieee" is asked for with
            a packed `b`.
    """
    matrix = b if isinstance(b, Tensor) else b.x
    if a.ndim != 2 or matrix.ndim != 2 or a.shape[1] != matrix.shape[0] or matrix.dtype != torch.float32:
        raise ValueError(
            f"a must be [m, k] and b [k, d] in fp32; found {tuple(a.shape)} {a.dtype}, "
            f"{tuple(matrix.shape)} {matrix.dtype}"
        )
    _check_sum("out", out, (a.shape[0], matrix.shape[1]), a, matrix, block=True)
    _check_precision(precision, (*_PRECISIONS, "fp16x2"))
    if precision == "ieee" and matrix is not b:
        raise ValueError('a packed b holds no more than 22 bits of a value; precision "ieee" takes b itself')
    if (gpu := _gpu(matrix, out)) is None:
        return naive.addmm_(out, a, matrix, scale)
    gpu.addmm_(out, a, b, scale, precision=precision)
    return out


def missing(device: torch.device) -> str:
    """What keeps the kernels from running on a GPU; empty if nothing does."""
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _TRITON:
        return f"found triton {triton.__version__}, expected {'.'.join(map(str, _TRITON))} or later"
    if arch_of(device) is None:
        found = torch.cuda.get_device_name(device)
        return f"found {found}, expected a GPU of compute capability 8.0 or later or an AMD gfx9"
    return ""


class _Kernels(Protocol):
    """What `launch` offers: the ops, for operands that were checked."""

    def moments_(
        self,
        gram: Tensor | None,
        cross: Tensor | None,
        x: Tensor,
        y: Tensor | None,
        *,
        weights: Tensor | None,
        precision: str,
    ) -> None: ...

    def addmm_(self, out: Tensor, a: Tensor, b: Tensor | OperandPanels, scale: Tensor, *, precision: str) -> None: ...

    def pack(self, b: Tensor) -> OperandPanels: ...

    def frobenius(self, s: Tensor) -> Tensor: ...

    def symmetrize_(self, s: Tensor) -> Tensor: ...


def _gpu(x: Tensor, *outputs: Tensor) -> _Kernels | None:
    """The module that runs the ops on the GPU of `x`; None where torch does, or where there is nothing to do."""
    if not x.is_cuda or x.dtype == torch.float64 or not x.numel() or not any(out.numel() for out in outputs or (x,)):
        return None
    return _gpu_module(x.device)


@cache
def _gpu_module(device: torch.device) -> _Kernels | None:
    if not (why := missing(device)):
        from featcal_kernels import launch

        return launch
    warnings.warn(
        f"featcal_kernels runs in plain torch on {device}, many times slower than its kernels could: {why}",
        stacklevel=4,
    )
    return None


def _check_features(name: str, x: Tensor) -> None:
    if x.ndim != 2 or x.dtype not in _INPUT_DTYPES or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(
            f"{name} must be [tokens, features] in fp16, bf16, fp32 or fp64 with unit column stride; "
            f"found {tuple(x.shape)}, {x.dtype}, strides {x.stride()}"
        )


def _check_pair(y: Tensor, x: Tensor) -> None:
    _check_features("x", x)
    _check_features("y", y)
    if y.shape[0] != x.shape[0] or y.dtype != x.dtype or y.device != x.device:
        raise ValueError(
            "y and x must share rows, dtype and device; found "
            f"{tuple(y.shape)} {y.dtype} {y.device}, {tuple(x.shape)} {x.dtype} {x.device}"
        )


def _check_sum(name: str, out: Tensor, shape: tuple[int, ...], *inputs: Tensor, block: bool = False) -> None:
    """With `block`, `out` may be part of a larger matrix."""
    laid_out = out.is_contiguous() or (block and out.ndim == 2 and out.stride(1) == 1 and out.stride(0) >= out.shape[1])
    if tuple(out.shape) != shape or out.dtype != torch.float32 or not laid_out:
        raise ValueError(
            f"{name} must be {'row-major' if block else 'contiguous'} float32 of shape {shape}; "
            f"found {tuple(out.shape)}, {out.dtype}, strides {out.stride()}"
        )
    if any(x.device != out.device for x in inputs):
        raise ValueError(f"{name} is on {out.device}, what is added to it on {[str(x.device) for x in inputs]}")


def _check_weights(weights: Tensor | None, x: Tensor) -> None:
    if weights is not None and (tuple(weights.shape) != (x.shape[0],) or weights.device != x.device):
        raise ValueError(
            f"weights must have shape ({x.shape[0]},) and be on {x.device}; "
            f"found {tuple(weights.shape)} on {weights.device}"
        )


def _check_precision(precision: str, known: tuple[str, ...] = _PRECISIONS) -> None:
    if precision not in known:
        raise ValueError(f"precision must be one of {known}; found {precision!r}")
