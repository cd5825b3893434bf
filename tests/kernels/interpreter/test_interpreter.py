"""The kernels' logic, run by Triton's interpreter on a CPU: every branch, on tiles small enough to need several.

The interpreter cannot multiply bfloat16, so the kernels widen it there (`UPCAST`); everything else is the code that
runs on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
from featcal_kernels import launch, schedule
from featcal_kernels.configs import Arch, Tile
from featcal_kernels.operands_triton import operand
from featcal_kernels.triangle_triton import frobenius, symmetrize_
from moment_oracle import Problem, assert_as_good, assert_moments, poisoned
from triton import knobs
from triton.runtime import interpreter


def versions(*texts: str) -> list[tuple[int, ...]]:
    return [tuple(int(part) for part in text.split(".")[:2]) for text in texts]


TRITON, NUMPY = versions(triton.__version__, np.__version__)
pytestmark = [
    pytest.mark.skipif(not knobs.runtime.interpret, reason="Triton was imported as a compiler before"),
    pytest.mark.skipif(TRITON < (3, 7) and NUMPY >= (2, 4), reason="this Triton's interpreter needs numpy < 2.4"),
]

TILE = Tile(64, 64, 64, warps=4, stages=2, group=2)
WIDE = Tile(32, 128, 64, warps=4, stages=2, halves=True, group=2)
POINTER = Arch(half=TILE, split=replace(TILE, promote=1), single=TILE)
DESCRIPTOR = Arch(half=WIDE, split=replace(WIDE, promote=2), single=TILE, descriptors=True)
BODIES = pytest.mark.parametrize("arch", [POINTER, DESCRIPTOR], ids=["pointer", "descriptor"])


def run(problem: Problem, arch: Arch, precision: str = "fp16x3") -> tuple[torch.Tensor, torch.Tensor]:
    d, m = problem.x.shape[1], problem.y.shape[1]
    s, h = poisoned(d), torch.zeros(m, d)
    add(s, h, problem, arch, precision)
    return s, h


def add(s, h, problem: Problem, arch: Arch, precision: str = "fp16x3") -> None:
    launch.moments_(s, h, problem.x, problem.y, weights=problem.weights, arch=arch, path="triton", precision=precision)


@BODIES
@pytest.mark.parametrize("weights", ["none", "mask", "any"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_odd_sizes(dtype: torch.dtype, weights: str, arch: Arch):
    problem = Problem.random(150, 101, 67, dtype, weights=weights)
    assert_moments(*run(problem, arch), problem)


@BODIES
def test_in_place_operands(arch: Arch):
    """Aligned features are read where they lie, in a wider buffer too; the last step is half empty."""
    wide = torch.randn(160, 144).half()
    problem = Problem(wide[:, 16:112], wide[:, 48:128], None)
    s, h = run(problem, arch)
    assert_moments(s, h, problem)


@BODIES
def test_strided_unaligned(arch: Arch):
    problem = Problem.random(70, 65, 40, torch.float16, weights="any", strided=True)
    assert_moments(*run(problem, arch), problem)


@pytest.mark.parametrize("weights", ["none", "any"])
def test_float32_products_on_request(weights: str):
    problem = Problem.random(150, 101, 67, torch.float32, weights=weights)
    assert_moments(*run(problem, POINTER, "ieee"), problem)


@BODIES
def test_chunks_add_up(arch: Arch):
    problem = Problem.random(200, 80, 64, torch.float16)
    s, h = poisoned(80), torch.zeros(64, 80)
    for chunk in problem.chunks([64, 1, 135]):
        add(s, h, chunk, arch)
    assert_moments(s, h, problem)


@BODIES
@pytest.mark.parametrize("weights", ["none", "any"])
def test_tokens_are_split_over_programs(weights: str, arch: Arch, monkeypatch: pytest.MonkeyPatch):
    seen = []

    def splits(tiles: int, steps: int, slots: int) -> int:
        seen.append(steps)
        return 3

    monkeypatch.setattr(schedule, "token_splits", splits)
    problem = Problem.random(450, 80, 64, torch.float16, weights=weights)
    s, h = run(problem, arch)
    assert seen == [8 * (1 if weights == "none" else 2)]
    assert_moments(s, h, problem)


@BODIES
@pytest.mark.parametrize(("splits", "promote"), [(1, 1), (1, 2), (1, 3), (3, 2), (7, 4)])
def test_sums_are_promoted_wherever_a_program_begins_and_ends(
    splits: int, promote: int, arch: Arch, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(schedule, "token_splits", lambda *_: splits)
    problem = Problem.random(300, 80, 64, torch.float32)  # 5 steps a run, 15 in all
    assert_moments(*run(problem, replace(arch, split=replace(arch.split, promote=promote))), problem)


def cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as NVIDIA's matrix units add them up: 16 at a time, the sum cut off at 24 bits."""

    def dot(builder: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        exact, left, right = d.data.astype(np.float64), a.data.astype(np.float64), b.data.astype(np.float64)
        for k in range(0, left.shape[-1], 16):
            exact += left[..., k : k + 16] @ right[k : k + 16]
            rounded = exact.astype(np.float32)
            exact = np.where(abs(rounded) > abs(exact), np.nextafter(rounded, np.float32(0)), rounded).astype(
                np.float64
            )
        return interpreter.TensorHandle(exact.astype(np.float32), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@BODIES
def test_a_matrix_unit_that_cuts_sums_off_is_not_trusted_with_long_ones(arch: Arch, monkeypatch: pytest.MonkeyPatch):
    cut_off(monkeypatch)
    problem = Problem.random(2048, 32, 16, torch.float32)
    assert_moments(*run(problem, arch), problem)
    with pytest.raises(AssertionError, match="relative error"):
        assert_moments(*run(problem, replace(arch, split=arch.half)), problem)


@BODIES
def test_one_of_the_sums_alone(arch: Arch):
    problem = Problem.random(64, 80, 48, torch.float16)
    s, h = poisoned(80), torch.zeros(48, 80)
    launch.moments_(s, None, problem.x, None, arch=arch, path="triton")
    launch.moments_(None, h, problem.x, problem.y, arch=arch, path="triton")
    assert_moments(s, h, problem)


@pytest.mark.parametrize(
    ("n", "d", "rows", "expected"),
    [
        (100, 64, 64, "blas"),  # little work
        (10_000, 64, 64, "triton"),
        (10_000, 256, 64, "blas"),  # wide
        (10_000, 64, None, "triton"),
    ],
)
def test_path(n: int, d: int, rows: int | None, expected: str, monkeypatch: pytest.MonkeyPatch):
    arch = replace(POINTER, blas_flops=2e6, blas_columns=256)
    gram, cross = torch.zeros(d, d), None if rows is None else torch.zeros(rows, d)
    x = torch.zeros(n, d).half()
    assert launch._path(gram, cross, x, arch) == "triton"  # not on a CPU
    monkeypatch.setattr(launch.blas, "available", lambda device: True)
    assert launch._path(gram, cross, x, arch) == expected
    assert launch._path(None, gram, x, arch) == "blas"  # a rectangle


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_operands_of_the_blas_path(dtype: torch.dtype, strided: bool, monkeypatch: pytest.MonkeyPatch):
    def addmm(accumulated, a, b, **options):
        assert a.dtype == b.dtype == dtype
        return accumulated.add_(a.float() @ b.float())

    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(launch.blas, "available", lambda device: True)
    problem = Problem.random(150, 101, 67, dtype, strided=strided)
    s, h = poisoned(101), torch.zeros(67, 101)
    launch.moments_(s, h, problem.x, problem.y, arch=replace(POINTER, blas_flops=1e9))
    assert_moments(s, h, problem)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_cublas_is_given_no_split_operands(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch.blas, "available", lambda device: True)
    problem = Problem.random(150, 101, 67, dtype, weights="any")
    s, h = poisoned(101), torch.zeros(67, 101)
    arch = replace(POINTER, blas_flops=1e9, blas_columns=1)
    launch.moments_(s, h, problem.x, problem.y, weights=problem.weights, arch=arch)
    assert_moments(s, h, problem)


def test_panels(monkeypatch: pytest.MonkeyPatch):
    """Copied operands are made for a few tokens at a time."""
    monkeypatch.setattr(launch, "PANEL_BYTES", 0)
    monkeypatch.setattr(launch, "MIN_PANEL", 128)
    problem = Problem.random(300, 48, 32, torch.float16, weights="any")
    assert_moments(*run(problem, POINTER), problem)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("precision", ["fp16x3", "ieee"])
def test_products_of_the_fold(precision: str, dtype: torch.dtype):
    a, b, out = torch.randn(70, 130).to(dtype), torch.randn(130, 96), torch.randn(70, 96)
    scale = torch.tensor(0.37, dtype=torch.float64)
    exact = out.double() + scale * (a.double() @ b.double())
    plain = out + 0.37 * (a.float() @ b)
    launch.moments_(None, out, b, a.mT, scale=scale, arch=POINTER, path="triton", precision=precision)
    assert_as_good(out, plain, exact)


@BODIES
@pytest.mark.parametrize("rounded", ["x", "y"])
def test_low_parts_on_one_side(rounded: str, arch: Arch):
    problem = Problem.random(150, 101, 67, torch.float32)
    getattr(problem, rounded).copy_(getattr(problem, rounded).bfloat16())
    assert_moments(*run(problem, arch), problem)


@BODIES
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e15])
def test_values_of_any_size(size: float, arch: Arch):
    """Columns a thousand times larger than others, as activations have, and sums at either end of float32."""
    problem = Problem.random(150, 101, 67, torch.float32, weights="any")
    problem.x.mul_(size).mul_(10 ** torch.linspace(-3, 0, 101))
    problem.y.div_(size)
    s, h = run(Problem(problem.x, problem.y, problem.weights), arch)
    assert_moments(s, h, problem)
    scale = 10 ** torch.linspace(3, 0, 101)  # each column by itself
    exact = problem.moments(torch.float64)[1] * scale
    assert_as_good(h * scale, problem.moments(torch.float32)[1] * scale, exact)


@BODIES
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e25])
def test_what_is_not_finite_stays_so(value: float, arch: Arch):
    problem = Problem.random(64, 48, 32, torch.float32)
    problem.x[3, 5] = value
    s, _ = run(problem, arch)
    assert not s[5, 5].isfinite()


@BODIES
def test_zeros(arch: Arch):
    problem = Problem(torch.zeros(64, 48), torch.zeros(64, 32), None)
    s, h = run(problem, arch)
    assert not s.triu().any()
    assert not h.any()


@BODIES
@pytest.mark.parametrize("splits", [1, 2])
def test_entries_below_the_diagonal_keep_their_bits(splits: int, arch: Arch, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(schedule, "token_splits", lambda *_: splits)
    s = torch.full((80, 80), 7.0)
    launch.moments_(s, None, torch.randn(128, 80).half(), None, arch=arch, path="triton")
    assert (s[torch.ones_like(s).tril(-1) > 0] == 7).all()
    assert not (s.triu() == 7).any()


def test_low_parts_that_are_zero_are_left_out():
    x = torch.randn(50, 24).bfloat16()
    mask, fraction = torch.arange(50) % 2 * 1.0, torch.full((50,), 0.3)
    flags = [operand(x, torch.float16, weights).low for weights in (mask, fraction)]
    assert [bool(flag) for flag in flags] == [False, True]


def test_parts_hold_22_bits():
    x = torch.randn(50, 24) * 10 ** torch.linspace(-5, 0, 24)
    found = operand(x, torch.float16)
    high, low = (part[:50, :24].double() for part in found.data.split(128))
    assert 2**14 <= high.abs().max() < 2**15
    power = 2.0 ** round(float((high.abs().max() / x.abs().max()).log2()))
    error = ((high + low) / power - x).abs()
    assert (error <= 2.0**-22 * x.abs() + 2.0**-39 * x.abs().max()).all()


@pytest.mark.parametrize("d", [1, 64, 130])
def test_triangle(d: int):
    s = torch.randn(d, d)
    full = s.triu() + s.triu(1).mT
    s[torch.ones(d, d).tril(-1) > 0] = torch.nan
    assert_as_good(frobenius(s), full.norm(), full.double().norm())
    symmetrize_(s)
    assert torch.equal(s, full)
