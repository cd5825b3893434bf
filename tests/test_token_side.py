"""Few tokens: the same solution from the token side, and only where it is cheaper."""

from __future__ import annotations

import copy
from pathlib import Path

import pico
import pytest
import torch
from test_engine import calibrated, update_errors

import featcal_fast as ff
from featcal_fast import reference
from featcal_fast.errors import SolveError
from featcal_fast.layer import moments
from featcal_fast.layer.layout import InputGroup
from featcal_fast.layer.moments import token_side
from featcal_fast.layer.tokens import TokenCounts


def few_tokens(kind: str, tasks: int) -> pico.Job:
    """A job of two samples a task, in batches of one."""
    job = pico.job(kind, tasks)
    for task, batches in job.batches.items():
        job.batches[task] = [{name: value[i : i + 1] for name, value in batches[0].items()} for i in range(2)]
    return job


def spaces(report: ff.Report) -> set[str]:
    return {group.space for layer in report.layers for group in layer.groups}


@pytest.mark.parametrize("ridge", [0.05, 1e-5])
@pytest.mark.parametrize("kind", ["clip", "llama", "t5", "gpt2"])
def test_it_is_the_same_solution(kind: str, ridge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    job, settings = few_tokens(kind, 3), ff.Settings(ridge_lambda=ridge)
    judge = calibrated(reference.calibrate_model, job.double(), settings)
    plain = calibrated(reference.calibrate_model, job.copy(), settings)
    monkeypatch.setattr(moments, "token_side", lambda group, _: not group.memory)
    monkeypatch.setattr("featcal_fast.layer.systems.token_side", moments.token_side)
    merged = copy.deepcopy(job.merged)
    report = ff.calibrate_model(merged, base=job.base, experts=job.experts, batches=job.batches, settings=settings)
    assert "tokens" in spaces(report)
    expected = "float32, token side" if ridge == 0.05 else "float64, token side"
    assert {group.solver for layer in report.layers for group in layer.groups if group.space == "tokens"} == {expected}
    steps = [group.solver_steps for layer in report.layers for group in layer.groups if group.space == "tokens"]
    assert all(each == [expected.partition(",")[0]] for each in steps)
    worse = update_errors(plain, judge, job.merged)
    for name, (error, rounding) in update_errors(merged, judge, job.merged).items():
        if name.endswith("bias"):  # what is off in W lies in the tokens' span, where a bias sees all of it
            assert error <= 2 * worse[name][0] + 2e-5 + 2 * rounding, f"{name}: {error:.1e}"
        else:
            assert error <= max(2e-5 + 2 * rounding, worse[name][0]), f"{name}: {error:.1e}"


def test_it_is_taken_by_itself_where_tokens_are_few() -> None:
    job = few_tokens("llama", 2)
    report = ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)
    found = {group.modules[0]: group.space for group in report.layers[0].groups}
    assert found["mlp.down_proj"] == "tokens"  # 160 inputs, 80 tokens
    many = pico.job("llama", 2)
    report = ff.calibrate_model(many.merged, base=many.base, experts=many.experts, batches=many.batches)
    assert "tokens" not in spaces(report)


def test_the_choice_by_hand() -> None:
    group = InputGroup(("fc",), 1024, (1024,), None)
    assert token_side(group, TokenCounts(64, 512, 8))
    assert not token_side(group, TokenCounts(256, 2048, 8))  # more tokens than features
    assert not token_side(group, TokenCounts(1000, 1000, 1))  # hardly fewer, and one fold only
    assert not token_side(InputGroup(("k",), 1024, (1024,), None, memory=True), TokenCounts(64, 512, 8))


def test_a_plan_prices_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = pico.save(few_tokens("llama", 2), tmp_path)
    plan, report = ff.plan(recipe), ff.calibrate(recipe)
    assert plan.problems == []
    assert "tokens" in spaces(report)
    for module in ("layer.moments", "layer.systems", "planning.footprint"):
        monkeypatch.setattr(f"featcal_fast.{module}.token_side", lambda *_: False)
    otherwise = ff.plan({**recipe, "out": str(tmp_path / "other")})
    assert plan.flops["forward"] == otherwise.flops["forward"]
    assert sum(plan.flops.values()) < sum(otherwise.flops.values())
    assert plan.layers[0].scratch < otherwise.layers[0].scratch


def test_features_that_are_not_finite_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    job = few_tokens("llama", 1)
    grown = copy.deepcopy(job.experts["task0"])
    with torch.no_grad():
        for expert in (grown, job.merged):
            expert.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1e38)
    job.experts["task0"] = grown
    with pytest.raises(SolveError, match=r"mlp\.|self_attn\.|not finite"):
        ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)
