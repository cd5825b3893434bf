"""Texts are cut at 512 tokens, or at as many as a task's models take if that is fewer."""

from __future__ import annotations

import json
from pathlib import Path

import pico
import pytest
import torch
from data_files import save_tokenizer

import featcal_fast as ff
from featcal_fast.inputs.load import load_data
from featcal_fast.inputs.models import RecipeModels

LONG = json.dumps({"text": "a b c " * 300}) + "\n"


def job(kind: str, folder: Path, **changes) -> dict:
    recipe = pico.save(pico.job(kind, 1, **changes), folder)
    save_tokenizer(folder / "merged")
    (folder / "data.jsonl").write_text(LONG)
    recipe["experts"]["task0"]["data"] = str(folder / "data.jsonl")
    return recipe


@pytest.mark.parametrize(
    ("kind", "changes", "length"),
    [
        ("llama", {}, 64),
        ("llama", {"max_position_embeddings": 4096}, 512),
        ("gpt2", {}, 64),
        ("bert", {}, 64),
        ("roberta", {}, None),
    ],
)
def test_by_default_as_many_as_the_model_takes(kind: str, changes: dict, length: int | None, tmp_path: Path) -> None:
    recipe = job(kind, tmp_path, **changes)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    if length is None:  # positions begin behind that of the padding token
        length = config["max_position_embeddings"] - config["pad_token_id"] - 1
        assert length < config["max_position_embeddings"]
    loaded = ff.Recipe.load(recipe)
    batches, sizes = load_data(loaded, RecipeModels(loaded), torch.device("cpu"))
    assert [batch["input_ids"].shape[1] for batch in batches["task0"]] == [length]
    assert sizes["task0"].max_length == length
    if kind == "roberta":
        report = ff.calibrate(recipe, device="cpu")
        assert report.inputs.data["task0"].max_length == length
        assert "max_length" not in report.recipe


@pytest.mark.parametrize("where", ["recipe", "expert"])
def test_more_than_that_is_refused_with_what_works(where: str, tmp_path: Path) -> None:
    recipe = job("roberta", tmp_path)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    most = config["max_position_embeddings"] - config["pad_token_id"] - 1
    place = recipe if where == "recipe" else recipe["experts"]["task0"]
    place["max_length"] = most + 1
    for run in (ff.plan, ff.calibrate):
        with pytest.raises(ff.FeatCalError, match=rf"found max_length {most + 1}, .*lower max_length to {most}"):
            run(recipe, device="cpu")
    place["max_length"] = most
    assert ff.plan(recipe, device="cpu").fits
