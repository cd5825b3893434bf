"""Drift, measured: its split against a plain loop in float64; and the folder that a report is written to."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from jsonschema import Draft202012Validator
from runs import Stop
from torch import Tensor, nn

import featcal_fast as ff
from featcal_fast import measure
from featcal_fast.checkpoints.manifest import Manifest
from featcal_fast.errors import FeatCalError, OutputError
from featcal_fast.measure import measure_source
from featcal_fast.models import find_structure
from featcal_fast.reporting.drift_page import page
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.splits import Split
from featcal_fast.streaming.held_out import HeldOut
from featcal_fast.streaming.sources import ModuleSource

SCHEMA = json.loads(resources("featcal_fast.reporting").joinpath("drift.schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)
CPU = torch.device("cpu")
Calls = list[tuple[tuple[Any, ...], dict[str, Any], Tensor]]  # of each block: what it is called with, what it makes


def measured(job: pico.Job, calibrated: nn.Module | None = None) -> ff.DriftReport:
    def source(model: nn.Module, label: str) -> ModuleSource:
        return ModuleSource(model, label, CPU)

    experts = {task: source(model, f"expert {task}") for task, model in job.experts.items()}
    other = None if calibrated is None else source(calibrated, "calibrated model")
    merged = source(job.merged, "merged model")
    return measure_source(merged, other, experts, job.batches, ff.Settings(), CPU, Progress())


def blocks(model: nn.Module) -> list[nn.Module]:
    return find_structure(model, "model").blocks


def calls(kind: str, model: nn.Module, batch: pico.Batch) -> tuple[Calls, dict[str, Tensor]]:
    """A forward of a whole model as it is: what its blocks are called with and make; inputs, outputs of modules."""
    found: Calls = []
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        for number, block in enumerate(blocks(model)):

            def after(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
                found.append((args, kwargs, out[0] if isinstance(out, tuple) else out))

            stack.callback(block.register_forward_hook(after, with_kwargs=True).remove)
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear):

                    def keep(_: nn.Module, args: Any, out: Tensor, key: str = f"{number}.{name}") -> None:
                        seen[key], seen[f"{key}:out"] = args[0], out

                    stack.callback(module.register_forward_hook(keep).remove)
        model(**batch, **({} if kind == "clip" else {"use_cache": False}))
    return found, seen


def counted(kind: str, batch: pico.Batch, layer: int) -> Tensor | None:
    if kind == "clip":
        return None
    decoder = kind == "t5" and layer >= 2
    return batch["labels"] != -100 if decoder else batch["attention_mask"].bool()


def plain_split(kind: str, model: nn.Module, expert: nn.Module, batches: list[pico.Batch]) -> list[Split]:
    """The same by the definition, with all features of all samples at hand."""
    drifts: list[list[Tensor]] = []
    for batch in batches:
        ours, theirs = calls(kind, model, batch)[0], calls(kind, expert, batch)[0]
        for layer, (block, own, other) in enumerate(zip(blocks(expert), ours, theirs, strict=True)):
            with torch.no_grad():
                mixed = block(*own[0], **own[1])
            mixed = mixed[0] if isinstance(mixed, tuple) else mixed
            mask = counted(kind, batch, layer)
            rows = [each if mask is None else each[mask] for each in (own[2], mixed, other[2])]
            if layer == len(drifts):
                drifts.append([])
            drifts[layer].append(torch.stack([each.reshape(-1, each.shape[-1]) for each in rows]))
    found = []
    for parts in drifts:
        out, mixed, other = torch.cat(parts, 1)
        d, local, upstream, scale = out - other, out - mixed, mixed - other, float(other.norm())
        shares = [float((d * each).sum() / d.norm()) / scale for each in (local, upstream)]
        found.append(Split(*(float(each.norm()) / scale for each in (d, local, upstream)), *shares))
    return found


def numbers(split: Split) -> list[float]:
    return [getattr(split, item.name) for item in fields(split)]


@pytest.mark.parametrize("kind", ["clip", "llama", "t5"])
def test_the_split_is_that_of_the_definition(kind: str) -> None:
    job = pico.job(kind, 2).double()
    job.batches = {task: batches[:2] for task, batches in job.batches.items()}
    other = pico.perturbed(job.merged, 0.1, seed=5)
    report = measured(job, other)
    for task, expert in job.experts.items():
        for name, model in (("merged", job.merged), ("calibrated", other)):
            expected = plain_split(kind, model, expert, job.batches[task])
            for layer, split in zip(report.layers, expected, strict=True):
                found = layer.splits(name)[task]
                assert numbers(found) == pytest.approx(numbers(split), rel=1e-6), (kind, name, layer.path)
                assert found.local_share + found.upstream_share == pytest.approx(found.drift, rel=1e-6)
                assert abs(found.local_share) <= found.local * (1 + 1e-9)
        mean = report.layers[-1].mean("merged")
        assert mean.local_share + mean.upstream_share == pytest.approx(mean.drift, rel=1e-6)
    paths = [layer.path for layer in find_structure(job.merged, "merged model").layers]
    assert [layer.path for layer in report.layers] == paths


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "llama", "t5"])
def test_errors_of_modules_are_those_of_the_definition(kind: str) -> None:
    job = pico.job(kind, 1).double()
    (expert,), batch = job.experts.values(), job.batches["task0"][0]
    job.batches["task0"] = [batch]
    other = pico.perturbed(job.merged, 0.1, seed=5)
    report = measured(job, other)
    (_, ours), (_, theirs) = calls(kind, other, batch), calls(kind, expert, batch)
    for number, layer in enumerate(report.layers):
        last = kind == "clip" and number == len(report.layers) - 1
        for name, found in layer.modules.items():
            key, memory = f"{number}.{name}", "EncDecAttention.k" in name or "EncDecAttention.v" in name
            weights = torch.ones(ours[key].shape[:2], dtype=torch.double)
            if (mask := counted(kind, batch, 0 if memory else number)) is not None:
                weights = mask.double()
            if last and not name.endswith(("k_proj", "v_proj")):
                weights[:, 1:] = 0.01
            wanted = theirs[f"{key}:out"]
            energies = [
                float((weights * (made - wanted).square().sum(2)).sum())
                for made in (blocks(model)[number].get_submodule(name)(ours[key]) for model in (job.merged, other))
            ]
            scale = float((weights * wanted.square().sum(2)).sum())
            errors = found["task0"].merged, found["task0"].calibrated
            assert errors == pytest.approx([each / scale for each in energies], rel=1e-6), (kind, key)
        linears = [name for name, each in blocks(other)[number].named_modules() if isinstance(each, nn.Linear)]
        assert sorted(layer.modules) == sorted(linears)


def test_an_expert_itself_does_not_drift() -> None:
    job = pico.job("llama", 1)
    job.merged = job.experts["task0"]
    report = measured(job, job.merged)
    for layer in report.layers:
        assert numbers(layer.merged["task0"]) == [0.0] * 5
        assert {(each.merged, each.calibrated) for errors in layer.modules.values() for each in errors.values()} == {
            (0.0, 0.0)
        }
        assert {layer.removed(module) for module in layer.modules} == {0.0}
    assert page(report)


def test_only_held_out_samples_count_where_there_are_some() -> None:
    job = pico.job("llama", 2)
    first, second = job.experts
    alone = copy.copy(job)
    alone.batches = {first: job.batches[first][3:], second: job.batches[second]}
    expected = measured(alone)
    job.batches[first][3:] = [HeldOut(batch) for batch in job.batches[first][3:]]
    found = measured(job)
    assert found.samples == {first: 8, second: 20}
    assert found.held_out == {first: 8, second: 0}
    assert found.layers == expected.layers


def test_where_memory_runs_out_the_numbers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    job = pico.job("t5", 1)
    expected = measured(job, job.base)
    split_sums = measure.split_sums

    def full(found: Tensor, *others: Any) -> Tensor:
        if len(found) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return split_sums(found, *others)

    monkeypatch.setattr(measure, "split_sums", full)
    for layer, before in zip(measured(job, job.base).layers, expected.layers, strict=True):
        for model in ("merged", "calibrated"):
            assert numbers(layer.mean(model)) == pytest.approx(numbers(before.mean(model)), rel=1e-5)


# The job


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a job, and its calibration in `out`."""
    folder = tmp_path_factory.mktemp("saved")
    job = pico.job("llama", 2, layers=2)
    recipe = pico.save(job, folder) | {"held_out": 0.2, "settings": "auto"}
    ff.calibrate(recipe, out=folder / "out", device="cpu")
    return folder, recipe


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_job_is_measured_and_written(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, recipe = saved
    before = everything(folder)
    report = ff.drift(recipe, model=folder / "out", out=tmp_path / "drift", device="cpu")
    assert everything(folder) == before
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["drift", "drift.html", "drift.json", "drift.png"]
    assert (tmp_path / "drift" / "drift.html").read_text() == page(report)
    assert (tmp_path / "drift" / "drift.png").read_bytes()[:4] == b"\x89PNG"
    assert "teacher_alpha as it was chosen: 0." in page(report)
    text = (tmp_path / "drift" / "drift.json").read_text()
    assert text == report.to_json()
    VALIDATOR.validate(json.loads(text))
    assert ff.DriftReport.from_json(text) == report
    assert report.samples == report.held_out == {"task0": 4, "task1": 4}
    assert report.models == ["merged", "calibrated"]
    assert report.warnings == []
    calibration = ff.Report.from_json((folder / "out" / "report.json").read_text())
    for layer, done in zip(report.layers, calibration.layers, strict=True):
        assert layer.mean("merged").drift == pytest.approx(done.drift_before, rel=1e-4)
        assert layer.mean("calibrated").drift == pytest.approx(done.drift_after, rel=1e-4)
        assert layer.picked == {module: each.ridge_lambda for module, each in done.chosen.items()}
        assert layer.picked
        assert layer.alpha == done.alpha.teacher_alpha
    assert report.settings == calibration.settings
    assert report.outcome is not None
    assert report.outcome.tasks.keys() == recipe["experts"].keys()


def test_the_merge_alone(saved: tuple[Path, dict[str, Any]]) -> None:
    report = ff.drift(saved[1], device="cpu")
    assert report.models == ["merged"]
    assert report.outcome is None
    written = json.loads(report.to_json())
    VALIDATOR.validate(written)
    assert written["layers"][0]["mean"].keys() == {"merged"}
    assert len(report.tables()) == 2
    assert "calibrated" not in page(report).partition("</style>")[2]


def test_any_model_like_it_may_be_compared(saved: tuple[Path, dict[str, Any]]) -> None:
    """Of which no report says anything, and whose head is its own."""
    folder, recipe = saved
    report = ff.drift(recipe, model=folder / "task0", device="cpu")
    assert report.layers[-1].calibrated["task0"].drift == pytest.approx(0.0, abs=1e-12)
    assert report.layers[-1].calibrated["task1"].drift > 0.1
    assert report.settings is None
    assert report.outcome is None


def test_samples_that_were_fitted_to_are_warned_of(saved: tuple[Path, dict[str, Any]]) -> None:
    folder, recipe = saved
    other = ff.drift(recipe | {"held_out": 0.4, "seed": 3}, model=folder / "out", device="cpu")
    assert "differs in held_out and seed" in other.warnings[0]
    assert "warning: the model was calibrated" in other.summary()


def test_heads_of_other_models_are_not_taken_for_the_merged_one_s(saved: tuple[Path, dict[str, Any]]) -> None:
    folder, recipe = saved
    other = recipe | {"merged_model": None, "merge": {"method": "average"}}
    report = ff.drift(other, model=folder / "out", device="cpu")
    assert "with other models" in report.warnings[0]
    assert (report.outcome, report.settings) == (None, None)


@pytest.mark.parametrize("text", ["{", "[]", '{"layers": 3}', '{"schema_version": 99}', "\udcff"])
def test_a_report_that_cannot_be_read_does_not_count(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path, text: str
) -> None:
    folder, recipe = saved
    shutil.copytree(folder / "out", tmp_path / "out")
    (tmp_path / "out" / "report.json").write_bytes(text.encode(errors="surrogateescape"))
    report = ff.drift(recipe, model=tmp_path / "out", device="cpu")
    assert "cannot be read as what calibrate writes, and does not count" in report.warnings[0]
    assert (report.outcome, report.settings) == (None, None)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("task0/drift", "lies in the input folder"),
        ("full/../base/a/b", "lies in the input folder"),
        ("link/drift", "lies in the input folder"),
        ("task1.safetensors", "task1.safetensors"),
        ("out", "holds something"),
        ("out/drift", "lies in .*out, a calibrated model"),
        ("link-to-out/a/b", "lies in .*out, a calibrated model"),
        ("full", "holds something"),
        ("mine", "lies in the recipe's own out"),
        ("full/../mine/drift", "lies in the recipe's own out"),
        (".mine.partial/drift", "lies in the recipe's own out"),
        ("left", "is what a calibration into .*left has left"),
    ],
)
def test_where_nothing_may_be_written(
    saved: tuple[Path, dict[str, Any]], where: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said before anything is read of the data, and nothing is changed."""
    folder, recipe = saved
    for name in ("full", ".left.partial"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "full" / "a").touch()
    for link, target in (("link", "merged"), ("link-to-out", "out")):
        if not (folder / link).is_symlink():
            (folder / link).symlink_to(target)
    if not (folder / ".left.partial" / "manifest").exists():
        Manifest(folder / ".left.partial" / "manifest").append({"fingerprint": {}, "finished": True})
        (folder / ".left.partial" / "model").mkdir()
    before = everything(folder)
    monkeypatch.setattr("featcal_fast.job.drift.load_data", lambda *_: pytest.fail("data is read"))
    with pytest.raises(OutputError, match=said):
        ff.drift(recipe | {"out": str(folder / "mine")}, out=folder / where, device="cpu")
    assert {name: text for name, text in everything(folder).items() if not name.endswith("/lock")} == before


def test_what_fails_leaves_no_folder(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, recipe = saved
    monkeypatch.setattr("featcal_fast.job.drift.DriftReport.plot", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ff.drift(recipe, out=tmp_path / "drift", device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_what_is_interrupted_leaves_no_folder(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        ff.drift(saved[1], out=tmp_path / "drift", device="cpu", progress=Stop(1))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_measurement_has_left_is_in_nobody_s_way(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / ".drift.partial" / "model").mkdir(parents=True)
    (tmp_path / ".drift.partial" / "model" / "drift.json").write_text("{")
    report = ff.drift(saved[1], out=tmp_path / "drift", device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["drift"]
    assert (tmp_path / "drift" / "drift.json").read_text() == report.to_json()


def test_without_matplotlib_there_is_no_picture(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable
) -> None:
    _, recipe = saved
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "featcal_fast.reporting.picture.find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    code, said, _ = command("drift", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "drift"), "--device", "cpu")
    assert code == 0
    assert "warning: drift.png is not written, which needs matplotlib" in said
    assert "drift after the last layer" in said
    assert f"look at {tmp_path / 'drift' / 'drift.html'}" in said.replace("\n", "")
    assert sorted(path.name for path in (tmp_path / "drift").iterdir()) == ["drift.html", "drift.json"]
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(FeatCalError, match="plots need matplotlib"):
        ff.DriftReport.from_json((tmp_path / "drift" / "drift.json").read_text()).plot(tmp_path / "a.png")
