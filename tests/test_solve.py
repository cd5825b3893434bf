"""Factorisation and solves, whole and by blocks; the ladder: what happens when a factorisation fails."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import featcal_fast as ff
from featcal_fast.layer import cholesky, solve
from featcal_fast.layer.cholesky import factor_, solve_, solve_blocked_
from featcal_fast.layer.fold import TaskFold
from featcal_fast.layer.layout import InputGroup, Layout
from featcal_fast.layer.moments import TaskMoments
from featcal_fast.layer.solve import MAX_CONDITION_SPLIT, check_finite, max_condition, solve_layer
from featcal_fast.layer.systems import Anchor, LayerSystem
from featcal_fast.layer.tokens import TokenCounts

IN, OUT, TOKENS = 48, 20, 400


def solve_and_check(system: LayerSystem, moments: TaskMoments) -> None:
    update = solve_layer(system, moments, tasks=1)
    check_finite(system.layout.groups, update.parameters, [float(each) for each in update.sums["fc"]])


def layer(settings: ff.Settings, features: torch.Tensor) -> tuple[LayerSystem, TaskMoments, nn.Module, nn.Module]:
    """A one-module layer with one task folded in; student and expert see the same features."""
    torch.manual_seed(0)
    block = nn.ModuleDict({"fc": nn.Linear(IN, OUT)})
    expert = nn.ModuleDict({"fc": nn.Linear(IN, OUT)})
    layout = Layout((InputGroup(("fc",), IN, (OUT,), None),), {}, "fc")
    device = torch.device("cpu")
    counts = TokenCounts(len(features), 8 * len(features), 8)
    moments = TaskMoments(layout, block, counts, settings, device)
    system = LayerSystem(layout, Anchor(block, copy.deepcopy(block), settings.anchor_rho), settings, device, counts)
    with torch.no_grad():
        moments.groups["fc"].add(
            features, features, [expert.fc(features)], None, len(features), lambda _, addition: addition()
        )
        TaskFold(system, moments, expert).add()
    return system, moments, block, expert


def exact(features: torch.Tensor, block: nn.Module, expert: nn.Module, settings: ff.Settings) -> torch.Tensor:
    x = features.double()
    s = x.T @ x / len(x)
    w = 1 / s.norm()
    left = w * s + (settings.ridge_lambda + settings.covariance_eps) * torch.eye(IN, dtype=torch.float64)
    right = w * s @ expert.fc.weight.double().T + settings.ridge_lambda * block.fc.weight.double().T
    return torch.linalg.solve(left, right).T


@torch.no_grad()
def test_the_solution_lies_where_the_right_hand_side_was() -> None:
    settings = ff.Settings()
    features = torch.randn(TOKENS, IN)
    system, moments, block, expert = layer(settings, features)
    place = system.systems[0].r.data_ptr()
    update = solve_layer(system, moments, tasks=1)
    assert update.parameters["fc.weight"].data_ptr() == place
    judge = exact(features, block, expert, settings)
    assert torch.allclose(update.parameters["fc.weight"].double(), judge, atol=1e-6)
    assert update.solver == {"fc": "float32"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("column_major", [True, False])
def test_neither_side_of_a_system_is_copied(dtype: torch.dtype, column_major: bool) -> None:
    torch.manual_seed(0)
    n, m = 300, 500
    x = torch.randn(600, n, dtype=dtype)
    system = x.mT @ x / len(x) + 0.1 * torch.eye(n, dtype=dtype)
    right = torch.randn(m, n, dtype=dtype).mT if column_major else torch.randn(n, m, dtype=dtype)
    judge = torch.linalg.solve(system.double(), right.double())
    factor = system.triu() + torch.full_like(system, 7.0).tril(-1)  # what is below the diagonal is never read
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        assert int(factor_(factor)) == 0
        solve_(factor, right)
    assert max(event.self_cpu_memory_usage for event in profiled.key_averages()) < 4096
    assert (right - judge).norm() < (1e-5 if dtype == torch.float32 else 1e-13) * judge.norm()


def ridge(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(n)
    x = torch.randn(2 * n, n, dtype=dtype)
    return x.mT @ x / len(x) + 0.1 * torch.eye(n, dtype=dtype)


def upper(system: torch.Tensor) -> torch.Tensor:
    """What is below the diagonal is poisoned."""
    return system.triu().masked_fill_(torch.ones_like(system).tril(-1) > 0, torch.nan)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 32, 100, 129])
@pytest.mark.parametrize("m", [1, 20, 300])
@pytest.mark.parametrize("column_major", [True, False])
def test_blocks_give_what_the_whole_gives(n: int, m: int, column_major: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "BLOCK", 16)
    system = ridge(n)
    right = torch.randn(m, n).mT if column_major else torch.randn(n, m)
    judge = torch.linalg.solve(system.double(), right.double())
    whole, parts, factor = right.clone(), right, upper(system)
    place = parts.data_ptr()
    assert int(factor_(factor)) == 0
    solve_(factor, whole)
    solve_blocked_(factor, parts)
    assert parts.data_ptr() == place
    assert (parts - judge).norm() < 2 * (whole - judge).norm() + 1e-6 * judge.norm()


def test_blocks_need_no_memory_of_the_size_of_a_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "BLOCK", 16)
    factor, right = upper(ridge(512)), torch.randn(2000, 512).mT
    factor_(factor)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        solve_blocked_(factor, right)
    most = max(event.self_cpu_memory_usage for event in profiled.events())
    assert 0 < most <= 4 * 128 * 256  # a product's left operand, half of eight blocks' right sides: torch scales it


@pytest.mark.parametrize("bad", [0, 15, 40, 99])
@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_a_factorisation_says_where_it_stopped(bad: int, value: float) -> None:
    system = ridge(100)
    system[bad, bad] = value
    info = factor_(upper(system))
    assert info.dtype == torch.int32
    assert int(info) == bad + 1


@pytest.mark.parametrize(
    ("gpu", "dtype", "n", "expected"),
    [
        (True, torch.float32, cholesky.MIN_BLOCKED, True),
        (True, torch.float32, cholesky.MIN_BLOCKED - 1, False),
        (True, torch.float64, cholesky.MIN_BLOCKED, False),
        (False, torch.float32, cholesky.MIN_BLOCKED, False),
    ],
)
def test_blocks_are_for_large_float32_systems_on_a_gpu(gpu: bool, dtype: torch.dtype, n: int, expected: bool) -> None:
    assert cholesky.by_blocks(SimpleNamespace(is_cuda=gpu, dtype=dtype, shape=(n, n))) == expected


def test_where_blocks_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never in float64, nor against a caller's word."""
    called = []
    blocked = cholesky.solve_blocked_
    monkeypatch.setattr(cholesky, "solve_blocked_", lambda *args: (called.append(1), blocked(*args)))
    monkeypatch.setattr(cholesky, "by_blocks", lambda a: a.dtype == torch.float32)
    for dtype, split, count in ((torch.float32, True, 1), (torch.float32, False, 1), (torch.float64, True, 1)):
        factor = ridge(20, dtype)
        assert int(factor_(factor)) == 0
        solve_(factor, torch.randn(20, 3, dtype=dtype), split=split)
        assert len(called) == count


@torch.no_grad()
@pytest.mark.parametrize("ridge_lambda", [0.05, 1e-4])
def test_a_layer_is_solved_by_blocks_where_its_condition_allows(
    ridge_lambda: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    blocked = cholesky.solve_blocked_
    monkeypatch.setattr(cholesky, "BLOCK", 16)
    monkeypatch.setattr(cholesky, "by_blocks", lambda a: a.dtype == torch.float32)
    monkeypatch.setattr(cholesky, "solve_blocked_", lambda *args: (called.append(1), blocked(*args)))
    settings = ff.Settings(ridge_lambda=ridge_lambda, solve_dtype="float32")
    features = torch.randn(TOKENS, IN)
    system, moments, block, expert = layer(settings, features)
    update = solve_layer(system, moments, tasks=1)
    assert len(called) == (max_condition(settings, 1, 64) <= MAX_CONDITION_SPLIT) == (ridge_lambda == 0.05)
    assert update.solver == {"fc": "float32"}
    assert update.steps == {"fc": ["float32, by blocks" if called else "float32"]}
    judge = exact(features, block, expert, settings)
    assert torch.allclose(update.parameters["fc.weight"].double(), judge, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("by_blocks", [False, True])
def test_a_failed_float32_factorisation_is_redone_in_float64(by_blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank-deficient features and a tiny ridge: float32 rounding makes the system indefinite."""
    if by_blocks:
        monkeypatch.setattr(cholesky, "BLOCK", 16)
        monkeypatch.setattr(cholesky, "by_blocks", lambda a: a.dtype == torch.float32)
        monkeypatch.setattr(solve, "MAX_CONDITION_SPLIT", math.inf)
    settings = ff.Settings(ridge_lambda=1e-9, covariance_eps=1e-12, solve_dtype="float32")
    torch.manual_seed(1)
    features = torch.randn(TOKENS, 3) @ torch.randn(3, IN)
    system, moments, *_ = layer(settings, features)
    update = solve_layer(system, moments, tasks=1)
    assert update.solver["fc"].startswith("float64")
    assert update.steps["fc"][:2] == ["float32", "float64"]
    assert update.steps["fc"][-1] == update.solver["fc"]
    assert update.parameters["fc.weight"].isfinite().all()


@torch.no_grad()
def test_an_indefinite_system_has_its_diagonal_raised_and_says_so() -> None:
    settings = ff.Settings()
    system, moments, *_ = layer(settings, torch.randn(TOKENS, IN))
    values, vectors = torch.linalg.eigh(torch.diag(torch.linspace(-3e-6, 1, IN)) + 0 * system.systems[0].a)
    broken = vectors @ values.diag() @ vectors.T - (settings.ridge_lambda + settings.covariance_eps) * torch.eye(IN)
    system.systems[0].a.copy_(broken)
    update = solve_layer(system, moments, tasks=1)
    assert update.solver["fc"] == "float64, diagonal raised by 1e-05 of its mean"
    raised = [f"float64, diagonal raised by {each} of its mean" for each in ("1e-07", "1e-06", "1e-05")]
    assert update.steps["fc"] == ["float32", "float64", *raised]
    assert update.parameters["fc.weight"].isfinite().all()


@torch.no_grad()
def test_a_hopeless_system_is_an_error_that_names_its_modules() -> None:
    system, moments, *_ = layer(ff.Settings(), torch.randn(TOKENS, IN))
    system.systems[0].a.copy_(-torch.eye(IN))
    with pytest.raises(ff.FeatCalError, match="fc: the ridge system is not positive definite"):
        solve_layer(system, moments, tasks=1)


@torch.no_grad()
@pytest.mark.parametrize("solve_dtype", ["float32", "float64"])
def test_features_that_are_not_finite_never_become_weights(solve_dtype: str) -> None:
    features = torch.randn(TOKENS, IN)
    features[3, 4] = float("nan")
    system, moments, *_ = layer(ff.Settings(solve_dtype=solve_dtype), features)
    with pytest.raises(ff.FeatCalError, match="fc: found NaN or Inf, expected finite numbers"):
        solve_and_check(system, moments)
