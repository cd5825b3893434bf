"""What was written is opened anew before it gets its name, and by `check`: whatever is broken in it is found."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from data_files import save_tokenizer
from runs import Case, Cases, contents
from safetensors.torch import load_file, save_file

import featcal_fast as ff
from featcal_fast.checkpoints import Checkpoint
from featcal_fast.errors import FeatCalError, OutputError
from featcal_fast.job import loads, run
from featcal_fast.job.check import NOT_LOADING, check
from featcal_fast.job.loads import check_loads

ONE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    pico.llama(2).save_pretrained(tmp_path / "merged", max_shard_size="100KB")
    return save_tokenizer(tmp_path / "merged")


@pytest.fixture
def out(merged: Path, tmp_path: Path) -> Path:
    """A copy, in several shards, with a tokenizer."""
    return Path(shutil.copytree(merged, tmp_path / "out"))


@pytest.mark.parametrize("kind", pico.KINDS)
def test_every_kind_loads_and_is_called(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the end: none has code that wants to know a value."""
    pico.KINDS[kind]().save_pretrained(tmp_path)
    monkeypatch.setattr(loads, "NO_VALUES", ())
    check_loads(tmp_path, Checkpoint(tmp_path, "merged model"))


def shard_of(out: Path, name: str) -> Path:
    index: dict[str, dict[str, str]] = json.loads((out / INDEX).read_text())
    return out / index["weight_map"][name]


def rewritten(out: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = shard_of(out, name)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def configured(out: Path, **values: object) -> None:
    config = json.loads((out / CONFIG).read_text())
    (out / CONFIG).write_text(json.dumps({**config, **values}))


Q, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"
BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a layer's tensor is gone": (lambda out: rewritten(out, Q, lambda t: t.pop(Q)), rf"holds tensor {Q}, but it does"),
    "a norm is gone, of the index too": (
        lambda out: (rewritten(out, NORM, lambda t: t.pop(NORM)), unlisted(out, NORM)),
        f"tensor '{NORM}' is missing, which the merged model has",
    ),
    "a tensor more": (
        lambda out: rewritten(out, Q, lambda t: t.update({"model.layers.1.mlp.extra": torch.ones(2)})),
        "found a tensor 'model.layers.1.mlp.extra', which the merged model has not",
    ),
    "another shape": (
        lambda out: rewritten(out, Q, lambda t: t.update({Q: t[Q][:, :32].contiguous()})),
        rf"tensor '{Q}' is torch.float32 of shape \(64, 32\), expected torch.float32 of shape \(64, 64\)",
    ),
    "another dtype": (
        lambda out: rewritten(out, Q, lambda t: t.update({Q: t[Q].bfloat16()})),
        f"tensor '{Q}' is torch.bfloat16 of shape",
    ),
    "no numbers": (
        lambda out: rewritten(out, Q, lambda t: t.update({Q: t[Q].to(torch.int8)})),
        "has dtype I8, expected plain floating-point weights",
    ),
    "a shard is gone": (lambda out: shard_of(out, Q).unlink(), "is missing, though model.safetensors.index.json"),
    "a shard is cut off": (lambda out: os.truncate(shard_of(out, Q), 20_000), "is not a complete safetensors file"),
    "a shard is empty": (lambda out: os.truncate(shard_of(out, Q), 0), "is not a complete safetensors file"),
    "a shard goes on": (lambda out: longer(shard_of(out, Q)), "is not a complete safetensors file"),
    "no index": (lambda out: (out / INDEX).unlink(), "has neither model.safetensors nor model.safetensors.index.json"),
    "the index is no JSON": (lambda out: (out / INDEX).write_text("{"), "is not valid JSON"),
    "no config": (lambda out: (out / CONFIG).unlink(), "config.json is missing"),
    "the config is no JSON": (lambda out: (out / CONFIG).write_bytes(b"\0" * 700), "config.json is not valid JSON"),
    "more layers": (lambda out: configured(out, num_hidden_layers=3), "model.layers.2.* is missing"),
    "fewer layers": (lambda out: configured(out, num_hidden_layers=1), "belongs to no module of LlamaForCausalLM"),
    "a larger vocabulary": (
        lambda out: configured(out, vocab_size=101),
        r"has shape \(100, 64\), expected \(101, 64\)",
    ),
    "no such class": (lambda out: configured(out, architectures=["LlamaForNothing"]), "expected one that transformers"),
    "other heads": (
        lambda out: configured(out, num_attention_heads=8, num_key_value_heads=8, head_dim=8),
        r"k_proj.weight has shape \(32, 64\), expected \(64, 64\)",
    ),
    "no tokenizer": (lambda out: (out / "tokenizer.json").unlink(), "'tokenizer.json' is missing, which the merged"),
    "no tokenizer's config": (lambda out: (out / "tokenizer_config.json").unlink(), "'tokenizer_config.json' is missi"),
}


def unlisted(out: Path, name: str) -> None:
    index = json.loads((out / INDEX).read_text())
    del index["weight_map"][name]
    (out / INDEX).write_text(json.dumps(index))


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_whatever_is_broken_is_named(breakage: str, merged: Path, out: Path) -> None:
    check_loads(out, Checkpoint(merged, "merged model"))
    change, said = BREAKAGES[breakage]
    change(out)
    with pytest.raises(FeatCalError, match=said) as error:
        check_loads(out, Checkpoint(merged, "merged model"))
    assert str(out) in str(error.value)


def test_a_forward_that_wants_to_know_a_value_is_not_held_against_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    pico.llama(1).save_pretrained(tmp_path)
    forward = LlamaForCausalLM.forward
    for reason in (
        lambda out: out.logits.sum().item(),
        lambda out: bool(out.logits.any()),
        lambda out: out.logits.tolist(),
    ):

        def looking(self: Any, input_ids: Any, reason: Any = reason) -> Any:
            return reason(forward(self, input_ids))

        monkeypatch.setattr(LlamaForCausalLM, "forward", looking)
        check_loads(tmp_path)


@pytest.mark.parametrize("cls", ["BertForMultipleChoice", "GPT2DoubleHeadsModel", "CLIPVisionModelWithProjection"])
def test_heads_that_take_more_are_not_held_against_a_model(cls: str, tmp_path: Path) -> None:
    kind = {"B": ("BertConfig", pico.TEXT), "G": ("GPT2Config", pico.GPT2), "C": ("CLIPVisionConfig", pico.IMAGE)}[
        cls[0]
    ]
    pico._model(cls, *kind).save_pretrained(tmp_path)
    check_loads(tmp_path)


def test_a_forward_that_the_merged_model_has_not_either_is_not_held_against_its_calibration(
    out: Path, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaModel

    monkeypatch.setattr(LlamaModel, "forward", lambda self, input_ids, **_: self.embed_tokens(input_ids) @ input_ids)
    check_loads(out, Checkpoint(merged, "merged model"))
    with pytest.raises(FeatCalError, match="LlamaForCausalLM that cannot be called"):
        check_loads(out)


# In a run, and by `check`


@pytest.mark.parametrize("breakage", ["another dtype", "config", "side file"])
def test_what_does_not_load_gets_no_name_and_a_run_can_go_on(
    breakage: str, cases: Cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case: Case = cases("llama")
    unbroken = run._check_unchanged

    def broken(work: Any, *more: Any) -> None:
        unbroken(work, *more)
        if breakage == "config":
            configured(work.model, num_hidden_layers=9)
        elif breakage == "side file":
            (work.model / "generation_config.json").unlink()
        else:
            tensors = load_file(work.model / ONE)
            save_file({name: value.half() for name, value in tensors.items()}, work.model / ONE)

    monkeypatch.setattr(run, "_check_unchanged", broken)
    with pytest.raises(
        OutputError, match=r"out was not written, because what is to become it does not load: "
    ) as error:
        case.run(tmp_path)
    assert "what is done is kept: --resume goes on from there" in str(error.value)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    if breakage != "another dtype":  # whose values are others, too
        case.resume(tmp_path)
        assert contents(tmp_path / "out").keys() == case.whole.keys()


def test_check_says_so_when_what_is_whole_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = pico.save(pico.job("llama", 1, layers=1), tmp_path)
    ff.calibrate(recipe)
    found = check(tmp_path / "out")
    assert (found.status, found.problems) == (0, [])
    assert " is whole, and loads; " in found.summary()
    path = tmp_path / "out" / "report.json"
    report = json.loads(path.read_text())
    configured(tmp_path / "out", num_hidden_layers=2)
    assert check(tmp_path / "out").status == 1
    report["contents"]["files"][CONFIG] = hashlib.sha256((tmp_path / "out" / CONFIG).read_bytes()).hexdigest()
    path.write_text(json.dumps(report))
    found = check(tmp_path / "out")
    assert (found.status, found.whole) == (NOT_LOADING, False)
    assert re.match(r"it does not load: .*model\.layers\.1\..* is missing", found.problems[0])
    assert " is whole, but does not load; as written: " in found.summary()
    for error in (RecursionError("deep"), OSError(5, "gone"), ValueError()):  # whatever is in a folder
        monkeypatch.setattr("featcal_fast.job.check.check_loads", _raising(error))
        assert check(tmp_path / "out").problems[0].startswith(f"it does not load: {type(error).__name__}")


def _raising(error: Exception) -> Callable[[Path], None]:
    def check_loads(out: Path) -> None:
        raise error

    return check_loads
