"""The ladder: what happens when a factorisation fails, and that nothing is copied when it does not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import featcal_fast as ff
from featcal_fast.features import InputGroup, Layout
from featcal_fast.moments import TaskMoments
from featcal_fast.solve import check_finite, factor_, solve_, solve_layer
from featcal_fast.systems import Anchor, LayerSystem
from featcal_fast.tokens import TokenCounts

IN, OUT, TOKENS = 48, 20, 400


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
        system.fold(moments, expert, "task")
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
    factor = system.systems[0].a.data_ptr()
    update = solve_layer(system, moments, tasks=1)
    assert update.parameters["fc.weight"].data_ptr() == place
    assert system.stacks[IN].data_ptr() == factor
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


@torch.no_grad()
def test_a_failed_float32_factorisation_is_redone_in_float64() -> None:
    """Rank-deficient features and a tiny ridge: float32 rounding makes the system indefinite."""
    settings = ff.Settings(ridge_lambda=1e-9, covariance_eps=1e-12, solve_dtype="float32")
    torch.manual_seed(1)
    features = torch.randn(TOKENS, 3) @ torch.randn(3, IN)
    system, moments, *_ = layer(settings, features)
    update = solve_layer(system, moments, tasks=1)
    assert update.solver["fc"].startswith("float64")
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
    with pytest.raises(ff.FeatCalError, match="fc: the features of these modules are not finite"):
        check_finite(system.systems, [float(each) for each in solve_layer(system, moments, tasks=1).sums])
