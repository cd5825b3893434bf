"""Every op and dtype on a GPU, by the path the dispatch takes and by each path there is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from featcal_kernels import add_scaled_, addmm_, blas, cross_, frobenius, gram_, gram_cross_, pack, symmetrize_
from featcal_kernels.configs import arch_of
from moment_oracle import Problem, assert_as_good, assert_moments, poisoned

from bench.gpu.tiles import other_way
from bench.gpu.timing import Run, measure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# tokens, columns, rows of the cross moment: aligned, odd, split over tokens, several waves
SIZES = [(512, 256, 128), (301, 157, 93), (4000, 768, 768), (1, 16, 16), (2048, 3072, 1024)]


@pytest.fixture(autouse=True)
def _float32_products() -> Iterator[None]:
    """The plain float32 results that errors are held against are not TF32's."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def launch() -> ModuleType:
    return pytest.importorskip("featcal_kernels.launch", reason="triton is not installed")


def sums(d: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    return poisoned(d, "cuda"), torch.zeros(m, d, device="cuda")


@pytest.mark.parametrize("weights", ["none", "mask", "any"])
@pytest.mark.parametrize(("n", "d", "m"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments(dtype: torch.dtype, n: int, d: int, m: int, weights: str):
    problem = Problem.random(n, d, m, dtype, weights=weights, device="cuda")
    s, h = gram_cross_(*sums(d, m), problem.x, problem.y, problem.weights)
    assert_moments(s, h, problem)
    s, h = sums(d, m)
    gram_(s, problem.x, problem.weights)
    cross_(h, problem.y, problem.x, problem.weights)
    assert_moments(s, h, problem)


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("weights", ["none", "any"])
@pytest.mark.parametrize(("n", "d", "m"), SIZES)
@pytest.mark.parametrize("path", ["triton", "squares"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_path(dtype: torch.dtype, path: str, n: int, d: int, m: int, weights: str, strided: bool):
    if path != "triton" and (dtype == torch.float32 or weights != "none"):
        pytest.skip("cuBLAS takes 16-bit operands as they lie")
    if path != "triton" and not blas.available(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("this torch does not accumulate 16-bit products in float32")
    problem = Problem.random(n, d, m, dtype, weights=weights, strided=strided, device="cuda")
    s, h = sums(d, m)
    launch().moments_(s, h, problem.x, problem.y, weights=problem.weights, path=path)
    assert_moments(s, h, problem)


@pytest.mark.parametrize("weights", ["none", "any"])
@pytest.mark.parametrize(("n", "d", "m"), SIZES)
@pytest.mark.parametrize("triple", [False, True], ids=["runs", "triple"])
def test_each_way_to_multiply_parts(triple: bool, n: int, d: int, m: int, weights: str):
    arch = arch_of(torch.device("cuda", torch.cuda.current_device()))
    assert arch is not None
    tile = arch.split if arch.split.triple == triple else replace(arch.split, **other_way(arch.split))
    problem = Problem.random(n, d, m, torch.float32, weights=weights, device="cuda")
    s, h = sums(d, m)
    moments_ = launch().moments_
    moments_(s, h, problem.x, problem.y, weights=problem.weights, arch=replace(arch, split=tile))
    assert_moments(s, h, problem)


@pytest.mark.parametrize("weights", ["none", "any"])
def test_float32_products_on_request(weights: str):
    problem = Problem.random(1000, 300, 200, torch.float32, weights=weights, device="cuda")
    s, h = gram_cross_(*sums(300, 200), problem.x, problem.y, problem.weights, precision="ieee")
    assert_moments(s, h, problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_add_up(dtype: torch.dtype):
    problem = Problem.random(3000, 640, 320, dtype, weights="mask", device="cuda")
    s, h = sums(640, 320)
    for chunk in problem.chunks([1024, 0, 1, 1975]):
        gram_cross_(s, h, chunk.x, chunk.y, chunk.weights)
    assert_moments(s, h, problem)


@pytest.mark.parametrize("d", [768, 2048, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_same_bits_every_time(dtype: torch.dtype, d: int):
    problem = Problem.random(4096, d, 512, dtype, weights="any", device="cuda")
    first = gram_cross_(*sums(d, 512), problem.x, problem.y, problem.weights)
    for _ in range(3):
        again = gram_cross_(*sums(d, 512), problem.x, problem.y, problem.weights)
        assert all(torch.equal(a.triu(), b.triu()) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("precision", ["fp16x3", "ieee", "packed"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_fold(dtype: torch.dtype, precision: str):
    a = torch.randn(700, 1300, device="cuda").to(dtype)
    b, out = torch.randn(1300, 528, device="cuda"), torch.randn(700, 600, device="cuda")[:, 48:576]
    scale = torch.tensor(0.37, dtype=torch.float64, device="cuda")
    exact = out.double() + scale * (a.double() @ b.double())
    plain = out + 0.37 * (a.float() @ b)
    whole = out.new_full((700, 600), 7.0)
    found = whole[:, 48:576].copy_(out)  # a block of a larger matrix
    if precision == "packed":
        addmm_(found, a, pack(b), scale)
    else:
        addmm_(found, a, b, scale, precision=precision)
    assert_as_good(found, plain, exact)
    assert (whole[:, :48] == 7).all()
    assert (whole[:, 576:] == 7).all()
    out = out.contiguous()
    exact = out.double() + scale * out.double()
    assert_as_good(add_scaled_(out.clone(), out, scale), out + 0.37 * out, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fold_of_rounded_weights(dtype: torch.dtype):
    """As good as the product with the weights rounded to 11 bits beforehand."""
    a = torch.randn(700, 1300, device="cuda").to(dtype)
    b, out = torch.randn(1300, 528, device="cuda"), torch.zeros(700, 528, device="cuda")
    exact = a.half().double() @ b.double()
    plain = a.half().float() @ b
    scale = torch.ones((), device="cuda")
    assert_as_good(addmm_(out, a, pack(b), scale, precision="fp16x2"), plain, exact)


@pytest.mark.parametrize("d", [1, 127, 3000])
def test_triangle(d: int):
    s = torch.randn(d, d, device="cuda")
    full = s.triu() + s.triu(1).mT
    s[torch.ones_like(s).tril(-1) > 0] = torch.nan
    assert_as_good(frobenius(s), full.norm(), full.double().norm())
    symmetrize_(s)
    assert torch.equal(s, full)


def test_rows_beyond_32_bits():
    """The last tokens of a matrix of more than 2^31 elements are found."""
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of device memory")
    wide = torch.zeros(2**31 // 8192 + 64, 8192, dtype=torch.bfloat16, device="cuda")
    problem = Problem.random(64, 64, 32, torch.bfloat16, device="cuda")
    x, y = wide[:, :64], wide[:, 64:96]
    x[-64:], y[-64:] = problem.x, problem.y
    for path in launch().PATHS:
        s, h = sums(64, 32)
        launch().moments_(s, h, x, y, path=path)
        assert_moments(s, h, problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_host_never_waits(dtype: torch.dtype):
    problem = Problem.random(2048, 512, 256, dtype, weights="any", device="cuda")
    scale = torch.ones((), device="cuda")

    def everything() -> None:
        s, h = sums(512, 256)
        gram_cross_(s, h, problem.x, problem.y, problem.weights)
        symmetrize_(s)
        addmm_(h, problem.y.mT[:, :512], s, scale / frobenius(s))
        add_scaled_(s, s, scale)

    everything()  # tile orders are copied over once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_clock_leaves_out_what_the_host_does_meanwhile():
    x = torch.zeros(1024, device="cuda")
    ms, host = measure({"slow": lambda: (time.sleep(0.002), x.add_(1))}, Run(x.device, dry=False), 0.1)
    assert ms["slow"] < 0.5 < 2 <= host["slow"]


def test_large_operands_are_not_copied():
    x = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16)
    s = torch.zeros(4096, 4096, device="cuda")
    gram_(s, x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gram_(s, x)
    assert torch.cuda.max_memory_allocated() - before < x.numel() // 2
