"""Samples that are held out, from a recipe to the engine's door: which they are, and that nothing is fitted to them."""

from __future__ import annotations

import json
from pathlib import Path

import pico
import pytest
import torch
from data_files import assert_same, ids, save_image, texts
from runs import Case, stopped
from safetensors.torch import load_file, save_file

import featcal_fast as ff
from featcal_fast.data.batches import load_batches
from featcal_fast.data.samples import draw
from featcal_fast.errors import RecipeError, ResumeError
from featcal_fast.job.fingerprint import Digested
from featcal_fast.reporting.clock import Clock
from featcal_fast.reporting.warnings import about_held_out
from featcal_fast.streaming.held_out import HeldOut


def parts(batches: list) -> tuple[list, list]:
    """What is fitted to and what is held out, which comes last."""
    held = [isinstance(batch, HeldOut) for batch in batches]
    assert held == sorted(held)
    return batches[: held.count(False)], batches[held.count(False) :]


def test_texts(write, bare) -> None:
    lines = ["a", "b c", "d e f", "g", "h i", "j a b", "c d e f", "a a", "b b b", "c"]
    path = write(*({"text": each} for each in lines))
    drawn = [ids(lines[i]) for i in draw(10, 8, 3, path)]
    found = load_batches(path, folders=[bare], samples=8, seed=3, batch_size=4, held_out=0.25)
    fitted, held = parts(found)
    assert texts(fitted) == sorted(drawn[:6], key=len)
    assert texts(held) == sorted(drawn[6:], key=len), "the last ones that were drawn"
    assert [len(batch["input_ids"]) for batch in found] == [4, 2, 2]
    again = load_batches(path, folders=[bare], samples=8, seed=3, batch_size=4, held_out=0.25)
    assert_same(found, again)


def test_images(vision, tmp_path: Path) -> None:
    for i in range(10):
        save_image(tmp_path / "data" / f"{i}.png", (20 * i, 0, 0), size=(4, 4))
    folder = tmp_path / "data"
    whole = torch.cat([batch["pixel_values"] for batch in load_batches(folder, folders=[vision], batch_size=4)])
    fitted, held = parts(load_batches(folder, folders=[vision], batch_size=4, held_out=0.2))
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in fitted]), whole[:8])
    assert [len(batch["pixel_values"]) for batch in held] == [2]
    assert torch.equal(held[0]["pixel_values"], whole[8:])


def test_tables(datasets, bare, tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"input_ids": [[i, i + 1] for i in range(10)]}).to_parquet(tmp_path / "a.parquet")
    fitted, held = parts(load_batches(tmp_path / "a.parquet", folders=[bare], held_out=0.3))
    order = draw(10, 10, 0, "")
    assert [texts(fitted), texts(held)] == [[[i, i + 1] for i in part] for part in (order[:7], order[7:])]


def ready(path: Path, values: list[float]) -> Path:
    save_file({"pixel_values": torch.tensor(values).reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()}, path)
    return path


@pytest.mark.parametrize(
    ("samples", "share", "held"),
    [(1, 0.5, 0), (2, 0.5, 0), (3, 0.2, 1), (5, 0.2, 1), (8, 0.2, 2), (10, 0.5, 5), (10, 0.04, 0), (10, 0, 0)],
)
def test_how_many(samples: int, share: float, held: int, tmp_path: Path) -> None:
    path = ready(tmp_path / "a.safetensors", [float(i) for i in range(samples)])
    found = parts(load_batches(path, folders=[], held_out=share))
    assert [sum(len(batch["pixel_values"]) for batch in part) for part in found] == [samples - held, held]


def test_what_is_fitted_to_is_not_held_out(tmp_path: Path) -> None:
    """Nor is a sample that is the same as one that is fitted to; one that is there twice among others may be."""
    order = draw(10, 10, 0, "")
    values = [0.0] * 10
    for place, value in zip(order, [1, 2, 3, 4, 5, 6, 6, 7, 7, 2], strict=True):
        values[place] = float(value)
    path = ready(tmp_path / "a.safetensors", values)
    fitted, held = parts(load_batches(path, folders=[], held_out=0.4))
    seen, other = ([batch["pixel_values"][:, 0, 0, 0].tolist() for batch in each] for each in (fitted, held))
    assert (seen, other) == ([[1, 2, 3, 4, 5, 6, 6, 2]], [[7, 7]])
    path = ready(tmp_path / "b.safetensors", [1.0] * 10)
    assert_same(load_batches(path, folders=[], held_out=0.4), load_batches(path, folders=[]))


@pytest.mark.parametrize("value", [-0.1, 0.6, float("nan"), "0.2", True, None, [0.2]])
def test_what_a_recipe_may_say(value: object) -> None:
    expert = {"math": {"model": "math", "data": "math.jsonl"}}
    recipe = {"base_model": "base", "merged_model": "merged", "experts": expert}
    assert ff.Recipe.load(recipe).held_out == 0.2
    assert [ff.Recipe.load({**recipe, "held_out": share}).held_out for share in (0, 0.5)] == [0, 0.5]
    with pytest.raises(RecipeError, match=r"held_out: found .*, expected a number"):
        ff.Recipe.load({**recipe, "held_out": value})


def test_what_leaves_its_digest_is_counted() -> None:
    values = [torch.arange(4.0).reshape(2, 2), torch.ones(3, 2)]
    plain = [{"pixel_values": value} for value in values]
    batches = Digested([plain[0], HeldOut(plain[1])], Clock())
    others = Digested(plain, Clock())
    assert [isinstance(batch, HeldOut) for batch in batches] == [False, True]
    assert list(others)
    assert (batches.count, batches.samples, batches.held_out, others.held_out) == (2, 5, 3, 0)
    assert batches.digest == others.digest


@pytest.mark.parametrize("kind", ["llama", "clip"])  # loaded at once, and when its turn comes
def test_a_run_says_how_many_were_held_out(kind: str, tmp_path: Path) -> None:
    recipe = {**pico.save(pico.job(kind, 2), tmp_path), "held_out": 0.2}
    recipe["experts"]["task1"]["samples"] = 2
    plan = ff.plan(recipe, device="cpu")
    report = ff.calibrate(recipe, device="cpu")
    rows = {"llama": 20, "clip": 24}[kind]
    found = {task: (each.samples, each.held_out) for task, each in report.inputs.data.items()}
    assert found == {"task0": (rows, round(0.2 * rows)), "task1": (2, 0)}
    assert report.held_out == {"task0": round(0.2 * rows), "task1": 0}
    told = "nothing is held out of task1 (2 samples)"
    assert [each for each in plan.warnings if told in each] == [each for each in report.warnings if told in each] != []
    assert all(plan.tokens[task] >= count for task, count in report.tokens.items())
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["recipe"]["held_out"] == 0.2


def test_alike_samples_are_told_too(tmp_path: Path) -> None:
    recipe = {**pico.save(pico.job("llama", 1), tmp_path), "held_out": 0.2}
    path = recipe["experts"]["task0"]["data"]
    save_file({name: value[:1].expand(9, -1).contiguous() for name, value in load_file(path).items()}, path)
    (said,) = [each for each in ff.plan(recipe, device="cpu").warnings if "held out" in each]
    assert "task0 (9 samples): they are too few, or too many are the same" in said
    assert about_held_out(0, {"task0": (9, 0)}) == about_held_out(0.2, {"task0": (9, 2)}) == []


def test_another_share_is_another_job(case: Case, tmp_path: Path) -> None:
    stopped(case, tmp_path / "job")
    with pytest.raises(ResumeError, match=r"recipe: held_out: 0, now 0\.25"):
        case.changed(held_out=0.25).run(tmp_path / "job", resume=True)
