"""A number that is not finite stops the layer, and the error says which model, layer, module, task and sample."""

from __future__ import annotations

import copy
from typing import Any

import pico
import pytest
import torch
from test_engine import calibrated, update_errors
from torch import Tensor, nn

import featcal_fast as ff
from featcal_fast import reference
from featcal_fast.errors import SolveError
from featcal_fast.layer import solve
from featcal_fast.streaming.culprit import Culprits

MARKED = 99  # a token that makes trouble


def refusal(job: pico.Job, **settings: Any) -> str:
    before = copy.deepcopy(job.merged).state_dict()
    with pytest.raises(SolveError) as found:
        ff.calibrate_model(
            job.merged, base=job.base, experts=job.experts, batches=job.batches, settings=ff.Settings(**settings)
        )
    assert all(torch.equal(value, before[name]) for name, value in job.merged.state_dict().items())
    return str(found.value)


def trouble(where: str, module: str, batch: int, value: float = torch.inf, kind: str = "llama") -> pico.Job:
    """What a module makes of one token, in sample 2 of a batch of task 1, is not finite in one of the models."""
    job = pico.job(kind, 2)
    for batches in job.batches.values():
        for each in batches:
            each["input_ids"].clamp_(max=MARKED - 1)
    job.batches["task1"][batch]["input_ids"][2, 3] = MARKED
    model = {"merged": job.merged, **job.experts}[where]
    block, name = module.split(".", 1)
    marks: list[Tensor] = []

    def look(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        marks[:] = [args[0].abs().amax(-1, keepdim=True) > 300]

    def spoil(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        return out.masked_fill(marks[0], value)

    with torch.no_grad():  # it goes through the layers in the residual stream
        model.get_input_embeddings().weight[MARKED] = 1000.0
    layers = model.model.layers
    layers[int(block)].register_forward_pre_hook(look)
    layers[int(block)].get_submodule(name).register_forward_hook(spoil)
    return job


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_the_merged_models_features(value: float) -> None:
    message = refusal(trouble("merged", "1.mlp.up_proj", batch=3, value=value))
    assert message.startswith("merged model, model.layers.1.mlp.down_proj: its features are not finite (NaN or Inf) in")
    assert "in batch 3, sample 2 of task task1; look at this sample" in message
    assert "float16" not in message


@pytest.mark.parametrize("solve_dtype", ["float32", "float64"])
def test_what_leaves_the_calibrated_layer_is_told_as_the_next_one_begins(solve_dtype: str) -> None:
    message = refusal(trouble("merged", "1.mlp.down_proj", batch=3), solve_dtype=solve_dtype)
    assert message.startswith("merged model, model.layers.2: the hidden states that enter it are not finite")
    assert "in batch 3, sample 2 of task task1" in message


def test_an_experts_features() -> None:
    message = refusal(trouble("task1", "1.mlp.up_proj", batch=3))
    assert message.startswith("expert task1, model.layers.1.mlp.down_proj: the features are not finite")
    assert "in batch 3, sample 2 of task task1" in message


@pytest.fixture
def in_input_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """What modules make is not looked at."""
    monkeypatch.setattr("featcal_fast.layer.moments.output_space", lambda *_: False)


def test_what_an_experts_module_makes() -> None:
    message = refusal(trouble("task1", "1.mlp.down_proj", batch=3))
    assert message.startswith("expert task1, model.layers.1.mlp.down_proj: the features are not finite")
    assert "in batch 3, sample 2 of task task1" in message


@pytest.mark.usefixtures("in_input_space")
def test_an_experts_hidden_states() -> None:
    """What its layer 1 makes of a sample is not finite: seen by the next one."""
    message = refusal(trouble("task1", "1.mlp.down_proj", batch=3))
    assert message.startswith("expert task1, model.layers.2.self_attn.q_proj, self_attn.k_proj, self_attn.v_proj: ")
    assert "the hidden states that enter the layer, and so the features are not finite" in message
    assert "in batch 3, sample 2 of task task1" in message


@pytest.mark.usefixtures("in_input_space")
@pytest.mark.parametrize(("where", "model"), [("merged", "merged model, not calibrated"), ("task1", "expert task1")])
def test_the_drift(where: str, model: str) -> None:
    """No moment is of what leaves the last layer."""
    message = refusal(trouble(where, "2.mlp.down_proj", batch=0))
    assert message.startswith(f"{model}, model.layers.2: the hidden states that leave it are not finite")
    assert "in batch 0, sample 2 of task task1" in message


def test_float16_is_named_where_it_is_to_blame() -> None:
    job = pico.job("llama", 1)
    for model in (job.base, job.merged, *job.experts.values()):
        model.half()
    with torch.no_grad():
        job.merged.get_parameter("model.layers.1.mlp.up_proj.weight").fill_(20000)
    message = refusal(job)
    assert message.startswith(
        "merged model, model.layers.1.mlp.down_proj: its features are not finite (NaN or Inf) in b"
    )
    assert message.endswith("sample 0 of task task0; float16 ends at 65504: convert the models to bfloat16")


def test_sums_that_overflow_are_not_blamed_on_float16() -> None:
    job = pico.job("llama", 1)
    with torch.no_grad():
        for model in (job.merged, job.experts["task0"]):
            model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1e25)
    message = refusal(job)
    assert message.startswith(
        "merged model, model.layers.1.mlp.down_proj: sums over the features leave float32's range"
    )
    assert "mlp.down_proj, batch" in message
    assert "float16" not in message


def test_what_enters_the_first_layer() -> None:
    job = pico.job("llama", 2)
    job.batches["task0"][0]["input_ids"].clamp_(max=MARKED - 1)
    for batch in job.batches["task1"]:
        batch["input_ids"].clamp_(max=MARKED - 1)
    job.batches["task1"][4]["input_ids"][3, 1] = MARKED
    with torch.no_grad():
        job.experts["task1"].get_input_embeddings().weight[MARKED, 5] = torch.nan
    message = refusal(job)
    assert message.startswith(
        "task task1, batch 4, sample 3: what the expert task1 makes of it is not finite (NaN or Inf)"
    )
    assert "as it enters model.layers.0" in message


def test_a_system_that_cannot_be_solved_names_model_and_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "factor_", lambda a: torch.ones((), dtype=torch.int32))
    message = refusal(pico.job("llama", 1))
    assert message.startswith(
        "merged model, model.layers.0: self_attn.q_proj, self_attn.k_proj, self_attn.v_proj: the ri"
    )
    assert "not positive definite" in message


def test_a_raised_diagonal_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    factor, failing = solve.factor_, iter([1, 1, 1])

    def fails_thrice(a: Tensor) -> Tensor:
        return factor(a) + next(failing, 0)

    monkeypatch.setattr(solve, "factor_", fails_thrice)
    job = pico.job("llama", 1)
    report = ff.calibrate_model(
        job.merged, base=job.base, experts=job.experts, batches=job.batches, settings=ff.Settings(solve_dtype="float64")
    )
    raised = [group.raised for layer in report.layers for group in layer.groups]
    assert raised == [1e-5] + [0.0] * (len(raised) - 1)
    assert report.layers[0].groups[0].solver == "float64, diagonal raised by 1e-05 of its mean"


def test_a_good_run_looks_for_no_culprit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Culprits, "_find", None)
    job = pico.job("llama", 1)
    ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)


def test_a_judge_that_is_not_finite_raises() -> None:
    job = trouble("merged", "1.mlp.up_proj", batch=3)
    with pytest.raises(SolveError, match=r"reference: model\.layers\.1\.mlp\.down_proj\.weight came out as NaN or Inf"):
        reference.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)


# Eager attention in float64 makes NaN of a row that is masked all over, and a window of 3 leaves none of padding's.
@pytest.mark.parametrize(
    ("kind", "padding", "sizes", "updates"),
    [
        ("llama", "left", {}, 21),
        ("gemma2", "left", {"sliding_window": 3}, 14),
        ("gemma2", "right", {"sliding_window": 3}, 14),
        ("gemma3", "right", {"sliding_window": 3}, 14),
        ("qwen2-moe", "left", {}, 22),
    ],
)
def test_paddings_nan_reaches_no_moment_and_no_other_layer(kind: str, padding: str, sizes: dict, updates: int) -> None:
    job = pico.job(kind, 2, attn_implementation="eager", **sizes)
    job.batches = {task: pico.batches_for(kind, k, padding)[:2] for k, task in enumerate(job.batches)}
    double, seen = job.double(), []
    first = double.merged.model.layers[0].mlp
    first.register_forward_hook(lambda _module, _args, out: seen.append(out) or None)
    judge = calibrated(reference.calibrate_model, double, ff.Settings())
    found = calibrated(ff.calibrate_model, double, ff.Settings())
    assert not all(out.isfinite().all() for out in seen)
    for ours in (found, calibrated(ff.calibrate_model, job, ff.Settings())):
        errors = update_errors(ours, judge, job.merged)
        assert len(errors) == updates
        for name, (error, rounding) in errors.items():
            assert error <= 2e-5 + 2 * rounding, f"{name}: {error:.1e}"
