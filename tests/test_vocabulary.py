"""Tokenizers beside the merged model's: which are the same, and which of their tokens are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from data_files import TEMPLATE
from unions import BASE, read_by, save_tokenizer, write_texts

from featcal_fast.data import vocabulary
from featcal_fast.data.batches import load_batches
from featcal_fast.data.left_out import LeftOut
from featcal_fast.data.vocabulary import Vocabularies
from featcal_fast.models.tokens import OwnTokens, make_table, own_inputs


def test_tables_are_by_text() -> None:
    assert make_table({"a": 0, "b": 1}, {"b": 0, "a": 1}, 2, 2) == [1, 0]
    assert make_table({"a": 0, "b": 1}, {"a": 0, "b": 5}, 2, 5) == [0, -1]  # it has no row for it
    assert make_table({"a": 0, "A": 0}, {"A": 3}, 1, 4) == [3]  # two texts of one id
    assert make_table({"a": 0}, {"a": 0}, 3, 3) == [0, 1, 2]  # rows of no token
    assert make_table({"a": 0}, {"a": 0, "b": 1}, 3, 2) == [0, -1, -1]  # of a token of another kind, and of none
    assert make_table({"a": 0, "far": 9}, {"a": 0, "far": 1}, 1, 2) == [0]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_tokenizers_of_any_kind_are_compared_by_text(tmp_path: Path, kind: str) -> None:
    tokens = [*BASE[:4], *(("▁" + each if kind == "unigram" else each) for each in BASE[4:])]
    order = [*tokens[:4], *tokens[:3:-1]]
    merged = save_tokenizer(tmp_path / "merged", tokens, ["<new>"], kind=kind)
    other = save_tokenizer(tmp_path / "other", order, kind=kind)
    own = Vocabularies(merged, len(tokens) + 1).of(other, len(tokens), "expert math")
    assert own.table is not None
    assert own.table.tolist() == [*(order.index(each) for each in tokens), -1]
    assert own.lacking == {len(tokens): "<new>"}
    assert own.label == "expert math"
    data = write_texts(tmp_path / "data.jsonl", ["ab cd a", "h g", "abcd <new>"])
    left_out, config = LeftOut(own, transformers.LlamaConfig()), transformers.LlamaConfig(vocab_size=len(tokens))
    (batch,) = load_batches(data, folders=[merged], left_out=left_out)
    found = own_inputs(batch, own.table, config)["input_ids"]
    for row, ids in enumerate(read_by(other, ["h g", "ab cd a"])):
        assert found[row, : len(ids)].tolist() == ids
    assert [*left_out.by_reason().values()] == [1]
    assert len(found) == 2


def test_equal_tokenizers_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "read_vocabulary", lambda *_: pytest.fail("it was read"))
    merged, other = save_tokenizer(tmp_path / "merged"), save_tokenizer(tmp_path / "other", template=TEMPLATE)
    config = json.loads((other / "tokenizer_config.json").read_text())
    config |= {"model_max_length": 7, "padding_side": "left", "chat_template": "x", "name_or_path": "elsewhere"}
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    (other / "trainer_state.json").write_text("{}")
    (other / "config.json").write_text("{}")  # which an adapter's folder need not have
    known = Vocabularies(merged, 4)
    assert known.of(other, 4, "it") == OwnTokens("it", other, merged)
    assert known.of(other, 9, "it").table is None
    fewer = known.of(other, 3, "it")
    assert fewer.same
    assert fewer.table is not None
    assert fewer.table.tolist() == [0, 1, 2, -1]
    assert not known.of(None, 4, "it").known
    assert not Vocabularies(None, 4).of(other, 4, "it").known


@pytest.mark.parametrize("change", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.txt"])
def test_tokenizers_that_may_differ_are_read(tmp_path: Path, change: str) -> None:
    merged, other = save_tokenizer(tmp_path / "merged"), save_tokenizer(tmp_path / "other")
    path = other / change
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**values, "x": 1} if change == "tokenizer_config.json" else values))
    own = Vocabularies(merged, len(BASE)).of(other, len(BASE), "it")
    assert not own.same
    assert own.table is None
    assert own.known
