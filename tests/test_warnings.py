"""What a run knows against its own result is said: in the report, the summary, the plan and on the terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch
import yaml
from forms import factors, write_adapter
from runs import Case, contents, stopped
from safetensors.torch import load_file, save_file

import featcal_fast as ff
from featcal_fast.layer.solve import MAX_CONDITION_FLOAT32, max_condition
from featcal_fast.reporting.outcome import LAYER_WORSE, Outcome
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import GroupReport, LayerReport, Report, drift_text, percent_text
from featcal_fast.reporting.warnings import (
    about_base,
    about_dequantised,
    about_held_out,
    about_ignored,
    about_left_out,
    about_merged,
    about_not_merged,
    about_run,
    about_same_model,
    about_samples,
    about_settings,
)
from featcal_fast.terminal import BarProgress, Terminal

ROOT = Path(__file__).resolve().parent.parent


def group(change: float = 0.2, raised: float = 0.0, tokens: int = 500, name: str = "mlp.fc1") -> GroupReport:
    return GroupReport([name], 64, 128, "input", "float32", change, raised, tokens)


def layer(index: int, before: float = 0.5, after: float = 0.4, *groups: GroupReport) -> LayerReport:
    return LayerReport(index, before, after, 0.1, list(groups or [group()]), [])


def report(*layers: LayerReport, **values: object) -> Report:
    made = Report(ff.Settings(), "clip", "cpu", {"a": 500, "b": 500}, list(layers or [layer(0), layer(1)]))
    for name, value in values.items():
        setattr(made, name, value)
    return made


def test_a_good_run_has_nothing_to_say() -> None:
    assert about_run(report()) == []
    assert about_run(report(layer(0, 0.5, 0.501), layer(1, 1e-9, 1e-6))) == [], "within what drift can tell"


RUNS = [
    (
        report(layer(0), layer(7, 0.67, 1.31), layer(8, 0.5, 0.6)),
        r"drift got worse in 2 of 3 layers \(most: layer 7, 0.6700 -> 1.3100\), and after the last one \(0.5000 ->",
    ),
    (report(layer(0, 0.67, 1.31), layer(1)), r"1 of 2 .*but not after the last one"),
    (report(layer(0, 0.0, 0.05)), r"drift got worse in 1 of 1"),
    (report(layer(0, 3e29, 2e29), layer(1)), r"drift means nothing in 1 of 2 .*3.0e\+29 -> 2.0e\+29"),
    (report(layer(0, float("nan"), 0.1)), r"drift means nothing in 1 of 1 .*nan -> 0.1000"),
    (
        report(layer(3, 0.5, 0.4, group(), group(5.0), group(1.2, name="q_proj"))),
        r"more than 100% in 2 of 3 groups \(most: layer 3, mlp.fc1, 500.0%\): at ridge_lambda 0.05",
    ),
    (report(layer(0, 0.5, 0.4, group(float("inf")))), r"more than 100% .*inf%"),
    (
        report(layer(0, 0.5, 0.4, group(raised=1e-7), group(raised=1e-5, name="fc2"))),
        r"diagonal was raised in 2 of 2 groups \(most: layer 0, fc2, by 1e-05 of its mean\)",
    ),
    (
        report(layer(0, 0.5, 0.4, group(tokens=63), group(tokens=7, name="fc2"), group(tokens=64))),
        r"fewer tokens than input features in 2 of 3 groups \(least: layer 0, fc2, 7 for 64\)",
    ),
    (report(tokens={"a": 1, "b": 500, "c": 31, "d": 32}), r"very few tokens: a 1, c 31;"),
    (
        report(LayerReport(0, 0.5, 0.4, 0.1, [], ["norm"]), kept={"fc1": "not included", "fc2": "excluded"}),
        r"0 of 2 linear weights were calibrated; .*1 not included, 1 excluded",
    ),
    (report(kept=dict.fromkeys("abc", "a router")), r"2 of 5 linear weights were calibrated; .*3 a router"),
    (
        report(outcome=Outcome(merged=0.1, calibrated=0.2, spread=0.01, worse=True, kept="merged")),
        r"worse than the merge .* \(drift of the features 0.1000 -> 0.2000, spread 0.0100\): all weights",
    ),
    (report(outcome=Outcome(merged=0.1, calibrated=0.2, spread=0.01, worse=True)), r"it was written all the same"),
    (report(storage_error={"a": 0.01, "b": 0.09}), r"expert_storage .* 1 of 2 experts by more than 2% \(most: b"),
]


@pytest.mark.parametrize(("found", "said"), RUNS)
def test_each_kind_is_one_sentence(found: Report, said: str) -> None:
    (sentence,) = about_run(found)
    assert re.search(said, sentence), sentence
    assert "\n" not in sentence
    assert len(sentence) < 400


@pytest.mark.parametrize(
    "found",
    [
        report(kept={"head": "outside of the layers"}),
        report(kept=dict.fromkeys("abcdef", "not included")),
        report(storage_error={"a": 0.011}),
        report(layer(0, 0.5, 0.4, group(tokens=0))),
        report(layer(0, 0.5, 0.4, group(5.0)), outcome=Outcome(merged=0.5, calibrated=0.4, spread=0.01)),
        report(layer(0, 0.5, 0.5), outcome=Outcome(kept="merged"), kept={"fc1": LAYER_WORSE}),
    ],
    ids=["a head", "the recipe's choice", "eight bits", "not counted", "judged", "merged weights kept"],
)
def test_what_is_as_it_should_be_is_not_said(found: Report) -> None:
    assert about_run(found) == []


SETTINGS = [
    ({"ridge_lambda": 1e-5, "forward_dtype": "bfloat16"}, "ridge_lambda 1e-05 with forward_dtype bfloat16"),
    ({"ridge_lambda": 1e-4, "moment_dtype": "bfloat16"}, "ridge_lambda 0.0001 with moment_dtype bfloat16"),
    ({"ridge_lambda": 1e-5, "solve_dtype": "float32"}, r"solve_dtype float32 .* condition number of 3e+05"),
    ({"ridge_lambda": 0}, "ridge_lambda 0: nothing pulls"),
    ({"covariance_eps": 0.01}, "covariance_eps 0.01 beside ridge_lambda 0.05"),
    ({"teacher_alpha": 0}, "teacher_alpha 0: the experts' features are not used"),
]


@pytest.mark.parametrize(("values", "said"), SETTINGS)
def test_settings_that_do_not_go_together(values: dict, said: str) -> None:
    settings = ff.Settings(**values)
    (sentence,) = about_settings(settings, max_condition(settings, 3, 64), MAX_CONDITION_FLOAT32)
    assert all(part in sentence for part in said.split(" .* ")), sentence


@pytest.mark.parametrize("name", ff.PRESETS)
def test_published_settings_go_together(name: str) -> None:
    settings = ff.PRESETS[name]
    assert about_settings(settings, max_condition(settings, 8, 64), MAX_CONDITION_FLOAT32) == []


def test_the_page_explains_each_kind() -> None:
    """And none that there is not."""
    table = (ROOT / "docs" / "troubleshooting.md").read_text().partition("## Warnings")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    settings = [ff.Settings(**values) for values, _ in SETTINGS]
    told = [about_settings(each, max_condition(each, 3, 64), MAX_CONDITION_FLOAT32) for each in settings]
    told += [about_run(found) for found, _ in RUNS] + [
        about_samples({"a": (1, 2)}),
        about_held_out(0.2, {"a": (2, 0)}),
        about_same_model(["a"]),
        about_base(True),
        about_dequantised("merged model", 1, 2),
        about_ignored(["data: read as text (ignored: id)"]),
        about_left_out({"a": ({"of other tokens": 1}, 2)}),
        about_merged(True, (9, 8)),
        about_not_merged({"a": ["lm_head.weight"]}),
    ]
    sentences = [sentence for each in told for sentence in each]
    for sentence in sentences:
        assert [row for row in rows if row in sentence], sentence
    for row in rows:
        assert [sentence for sentence in sentences if row in sentence], row


def test_numbers_are_never_long() -> None:
    assert [drift_text(value) for value in (0.25, 999, 1e30)] == ["0.2500", "999.0000", "1.0e+30"]
    assert [percent_text(value) for value in (0.258, 5, 1e30)] == ["25.8%", "500.0%", "1.0e+32%"]
    zeros = report(layer(0, 3.1e29, 2e29, group(1e38)), seconds=1.0)
    assert max(len(word) for word in zeros.summary().split()) < 30


def test_names_are_told_as_they_can_be_shown() -> None:
    (sentence,) = about_samples({"a\x1b[31m\nb": (2, 5)})
    assert r"a\x1b[31m\nb 2 of 5" in sentence
    assert "and 6 more" in about_samples({f"task{number}": (1, 5) for number in range(9)})[0]


class Told(Progress):
    def __init__(self) -> None:
        self.told: list[str] = []

    def warning(self, text: str) -> None:
        self.told.append(text)


@pytest.fixture
def recipe(tmp_path: Path) -> dict:
    """Nothing is wrong with it."""
    return {**pico.save(pico.job("clip", 2), tmp_path), "samples": 8}


def test_an_ordinary_job_is_quiet(recipe: dict, tmp_path: Path) -> None:
    plan = ff.plan(recipe, device="cpu")
    watcher = Told()
    found = ff.calibrate(recipe, device="cpu", progress=watcher)
    assert plan.warnings == watcher.told == found.warnings == []
    assert "warning" not in plan.summary() + found.summary()
    assert plan.summary().splitlines()[-1].startswith("fits: ")


def test_what_is_known_beforehand_is_said_by_plan_and_before_the_first_layer(recipe: dict, tmp_path: Path) -> None:
    recipe["experts"]["task1"] |= {"model": recipe["base_model"], "samples": 99}
    recipe["settings"] = {"teacher_alpha": 0}
    plan, watcher = ff.plan(recipe, device="cpu"), Told()
    kinds = ["teacher_alpha 0", "fewer samples than asked for: task1 24 of 99", "experts of task1: their weights"]
    assert all(kind in said for kind, said in zip(kinds, plan.warnings, strict=True)), plan.warnings
    assert all(f"warning: {said}" in plan.summary() for said in plan.warnings)
    found = ff.calibrate(recipe, device="cpu", progress=watcher)
    assert watcher.told == plan.warnings == found.warnings[:3]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["warnings"] == found.warnings
    assert Report.from_json((tmp_path / "out" / "report.json").read_text()) == found


def test_settings_that_leave_nothing_to_do_are_refused(recipe: dict) -> None:
    recipe["settings"] = {"include": ["layer_norm1"], "calibrate_layernorm": False}
    for run in (ff.plan, ff.calibrate):
        with pytest.raises(ff.FeatCalError, match="'layer_norm1' matches no module"):
            run(recipe, device="cpu")
    recipe["settings"]["calibrate_layernorm"] = True
    assert "0 of 18 linear weights were calibrated" in ff.calibrate(recipe, device="cpu").warnings[0]


def _copied(root: Path, recipe: dict) -> None:
    """A download of the base model under another name, in other files."""
    weights = load_file(root / "base" / "model.safetensors")
    half = len(weights) // 2
    parts = {"a.safetensors": sorted(weights)[:half], "b.safetensors": sorted(weights)[half:]}
    for file, names in parts.items():
        save_file({name: weights[name] for name in names}, root / "task1" / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (root / "task1" / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "task1" / "model.safetensors").unlink()


def _untrained(root: Path, recipe: dict) -> None:
    """An adapter as it is before its first step: its B are zero."""
    adapter = factors(load_file(root / "base" / "model.safetensors"))
    zero = {name: torch.zeros_like(value) if "lora_B" in name else value for name, value in adapter.items()}
    recipe["experts"]["task1"]["model"] = str(write_adapter(root / "adapter", zero))


def _kept_in_memory(root: Path, recipe: dict) -> None:
    _copied(root, recipe)
    recipe["expert_storage"] = "host"


@pytest.mark.parametrize("change", [_copied, _untrained, _kept_in_memory])
def test_experts_that_learned_nothing_are_told_before_the_first_layer(change: Callable, tmp_path: Path) -> None:
    recipe, watcher = {**pico.save(pico.job("llama", 2), tmp_path), "samples": 4}, Told()
    change(tmp_path, recipe)
    found = ff.calibrate(recipe, device="cpu", progress=watcher)
    assert watcher.told == found.warnings[:1]
    assert found.warnings[0].startswith("nothing was learned by the experts of task1: ")


def test_experts_that_learned_something_are_not(tmp_path: Path) -> None:
    """However little: a value of one weight; an adapter of one module."""
    recipe, watcher = {**pico.save(pico.job("llama", 2), tmp_path), "samples": 4}, Told()
    weights = load_file(tmp_path / "base" / "model.safetensors")
    adapter = factors(weights)
    last = sorted(name for name in adapter if "lora_B" in name)[-1]
    almost = {
        name: torch.zeros_like(value) if "lora_B" in name and name != last else value for name, value in adapter.items()
    }
    recipe["experts"]["task1"]["model"] = str(write_adapter(tmp_path / "adapter", almost))
    weights["model.layers.2.mlp.up_proj.weight"][3, 3] += 1
    save_file(weights, tmp_path / "task0" / "model.safetensors", metadata={"format": "pt"})
    ff.calibrate(recipe, device="cpu", progress=watcher)
    assert watcher.told == []


def test_models_in_memory_are_warned_of_too() -> None:
    job = pico.job("clip", 2)
    settings = ff.Settings(ridge_lambda=0)
    found = ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches, settings=settings)
    assert found.warnings[0].startswith("settings: ridge_lambda 0")
    assert any(said.startswith("weights changed by more than 100%") for said in found.warnings)


def test_they_are_those_of_a_run_that_nobody_stopped(case: Case, tmp_path: Path) -> None:
    """`resume` compares the whole report."""
    weak = case.changed(settings={"ridge_lambda": 0.0})
    weak.run(tmp_path / "whole")
    weak.whole = contents(tmp_path / "whole" / "out")
    assert len(weak.whole["report.json: warnings"]) > 1
    stopped(weak, tmp_path / "stopped", after=2)
    weak.resume(tmp_path / "stopped")


def test_on_the_terminal(recipe: dict, tmp_path: Path, command: Callable) -> None:
    """A task's name is shown as it is, and no more than shown; an expert of zeros is told in few digits."""
    recipe["experts"] = {"[red]a": recipe["experts"]["task0"], "b": recipe["experts"]["task1"]}
    recipe["samples"] = 99
    weights = load_file(tmp_path / "task1" / "model.safetensors")
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    save_file(zeros, tmp_path / "task1" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    told = "warning: fewer samples than asked for: [red]a 24 of 99, b 24 of 99"
    code, shown, errors = command("plan", str(tmp_path / "recipe.yaml"), "--device", "cpu")
    assert code == 0, errors
    assert told in shown
    assert "read: expert [red]a" in shown
    code, shown, errors = command("calibrate", str(tmp_path / "recipe.yaml"), "--device", "cpu")
    assert code == 0, errors
    assert shown.count(told) == 2, "before the first layer, and at the end"
    assert "warning: drift means nothing in 3 of 3 layers" in shown
    assert re.search(r"layer 3/3: drift \d\.\de\+\d\d -> \d\.\de\+\d\d, ", shown), shown


def test_no_name_acts_on_a_terminal(
    recipe: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """In tables, lines and the bar; whatever terminals and rich would make of it."""
    name = "a\x1b]0;title\x07\x1b[2J[bold]b[/bold]:smile:"
    shown = r"a\x1b]0;title\x07\x1b[2J[bold]b[/bold]:smile:"
    monkeypatch.setenv("FORCE_COLOR", "1")
    bar = BarProgress(Terminal())
    bar.stage(1, 10)
    bar.task(0, name)
    bar.warning(name)
    bar.close()
    text = capsys.readouterr().out
    assert text.count(shown) >= 2
    assert "\x1b[2J" not in text
    assert "\x1b[?25l" in text, "it was drawn"
    plan = ff.plan(recipe, device="cpu")
    plan.kept, plan.bytes_read, plan.warnings = {name: "a reason"}, {name: 1}, [name]
    console = Terminal()
    for table in plan.tables():
        console.print(table)
    console.say(plan.summary())
    text = capsys.readouterr().out
    assert text.count(shown) == 3
    assert "\x1b[2J" not in text
