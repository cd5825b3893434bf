"""Texts are cut at 512 tokens, or at as many as a task's models take if that is fewer."""

from __future__ import annotations

import json
from pathlib import Path

import pico
import pytest
import torch
import transformers
from data_files import save_tokenizer
from safetensors.torch import load_file, save_file

import featcal_fast as ff
from featcal_fast.inputs.load import load_data
from featcal_fast.inputs.models import RecipeModels
from featcal_fast.models.configs import max_positions

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


FEWER = 40
TABLES = {
    "bert": "embeddings.position_embeddings.weight",
    "gpt2": "transformer.wpe.weight",
    "llama": None,  # whose angles go on
}


@pytest.mark.parametrize("kind", TABLES)
def test_an_expert_may_have_fewer_positions_of_its_own(kind: str, tmp_path: Path) -> None:
    recipe, table = job(kind, tmp_path), TABLES[kind]
    config = tmp_path / "task0" / "config.json"
    key = "n_positions" if kind == "gpt2" else "max_position_embeddings"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: FEWER}))
    if table is not None:
        tensors = load_file(tmp_path / "task0" / "model.safetensors")
        save_file({**tensors, table: tensors[table][:FEWER].clone()}, tmp_path / "task0" / "model.safetensors")
    length = 64 if table is None else FEWER
    assert ff.plan(recipe, device="cpu").fits
    report = ff.calibrate({**recipe, "max_length": None}, device="cpu")
    assert report.inputs.data["task0"].max_length == length
    with pytest.raises(ff.FeatCalError, match=rf"found max_length {length + 1}, .*lower max_length to {length}"):
        ff.plan({**recipe, "max_length": length + 1}, device="cpu")


@pytest.mark.parametrize("name", ["Roberta", "XLMRoberta", "Camembert", "Luke", "Longformer", "MarkupLM", "Bert"])
def test_a_model_takes_so_many_tokens_and_no_more(name: str) -> None:
    sizes = {**pico.TEXT, "num_hidden_layers": 1, "pad_token_id": 3, "entity_vocab_size": 10, "attention_window": 4}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model, most = getattr(transformers, f"{name}Model")(config).eval(), max_positions(config)
    with torch.no_grad():
        model(input_ids=torch.full((1, most), 7))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, most + 1), 7))


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
