"""Snippets that say how a model is used: those for transformers are run, on every kind of model."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pico
import pytest
import transformers
from data_files import WORDS, save_image, save_tokenizer

from featcal_fast.reporting.usage import SERVED, python_quoted, shell_quoted, usage

TEXTS = "The capital of France is translate English to German: Hello! Hello, world! Paris is the of France. a cat dog"
VOCABULARY = tuple(dict.fromkeys((*WORDS, "<mask>", *TEXTS.split())))
MORE = {
    "bert masked": partial(pico._model, "BertForMaskedLM", "BertConfig", pico.TEXT),
    "bert tokens": partial(pico._model, "BertForTokenClassification", "BertConfig", pico.TEXT),
    "bert causal": partial(pico._model, "BertLMHeadModel", "BertConfig", {**pico.TEXT, "is_decoder": True}),
    "clip projected": partial(pico._model, "CLIPVisionModelWithProjection", "CLIPVisionConfig", pico.IMAGE),
    "gpt2 bare": partial(pico._model, "GPT2Model", "GPT2Config", pico.GPT2),
    "llama classifier": partial(pico._model, "LlamaForSequenceClassification", "LlamaConfig", pico.DECODER),
    "t5 bare": partial(pico._model, "T5Model", "T5Config", pico.T5),
}
KINDS = pico.KINDS | MORE
IMAGES = {"clip", "clip whole", "clip projected", "vit", "vit classifier", "dinov2"}


def _save(kind: str, folder: Path) -> Any:
    """A model of a kind, with what makes its inputs."""
    model = KINDS[kind]()
    model.save_pretrained(folder)
    if kind in IMAGES:
        size = {"height": 16, "width": 16}
        images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
        images.save_pretrained(folder)
        if kind == "clip whole":
            words = ("<pad>", "<s>", "</s>", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz"))
            tokenizer = transformers.CLIPTokenizer({word: number for number, word in enumerate(words)}, [], "</s>")
            transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    else:
        save_tokenizer(folder, VOCABULARY, mask_token="<mask>")
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_snippet_for_transformers_loads_the_model_and_calls_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / 'my "own" \\ model'
    model = _save(kind, folder)
    save_image(tmp_path / "image.png", (200, 10, 10))
    monkeypatch.chdir(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    title, code = usage(config, str(folder), [path.name for path in folder.iterdir()])[0]
    assert title == "transformers"
    found: dict[str, Any] = {}
    exec(code, found)
    assert type(found["model"]) is type(model)
    uncalled = kind in ("t5 bare", "clip projected")  # which want inputs of two kinds, or give embeddings
    assert bool(capsys.readouterr().out) != uncalled
    assert code.count("\n") < 10


@pytest.mark.parametrize("kind", ["clip whole", "llama", "t5", "vit", "bert"])
def test_without_what_makes_inputs_the_model_is_loaded_and_no_more(kind: str, tmp_path: Path) -> None:
    model = KINDS[kind]()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    ((_, code),) = usage(config, str(tmp_path), [path.name for path in tmp_path.iterdir()])
    found: dict[str, Any] = {}
    exec(code, found)
    assert type(found["model"]) is type(model)
    assert "okenizer" not in code
    assert "rocessor" not in code


def test_only_models_that_generate_are_served_and_evaluated() -> None:
    for kind in KINDS:
        model = KINDS[kind]()
        name = type(model).__name__
        titles = [title for title, _ in usage({**model.config.to_dict(), "architectures": [name]}, "out")]
        assert ("vLLM" in titles) == (name in SERVED)
        assert ("lm-evaluation-harness" in titles) == (name in SERVED or kind in ("t5", "flan-t5", "bert causal"))
    assert {name for name in transformers.__all__ if name.endswith(("ForCausalLM", "LMHeadModel"))} >= SERVED


PATHS = [
    "org/model",
    "/models/calibrated",
    "my model, the second",
    "a=b,c=[d]",
    "42",
    "-model",
    "$(touch x) `y` 'z' \"w\" \\ !",
    "two\nlines\t\x1b[2J",
    "\udcff not UTF-8",
    "größe‮.exe",
]


@pytest.mark.parametrize("path", PATHS)
def test_paths_are_quoted_for_python_and_for_a_shell(path: str) -> None:
    assert eval(python_quoted(path)) == path
    found = subprocess.run(["bash", "-c", f"printf '%s' {shell_quoted(path)}"], capture_output=True, check=True)
    assert found.stdout.decode(errors="surrogateescape") == path
    assert shell_quoted(path).isprintable()
    assert python_quoted(path).isprintable()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (_, code), (_, serve), (_, evaluate) = usage(config, path)
    assert f"folder = {python_quoted(path)}" in code
    for command, option in ((serve, 2), (evaluate, 4)):
        split = ["bash", "-c", f"printf '%s\\0' {command}"]
        words = subprocess.run(split, capture_output=True, check=True).stdout.decode(errors="surrogateescape")
        word = words.split("\0")[option]
        given = json.loads(word)["pretrained"] if word.startswith("{") else word.removeprefix("pretrained=")
        assert given == (f"./{path}" if path.startswith("-") else path)
        plain = re.fullmatch(r"pretrained=[^,=\[\]{}\"' ]+", word)
        assert option == 2 or word.startswith("{") or plain
    assert shlex.split(evaluate)[:2] == ["lm_eval", "--model"]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"architectures": None},
        {"architectures": []},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [["LlamaForCausalLM"]]},
        {"architectures": ["NoSuchModel"]},
        {"architectures": ["__version__"]},
        {"architectures": ["logging"]},
        {"architectures": ["os; import sys"]},
        {"architectures": ["L" * 10**6]},
    ],
)
def test_what_names_no_model_has_no_snippet(config: dict[str, Any]) -> None:
    assert usage(config, "out") == []


@pytest.mark.parametrize("kind", [None, [], {}, "no such", "bert", 7])
def test_a_kind_that_is_not_the_models_leads_to_its_own_class(kind: object) -> None:
    (_, code), *_ = usage({"architectures": ["LlamaForCausalLM"], "model_type": kind}, "out")
    assert "LlamaForCausalLM.from_pretrained" in code
