"""Merges on the fly of models with other vocabularies: rows of embeddings by token text."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import transformers
from safetensors.torch import save_file
from unions import ADDED, BASE, MERGES, SIZES, read_by, save_tokenizer, tensors, union_job, with_rows, write_texts

import featcal_fast as ff
from featcal_fast.checkpoints import Checkpoint
from featcal_fast.errors import ModelMismatchError
from featcal_fast.inputs.models import RecipeModels
from featcal_fast.models.meta import token_tensors


@pytest.fixture
def own_union(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    return tmp_path / "job", union_job(tmp_path / "job")


def merged_rows(folder: Path, name: str) -> torch.Tensor:
    """Averages by token text, as one would write them."""
    base, rows = tensors(folder / "base")[name], []
    experts = {task: tensors(folder / task)[name] for task in ADDED}
    for row, text in enumerate(BASE):
        own = [experts[task][read_by(folder / task, [text])[0][1]] for task in ADDED]
        rows.append((own[0] + own[1]) / 2 if text in LETTER_ROWS else base[row])
    return torch.stack(rows)


LETTER_ROWS = [token for token in BASE if token.isalpha()]


@pytest.mark.parametrize("order", [False, True])
def test_a_merge_takes_rows_by_token(own_union: tuple[Path, dict[str, Any]], order: bool) -> None:
    """Experts have more rows than the base, or as many, in another order."""
    folder, recipe = own_union
    if order:
        for task in ADDED:
            rows = [*range(4), *range(len(BASE) - 1, 3, -1)]
            model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
            shutil.rmtree(folder / task)
            with torch.no_grad():
                model.model.embed_tokens.weight.add_(1.0 if task == "math" else 2.0)
            with_rows(model, rows).save_pretrained(folder / task)
            save_tokenizer(folder / task, [BASE[row] for row in rows])
    recipe = {**recipe, "merge": {"method": "average"}, "out": str(folder / "averaged")}
    del recipe["merged_model"]
    out = ff.merge(recipe)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        found, expected = tensors(out)[name], merged_rows(folder, name)
        chosen = [BASE.index(text) for text in LETTER_ROWS]
        assert found.shape == expected.shape
        assert torch.equal(found[chosen], expected[chosen])
    assert (out / "tokenizer.json").read_bytes() == (folder / "base" / "tokenizer.json").read_bytes()
    if order:
        return
    for task in ADDED:
        write_texts(folder / f"{task}.jsonl", ["ab c", "d e f", "g h"])
    report = ff.calibrate({**recipe, "out": str(folder / "calibrated")}, device="cpu")
    assert not any("samples left out" in each for each in report.warnings)


def test_a_merge_keeps_the_bases_rows_where_an_expert_has_none(tmp_path: Path) -> None:
    job = pico.job("llama", 1, **SIZES, vocab_size=len(BASE))
    job.base.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    with_rows(job.experts["task0"], [*range(len(BASE) - 1)]).save_pretrained(tmp_path / "task0")
    save_tokenizer(tmp_path / "task0", BASE[:-1], merges=MERGES[:-1])
    experts = {"task0": {"model": str(tmp_path / "task0"), "data": "none.jsonl"}}
    recipe = {"base_model": str(tmp_path / "base"), "experts": experts, "merge": {"method": "average"}}
    out = tensors(ff.merge(recipe, out=tmp_path / "out"))["model.embed_tokens.weight"]
    base, own = (tensors(tmp_path / name)["model.embed_tokens.weight"] for name in ("base", "task0"))
    assert torch.equal(out[:-1], own)
    assert torch.equal(out[-1], base[-1])


def test_embeddings_of_other_vocabularies_are_counted_once(own_union: tuple[Path, dict[str, Any]]) -> None:
    """What aligns one is gone when there is a result."""
    folder, recipe = own_union
    recipe = {**recipe, "merge": {"method": "average"}}
    del recipe["merged_model"]
    name = "model.embed_tokens.weight"
    sizes = {each: tensors(folder / each)[name] for each in ("base", *ADDED)}
    assert all(sizes[task].nbytes > sizes["base"].nbytes for task in ADDED)
    parts = 4 * 4 * sizes["base"].numel()
    held = sizes["base"].nbytes + sum(sizes[task].nbytes for task in ADDED)
    assert RecipeModels(ff.Recipe.load(recipe)).merged.merging_bytes(name) == (held + parts, 0)


def test_sizes_that_nothing_explains_are_refused(own_union: tuple[Path, dict[str, Any]]) -> None:
    folder, recipe = own_union
    (folder / "base" / "tokenizer.json").unlink()
    recipe = {**recipe, "merge": {"method": "average"}}
    del recipe["merged_model"]
    told = (
        r"expert math: tensor .* has shape \(17, 16\), expected the base's \(15, 16\); if its rows are tokens, .*base$"
    )
    with pytest.raises(ModelMismatchError, match=told):
        ff.merge(recipe)


TOKEN_TENSORS = {
    "llama": {"model.embed_tokens.weight", "lm_head.weight"},
    "llama tied": {"model.embed_tokens.weight"},
    "gpt2": {"transformer.wte.weight"},
    "t5": {"shared.weight"},
    "flan-t5": {"shared.weight", "lm_head.weight", "encoder.embed_tokens.weight"},
    "bert": {"embeddings.word_embeddings.weight"},
    "roberta": {"embeddings.word_embeddings.weight"},
    "vit": set(),
    "clip": set(),
    "clip whole": {"text_model.embeddings.token_embedding.weight"},
}


@pytest.mark.parametrize("kind", TOKEN_TENSORS)
def test_models_say_themselves_what_has_a_row_for_each_token(kind: str, tmp_path: Path) -> None:
    pico.KINDS[kind]().save_pretrained(tmp_path / "model")
    if kind == "flan-t5":  # whose files hold what is tied, and what once was, as tensors of their own
        found = tensors(tmp_path / "model")
        own = {name: found["shared.weight"].clone() for name in TOKEN_TENSORS[kind]}
        save_file({**found, **own}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert {*token_tensors(Checkpoint(tmp_path / "model", "it"))[0]} == TOKEN_TENSORS[kind]


def test_the_output_layers_bias_has_rows_too(tmp_path: Path) -> None:
    config = transformers.BertConfig(**pico.TEXT)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "model")
    found, _ = token_tensors(Checkpoint(tmp_path / "model", "it"))
    assert {each.rpartition(".")[2] for each in found} == {"weight", "bias"}
    assert "cls.predictions.bias" in found
