"""Every expert reads its own tokens: token ids are translated by token text where tokenizers differ."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import transformers
from forms import factors, write_adapter
from runs import Stop
from safetensors.torch import save_file
from unions import (
    ADDED,
    BASE,
    MERGES,
    TEXTS,
    UNION,
    read_by,
    save_tokenizer,
    tensors,
    union_job,
    with_rows,
    write_texts,
)

import featcal_fast as ff
from featcal_fast.errors import DataError, ModelMismatchError, ResumeError
from featcal_fast.inputs.load import load_data
from featcal_fast.inputs.models import RecipeModels
from featcal_fast.inputs.recipe import Recipe
from featcal_fast.models.configs import differences
from featcal_fast.models.tokens import own_inputs
from featcal_fast.planning.models import PlannedModels
from featcal_fast.streaming.sources import CheckpointSource

CPU = torch.device("cpu")
EVERY = [*BASE, *UNION]
ROWS = {
    task: [(BASE + ADDED[task]).index(text) if text in BASE + ADDED[task] else None for text in EVERY] for task in ADDED
}


@pytest.fixture(scope="module")
def union(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("union")
    return folder, union_job(folder)


@pytest.fixture
def own_union(tmp_path: Path, union: tuple[Path, dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """A copy to change."""
    shutil.copytree(union[0], tmp_path / "job", ignore=shutil.ignore_patterns("out*"))
    return tmp_path / "job", json.loads(json.dumps(union[1]).replace(str(union[0]), str(tmp_path / "job")))


def loaded(recipe: dict[str, Any]) -> tuple[RecipeModels, dict[str, Any], dict[str, Any]]:
    read = Recipe.load(recipe)
    models = RecipeModels(read)
    return models, *load_data(read, models, CPU)


# ---- a union merge


def test_an_expert_is_given_what_its_own_tokenizer_makes_of_the_texts(union: tuple[Path, dict[str, Any]]) -> None:
    models, batches, sizes = loaded(union[1])
    for task, own in models.tokens.items():
        assert own.table is not None
        assert own.known
        assert not own.same
        assert own.table.tolist() == [-1 if row is None else row for row in ROWS[task]]
        source = CheckpointSource(models.experts[task], CPU, own.table)
        model = transformers.AutoModelForCausalLM.from_pretrained(union[0] / task)
        expected = {
            tuple(ids): model.model.embed_tokens(torch.tensor(ids)) for ids in read_by(union[0] / task, TEXTS[task])
        }
        given = {tuple(ids) for ids in read_by(union[0] / "merged", TEXTS[task])}
        found = []
        for batch in batches[task]:
            hidden = source.stage_inputs(batch, 0, None)[0]
            for states, ids, mask in zip(hidden, batch["input_ids"], batch["attention_mask"], strict=True):
                assert tuple(ids[mask == 1].tolist()) in given  # the batch itself stays the merged model's
                found.append(states[mask == 1])
        assert len(found) == len(expected) == 6
        assert sizes[task].left_out == {}
        for states in found:
            assert any(states.shape == each.shape and torch.equal(states, each) for each in expected.values())


@pytest.mark.parametrize("ready", [False, True])
def test_weights_are_those_of_experts_in_the_merged_vocabulary(
    own_union: tuple[Path, dict[str, Any]], ready: bool
) -> None:
    """Bit for bit, also where ready ids without a mask are read when their turn comes, and after a resume."""
    folder, recipe = own_union
    recipe["held_out"] = 0  # by which all could be as it was
    if ready:
        for task in ADDED:
            lines = [ids[:4] for ids in read_by(folder / "merged", TEXTS[task]) if len(ids) >= 4]
            save_file({"input_ids": torch.tensor(lines)}, folder / f"{task}.safetensors")
            recipe["experts"][task]["data"] = str(folder / f"{task}.safetensors")
    with pytest.raises(KeyboardInterrupt):
        ff.calibrate(recipe, device="cpu", progress=Stop(1), checkpoint_every=1)
    ff.calibrate(recipe, device="cpu", resume=True)
    for task in ADDED:  # the same experts with rows in the merged model's order, and its tokenizer
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / task)
        shutil.rmtree(folder / task)
        with_rows(model, ROWS[task]).save_pretrained(folder / task)
        save_tokenizer(folder / task, added=UNION)
    ff.calibrate(recipe, out=folder / "expected", device="cpu")
    found, expected = tensors(folder / "out"), tensors(folder / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    merged = tensors(folder / "merged")
    assert not torch.equal(found["model.layers.1.mlp.down_proj.weight"], merged["model.layers.1.mlp.down_proj.weight"])


def test_a_run_does_not_go_on_with_another_tokenizer_of_an_expert(own_union: tuple[Path, dict[str, Any]]) -> None:
    folder, recipe = own_union
    with pytest.raises(KeyboardInterrupt):
        ff.calibrate(recipe, device="cpu", progress=Stop(1), checkpoint_every=1)
    save_tokenizer(folder / "math", added=ADDED["math"][::-1])
    with pytest.raises(ResumeError, match=r"math/tokenizer\.json"):
        ff.calibrate(recipe, device="cpu", resume=True)


def test_ids_and_positions_stay_where_they_are() -> None:
    table = torch.tensor([2, -1, 0])
    config = transformers.T5Config(vocab_size=3, pad_token_id=1)
    batch = {"input_ids": torch.tensor([[0, 2, 1]]), "labels": torch.tensor([[2, -100]]), "pixels": torch.ones(1)}
    own = own_inputs(batch, table, config)
    assert own["input_ids"].tolist() == [[2, 0, 1]]  # padding that has no counterpart is the model's own
    assert own["labels"].tolist() == [[0, -100]]
    assert own["pixels"] is batch["pixels"]
    assert batch["input_ids"].tolist() == [[0, 2, 1]]
    gpt2 = transformers.GPT2Config(vocab_size=3)
    kinds = own_inputs({"token_type_ids": torch.tensor([[0, 2]])}, table, gpt2)
    assert kinds["token_type_ids"].tolist() == [[2, 0]]  # of the one table that it has
    bert = transformers.BertConfig(vocab_size=3)
    assert own_inputs({"token_type_ids": torch.tensor([[0, 1]])}, table, bert)["token_type_ids"].tolist() == [[0, 1]]


# ---- samples that are left out


def _foreign(folder: Path) -> None:
    """A tokenizer of a class that transformers has not."""
    path = folder / "tokenizer_config.json"
    code = {"tokenizer_class": "TheirTokenizer", "auto_map": {"AutoTokenizer": ["theirs.TheirTokenizer", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | code))


def test_the_class_of_an_experts_tokenizer_need_not_be_there(own_union: tuple[Path, dict[str, Any]]) -> None:
    """All that counts of it is in its tokenizer.json, texts included."""
    folder, recipe = own_union
    expected, batches, _ = loaded(recipe)
    for task in ADDED:
        _foreign(folder / task)
    models, found, sizes = loaded(recipe)
    for task in ADDED:
        assert torch.equal(models.tokens[task].table, expected.tokens[task].table)
        assert sizes[task].left_out == {}
        pairs = zip(found[task], batches[task], strict=True)
        assert all(torch.equal(one["input_ids"], other["input_ids"]) for one, other in pairs)
    (folder / "math" / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"math: AutoTokenizer cannot load it.*code of its own, which is never run"):
        loaded(recipe)


@pytest.mark.parametrize("change", ["split", "token", "vocabulary"])
def test_ids_need_no_tokenizer_that_can_be_loaded_where_files_say_that_they_are_the_same(
    own_union: tuple[Path, dict[str, Any]], change: str
) -> None:
    """As where a library is missing; texts need one, and so does what would have to be translated."""
    folder, recipe = own_union
    recipe["experts"] = {"math": recipe["experts"]["math"]}
    for name in ("base", "merged", "math"):
        (folder / name / "tokenizer.json").unlink()
        (folder / name / "tokenizer.model").write_bytes(b"of a library that is not there")
        _foreign(folder / name)
    shutil.copyfile(folder / "merged" / "tokenizer_config.json", folder / "math" / "tokenizer_config.json")
    path = folder / "math" / "tokenizer_config.json"
    values = {"split": {"legacy": True, "add_bos_token": False}, "token": {"pad_token": "<tool>"}, "vocabulary": {}}
    path.write_text(json.dumps(json.loads(path.read_text()) | values[change] | {"bos_token": {"content": "<s>"}}))
    if change == "vocabulary":
        (folder / "math" / "tokenizer.model").write_bytes(b"another")
    save_file({"input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])}, folder / "math.safetensors")
    with pytest.raises(DataError, match="AutoTokenizer cannot load it"):
        loaded(recipe)
    recipe["experts"]["math"]["data"] = str(folder / "math.safetensors")
    if change == "split":  # the expert has two rows less than the merged model
        models, batches, _ = loaded(recipe)
        size, rows = len(BASE) + len(UNION), len(BASE) + len(ADDED["math"])
        assert models.tokens["math"].table.tolist() == [row if row < rows else -1 for row in range(size)]
        assert sum(len(batch["input_ids"]) for batch in batches["math"]) == 2
    else:
        with pytest.raises(DataError, match="AutoTokenizer cannot load it"):
            loaded(recipe)


def test_samples_with_tokens_that_an_expert_lacks_are_left_out_and_told(own_union: tuple[Path, dict[str, Any]]) -> None:
    folder, recipe = own_union
    write_texts(folder / "math.jsonl", [*TEXTS["math"], "ab <|im_start|>"])
    recipe["samples"] = 7
    sizes = loaded(recipe)[2]
    ((reason, count),) = sizes["math"].left_out.items()
    assert count == 1
    assert sizes["math"].rows == 6
    assert reason.startswith(
        "with a token that expert math does not have, such as '<|im_start|>' (id 15) at position 2"
    )
    assert "line 7" in reason
    assert sizes["code"].left_out == {}
    told = [each for each in ff.plan(recipe, device="cpu").warnings if each.startswith("samples left out")]
    assert len(told) == 1
    assert "math 1 of 7 (1 with a token" in told[0]
    warnings = ff.calibrate(recipe, device="cpu").warnings
    assert told[0] in warnings
    assert not any("math 6 of 7" in each for each in warnings)


def test_more_than_half_are_refused(own_union: tuple[Path, dict[str, Any]]) -> None:
    folder, recipe = own_union
    write_texts(folder / "math.jsonl", ["ab", "<|im_start|>", "c <|im_start|>"])
    with pytest.raises(DataError, match=r"math.jsonl: 2 of 3 samples cannot be given to expert math .*2 with a token"):
        loaded(recipe)
    write_texts(folder / "math.jsonl", ["ab", "<|im_start|>"])
    assert sum(loaded(recipe)[2]["math"].left_out.values()) == 1


@pytest.mark.parametrize("ready", [False, True])
def test_ready_ids_are_dropped_where_a_token_is_lacking(own_union: tuple[Path, dict[str, Any]], ready: bool) -> None:
    folder, recipe = own_union
    ids = {"input_ids": torch.tensor([[4, 5], [15, 4], [4, 17]])}
    if ready:  # padding counts for nothing
        ids = {
            "input_ids": torch.tensor([[4, 15], [15, 4], [4, 17]]),
            "attention_mask": torch.tensor([[1, 0], [1, 1], [1, 1]]),
        }
    save_file(ids, folder / "math.safetensors")
    recipe["experts"]["math"]["data"] = str(folder / "math.safetensors")
    _, batches, sizes = loaded(recipe)
    assert [*sizes["math"].left_out.values()] == [1]
    assert "sample 1" in next(iter(sizes["math"].left_out))
    assert sum(len(batch["input_ids"]) for batch in batches["math"]) == 2


@pytest.mark.parametrize(
    ("other", "text", "told"),
    [
        ({"merges": MERGES[:1]}, "ab cd", r"token 1 is 'cd', by its own 'c'"),
        ({"added": ["a b"]}, "c a b", r"token 1 is 'a', by its own 'a b'"),
    ],
)
def test_texts_that_split_differently_are_left_out(
    own_union: tuple[Path, dict[str, Any]], other: dict[str, Any], text: str, told: str
) -> None:
    folder, recipe = own_union
    for name in ("merged", "math"):
        shutil.copy(folder / "base" / "model.safetensors", folder / name)
        shutil.copy(folder / "base" / "config.json", folder / name)
    save_tokenizer(folder / "merged")
    save_tokenizer(folder / "math", **{"added": [], **other})
    write_texts(folder / "math.jsonl", ["e f", "g h", text])
    recipe["experts"].pop("code")
    sizes = loaded(recipe)[2]
    ((reason, count),) = sizes["math"].left_out.items()
    assert count == 1
    assert reason.startswith("that the tokenizer of expert math splits differently, such as")
    assert "line 3" in reason
    assert re.search(told, reason), reason


# ---- other models, other inputs


def test_an_adapter_with_tokens_of_its_own(own_union: tuple[Path, dict[str, Any]]) -> None:
    """Its tokenizer and its resized embedding count; one without a tokenizer has the base's."""
    folder, recipe = own_union
    base, own = tensors(folder / "base"), tensors(folder / "math")
    saved = {name: own[name] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    made = {**factors(base, layers=2), **saved}
    adapter = write_adapter(folder / "adapter", made, modules_to_save=["embed_tokens", "lm_head"])
    save_tokenizer(adapter, added=ADDED["math"])
    write_adapter(folder / "plain", factors(base, layers=2))
    recipe["experts"]["math"]["model"] = str(adapter)
    recipe["experts"]["code"] |= {"model": str(folder / "plain"), "data": str(folder / "some.jsonl")}
    write_texts(folder / "some.jsonl", ["ab cd", "<tool>", "e"])
    models, batches, sizes = loaded(recipe)
    assert models.tokens["math"].folder == adapter
    assert models.tokens["code"].folder == folder / "base"
    assert sum(sizes["code"].left_out.values()) == 1
    assert sizes["math"].left_out == {}
    source = CheckpointSource(models.experts["math"], CPU, models.tokens["math"].table)
    expected = {
        tuple(saved["model.embed_tokens.weight"][ids].flatten().tolist()) for ids in read_by(adapter, TEXTS["math"])
    }
    for batch in batches["math"]:
        for states, mask in zip(source.stage_inputs(batch, 0, None)[0], batch["attention_mask"], strict=True):
            assert tuple(states[mask == 1].flatten().tolist()) in expected


def t5_job(folder: Path, start: str) -> dict[str, Any]:
    """The expert's vocabulary is in another order; its decoder starts with a token of a name."""
    order = [*BASE[:1], *BASE[:0:-1]]
    pads = {"pad_token_id": BASE.index("<pad>"), "decoder_start_token_id": BASE.index("<pad>"), "vocab_size": len(BASE)}
    models = pico.job("t5", 1)
    for name, model, tokens in (
        ("base", models.base, BASE),
        ("merged", models.merged, BASE),
        ("task0", models.experts["task0"], order),
    ):
        model = with_rows(model, [*range(len(BASE))])
        for key, value in pads.items():
            setattr(model.config, key, value)
        if name == "task0":
            model.config.pad_token_id, model.config.decoder_start_token_id = order.index("<pad>"), order.index(start)
        model.save_pretrained(folder / name)
        save_tokenizer(folder / name, tokens, wrapped=False)
    lines = [{"prompt": "ab c", "completion": "d e"}, {"prompt": "h", "completion": "cd ab f"}]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    experts = {"task0": {"model": str(folder / "task0"), "data": str(folder / "data.jsonl")}}
    return {
        "base_model": str(folder / "base"),
        "merged_model": str(folder / "merged"),
        "experts": experts,
        "max_length": 8,
    }


def test_targets_of_an_encoder_decoder_are_its_own(tmp_path: Path) -> None:
    recipe = t5_job(tmp_path, "<pad>")
    models, batches, _ = loaded(recipe)
    source = CheckpointSource(models.experts["task0"], CPU, models.tokens["task0"].table)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "task0")
    own = read_by(tmp_path / "task0", ["h", "cd ab f", "ab c", "d e"])
    (batch,) = batches["task0"]
    encoded = source.stage_inputs(batch, 0, None)[0]
    decoded = source.stage_inputs(batch, 1, encoded)[0]
    padding = model.config.pad_token_id
    for row, (prompt, completion) in enumerate((own[:2], own[2:])):
        inputs, targets = torch.tensor(prompt), torch.tensor([padding, *completion[:-1]])
        assert torch.equal(encoded[row, : len(prompt)], model.shared(inputs))
        assert torch.equal(decoded[row, : len(completion)], model.shared(targets))
    PlannedModels(Recipe.load(recipe), models)


def test_a_decoder_that_starts_with_another_token_is_refused(tmp_path: Path) -> None:
    recipe = Recipe.load(t5_job(tmp_path, "</s>"))
    with pytest.raises(ModelMismatchError, match="decoder_start_token_id"):
        PlannedModels(recipe, RecipeModels(recipe))


def test_positions_of_roberta_are_counted_from_its_own_padding(tmp_path: Path) -> None:
    order = [*BASE[:1], *BASE[:0:-1]]
    fresh = pico.job("roberta", 1)
    for name, model, tokens in (
        ("base", fresh.base, BASE),
        ("merged", fresh.merged, BASE),
        ("task0", fresh.experts["task0"], order),
    ):
        model = with_rows(model, [*range(len(BASE))])
        model.config.pad_token_id = tokens.index("<pad>")
        model.embeddings.padding_idx = model.embeddings.word_embeddings.padding_idx = tokens.index("<pad>")
        model.save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name, tokens)
    write_texts(tmp_path / "data.jsonl", ["ab c", "h g f e", "d"])
    experts = {"task0": {"model": str(tmp_path / "task0"), "data": str(tmp_path / "data.jsonl")}}
    recipe = {
        "base_model": str(tmp_path / "base"),
        "merged_model": str(tmp_path / "merged"),
        "experts": experts,
        "max_length": 32,
        "held_out": 0,
    }
    models, batches, _ = loaded(recipe)
    source = CheckpointSource(models.experts["task0"], CPU, models.tokens["task0"].table)
    assert differences(models.experts["task0"].config, models.merged.config)
    assert not differences(models.experts["task0"].config, models.merged.config, models.tokens["task0"].table)
    model = transformers.AutoModel.from_pretrained(tmp_path / "task0").eval()
    (batch,) = batches["task0"]
    hidden = source.stage_inputs(batch, 0, None)[0]
    for states, ids in zip(hidden, read_by(tmp_path / "task0", ["d", "ab c", "h g f e"]), strict=True):
        assert torch.equal(states[: len(ids)], model.embeddings(input_ids=torch.tensor([ids]))[0])
    PlannedModels(Recipe.load(recipe), models)


@pytest.mark.parametrize("having", ["merged", "math", "base"])
def test_messages_are_rendered_by_whoever_has_a_template_and_split_by_the_merged_model(
    own_union: tuple[Path, dict[str, Any]], having: str
) -> None:
    folder, recipe = own_union
    added = {"merged": UNION, "math": ADDED["math"], "base": []}
    save_tokenizer(
        folder / having, added=added[having], template="{% for m in messages %}<s> {{ m.content }} ab{% endfor %}"
    )
    (folder / "math.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "c <tool>"}]}))
    _, batches, sizes = loaded(recipe)
    (batch,) = batches["math"]
    assert batch["input_ids"].tolist() == [[1, EVERY.index("c"), EVERY.index("<tool>"), EVERY.index("ab")]]
    assert sizes["math"].left_out == {}


# ---- vocabularies that nobody can compare


@pytest.mark.parametrize(
    ("gone", "texts", "told"),
    [
        (
            ["math", "base"],
            ["<tool>"],
            r"found token id 17, expected 0 to 16 \(vocabulary of expert math\).*missing into .*math$",
        ),
        (
            ["math", "base", "merged"],
            None,
            r"id 17, expected 0 to 16 \(vocabulary of expert math\).*missing into .*math",
        ),
        (
            [],
            None,
            r"id 99, expected 0 to 17 \(vocabulary of the merged model\); ids are the merged model's: .*merged has",
        ),
    ],
)
def test_errors_say_whose_vocabulary_it_is(
    own_union: tuple[Path, dict[str, Any]], gone: list[str], texts: list[str] | None, told: str
) -> None:
    folder, recipe = own_union
    for name in gone:
        (folder / name / "tokenizer.json").unlink()
    data = folder / ("math.jsonl" if texts else "math.safetensors")
    if texts:
        write_texts(data, texts)
    else:
        save_file({"input_ids": torch.tensor([[4, 17 if gone else 99]])}, data)
    recipe["experts"]["math"]["data"] = str(data)
    with pytest.raises(DataError, match=told):
        loaded(recipe)
