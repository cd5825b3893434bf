"""The kernels' logic, run by Triton's interpreter on a CPU: every branch, on tiles small enough to need several.

The interpreter cannot multiply bfloat16, so the kernels widen it there (`UPCAST`); everything else is the code that
runs on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import triton
from featcal_kernels import launch, schedule
from featcal_kernels.configs import Arch, Tile
from featcal_kernels.operands_triton import OperandPanels
from featcal_kernels.triangle_triton import frobenius, symmetrize_
from moment_oracle import Problem, assert_as_good, assert_moments, poisoned
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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
TRIPLE = [replace(arch, split=replace(arch.split, promote=1, triple=True)) for arch in (POINTER, DESCRIPTOR)]
NAMES = ["pointer", "descriptor", "pointer-triple", "descriptor-triple"]
BODIES = pytest.mark.parametrize("arch", [POINTER, DESCRIPTOR, *TRIPLE], ids=NAMES)


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

    def splits(tiles: int, steps: int, *_: float) -> tuple[int, float]:
        seen.append(steps)
        return 3, 0.0

    monkeypatch.setattr(schedule, "token_splits", splits)
    problem = Problem.random(450, 80, 64, torch.float16, weights=weights)
    s, h = run(problem, arch)
    assert seen == [8 * (1 if weights == "none" or arch.split.triple else 2)]
    assert_moments(s, h, problem)


@BODIES
@pytest.mark.parametrize(("splits", "promote"), [(1, 1), (1, 2), (1, 3), (3, 2), (7, 4)])
def test_sums_are_promoted_wherever_a_program_begins_and_ends(
    splits: int, promote: int, arch: Arch, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(schedule, "token_splits", lambda *_: (splits, 0.0))
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
        (100, 64, 64, "squares"),  # little work
        (10_000, 64, 64, "triton"),
        (10_000, 256, 64, "squares"),  # wide
        (10_000, 64, None, "triton"),
        (10_000, 48, None, "squares"),  # a narrow Gram matrix alone
    ],
)
def test_path(n: int, d: int, rows: int | None, expected: str, monkeypatch: pytest.MonkeyPatch):
    arch = replace(POINTER, blas_flops=2e6, blas_columns=256, blas_grams=48)
    gram, cross = torch.zeros(d, d), None if rows is None else torch.zeros(rows, d)
    x = torch.zeros(n, d).half()
    assert launch._path(gram, cross, x, arch) == "triton"  # not on a CPU
    monkeypatch.setattr(launch.blas, "available", lambda device: True)
    assert launch._path(gram, cross, x, arch) == expected
    assert launch._path(None, gram, x, arch) == "squares"  # a rectangle


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("d", [301, 304], ids=["copied", "as they lie"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_operands_of_the_blas_path(dtype: torch.dtype, d: int, strided: bool, monkeypatch: pytest.MonkeyPatch):
    def addmm(accumulated, a, b, **options):
        assert a.dtype == b.dtype == dtype
        return accumulated.add_(a.float() @ b.float())

    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(launch.blas, "MIN_BLOCK", 16)  # several levels of squares
    monkeypatch.setattr(launch.blas, "MIN_WORK", 0)
    problem = Problem.random(150, d, 64, dtype, strided=strided)
    s, h = poisoned(d), torch.zeros(64, d)
    launch.moments_(s, h, problem.x, problem.y, arch=POINTER, path="squares")
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
    launch.addmm_(out, a, b, scale, arch=POINTER, precision=precision)
    assert_as_good(out, plain, exact)


@BODIES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_of_the_fold_with_one_side_packed(dtype: torch.dtype, arch: Arch):
    """Into a block of a larger matrix, from weights of any strides; and packed once, whatever is made with it."""
    a, b, whole = torch.randn(130, 70).to(dtype).mT, torch.randn(130, 96), torch.full((70, 128), 7.0)
    out, scale = whole[:, 16:112].zero_(), torch.tensor(0.37)
    packed = launch.pack(rest := b.clone())
    rest.fill_(torch.nan)  # nobody reads it again
    launch.addmm_(out, a, packed, scale, arch=arch)
    assert_as_good(out, 0.37 * (a.float() @ b), 0.37 * (a.double() @ b.double()))
    launch.addmm_(out.zero_(), a, packed, scale, arch=arch, precision="fp16x2")
    rounded = a.half()
    assert_as_good(out, 0.37 * (rounded.float() @ b), 0.37 * (rounded.double() @ b.double()))
    assert (whole[:, :16] == 7).all()
    assert (whole[:, 112:] == 7).all()


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
    monkeypatch.setattr(schedule, "token_splits", lambda *_: (splits, 0.0))
    s = torch.full((80, 80), 7.0)
    launch.moments_(s, None, torch.randn(128, 80).half(), None, arch=arch, path="triton")
    assert (s[torch.ones_like(s).tril(-1) > 0] == 7).all()
    assert not (s.triu() == 7).any()


class OutOfMemory(TorchDispatchMode):
    """The device is full when memory is asked for once more than `number` times; interpreted kernels ask for none."""

    def __init__(self, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.number, self.asked, self.in_kernel = number, 0, False
        run = interpreter.GridExecutor.__call__

        def interpreted(*args: Any, **options: Any) -> None:
            self.in_kernel = True
            run(*args, **options)
            self.in_kernel = False

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", interpreted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        known = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        new = isinstance(found, torch.Tensor) and found.untyped_storage()._cdata not in known
        if new and not self.in_kernel:
            self.asked += 1
            if self.asked == self.number + 1:
                raise torch.OutOfMemoryError("full")
        return found


def _ops(arch: Arch) -> dict[str, Callable[[torch.Tensor, torch.Tensor], object]]:
    """Every op that adds to sums, in several panels, with operands that must be copied and tokens that are split."""
    x, y, weights = torch.randn(300, 90), torch.randn(300, 70), torch.rand(300)
    a, b, scale = torch.randn(70, 300).bfloat16(), torch.randn(300, 90), torch.full((), 0.3)
    run = partial(launch.moments_, arch=arch)
    return {
        "gram": lambda s, h: run(s, None, x, None),
        "cross": lambda s, h: run(None, h, x, y, weights=weights),
        "both": lambda s, h: run(s, h, x, y, weights=weights),
        "16 bits": lambda s, h: run(s, h, x.half(), y.half()),
        "16 bits, weighted": lambda s, h: run(s, h, x.half(), y.half(), weights=weights),
        "float32": lambda s, h: run(s, h, x, y, precision="ieee"),
        "cuBLAS": lambda s, h: run(s, h, x.half(), y.half(), path="squares"),
        "addmm": lambda s, h: launch.addmm_(h, a, b, scale, arch=arch),
        "addmm, packed": lambda s, h: launch.addmm_(h, a, launch.pack(b), scale, arch=arch, precision="fp16x2"),
        "addmm, float32": lambda s, h: launch.addmm_(h, a, b, scale, arch=arch, precision="ieee"),
    }


@pytest.mark.parametrize("arch", [POINTER, TRIPLE[1]], ids=["pointer", "descriptor-triple"])
@pytest.mark.parametrize("name", _ops(POINTER))
def test_an_op_that_runs_out_of_memory_has_done_nothing(name: str, arch: Arch, monkeypatch: pytest.MonkeyPatch):
    """Wherever it does, so that who tries again with fewer tokens counts none twice."""

    def addmm(accumulated, a, b, **options):  # as cuBLAS does: in place, with no memory of its own
        return accumulated.add_(torch.from_numpy(a.numpy().astype("f4") @ b.numpy().astype("f4")))

    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(launch, "PANEL_BYTES", 0)
    monkeypatch.setattr(launch, "MIN_PANEL", 128)
    # A last panel that would be split otherwise than the first.
    monkeypatch.setattr(schedule, "token_splits", lambda tiles, steps, *_: (2 if steps >= 2 else 3, 0.0))
    op = _ops(arch)[name]
    launch._tile_table.cache_clear(), launch._unsplit.cache_clear(), launch.choose_tile.cache_clear()
    asked = 1
    number = 0
    while number < asked:
        s, h = torch.full((90, 90), 7.0), torch.full((70, 90), 7.0)
        with monkeypatch.context() as patch, OutOfMemory(number, patch) as memory:
            try:
                op(s, h)
            except torch.OutOfMemoryError:
                assert (s == 7).all()
                assert (h == 7).all()
                asked = number + 2
        number += 1
    assert memory.asked == number - 1 > 0  # the last time there was enough
    assert not (h == 7).all() or not (s == 7).all()


def test_low_parts_that_are_zero_are_left_out():
    x = torch.randn(50, 24).bfloat16()
    mask, fraction = torch.arange(50) % 2 * 1.0, torch.full((50,), 0.3)
    flags = [OperandPanels(x, torch.float16, weights)[:].low for weights in (mask, fraction)]
    assert [bool(flag) for flag in flags] == [False, True]


def test_parts_hold_22_bits():
    x = torch.randn(50, 24) * 10 ** torch.linspace(-5, 0, 24)
    found = OperandPanels(x, torch.float16)[:]
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
