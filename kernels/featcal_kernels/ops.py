"""The op list: what each op computes, what it accepts, and which implementation runs.

`naive` is plain torch and the specification: it runs on any device.

A *triangle* is the upper one of a row-major buffer, which is the lower one of its column-major view `out.mT`:
`torch.linalg.cholesky_ex(out.mT, out=(out.mT, info))` factors it in place. Entries below the diagonal are unspecified
after `gram_` and `gram_cross_`, and never read by `frobenius` and `symmetrize_`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featcal_kernels import naive

_INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def gram_(out: Tensor, x: Tensor, weights: Tensor | None = None) -> Tensor:
    """`out += x' diag(weights) x`, upper triangle.

    Args:
        out: `[d, d]` float32, contiguous; the running sum.
        x: `[n, d]` float16, bfloat16, float32 or float64, unit column stride; `n` may be 0.
        weights: `[n]` non-negative token weights, or None for ones.

    Returns:
        `out`.
    """
    _check_features("x", x)
    _check_sum("out", out, (x.shape[1], x.shape[1]))
    _check_weights(weights, x)
    return naive.gram_(out, x, weights)


def cross_(out: Tensor, y: Tensor, x: Tensor, weights: Tensor | None = None) -> Tensor:
    """`out += y' diag(weights) x`.

    Args:
        out: `[m, d]` float32, contiguous.
        y: `[n, m]`, same dtype as `x`.
        x: `[n, d]`.
        weights: `[n]` non-negative token weights, or None for ones.

    Returns:
        `out`.
    """
    _check_features("x", x)
    _check_features("y", y)
    if y.shape[0] != x.shape[0] or y.dtype != x.dtype:
        raise ValueError(
            f"y and x must share rows and dtype: {tuple(y.shape)} {y.dtype}, {tuple(x.shape)} {x.dtype}"
        )
    _check_sum("out", out, (y.shape[1], x.shape[1]))
    _check_weights(weights, x)
    return naive.cross_(out, y, x, weights)


def gram_cross_(
    s: Tensor, h: Tensor, x: Tensor, y: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`gram_(s, x, weights)` and `cross_(h, y, x, weights)` in one call."""
    return gram_(s, x, weights), cross_(h, y, x, weights)


def frobenius(s: Tensor) -> Tensor:
    """Frobenius norm of the symmetric matrix whose upper triangle is `s`: a float64 scalar on `s.device`."""
    _check_sum("s", s, (s.shape[0], s.shape[0]))
    return naive.frobenius(s)


def symmetrize_(s: Tensor) -> Tensor:
    """Mirror the upper triangle of `s` `[d, d]` into the lower one, in place."""
    _check_sum("s", s, (s.shape[0], s.shape[0]))
    return naive.symmetrize_(s)


def add_scaled_(out: Tensor, s: Tensor, scale: Tensor) -> Tensor:
    """`out += scale * s`, `[d, d]` each; `scale` is a scalar tensor, never read by the host."""
    _check_sum("out", out, tuple(s.shape))
    return naive.add_scaled_(out, s, scale)


def addmm_(out: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """`out += scale * (a @ b)`: the fold's products, at float32 accuracy.

    Args:
        out: `[m, d]` float32, contiguous.
        a: `[m, k]`, any floating dtype.
        b: `[k, d]` float32.
        scale: a scalar tensor, never read by the host.

    Returns:
        `out`.
    """
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"a and b do not chain: {tuple(a.shape)} @ {tuple(b.shape)}")
    _check_sum("out", out, (a.shape[0], b.shape[1]))
    return naive.addmm_(out, a, b, scale)


def _check_features(name: str, x: Tensor) -> None:
    if x.ndim != 2 or x.dtype not in _INPUT_DTYPES or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(
            f"{name} must be [tokens, features] in fp16, bf16, fp32 or fp64 with unit column stride; "
            f"found {tuple(x.shape)}, {x.dtype}, strides {x.stride()}"
        )


def _check_sum(name: str, out: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(out.shape) != shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous float32 of shape {shape}; found {tuple(out.shape)}, {out.dtype}, "
            f"strides {out.stride()}"
        )


def _check_weights(weights: Tensor | None, x: Tensor) -> None:
    if weights is not None and tuple(weights.shape) != (x.shape[0],):
        raise ValueError(f"weights must have shape ({x.shape[0]},); found {tuple(weights.shape)}")
