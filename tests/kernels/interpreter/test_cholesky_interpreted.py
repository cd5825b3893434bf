"""Systems solved by blocks, with the kernels a GPU would run between them, in place in larger buffers."""

from __future__ import annotations

import pytest
import torch
from featcal_kernels import launch, ops
from featcal_kernels.configs import Arch
from moment_oracle import assert_as_good, poisoned
from test_interpreter import BODIES, pytestmark  # noqa: F401 (where the interpreter can be used)

from featcal_fast.layer import cholesky


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Blocks of 64, `addmm_` on the kernels; the shapes of what they add to."""
    found: list[tuple[int, int]] = []
    addmm = launch.addmm_
    monkeypatch.setattr(cholesky, "BLOCK", 64)
    monkeypatch.setattr(ops, "_gpu", lambda *tensors: launch)
    monkeypatch.setattr(
        launch, "addmm_", lambda out, *args, **kwargs: (found.append(tuple(out.shape)), addmm(out, *args, **kwargs))
    )
    return found


@BODIES
@pytest.mark.parametrize(("n", "m"), [(200, 150), (192, 64), (130, 1)])
@pytest.mark.parametrize("column_major", [True, False])
def test_as_good_as_the_whole(
    n: int,
    m: int,
    column_major: bool,
    arch: Arch,
    products: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "arch_of", lambda device: arch)
    torch.manual_seed(n)
    x = torch.randn(2 * n, n) * torch.logspace(0, -1.5, n)
    x[:, 5] *= 100
    system = x.mT @ x
    system = 8 * system / system.norm() + 0.05 * torch.eye(n)
    right = torch.randn(m, n).mT if column_major else torch.randn(n, m)
    exact = torch.linalg.solve(system.double(), right.double())
    plain = torch.cholesky_solve(right, torch.linalg.cholesky(system))

    a = poisoned(n) + system.triu()
    assert int(cholesky.factor_(a)) == 0
    assert not products
    cholesky.solve_blocked_(a, right)
    assert products
    assert_as_good(right, plain, exact)
