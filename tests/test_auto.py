"""`settings: auto`: each module's ridge_lambda, and each layer's teacher_alpha, is best on samples not fitted to."""

from __future__ import annotations

import copy

import pico
import pytest
import torch
from torch import Tensor, nn

import featcal_fast as ff
from featcal_fast import reference
from featcal_fast.errors import DataError, RecipeError, SolveError
from featcal_fast.forward.calls import stage_inputs
from featcal_fast.layer.choice import ALPHAS, RIDGES, Choice
from featcal_fast.layer.judge import Judge
from featcal_fast.layer.layout import InputGroup, Layout
from featcal_fast.layer.systems import Anchor, GroupSystem, fold_precision
from featcal_fast.layer.tokens import TokenCounts
from featcal_fast.models import find_structure


def halves(job: pico.Job, held_out: int = 2) -> tuple[dict[str, list[pico.Batch]], dict[str, list[pico.Batch]]]:
    """Batches to fit to, and others."""
    parts = slice(None, -held_out), slice(-held_out, None)
    fitted, others = ({task: each[part] for task, each in job.batches.items()} for part in parts)
    return fitted, others


def calibrated(job: pico.Job, settings: ff.Settings, **data: object) -> tuple[nn.Module, ff.Report]:
    merged = copy.deepcopy(job.merged)
    return merged, ff.calibrate_model(merged, base=job.base, experts=job.experts, settings=settings, **data)


def inputs(model: nn.Module, batch: pico.Batch, name: str) -> Tensor:
    """What the first layer's module of this name is given, `[tokens that count, in]`."""
    structure = find_structure(model, "model")
    seen: list[Tensor] = []
    handle = structure.blocks[0].get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    hidden, calls = stage_inputs(structure, batch)
    calls.run(0, structure.blocks[0], hidden)
    handle.remove()
    mask = batch.get("attention_mask")
    return seen[0].flatten(0, 1) if mask is None else seen[0][mask.bool()]


@torch.no_grad()
def error(job: pico.Job, model: nn.Module, held_out: dict[str, list[pico.Batch]], name: str) -> float:
    """Of a module of the first layer, by its definition: `sum_t w_t E||W x_s + b - W_t x_e - b_t||^2`, in float64."""
    total = 0.0
    new = find_structure(model, "model").blocks[0].get_submodule(name)
    for task, batches in held_out.items():
        expert = find_structure(job.experts[task], task).blocks[0].get_submodule(name)
        xs, xe = (
            torch.cat([inputs(each, batch, name) for batch in batches]).double()
            for each in (job.merged, job.experts[task])
        )
        weight = 1 / torch.linalg.matrix_norm(xs.T @ xs / len(xs))
        made, wanted = (
            torch.nn.functional.linear(x, module.weight.double(), None if module.bias is None else module.bias.double())
            for x, module in ((xs, new), (xe, expert))
        )
        total += float(weight * (made - wanted).square().sum(1).mean())
    return total


@pytest.mark.parametrize(
    ("kind", "module"), [("clip", "mlp.fc2"), ("clip", "self_attn.q_proj"), ("llama", "mlp.down_proj")]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("few", [False, True], ids=["features", "tokens"])
def test_errors_are_those_of_the_definition(kind: str, module: str, few: bool, bias: bool) -> None:
    """The curve's differences, whatever side it is solved from, with biases that are solved for or stay."""
    job = pico.job(kind, 2)
    with torch.no_grad():
        for number, model in enumerate((job.merged, *job.experts.values())):  # away from the base's
            for name, value in model.named_parameters():
                value += (0.3 + 0.1 * number) * name.endswith("bias")
    if few:
        few_samples(job)
    fitted, held_out = halves(job, 1)
    _, report = calibrated(
        job, ff.Settings(auto=True, keep_better=False, calibrate_bias=bias), batches=fitted, held_out=held_out
    )
    curve = report.layers[0].chosen[module].curve
    assert len(curve) >= 2
    found = {}
    for ridge in curve:
        fixed, _ = calibrated(
            job, ff.Settings(ridge_scale="trace", ridge_lambda=float(ridge), calibrate_bias=bias), batches=fitted
        )
        found[ridge] = error(job, fixed, held_out, module)
    scale = max(found.values()) - min(found.values())
    first = next(iter(curve))
    span = (max(curve.values()) - min(curve.values())) / scale
    for ridge, value in curve.items():
        assert (value - curve[first]) == pytest.approx((found[ridge] - found[first]) * span, abs=2e-3 * span * scale)


def with_choice(job: pico.Job, report: ff.Report, fitted: dict[str, list[pico.Batch]], alpha: float, **more: object):
    """The first layer as fixed settings make it, each module with the ridge that was chosen for it."""
    block = copy.deepcopy(find_structure(job.merged, "model").blocks[0])
    for ridge in RIDGES:
        settings = ff.Settings(ridge_scale="trace", ridge_lambda=ridge, teacher_alpha=alpha, **more)
        fixed = find_structure(calibrated(job, settings, batches=fitted)[0], "model").blocks[0]
        for name, found in report.layers[0].chosen.items():
            if found.ridge_lambda == ridge:
                block.get_submodule(name).load_state_dict(fixed.get_submodule(name).state_dict())
    norms = find_structure(calibrated(job, ff.Settings(), batches=fitted)[0], "model").blocks[0]
    for name in report.layers[0].norms:
        block.get_submodule(name).load_state_dict(norms.get_submodule(name).state_dict())
    return block


def few_samples(job: pico.Job) -> None:
    """So few that layers are solved from the token side."""
    for task, each in job.batches.items():
        job.batches[task] = [{k: v[:1] for k, v in batch.items()} for batch in each[:3]]


@pytest.mark.parametrize("few", [False, True], ids=["features", "tokens"])
@pytest.mark.parametrize(
    ("kind", "more"), [("clip", {}), ("clip", {"max_change": 0.5}), ("llama", {"calibrate_bias": False})]
)
def test_every_module_has_the_weights_of_its_choice(kind: str, more: dict[str, object], few: bool) -> None:
    job = pico.job(kind, 2)
    if few:
        few_samples(job)
    fitted, held_out = halves(job)
    settings = ff.Settings(auto=True, keep_better=False, **more)
    chosen, report = calibrated(job, settings, batches=fitted, held_out=held_out)
    own = dict(find_structure(chosen, "model").blocks[0].named_parameters())
    merged = dict(find_structure(job.merged, "model").blocks[0].named_parameters())
    expected = with_choice(job, report, fitted, report.layers[0].alpha.teacher_alpha, **more)
    for name, value in expected.named_parameters():
        assert (own[name] - value).norm() <= 1e-4 * (merged[name] - value).norm(), name
    for layer in report.layers:
        for found in layer.chosen.values():
            assert found.curve[f"{found.ridge_lambda:g}"] == min(found.curve.values())
            assert list(found.curve)[:2] == ["0.001", "0.01"]
    assert {name for layer in report.layers for name in layer.chosen} == {
        name for layer in report.layers for group in layer.groups for name in group.modules
    }


def test_modules_of_a_group_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own ridge's weights, and the hardest solve is told."""
    job = pico.job("clip", 2)
    fitted, held_out = halves(job)
    own = {"self_attn.q_proj": 1.0, "self_attn.k_proj": 1e-3, "self_attn.v_proj": 1e-2}
    tried = Choice._try

    def forced(self: Choice, system: GroupSystem) -> dict[str, dict[float, float]]:
        curves = tried(self, system)
        return {name: {own[name]: -1.0} if name in own else curve for name, curve in curves.items()}

    monkeypatch.setattr(Choice, "_try", forced)
    settings = ff.Settings(auto=True, keep_better=False)
    chosen, report = calibrated(job, settings, batches=fitted, held_out=held_out)
    group = report.layers[0].groups[0]
    assert group.modules == list(own)
    assert group.solver == group.solver_steps[-1] == "float64"
    expected = dict(with_choice(job, report, fitted, report.layers[0].alpha.teacher_alpha).named_parameters())
    merged = dict(find_structure(job.merged, "model").blocks[0].named_parameters())
    for name, value in find_structure(chosen, "model").blocks[0].named_parameters():
        assert (expected[name] - value).norm() <= 1e-4 * (merged[name] - value).norm(), name


@pytest.mark.parametrize("kind", ["clip", "llama"])
def test_every_layer_has_the_alpha_that_is_best_for_its_output(kind: str) -> None:
    """The curve is that of the definition: `||h - h_e||^2 / ||h_e||^2`, a mean over tokens, samples and tasks."""
    job = pico.job(kind, 2)
    fitted, held_out = halves(job)
    _, report = calibrated(job, ff.Settings(auto=True, keep_better=False), batches=fitted, held_out=held_out)
    for layer in report.layers:
        curve = layer.alpha.curve
        assert list(map(float, curve)) == list(ALPHAS)
        assert curve[f"{layer.alpha.teacher_alpha:g}"] == min(curve.values())
    for alpha, found in report.layers[0].alpha.curve.items():
        block = with_choice(job, report, fitted, float(alpha))
        means = [
            torch.cat([relative(job, task, batch, block) for batch in batches]).mean()
            for task, batches in held_out.items()
        ]
        assert found == pytest.approx(float(sum(means) / len(means)) ** 0.5, rel=1e-5)


@torch.no_grad()
def relative(job: pico.Job, task: str, batch: pico.Batch, block: nn.Module) -> Tensor:
    """Of each sample, the mean over its tokens of the first layer's relative squared distance from the expert's."""
    expert = find_structure(job.experts[task], task)
    (h, calls), (h_e, expert_calls) = (
        stage_inputs(structure, batch) for structure in (find_structure(job.merged, "model"), expert)
    )
    made, wanted = calls.run(0, block, h).double(), expert_calls.run(0, expert.blocks[0], h_e).double()
    ratio = (made - wanted).square().sum(2) / wanted.square().sum(2)
    mask = batch.get("attention_mask", torch.ones(ratio.shape))
    return (ratio * mask).sum(1) / mask.sum(1)


def test_layers_without_a_module_to_solve_are_left_out() -> None:
    job = pico.job("clip", 2)
    fitted, held_out = halves(job)
    settings = ff.Settings(auto=True, exclude=r".*layers\.0\..*(proj|fc\d)")
    _, report = calibrated(job, settings, batches=fitted, held_out=held_out)
    assert report.layers[0].chosen == {}
    assert report.layers[0].alpha is None
    assert report.layers[1].chosen
    assert report.layers[1].alpha is not None


def test_a_given_alpha_is_not_used() -> None:
    job = pico.job("clip", 2, layers=1)
    fitted, held_out = halves(job)
    (one, report), (other, _) = (
        calibrated(job, ff.Settings(auto=True, teacher_alpha=alpha), batches=fitted, held_out=held_out)
        for alpha in (0.0, 0.3)
    )
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    assert not [said for said in report.warnings if "teacher_alpha" in said]


def test_a_judge_is_as_precise_as_what_it_judges() -> None:
    settings = ff.Settings(auto=True, ridge_lambda=1.0)
    block = nn.Linear(8, 8, dtype=torch.bfloat16)
    counts = TokenCounts.of({"a": 64})
    layout = Layout((InputGroup(("",), 8, (8,), None),), {}, "")
    judge = Judge(layout, Anchor(block, block, 1.0), settings, torch.device("cpu"), counts, ["a"])
    assert fold_precision(block.weight, judge.settings) == fold_precision(block.weight, settings) == "fp16x3"


def test_held_out_features_that_overflow_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    job = pico.job("clip", 2, layers=1)
    fitted, held_out = halves(job)
    errors = Judge.errors
    monkeypatch.setattr(
        Judge, "errors", lambda self, update: {k: v * float("inf") for k, v in errors(self, update).items()}
    )
    with pytest.raises(SolveError, match=r"layers\.0: .*leaves float32's range"):
        calibrated(job, ff.Settings(auto=True), batches=fitted, held_out=held_out)


def test_few_samples_choose_larger_values_than_many() -> None:
    job = pico.job("clip", 2)
    many = {task: pico.images(64, seed=len(task) + k) for k, task in enumerate(job.batches)}
    few = {task: [{"pixel_values": each[0]["pixel_values"][:1]}] for task, each in many.items()}
    held_out = {task: pico.images(16, seed=50 + k) for k, task in enumerate(job.batches)}
    means = []
    for fitted in (few, many):
        _, report = calibrated(job, ff.Settings(auto=True), batches=fitted, held_out=held_out)
        values = torch.tensor([each.ridge_lambda for layer in report.layers for each in layer.chosen.values()])
        means.append(float(values.log().mean()))
    assert means[0] > means[1]


def test_it_needs_samples_to_choose_by() -> None:
    job = pico.job("clip", 1)
    with pytest.raises(DataError, match=r"settings.auto: found no samples of any task held out"):
        calibrated(job, ff.Settings(auto=True), batches=job.batches)


def test_a_preset_by_its_name() -> None:
    assert ff.Settings.from_dict("auto") == ff.Settings(auto=True) == ff.Settings.from_dict({"preset": "auto"})
    assert ff.Settings.from_dict({"auto": True, "preset": "llm"}).anchor_rho == 1.5
    with pytest.raises(RecipeError, match=r"settings.preset: found 'autos', expected one of default, .*auto"):
        ff.Settings.from_dict("autos")
    with pytest.raises(RecipeError, match=r"settings.auto: found 1, expected true or false"):
        ff.Settings.from_dict({"auto": 1})
    assert reference.ridge_of([], ff.Settings(ridge_lambda=0.2)) == 0.2
