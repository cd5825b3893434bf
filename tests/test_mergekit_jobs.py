"""A folder in mergekit's form repaired by one command, or by the recipe that it amounts to."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from merges import DATA, MATH, TIES, recipe_of
from runs import contents

import featcal_fast as ff
from featcal_fast import files
from featcal_fast.errors import OutputError, RecipeError
from featcal_fast.inputs.recipe_file import write_recipe


def test_the_recipe_says_what_will_be_done(work: Path) -> None:
    recipe = recipe_of(work, out="new", recipe_out="recipes.yaml")
    text = (work / "recipes.yaml").read_text()
    assert text.startswith("# What `featcal-fast calibrate --mergekit ")
    assert "settings: {preset: llm}\n" in text
    loaded = ff.Recipe.load(work / "recipes.yaml")
    assert loaded == replace(recipe, root=loaded.root)


def test_a_recipe_holds_any_path(work: Path) -> None:
    odd = work / "no: 'x' #\u00e9\u4e2d \U0001f600\\"
    odd.mkdir()
    for task in DATA:
        shutil.copy(work / f"{task}.safetensors", odd)
    recipe = recipe_of(work, data={task: odd / f"{task}.safetensors" for task in DATA}, recipe_out=odd / "r.yaml")
    assert ff.Recipe.load(odd / "r.yaml").experts == recipe.experts


def test_a_recipe_overwrites_nothing(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "mine.yaml").write_text("mine")
    for name, message in {
        "mine.yaml": "is there already",
        "src": "is there already",
        "no/r.yaml": "cannot be written",
    }.items():
        with pytest.raises(OutputError, match=f"recipe-out: .*{message}"):
            recipe_of(work, recipe_out=name)
    with pytest.raises(OutputError, match=r"recipe-out: .* lies in .*merged, which is never written to"):
        recipe_of(work, recipe_out="out/merged/r.yaml")
    with pytest.raises(OutputError, match=r"lies in .*base"):
        recipe_of(work, recipe_out="src/base/r.yaml")
    assert (work / "mine.yaml").read_text() == "mine"
    recipe_of(work, recipe_out="new.yaml")
    recipe_of(work, recipe_out="new.yaml")  # as when a run goes on

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(work.iterdir())
    for call in ("write_at", "sync", "link"):
        with monkeypatch.context() as patch:
            patch.setattr(files, call, full)
            with pytest.raises(OutputError, match="No space left"):
                write_recipe(work / "other.yaml", "text", [])
        assert sorted(work.iterdir()) == before


@contextmanager
def no_links(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr("os.link", refuse)
        yield


def test_where_a_file_has_one_name_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with no_links(monkeypatch):
        write_recipe(tmp_path / "r.yaml", "text", [])
        with pytest.raises(OutputError, match="is there already"):
            write_recipe(tmp_path / "r.yaml", "other", [])
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]
    assert (tmp_path / "r.yaml").read_text() == "text"


@pytest.mark.parametrize("method", ["slerp", "linear"])
def test_without_a_base_the_anchor_is_the_merge(method: str, work: Path) -> None:
    base = {"base_model": f"src/{MATH}"} if method == "slerp" else {}
    recipe = recipe_of(work, {"merge_method": method, "models": TIES["models"], **base}, out="new")
    plan = ff.plan(recipe, device="cpu")
    told = [each for each in plan.warnings if each.startswith("no base model") and "--base" in each]
    assert len(told) == 1
    report = ff.calibrate(recipe, device="cpu")
    assert report.warnings.count(told[0]) == 1
    assert not any("nothing was learned" in each for each in report.warnings)
    assert report.layers[-1].drift_after < report.layers[-1].drift_before
    again = ff.calibrate(
        replace(recipe, settings=replace(recipe.settings, anchor_rho=1.0), out=str(work / "rho")), device="cpu"
    )
    for one, other in zip(report.layers, again.layers, strict=True):
        assert one.drift_after == pytest.approx(other.drift_after, rel=1e-3)
    with_base = recipe_of(work, base="src/base")
    assert not any(each.startswith("no base model") for each in ff.plan(with_base, device="cpu").warnings)


def test_a_plan_only_warns_of_what_an_output_holds(work: Path) -> None:
    recipe = recipe_of(work)
    (work / "full").mkdir()
    (work / "full" / "a").touch()
    for job, out in ((recipe, "full"), (replace(recipe, out=str(work / "full")), None)):
        plan = ff.plan(job, out=out, device="cpu")
        assert [each for each in plan.warnings if "already holds something" in each]
        assert not plan.problems
    assert not any("already" in each for each in ff.plan(recipe, out="new", device="cpu").warnings)
    for out in ("src/base/new", "math.safetensors/x", "."):
        with pytest.raises(OutputError, match="out: "):
            ff.plan(recipe, out=out, device="cpu")
    with pytest.raises(OutputError, match="already holds something"):
        ff.calibrate(recipe, out="full", device="cpu")


TYPED = ("--mergekit", "out/merged", "--data", "math=math.safetensors", "--data", "code=code.safetensors")


def test_one_command(work: Path, command: Callable) -> None:
    code, text, errors = command("plan", *TYPED, "--out", "new/model", "--recipe-out", "r.yaml", "--device", "cpu")
    assert (code, errors) == (0, "")
    assert "fits" in text
    assert command("calibrate", *TYPED, "--out", "new/model", "--recipe-out", "r.yaml", "--device", "cpu")[0] == 0
    assert command("calibrate", "r.yaml", "--out", "read/model", "--device", "cpu")[0] == 0
    assert contents(work / "new" / "model") == contents(work / "read" / "model")
    code, text, _ = command("plan", *TYPED, "--out", "new/model", "--device", "cpu")
    assert code == 0
    assert "warning: out: " in text


@pytest.mark.parametrize("name", ["calibrate", "plan"])
@pytest.mark.parametrize(
    ("typed", "code", "message"),
    [
        ((), 2, "RECIPE.yaml"),
        (("r.yaml", *TYPED), 2, "found --mergekit too"),
        (("r.yaml", "--data", "a=b"), 2, "--mergekit"),
        (("r.yaml", "--skip", "a"), 2, "--mergekit"),
        (("r.yaml", "--base", "a"), 2, "--mergekit"),
        (("r.yaml", "--recipe-out", "a"), 2, "--mergekit"),
        (("--mergekit", "out/merged", "--data", "math.jsonl"), 2, "NAME=FILE"),
        (("--mergekit", "out/merged", "--data", "=math.jsonl"), 2, "NAME=FILE"),
        (("--mergekit", "out/merged", "--data", "math="), 2, "NAME=FILE"),
        (("--mergekit", "out/merged"), 1, "data: missing for math (src/Llama-3-8B-math), code"),
        (("--mergekit", "nowhere"), 1, "nowhere is not a folder"),
        (("--mergekit", "out/merged/mergekit_config.yml"), 1, "is not a folder"),
        (("out/merged/mergekit_config.yml",), 1, "calibrate --mergekit out/merged --data NAME=FILE --out DIR"),
        (("out/merged",), 1, "calibrate --mergekit out/merged --data NAME=FILE --out DIR"),
    ],
)
def test_what_is_typed_wrongly(
    name: str, typed: tuple[str, ...], code: int, message: str, work: Path, command: Callable
) -> None:
    found, _, errors = command(name, *typed)
    assert (found, message in " ".join(errors.replace("│", " ").split())) == (code, True), errors


def test_a_config_is_no_recipe(work: Path) -> None:
    (work / "merge.yaml").write_text(yaml.safe_dump(TIES))
    with pytest.raises(
        RecipeError, match=r"merge.yaml: found a mergekit config, expected a recipe.*--mergekit OUT_FOLDER"
    ):
        ff.plan("merge.yaml")
    with pytest.raises(RecipeError, match="found a mergekit config"):
        ff.plan(TIES)
    (work / "moe.yaml").write_text("base_model: a\nexperts: [{source_model: b}]\n")
    with pytest.raises(RecipeError, match="mergekit-moe, whose models cannot be calibrated"):
        ff.plan("moe.yaml")
