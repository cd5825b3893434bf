"""What is said of a merged model that may be another one than was meant, or lacks its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pico
import pytest
from safetensors.torch import load_file, save_file
from unions import union_job

import featcal_fast as ff
from featcal_fast.planning.planner import _is_calibrated


def test_a_merge_that_was_calibrated_before(tmp_path: Path) -> None:
    recipe = union_job(tmp_path)
    assert not _said(recipe, "calibrated before")
    ff.calibrate(recipe, device="cpu")
    again = {**recipe, "merged_model": recipe["out"], "out": str(tmp_path / "again")}
    assert _said(again, "calibrated before")
    assert [each for each in ff.calibrate(again, device="cpu").warnings if each.startswith("calibrated before")]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"versions": 3}', '{"versions": {"other": 1}}', "[" * 10**5])
def test_a_report_of_others_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    assert not _is_calibrated(tmp_path)


def test_a_merge_of_vocabularies_without_its_tokenizer(tmp_path: Path) -> None:
    recipe = union_job(tmp_path)
    merged = Path(recipe["merged_model"])
    assert not _said(recipe, "no tokenizer")
    rows = [json.loads((folder / "config.json").read_text())["vocab_size"] for folder in (merged, tmp_path / "base")]
    assert rows[0] > rows[1]
    for path in merged.glob("tokenizer*"):
        path.unlink()
    for task in recipe["experts"]:  # which both tokenizers split alike
        (tmp_path / f"{task}.jsonl").write_text('{"text": "a b c"}\n' * 8)
        recipe["experts"][task]["data"] = str(tmp_path / f"{task}.jsonl")
    (said,) = _said(recipe, "no tokenizer")
    assert f"{rows[0]} rows and the base model's {rows[1]}" in said


def _said(recipe: dict, beginning: str) -> list[str]:
    return [each for each in ff.plan(recipe, device="cpu").warnings if each.startswith(beginning)]


def test_an_expert_with_an_output_layer_that_the_base_has_not(tmp_path: Path) -> None:
    recipe = pico.save(pico.job("llama tied", 2), tmp_path)
    del recipe["merged_model"]
    recipe["merge"] = {"method": "average"}
    folder = tmp_path / "task1"
    found = load_file(folder / "model.safetensors")
    save_file({**found, "lm_head.weight": found["model.embed_tokens.weight"] + 1}, folder / "model.safetensors")
    assert not _said(recipe, "weights that the base model has not")  # its config says that they are the same
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    (said,) = _said(recipe, "weights that the base model has not")
    assert "task1 lm_head.weight; " in said
    told: list[str] = []
    ff.merge(recipe, out=tmp_path / "out", progress=Mock(warning=told.append))
    assert told == [said]
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForSequenceClassification"]}))
    assert not _said({**recipe}, "weights that the base model has not")  # heads of other models are not meant
