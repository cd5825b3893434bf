"""The engine against the float64 reference: exact to rounding, whatever family, number of tasks, kind of parameter."""

from __future__ import annotations

import copy
import gc
import weakref
from itertools import pairwise

import pico
import pytest
import torch
from torch import nn

import featcal_fast as ff
from featcal_fast import reference
from featcal_fast.errors import SolveError
from featcal_fast.forward.hooks import ActivationHooks
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import LayerReport

ROUNDING = 2.0**-24


def update_errors(found: nn.Module, judge: nn.Module, merged: nn.Module) -> dict[str, tuple[float, float]]:
    """`||P - P64|| / ||P64 - P_merged||` by parameter, with the share of it that storing in float32 may explain."""
    errors = {}
    for name, exact in judge.named_parameters():
        assert exact.isfinite().all(), f"{name}: the judge is not finite"
        start = merged.get_parameter(name).double()
        update = (exact - start).norm()
        if update > 0 and not torch.equal(exact.float(), start.float()):
            error = (found.get_parameter(name).double() - exact).norm() / update
            errors[name] = error.item(), (ROUNDING * exact.norm() / update).item()
    return errors


def calibrated(run, job: pico.Job, settings: ff.Settings) -> nn.Module:
    merged = copy.deepcopy(job.merged)
    run(merged, base=job.base, experts=job.experts, batches=job.batches, settings=settings)
    return merged


@pytest.mark.parametrize("tasks", [1, 3, 8])
@pytest.mark.parametrize("kind", ["clip", "llama"])
def test_engine_matches_the_float64_reference_and_beats_the_float32_one(kind: str, tasks: int) -> None:
    job, settings = pico.job(kind, tasks), ff.Settings(ridge_lambda=0.05)
    judge = calibrated(reference.calibrate_model, job.double(), settings)
    plain = calibrated(reference.calibrate_model, job.copy(), settings)
    ours = calibrated(ff.calibrate_model, job, settings)

    errors, plain_errors = update_errors(ours, judge, job.merged), update_errors(plain, judge, job.merged)
    linear = {name for name in errors if "proj" in name or "fc" in name}
    norms = {name for name in errors if "layer_norm" in name}
    assert len(linear) == (3 * 12 if kind == "clip" else 3 * 7)
    assert len(norms) == (3 * 4 if kind == "clip" else 0)
    for name, (error, rounding) in errors.items():
        if rounding < 1e-6:  # an update well above the parameter's own rounding
            assert error <= 2e-5, f"{name}: {error:.1e}"
            assert error <= plain_errors[name][0], f"{name}: {error:.1e} > {plain_errors[name][0]:.1e}"
        assert error <= 2e-5 + 2 * rounding, f"{name}: {error:.1e}"


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_never_counts(padding: str) -> None:
    """A padded batch gives what its rows give one by one, unpadded."""
    job = pico.job("llama", 2)
    for task in job.batches:
        job.batches[task] = pico.texts(3, seed=len(task), padding=padding)
    alone = job.copy()
    for task, batches in alone.batches.items():
        alone.batches[task] = [
            {"input_ids": row[mask.bool()][None]}
            for batch in batches
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
    a, b = (calibrated(ff.calibrate_model, each, ff.Settings()) for each in (job, alone))
    for name, (error, _) in update_errors(a, copy.deepcopy(b).double(), job.merged).items():
        assert error < 1e-5, f"{name}: {error:.1e}"


def test_token_weights_of_clips_last_layer_split_its_groups() -> None:
    job = pico.job("clip", 2)
    report = ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)
    first = {frozenset(group.modules) for group in report.layers[0].groups}
    assert frozenset(f"self_attn.{x}_proj" for x in "qkv") in first
    last = {frozenset(group.modules) for group in report.layers[-1].groups}
    assert {frozenset({"self_attn.q_proj"}), frozenset({"self_attn.k_proj", "self_attn.v_proj"})} <= last


def test_groups_come_from_the_tensor_not_the_name() -> None:
    job = pico.job("llama", 1)
    report = ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)
    groups = {tuple(sorted(group.modules)): group for group in report.layers[0].groups}
    assert set(groups) == {
        ("self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    }
    assert groups[("mlp.down_proj",)].space == "output"  # 160 -> 64: H is the cheaper one
    assert groups[("mlp.gate_proj", "mlp.up_proj")].space == "input"
    assert report.calibrated == 3 * 7
    assert report.kept == {"lm_head": "outside of the layers"}


def test_both_spaces_give_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    job, results = pico.job("clip", 2), []
    judge = calibrated(reference.calibrate_model, job.double(), ff.Settings())
    for choice in (True, False):
        monkeypatch.setattr("featcal_fast.layer.moments.output_space", lambda *_, choice=choice: choice)
        results.append(calibrated(ff.calibrate_model, job, ff.Settings()))
    for found in results:
        for name, (error, rounding) in update_errors(found, judge, job.merged).items():
            assert error < 2e-5 + 2 * rounding, f"{name}: {error:.1e}"


def test_a_stopped_forward_lets_go_of_its_features() -> None:
    """At once, on every version of Python: on a GPU nothing else would free them before the next chunk."""
    block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    seen: list[weakref.ref] = []
    gc.disable()
    try:
        with ActivationHooks(block, ["1"], lambda _, x: seen.append(weakref.ref(x)), stop_at="1"):
            block(torch.zeros(2, 4))
        assert [each() for each in seen] == [None]
    finally:
        gc.enable()


def test_task_order_does_not_matter() -> None:
    job = pico.job("llama", 3)
    turned = job.copy()
    turned.experts = dict(reversed(turned.experts.items()))
    turned.batches = {task: turned.batches[task] for task in turned.experts}
    a, b = (calibrated(ff.calibrate_model, each, ff.Settings()) for each in (job, turned))
    errors = update_errors(a, copy.deepcopy(b).double(), job.merged)
    assert len(errors) == 21
    assert all(error < 1e-5 for error, _ in errors.values())


def test_a_second_run_gives_the_same_bits() -> None:
    job = pico.job("clip", 2)
    a, b = (calibrated(ff.calibrate_model, job, ff.Settings()) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_batch_size_does_not_matter() -> None:
    job = pico.job("clip", 2)
    whole = job.copy()
    whole.batches = {
        task: [{"pixel_values": torch.cat([batch["pixel_values"] for batch in batches])}]
        for task, batches in job.batches.items()
    }
    a, b = (calibrated(ff.calibrate_model, each, ff.Settings()) for each in (job, whole))
    for name, (error, rounding) in update_errors(a, copy.deepcopy(b).double(), job.merged).items():
        assert error < 1e-5 + 2 * rounding, f"{name}: {error:.1e}"


def test_settings_switch_biases_and_layernorms_off() -> None:
    job = pico.job("clip", 2)
    found = calibrated(ff.calibrate_model, job, ff.Settings(calibrate_bias=False, calibrate_layernorm=False))
    changed = {name for name, p in found.named_parameters() if not torch.equal(p, job.merged.get_parameter(name))}
    assert changed == {name for name in changed if name.endswith(("proj.weight", "fc1.weight", "fc2.weight"))}
    assert len(changed) == 3 * 6


@pytest.mark.parametrize("lam", [1e-5, 1e-3, 0.0])
def test_small_lambda_is_solved_in_float64(lam: float) -> None:
    job = pico.job("llama", 2)
    report = ff.calibrate_model(
        job.merged, base=job.base, experts=job.experts, batches=job.batches, settings=ff.Settings(ridge_lambda=lam)
    )
    solvers = {group.solver for layer in report.layers for group in layer.groups}
    assert solvers == ({"float32"} if lam == 1e-3 else {"float64"})
    assert all(p.isfinite().all() for p in job.merged.parameters())


def test_bfloat16_models_stay_near_the_exact_solution() -> None:
    """Weights, features and results are bfloat16; sums and solve are not."""
    job = pico.job("llama", 2)
    for model in (job.base, job.merged, *job.experts.values()):
        model.bfloat16()
    judge = calibrated(reference.calibrate_model, job.double(), ff.Settings())
    found = calibrated(ff.calibrate_model, job, ff.Settings())
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    for name, (error, _) in update_errors(found, judge, job.merged).items():
        assert error < 0.1, f"{name}: {error:.1e}"


def test_calibration_repairs() -> None:
    """One expert: most of what separates its merge from it goes away (embeddings keep their merged values)."""
    job = pico.job("llama", 1)
    job.batches["task0"] = pico.texts(20, seed=7)
    report = ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)
    assert report.layers[-1].drift_after < 0.5 * report.layers[-1].drift_before


def test_models_given_are_left_alone() -> None:
    job = pico.job("clip", 2)
    job.merged.train()
    before = [copy.deepcopy(model.state_dict()) for model in (job.base, *job.experts.values())]
    ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)
    for model, state in zip((job.base, *job.experts.values()), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in job.merged.modules())
    assert not any("forward" in module.__dict__ for module in job.merged.modules())


def test_a_failed_run_leaves_the_merged_model_untouched() -> None:
    job = pico.job("clip", 2)
    with torch.no_grad():
        weights = dict(job.experts["task1"].named_parameters())
        next(weights[name] for name in weights if name.endswith("layers.2.mlp.fc1.weight"))[3, 4] = float("nan")
    before = copy.deepcopy(job.merged.state_dict())
    with pytest.raises(ff.FeatCalError, match=r"expert task1: block 2, mlp.fc1.weight holds NaN"):
        ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)
    assert all(torch.equal(value, before[name]) for name, value in job.merged.state_dict().items())


def test_features_that_are_not_finite_are_named() -> None:
    job = pico.job("clip", 1)
    job.batches["task0"][1]["pixel_values"][0, 0, 0, 0] = float("inf")
    message = r"task task0, batch 1, sample 0: what the merged model makes of it is not finite .* encoder.layers.0"
    with pytest.raises(SolveError, match=message):
        ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_layer_reads_the_device_once_for_the_solve_and_once_for_its_report(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, each read is a wait. However many batches and tasks there are."""
    reads, layers = [], []

    def counted(name: str):
        method = getattr(torch.Tensor, name)

        def read(tensor: torch.Tensor, *args: object) -> object:
            reads.append(name)
            return method(tensor, *args)

        return read

    class Layers(Progress):
        def layer(self, report: LayerReport) -> None:
            layers.append(len(reads))

    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    job = pico.job(kind, 3)
    ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches, progress=Layers())
    assert [after - before for before, after in pairwise(layers)] == [2] * (len(layers) - 1)


def test_tasks_must_agree() -> None:
    job = pico.job("clip", 2)
    with pytest.raises(ff.FeatCalError, match="task task1: found an expert but no batches"):
        ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches={"task0": job.batches["task0"]})
    with pytest.raises(ff.FeatCalError, match="task task1: found no batch"):
        ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches={**job.batches, "task1": []})


def test_models_must_have_one_architecture() -> None:
    job = pico.job("llama", 2)
    job.experts["task1"] = pico.llama(intermediate_size=96)
    with pytest.raises(ff.FeatCalError, match=r"expert task1: block parameter 0.mlp.down_proj.weight is \(64, 96\)"):
        ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)


def test_unknown_models_are_refused() -> None:
    job = pico.job("llama", 1)
    with pytest.raises(ff.FeatCalError, match=r"merged model: found a Sequential, expected one of the families"):
        ff.calibrate_model(nn.Sequential(nn.Linear(2, 2)), base=job.base, experts=job.experts, batches=job.batches)
    odd = copy.deepcopy(job.merged)
    odd.model.layers[1].mlp.extra = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ff.FeatCalError, match=r"model.layers.1.mlp.extra is a weight of shape \(4, 4\) in a LlamaMLP"):
        ff.calibrate_model(odd, base=job.base, experts=job.experts, batches=job.batches)


def test_a_batch_that_the_model_cannot_take_names_its_task() -> None:
    job = pico.job("clip", 2)
    job.batches["task1"] = [{"input_ids": torch.zeros(2, 3, dtype=torch.long)}]
    with pytest.raises(ff.FeatCalError, match=r"task task1, batch 0: .* cannot take .*input_ids"):
        ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)


@pytest.mark.parametrize("kind", ["clip", "llama", "t5"])
def test_a_bfloat16_forward_costs_some_accuracy_and_touches_nothing_else(kind: str) -> None:
    job = pico.job(kind, 3)
    judge = calibrated(reference.calibrate_model, job.double(), ff.Settings())
    found = calibrated(ff.calibrate_model, job, ff.Settings(forward_dtype="bfloat16"))
    errors = [error for error, rounding in update_errors(found, judge, job.merged).values() if rounding < 1e-6]
    assert 1e-5 < max(errors) < 0.1
    assert {value.dtype for value in found.state_dict().values() if value.is_floating_point()} == {torch.float32}


def test_a_bfloat16_forward_is_not_for_float16_layers() -> None:
    job = pico.job("clip", 1)
    for model in (job.merged, job.base, *job.experts.values()):
        model.half()
    with pytest.raises(ff.FeatCalError, match=r"forward_dtype: found bfloat16 for layers of float16, expected"):
        ff.calibrate_model(
            job.merged,
            base=job.base,
            experts=job.experts,
            batches=job.batches,
            settings=ff.Settings(forward_dtype="bfloat16"),
        )


def test_what_the_process_allows_float32_products_changes_nothing() -> None:
    job = pico.job("llama", 2)
    before = torch.get_float32_matmul_precision()
    exact = calibrated(ff.calibrate_model, job, ff.Settings())
    torch.set_float32_matmul_precision("medium")
    try:
        found = calibrated(ff.calibrate_model, job, ff.Settings())
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for name, parameter in exact.named_parameters():
        assert torch.equal(parameter, found.get_parameter(name)), name


@pytest.mark.parametrize("samples", [24, 1])  # one sample a task is solved from the token side
@pytest.mark.parametrize(
    "settings",
    [
        ff.Settings(ridge_scale="trace", ridge_lambda=0.3),
        ff.Settings(max_change=0.1, ridge_lambda=1e-2),
        ff.Settings(ridge_scale="trace", ridge_lambda=0.1, max_change=0.2),
    ],
    ids=["trace", "capped", "both"],
)
def test_ridges_relative_to_the_features_and_capped_changes_are_the_references(
    settings: ff.Settings, samples: int
) -> None:
    job = pico.job("clip", 2)
    job.batches = {task: pico.images(samples, seed=len(task)) for task in job.batches}
    judge = calibrated(reference.calibrate_model, job.double(), settings)
    plain = calibrated(ff.calibrate_model, job, ff.Settings(ridge_lambda=settings.ridge_lambda))
    ours = calibrated(ff.calibrate_model, job, settings)
    for name, (error, rounding) in update_errors(ours, judge, job.merged).items():
        if "norm" not in name and name.endswith("weight"):
            assert error <= 5e-5 + 2 * rounding, f"{name}: {error:.1e}"
    name = next(name for name, _ in ours.named_parameters() if name.endswith("layers.0.mlp.fc1.weight"))
    assert not torch.allclose(ours.get_parameter(name), plain.get_parameter(name), rtol=1e-3)


def test_a_capped_change_is_as_long_as_it_may_be() -> None:
    job, settings = pico.job("llama", 2), ff.Settings(max_change=0.1, ridge_lambda=1e-3)
    ours = calibrated(ff.calibrate_model, job, settings)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.2.self_attn.q_proj.weight"):
        base, merged, new = (each.get_parameter(name).double() for each in (job.base, job.merged, ours))
        anchor = 2 * merged - base
        distances = [(expert.get_parameter(name).double() - anchor).norm() for expert in job.experts.values()]
        assert (new - anchor).norm().item() == pytest.approx(0.1 * sum(distances).item() / 2, rel=1e-4)
