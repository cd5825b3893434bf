"""`--scan`: what is not finite in any model is found before the first layer, whether it is calibrated or copied."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import yaml
from forms import FORMS, expert_at, factors, quantised, write_adapter
from safetensors.torch import load_file, save_file

import featcal_fast as ff
from featcal_fast.planning.plan import format_bytes
from featcal_fast.reporting.progress import Progress


@pytest.fixture
def recipe(tmp_path: Path) -> dict:
    return {**pico.save(pico.job("llama", 2), tmp_path), "samples": 4}


class Watcher(Progress):
    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []
        self.layers = 0

    def scanned(self, model: str, done: int, total: int) -> None:
        assert not self.layers
        self.seen.append((model, done, total))

    def task(self, layer: int, task: str) -> None:
        self.layers += 1


def poison(folder: Path, name: str, value: float = float("nan"), file: str = "model.safetensors") -> None:
    weights = load_file(folder / file)
    weights[name].view(-1)[:3] = value
    save_file(weights, folder / file, metadata={"format": "pt"})


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


@pytest.mark.parametrize(
    ("folder", "name", "value"),
    [
        ("task1", "model.layers.2.mlp.down_proj.weight", float("nan")),
        ("task1", "lm_head.weight", float("inf")),  # is not read otherwise
        ("base", "model.embed_tokens.weight", -float("inf")),  # nor is this
        ("merged", "model.norm.weight", float("nan")),
    ],
)
def test_what_is_not_finite_is_found_before_the_first_layer(
    folder: str, name: str, value: float, recipe: dict, tmp_path: Path
) -> None:
    poison(tmp_path / folder, name, value)
    label = {"task1": "expert task1", "base": "base model", "merged": "merged model"}[folder]
    before, watcher = tree(tmp_path), Watcher()
    for run in (ff.plan, ff.calibrate):
        found = rf"{label}: .*{folder}/model.safetensors: tensor {name} holds 3 values that are NaN or Inf"
        with pytest.raises(ff.FeatCalError, match=found):
            run(recipe, device="cpu", scan=True, progress=watcher)
    assert watcher.layers == 0
    assert tree(tmp_path) == before


@pytest.mark.parametrize("form", ["adapter", "nf4"])
def test_weights_are_scanned_as_they_are_used(form: str, recipe: dict, tmp_path: Path) -> None:
    """An adapter's are formed, quantised ones dequantised."""
    if form == "adapter":
        folder = write_adapter(tmp_path / "adapter", factors(load_file(tmp_path / "base" / "model.safetensors")))
        name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
        file, named = "adapter_model.safetensors", r"v_proj.lora_B.weight"
        changed = 3 * 3  # in three layers, three weights; the rest are the base's
    else:
        folder = quantised(tmp_path / "task0", tmp_path / "nf4", FORMS["nf4"], tmp_path / "before")
        name = "model.layers.1.mlp.down_proj.weight.absmax"
        file, named = "model.safetensors", r"down_proj.weight"
        changed = len(load_file(tmp_path / "base" / "model.safetensors"))
    job, watcher = {**recipe, **expert_at(recipe, "task0", folder)}, Watcher()
    ff.plan(job, device="cpu", scan=True, progress=watcher)
    assert [model for model, _, _ in watcher.seen].count("expert task0") == changed
    poison(folder, name, file=file)
    with pytest.raises(ff.FeatCalError, match=rf"expert task0: .*{named}"):
        ff.plan(job, device="cpu", scan=True)


def test_of_an_adapter_of_another_model_all_of_that_is_scanned(recipe: dict, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", factors(load_file(tmp_path / "base" / "model.safetensors")))
    job = {**recipe, **expert_at(recipe, "task0", f"{tmp_path / 'task0'}+{folder}")}
    ff.plan(job, device="cpu", scan=True)
    poison(tmp_path / "task0", "lm_head.weight")
    with pytest.raises(ff.FeatCalError, match=r"expert task0, base model: .*lm_head.weight holds 3 values"):
        ff.plan(job, device="cpu", scan=True)


@pytest.mark.parametrize("changes", [{}, {"expert_storage": "host"}, {"merge": {"method": "average"}}], ids=str)
def test_what_it_reads_is_counted_apart(changes: dict, recipe: dict, tmp_path: Path) -> None:
    """A run that was scanned reads, keeps and gives what one that was not does."""
    job = {**recipe, **changes}
    if "merge" in changes:
        del job["merged_model"]
    assert "scan" not in ff.plan(job, device="cpu").bytes_read
    plan, watcher = ff.plan(job, device="cpu", scan=True), Watcher()
    plain = ff.calibrate(job, device="cpu")
    (tmp_path / "scanned").mkdir()
    again = tmp_path / "scanned" / Path(job["out"]).name  # the card bears it
    found = ff.calibrate(job, device="cpu", out=again, scan=True, progress=watcher)
    models = {"base", "task0", "task1"} | ({"merged"} if "merge" not in changes else set())
    whole = sum(value.nbytes for each in models for value in load_file(tmp_path / each / "model.safetensors").values())
    assert found.bytes_read == {**plain.bytes_read, "scan": whole} == plan.bytes_read
    assert found.contents == plain.contents
    assert watcher.layers
    counts = [done for _, done, _ in watcher.seen]
    assert counts == sorted(counts)
    assert watcher.seen[-1][1:] == (whole, whole)


def test_on_the_command_line(recipe: dict, tmp_path: Path, command: Callable) -> None:
    job = (str(tmp_path / "recipe.yaml"), "--device", "cpu", "--scan")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    planned, ran = command("plan", *job), command("calibrate", *job)
    size = json.loads((tmp_path / "out" / "report.json").read_text())["bytes_read"]["scan"]
    for code, shown, errors in (planned, ran):
        assert code == 0, errors
        assert f"scanned {format_bytes(size)} of weights: all are finite" in shown
    assert "read: scan" in planned[1]
    poison(tmp_path / "task0", "lm_head.weight")
    code, shown, errors = command("calibrate", *job, "--out", str(tmp_path / "other"))
    assert code == 1
    assert "lm_head.weight holds 3 values" in errors
    assert "finite" not in shown
