"""The ops on this machine against plain torch: `python -m pytest bench/test_ops.py --benchmark-group-by=group`."""

from __future__ import annotations

import pytest
import torch
from featcal_kernels import cross_, gram_, symmetrize_

SHAPES = [(8192, 1024), (3200, 768), (3200, 3072)]


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("how", ["torch", "featcal_kernels"])
def test_gram(benchmark, how: str, n: int, d: int) -> None:
    benchmark.group = f"gram {n} x {d}"
    x, out = torch.randn(n, d), torch.zeros(d, d)
    benchmark(lambda: x.T @ x if how == "torch" else gram_(out, x))


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("how", ["torch", "featcal_kernels"])
def test_cross(benchmark, how: str, n: int, d: int) -> None:
    benchmark.group = f"cross {n} x {d}"
    x, y, out = torch.randn(n, d), torch.randn(n, d), torch.zeros(d, d)
    benchmark(lambda: y.T @ x if how == "torch" else cross_(out, y, x))


@pytest.mark.parametrize("d", [1024, 3072])
@pytest.mark.parametrize("how", ["torch", "featcal_kernels"])
def test_symmetrize(benchmark, how: str, d: int) -> None:
    benchmark.group = f"symmetrize {d}"
    s = torch.randn(d, d)
    benchmark(lambda: s.triu() + s.triu(1).T if how == "torch" else symmetrize_(s))
