"""The ops on a CPU: the torch implementation, which is the specification of the kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from featcal_kernels import add_scaled_, addmm_, cross_, frobenius, gram_, gram_cross_, pack, symmetrize_
from moment_oracle import Problem, assert_as_good, assert_moments, error, poisoned

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("weights", ["none", "mask", "any"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments(dtype: torch.dtype, weights: str, strided: bool):
    problem = Problem.random(301, 157, 93, dtype, weights=weights, strided=strided)
    s, h = poisoned(157), torch.zeros(93, 157)
    assert gram_(s, problem.x, problem.weights) is s
    assert cross_(h, problem.y, problem.x, problem.weights) is h
    assert_moments(s, h, problem)


def test_both_in_one_call():
    problem = Problem.random(80, 33, 20, torch.float32, weights="any")
    s, h = gram_cross_(poisoned(33), torch.zeros(20, 33), problem.x, problem.y, problem.weights)
    assert_moments(s, h, problem)


def test_chunks_add_up():
    problem = Problem.random(200, 130, 70, torch.bfloat16, weights="any")
    s, h = poisoned(130), torch.zeros(70, 130)
    for chunk in problem.chunks([64, 0, 1, 135]):
        gram_cross_(s, h, chunk.x, chunk.y, chunk.weights)
    assert_moments(s, h, problem)


@pytest.mark.parametrize(("n", "d", "m"), [(0, 5, 3), (4, 1, 1), (4, 5, 0), (1, 7, 2)])
def test_small_and_empty(n: int, d: int, m: int):
    problem = Problem.random(n, d, m, torch.float32)
    s, h = gram_cross_(torch.ones(d, d), torch.ones(m, d), problem.x, problem.y)
    assert_moments(s - 1, h - 1, problem)


@pytest.mark.parametrize("d", [1, 127, 300])
def test_triangle(d: int):
    s = torch.randn(d, d)
    full = s.triu() + s.triu(1).mT
    s[torch.ones(d, d).tril(-1) > 0] = torch.nan
    assert_as_good(frobenius(s), full.norm(), full.double().norm())
    assert symmetrize_(s) is s
    assert torch.equal(s, full)


def test_fold():
    out, s, scale = torch.randn(40, 30), torch.randn(40, 30), torch.tensor(0.37, dtype=torch.float64)
    exact = out.double() + scale * s.double()
    assert_as_good(add_scaled_(out.clone(), s, scale), out + 0.37 * s, exact)
    for dtype in DTYPES:
        a, b = torch.randn(40, 50).to(dtype), torch.randn(50, 30)
        exact = out.double() + scale * (a.double() @ b.double())
        assert_as_good(addmm_(out.clone(), a, b, scale), out + 0.37 * (a.float() @ b), exact)


def test_cholesky_takes_the_triangle_in_place():
    problem = Problem.random(300, 40, 1, torch.float32)
    s = gram_(poisoned(40), problem.x)
    exact = torch.linalg.cholesky(problem.moments(torch.float64)[0])
    column_major, info = s.mT, torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(column_major, out=(column_major, info))
    assert not info
    assert error(column_major.tril(), exact) < 1e-5


def product(b: Any, **options: str) -> torch.Tensor:
    return addmm_(torch.zeros(2, 3), torch.zeros(2, 4), b, torch.ones(()), **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gram_(torch.zeros(3, 3), torch.zeros(2, 3, dtype=torch.int32)), "x must be"),
        (lambda: gram_(torch.zeros(3, 3), torch.zeros(3, 2).mT), "unit column stride"),
        (lambda: gram_(torch.zeros(3, 4), torch.zeros(2, 3)), "out must be contiguous float32 of shape"),
        (lambda: gram_(torch.zeros(3, 3).half(), torch.zeros(2, 3)), "out must be contiguous float32"),
        (lambda: gram_(torch.zeros(3, 3), torch.zeros(2, 3), torch.ones(3)), "weights must have shape"),
        (lambda: gram_(torch.zeros(3, 3), torch.zeros(2, 3), precision="tf32"), "precision must be one of"),
        (lambda: gram_(torch.zeros(3, 3, device="meta"), torch.zeros(2, 3)), "out is on meta"),
        (lambda: cross_(torch.zeros(4, 3), torch.zeros(1, 4), torch.zeros(2, 3)), "y and x must share"),
        (lambda: cross_(torch.zeros(4, 3), torch.zeros(2, 4).half(), torch.zeros(2, 3)), "y and x must share"),
        (lambda: symmetrize_(torch.zeros(2, 3)), "s must be contiguous float32 of shape"),
        (lambda: product(torch.zeros(5, 3)), "a must be"),
        (lambda: product(SimpleNamespace(x=torch.zeros(4, 3)), precision="ieee"), "packed"),
        (lambda: product(torch.zeros(4, 3), precision="fp16"), "precision must be one of"),
        (lambda: pack(torch.zeros(3)), "b must be"),
        (lambda: pack(torch.zeros(3, 2).half()), "b must be"),
    ],
)
def test_what_does_not_fit_is_refused(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
