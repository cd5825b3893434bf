"""bfloat16 sums by a CPU's matrix units: exact products, and only where a program has allowed them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from featcal_kernels import allow_bf16_units, cpu, gram_, gram_cross_

BF16 = torch.bfloat16


@pytest.fixture
def units() -> Iterator[None]:
    if not cpu._available():
        pytest.skip("a CPU without matrix units for bfloat16, or a torch that cannot be told to use them")
    allow_bf16_units()
    yield
    allow_bf16_units(False)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.usefixtures("units")
@pytest.mark.parametrize(("tokens", "m", "d"), [(0, 8, 8), (1, 3, 5), (77, 33, 129), (300, 64, 700)])
def test_sums_are_as_exact_as_those_in_float32(tokens: int, m: int, d: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(tokens, 2 * d).to(BF16)[:, :d], torch.randn(tokens, m).to(BF16)
    s, h = torch.ones(d, d), torch.ones(m, d)
    gram_cross_(s, h, x, y)
    gram_cross_(s, h, x, y)
    gram = 1 + 2 * x.double().T @ x.double()
    assert relative(s.triu(), gram.triu()) < 1e-6
    assert relative(h, 1 + 2 * y.double().T @ x.double()) < 1e-6
    if d > cpu.BLOCK:
        assert (s[cpu.BLOCK :, : cpu.BLOCK] == 1).all()  # below the diagonal nothing is computed


@pytest.mark.usefixtures("units")
def test_the_switch_is_turned_back_and_float32_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.backends.mkldnn.matmul.fp32_precision
    x = torch.randn(64, 32)
    gram_(torch.zeros(32, 32), x.to(BF16))
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    with pytest.raises(RuntimeError):
        cpu.cross_(torch.zeros(8, 32), torch.randn(63, 8).to(BF16), x.to(BF16))
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert relative(gram_(torch.zeros(32, 32), x).triu(), (x.double().T @ x.double()).triu()) < 1e-6
    assert relative(x.T @ x, x.double().T @ x.double()) < 1e-6


@pytest.mark.usefixtures("units")
def test_weighted_features_are_no_longer_bfloat16() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(64, 32).to(BF16), torch.rand(64)
    exact = x.double().T @ (weights.double()[:, None] * x.double())
    assert relative(gram_(torch.zeros(32, 32), x, weights).triu(), exact.triu()) < 1e-6


def test_nothing_is_switched_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_exact_bf16_products", lambda: pytest.fail("switched"))
    gram_(torch.zeros(8, 8), torch.randn(16, 8).to(BF16))
