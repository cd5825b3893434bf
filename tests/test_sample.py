"""Will it help: a sample's figures against dense algebra in float64, and what they say of merges that are known."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import featcal_fast as ff
from featcal_fast.errors import DataError, RecipeError, SolveError
from featcal_fast.layer import captured
from featcal_fast.layer.captured import RIDGES, ROWS
from featcal_fast.models import find_structure
from featcal_fast.models.structure import Layer
from featcal_fast.planning.sample import sample_source
from featcal_fast.planning.sampled import Sampled, SampledGroup, SampledLayer
from featcal_fast.reporting.progress import Progress
from featcal_fast.streaming.held_out import HeldOut
from featcal_fast.streaming.sources import ModuleSource
from featcal_fast.terminal import BarProgress

CPU = torch.device("cpu")
Features = dict[str, Tensor]  # by full name of a module, what it is given; of a block, what it makes: `[tokens, d]`


def sampled(job: pico.Job, chunk: int | None = None, **settings: Any) -> Sampled:
    """Of a job whose last half of batches is held out."""
    experts = {task: ModuleSource(model, f"expert {task}", CPU) for task, model in job.experts.items()}
    merged = ModuleSource(job.merged, "merged model", CPU)
    return sample_source(merged, experts, halves(job), ff.Settings(**settings), CPU, Progress(), chunk)


def halves(job: pico.Job) -> dict[str, list[pico.Batch]]:
    return {
        task: [HeldOut(batch) if i >= len(batches) // 2 else batch for i, batch in enumerate(batches)]
        for task, batches in job.batches.items()
    }


def mask(kind: str, batch: pico.Batch, decoder: bool) -> Tensor | None:
    """Tokens that count, `[samples, tokens]`."""
    if kind == "clip":
        return None
    return batch["labels"] != -100 if decoder else batch["attention_mask"].bool()


def features(kind: str, model: nn.Module, layers: list[Layer], batches: list[pico.Batch]) -> list[Features]:
    """Batch by batch, in a forward of the whole model as it is."""
    found = []
    for batch in batches:
        seen: Features = {}
        with ExitStack() as stack, torch.no_grad():
            for layer in layers:
                block = model.get_submodule(layer.path)
                decoder = kind == "t5" and layer.stage == 1
                for name, module in [("", block), *block.named_modules()]:
                    own = decoder and "EncDecAttention.k" not in name and "EncDecAttention.v" not in name
                    counted, key = mask(kind, batch, own), f"{layer.path}.{name}"

                    def keep(
                        _: Any, args: Any, out: Any, counted: Any = counted, key: str = key, seen: Features = seen
                    ) -> None:
                        x = args[0] if key[-1] != "." else out[0] if isinstance(out, tuple) else out
                        seen[key] = x.flatten(0, 1) if counted is None else x[counted]

                    if not name or isinstance(module, nn.Linear):
                        stack.callback(module.register_forward_hook(keep).remove)
            model(**batch, **({} if kind == "clip" else {"use_cache": False}))
        found.append(seen)
    return found


def token_weights(layer: Layer, leader: str, kind: str, batches: list[pico.Batch], like: Tensor) -> Tensor:
    rule = layer.token_weights
    if kind != "clip" or rule is None or not rule.applies_to(leader):
        return torch.ones(len(like), 1, dtype=torch.float64)
    one = torch.full((sum(len(batch["pixel_values"]) for batch in batches), 17), rule.rest, dtype=torch.float64)
    one[:, 0] = 1
    return one.reshape(-1, 1)


@pytest.mark.parametrize("kind", ["clip", "llama", "t5"])
def test_a_sample_is_dense_algebra(kind: str) -> None:
    job = pico.job(kind, 2)
    found = sampled(job)
    double = job.double()
    layers = find_structure(double.merged, "merged model").layers
    data = {task: (each[: len(each) // 2], each[len(each) // 2 :]) for task, each in double.batches.items()}
    own = {task: [features(kind, double.merged, layers, half) for half in each] for task, each in data.items()}
    theirs = {task: features(kind, double.experts[task], layers, data[task][1]) for task in data}
    assert [layer.path for layer in found.layers] == [layer.path for layer in layers]
    for layer, told in zip(layers, found.layers, strict=True):
        for task in data:
            h, h_e = (torch.cat([each[f"{layer.path}."] for each in side]) for side in (own[task][1], theirs[task]))
            assert told.drift[task] == pytest.approx(float((h - h_e).norm() / h_e.norm()), rel=1e-4)
        for group in told.groups:
            mismatch, total, left, fitted = dense(layer, group, kind, double, data, own)
            assert group.mismatch == pytest.approx(mismatch, rel=1e-4)
            assert group.total == pytest.approx(total, rel=1e-4)
            # Float32 sums lose more, the smaller the ridge is: by the condition of what is solved.
            for ridge, one, expected in zip(RIDGES, group.left, left, strict=True):
                assert abs(one - expected) < 1e-5 / ridge**0.5 * total
            assert group.fitted == pytest.approx(fitted, abs=1e-3)


def dense(
    layer: Layer, group: SampledGroup, kind: str, job: pico.Job, data: Any, own: Any
) -> tuple[float, float, list[float], list[float]]:
    """By the definitions, everything at once: mismatch, total and what is left by ridge; and where it is fitted."""
    names = [f"{layer.path}.{name}" for name in group.modules]
    merged = torch.cat([job.merged.get_submodule(name).weight.data for name in names])
    count = min(len(merged), merged.shape[1], ROWS)
    rows = torch.arange(count) * len(merged) // count
    a, r, parts, fits, shares = 0, 0, [], [], []
    for task, expert in job.experts.items():
        weight = torch.cat([expert.get_submodule(name).weight.data for name in names])[rows]
        t = weight - merged[rows]
        fit, judge = (torch.cat([each[names[0]] for each in half]) for half in own[task])
        d, d_judge = (
            token_weights(layer, group.modules[0], kind, half, x)
            for half, x in zip(data[task], (fit, judge), strict=True)
        )
        s = fit.T @ (d * fit) / d.sum()
        w = 1 / s.norm()
        a, r = a + w * s, r + w * t @ s
        parts.append((w / d_judge.sum(), t, judge, d_judge))
        fits.append((w / d.sum(), t, fit, d))
        shares.append(float((d_judge * (judge @ t.T) ** 2).sum() / (d_judge * (judge @ weight.T) ** 2).sum()))

    def energy(update: Tensor, over: Any) -> float:
        return sum(float(w * (d * (x @ (t - update).T) ** 2).sum()) for w, t, x, d in over)

    eye, nothing = torch.eye(merged.shape[1], dtype=torch.float64), torch.zeros_like(merged[rows])
    updates = [r @ torch.linalg.inv(a + ridge * len(parts) * eye) for ridge in RIDGES]
    fitted = [energy(update, fits) / energy(nothing, fits) for update in updates]
    return sum(shares) / len(shares), energy(nothing, parts), [energy(update, parts) for update in updates], fitted


def test_chunks_make_no_difference() -> None:
    job = pico.job("llama", 2)
    whole, parts = sampled(job), sampled(job, chunk=20)
    assert parts.distance == pytest.approx(whole.distance, rel=1e-5)
    assert parts.captured == pytest.approx(whole.captured, abs=1e-4)
    again = sampled(job)
    assert (again.layers, again.line()) == (whole.layers, whole.line())


def test_the_models_are_left_as_they_are() -> None:
    job = pico.job("llama", 2)
    before = copy.deepcopy(job)
    sampled(job)
    for model, was in zip((job.merged, *job.experts.values()), (before.merged, *before.experts.values()), strict=True):
        for (name, one), other in zip(model.named_parameters(), was.parameters(), strict=True):
            assert torch.equal(one, other), name


def test_a_merge_that_is_its_experts_leaves_nothing_to_do() -> None:
    job = pico.job("llama", 2)
    job.experts = dict.fromkeys(job.experts, job.merged)
    found = sampled(job)
    assert found.distance == 0
    assert found.captured == 0
    assert found.span is None
    assert "nothing to repair" in found.line()


def test_one_expert_can_be_had_whole_and_conflicting_ones_cannot() -> None:
    alone = pico.job("llama", 1)
    alone.batches["task0"] = pico.texts(24, 0)  # more tokens than inputs, to be had whole
    assert sampled(alone).captured > 0.98

    # Two experts that want the opposite of each other for the same inputs.
    job = pico.job("llama", 2, scaling=0.0)
    task0, task1 = job.experts.values()
    with torch.no_grad():
        for name, parameter in task1.named_parameters():
            parameter.copy_(2 * job.base.get_parameter(name) - task0.get_parameter(name))
    job.batches = dict.fromkeys(job.batches, pico.texts(24, 0))
    opposed = sampled(job)
    assert opposed.captured < 0.05
    assert opposed.distance > 0.1


def layers_of(*shares: float, distance: float = 0.5, fitted: float = 0.7) -> Sampled:
    """With one group a layer, of which a linear update removes a share."""
    layers = [
        SampledLayer(
            i,
            f"layers.{i}",
            {"a": distance, "b": distance},
            [SampledGroup(("q",), 0.1, 1.0, [1 - share] * 4, [1 - fitted] * 4)],
        )
        for i, share in enumerate(shares)
    ]
    return Sampled({"a": 4, "b": 4}, {"a": 4, "b": 4}, layers)


def test_the_line_says_how_far_how_much_where_and_what_to_do() -> None:
    told = layers_of(0.1, 0.1, 0.9, 0.8, 0.1, 0.1).line()
    assert told == (
        "will it help: the merge is 0.50 away from its experts after the last layer; a linear update can remove 35% to "
        "70% of what their weights differ by, half of it in layers 2 to 3; likely worth a run"
    )
    assert "half of it in layer 1; worth a run" in layers_of(0.5, 1, 0.1).line()
    assert (
        "60% to 70% of what their weights differ by, spread over the layers; worth a run"
        in layers_of(*[0.6] * 4).line()
    )
    assert "too few samples to tell: try --sample 32" in layers_of(0.1, 0.1).line()
    assert "the experts want different weights" in layers_of(0.1, 0.1, fitted=0.3).line()
    assert "can remove 0% to 30% of what their weights differ by; the experts want" in layers_of(-1, fitted=0.3).line()
    assert (
        layers_of(0.6, distance=0.001).line().endswith("away from its experts after the last layer; nothing to repair")
    )


def test_one_ridge_serves_all_layers() -> None:
    groups = [SampledGroup(("q",), 1.0, 1.0, left, [0.0, 0.1, 1, 1]) for left in ([0.1, 0.2, 1, 1], [3.0, 0.2, 1, 1])]
    layers = [SampledLayer(i, f"layers.{i}", {"a": 0.5}, [group]) for i, group in enumerate(groups)]
    found = Sampled({"a": 4}, {"a": 4}, layers)
    assert found.ridge == 1
    assert found.captured == pytest.approx(0.8)
    assert found.fitted_captured == pytest.approx(0.9)


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return pico.save(pico.job("llama", 2), tmp_path)


def test_a_plan_with_a_sample(recipe: dict[str, Any], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    bare, plan = ff.plan(recipe, device="cpu"), ff.plan(recipe, device="cpu", sample=8)
    assert bare.sample is None
    assert "will it help" not in bare.summary()
    assert plan.sample is not None
    assert (plan.sample.fitted, plan.sample.judged) == ({"task0": 4, "task1": 4}, {"task0": 4, "task1": 4})
    assert plan.sample.line() in plan.summary().split("\n")
    assert len(plan.tables()) == len(bare.tables()) + 1
    assert ff.plan(recipe, device="cpu", sample=8).sample == plan.sample
    assert (plan.flops, plan.bytes_read, plan.disk) == (bare.flops, bare.bytes_read, bare.disk)
    assert sorted(tmp_path.rglob("*")) == before


def test_on_the_command_line(recipe: dict[str, Any], command, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, shown, told = command("plan", str(tmp_path / "recipe.yaml"), "--device", "cpu", "--sample", "8")
    assert code == 0, told
    assert "will it help: the merge is 0." in shown
    assert "a linear update removes" in " ".join(shown.split())
    code, _, _ = command("plan", str(tmp_path / "recipe.yaml"), "--sample", "2")
    assert code == 2
    assert not (tmp_path / "out").exists()


def test_a_job_that_does_not_fit_is_not_sampled(recipe: dict[str, Any]) -> None:
    plan = ff.plan(recipe, device="cpu", host_memory=1000, sample=8)
    assert plan.problems
    assert plan.sample is None


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        (DataError("task task0: found no rows"), 1, "error: task task0: found no rows"),
        (ZeroDivisionError("division by zero"), 70, "unexpected error: ZeroDivisionError"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_a_sample_that_fails_leaves_the_plan(
    recipe: dict[str, Any],
    command: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    code: int,
    said: str,
) -> None:
    closed: list[BarProgress] = []

    def fail(self: BarProgress, *_: Any) -> None:
        assert self._bar is not None
        raise failure

    close = BarProgress.close
    monkeypatch.setattr(BarProgress, "task", fail)
    monkeypatch.setattr(BarProgress, "close", lambda self: (close(self), closed.append(self)))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found, shown, told = command("plan", str(tmp_path / "recipe.yaml"), "--device", "cpu", "--sample", "8")
    assert found == code
    assert "fits: " in shown
    assert "will it help" not in shown
    assert said in told
    assert closed[-1]._bar is None


def test_a_scan_that_fails_leaves_no_bar(
    recipe: dict[str, Any],
    command: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = Path(recipe["experts"]["task1"]["model"]) / "model.safetensors"
    save_file({name: tensor.fill_(float("nan")) for name, tensor in load_file(path).items()}, path)
    bars: list[BarProgress] = []
    start = BarProgress._start
    monkeypatch.setattr(BarProgress, "_start", lambda self, total: (start(self, total), bars.append(self)))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name in ("plan", "calibrate"):
        code, _, told = command(name, str(tmp_path / "recipe.yaml"), "--device", "cpu", "--scan")
        assert code == 1
        assert "NaN or Inf" in told
    assert [each._bar for each in bars] == [None, None]


@pytest.mark.parametrize("wrong", [2, 0, -1, True, 8.0, "8", 2**31])
def test_samples_that_are_no_number_of_them(recipe: dict[str, Any], wrong: Any) -> None:
    with pytest.raises(RecipeError, match=r"sample: found .*, expected a number of samples from 3"):
        ff.plan(recipe, device="cpu", sample=wrong)


def test_too_few_samples_to_judge_by(recipe: dict[str, Any], tmp_path: Path) -> None:
    rows = {name: value[:2] for name, value in load_file(tmp_path / "task1.safetensors").items()}
    save_file(rows, tmp_path / "task1.safetensors")
    with pytest.raises(DataError, match="task task1: found 2 samples that differ, expected at least 3"):
        ff.plan(recipe, device="cpu", sample=8)


def test_what_is_not_finite_is_an_error() -> None:
    job = pico.job("llama", 2)
    with torch.no_grad():
        job.merged.get_parameter("model.layers.1.mlp.down_proj.weight").fill_(1e38)
    with pytest.raises(SolveError, match=r"model\.layers\.1: .*not finite"):
        sampled(job)


def test_what_calibration_leaves_alone_is_not_looked_at() -> None:
    (first, *_) = sampled(pico.job("llama", 1), include=["q_proj", "down_proj"]).layers
    assert [group.modules for group in first.groups] == [("self_attn.q_proj",), ("mlp.down_proj",)]


@pytest.mark.parametrize("what", ["fit", "aim", "judge"])
def test_memory_that_runs_out_halves_a_chunk_and_changes_nothing(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = pico.job("llama", 2)
    whole, original, failures = sampled(job), getattr(captured._Group, what), []

    def short(self: Any, x: Tensor, *rest: Any) -> None:
        if len(x) > 30 and self.group.leader == "mlp.down_proj":
            failures.append(len(x))
            raise torch.OutOfMemoryError("no more")
        original(self, x, *rest)

    monkeypatch.setattr(captured._Group, what, short)
    found = sampled(job)
    assert failures
    assert found.distance == pytest.approx(whole.distance, rel=1e-5)
    assert found.captured == pytest.approx(whole.captured, abs=1e-4)
