"""Which implementation and which configuration a device gets, and the cuBLAS path's blocks: all but the GPU itself."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from featcal_kernels import blas, ops
from featcal_kernels.configs import TABLE, Arch, arch_of
from moment_oracle import Problem, assert_moments, poisoned

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "row"),
    [
        ((7, 5), None),
        ((8, 0), "sm_80"),
        ((8, 6), "sm_89"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_90"),
        ((12, 0), "sm_89"),
    ],
)
def test_rows_of_the_table(capability: tuple[int, int], row: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert arch_of.__wrapped__(GPU) == (TABLE[row] if row else None)


@pytest.mark.parametrize(
    ("triton", "row", "why"),
    [
        (None, TABLE["sm_90"], "triton is not installed"),
        (SimpleNamespace(__version__="3.5.1"), TABLE["sm_90"], "found triton 3.5.1, expected 3.6 or later"),
        (SimpleNamespace(__version__="3.6.0"), None, "found an old one, expected a GPU of compute capability 8.0"),
    ],
)
def test_where_kernels_cannot_run_torch_does_and_says_so(
    triton: Any, row: Arch | None, why: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setattr(ops, "arch_of", lambda device: row)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old one")
    with pytest.warns(UserWarning, match=f"plain torch on cuda:0, many times slower than its kernels could: {why}"):
        assert ops._gpu_module.__wrapped__(GPU) is None


def test_cublas_is_not_offered_where_torch_lacks_it():
    assert not blas.available(torch.device("cpu"))


@pytest.mark.parametrize("worth_it", [True, False])
@pytest.mark.parametrize("d", [25, 325, 2250])
def test_triangle_of_squares(d: int, worth_it: bool, monkeypatch: pytest.MonkeyPatch):
    """A square that is too small to be worth more launches is one product."""
    areas = []
    monkeypatch.setattr(blas, "MIN_BLOCK", 128)  # as on a GPU, at a quarter of the size
    monkeypatch.setattr(blas, "MIN_WORK", 0 if worth_it else 64 * d * d + 1)

    def addmm(accumulated: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
        assert options["out"] is accumulated
        assert options["out_dtype"] == torch.float32
        areas.append(accumulated.numel())
        return accumulated.add_(a.float() @ b.float())

    monkeypatch.setattr(torch, "addmm", addmm)
    problem = Problem.random(64, d, 8, torch.bfloat16)
    s = poisoned(d)
    blas.add_gram_(s, problem.x)
    triangle = sum(areas)
    h = blas.add_product_(torch.zeros(8, d), problem.y, problem.x)
    assert_moments(s, h, problem)
    assert triangle <= (max(d * d * 9 / 16 * 1.02, d * (d / 2 + blas.MIN_BLOCK)) if worth_it else d * d)
    assert (len(areas) == 2) == (not worth_it or d < 2 * blas.MIN_BLOCK)
