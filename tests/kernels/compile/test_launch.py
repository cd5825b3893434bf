"""The host's own launches, with the arguments they have, compiled for each GPU instead of run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ahead import SHARED_LIMIT, AbsentDevice, needs
from featcal_kernels import launch
from featcal_kernels.configs import TABLE
from triton.runtime import driver
from triton.runtime.jit import JITFunction


@pytest.fixture(params=SHARED_LIMIT)
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(driver, "_active", AbsentDevice(request.param))
    return request.param


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What was compiled, by the kernel's name."""
    compiled = {}
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        assert all(0 < size < 2**31 for size in grid)
        compiled[self.__name__] = run(self, *arguments, grid=grid, warmup=True, **options)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    return compiled


def assert_fit(launched: dict[str, Any], arch: str, *names: str) -> None:
    assert set(launched) == set(names)
    for result in launched.values():
        needed = needs(result)
        assert needed.spilled == 0
        assert needed.shared <= SHARED_LIMIT[arch]


def moments_kernel(arch: str) -> str:
    return "descriptor_kernel" if TABLE[arch].descriptors else "pointer_kernel"


def test_features_in_place(arch: str, launched: dict[str, Any]):
    x, y = torch.randn(300, 256).bfloat16(), torch.randn(300, 128).bfloat16()
    s, h = torch.zeros(256, 256), torch.zeros(128, 256)
    launch.moments_(s, h, x, y, arch=TABLE[arch], path="triton")
    assert_fit(launched, arch, moments_kernel(arch))


def test_weighted_features_of_odd_size(arch: str, launched: dict[str, Any]):
    x, y, weights = torch.randn(300, 157).half(), torch.randn(300, 93).half(), torch.rand(300)
    s, h = torch.zeros(157, 157), torch.zeros(93, 157)
    launch.moments_(s, h, x, y, weights=weights, arch=TABLE[arch], path="triton")
    assert_fit(launched, arch, moments_kernel(arch), "pack_kernel", "reduce_kernel")


@pytest.mark.parametrize("precision", ["fp16x3", "ieee"])
def test_one_column(precision: str, arch: str, launched: dict[str, Any]):
    x, y = torch.randn(1, 1), torch.randn(1, 1)
    launch.moments_(torch.zeros(1, 1), torch.zeros(1, 1), x, y, arch=TABLE[arch], path="triton", precision=precision)
    kernel = moments_kernel(arch) if precision == "fp16x3" else "pointer_kernel"
    assert_fit(launched, arch, kernel, "pack_kernel", "reduce_kernel")


def test_fold(arch: str, launched: dict[str, Any]):
    a, b, out = torch.zeros(100, 70).bfloat16(), torch.zeros(70, 64), torch.zeros(100, 64)
    launch.addmm_(out, a, b, torch.ones(()), arch=TABLE[arch])
    launch.frobenius(torch.zeros(100, 100))
    launch.symmetrize_(torch.zeros(100, 100))
    assert_fit(launched, arch, moments_kernel(arch), "pack_kernel", "frobenius_kernel", "symmetrize_kernel")
