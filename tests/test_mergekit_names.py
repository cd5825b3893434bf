"""What the models of a merge are called, and whom data is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from merges import CODE, EXPERTS, MATH, TIES, recipe_of, short

from featcal_fast.errors import RecipeError
from featcal_fast.inputs.names import find_name, model_names


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["x/Llama-3-8B-math", "x/Llama-3-8B-code"], ["math", "code"]),
        (["x/math_7b.ft", "y/code_7b.ft"], ["math", "code"]),
        (["x/Math-v1-7B", "y/math-V2-7b"], ["v1", "V2"]),
        (["org/Mistral-7B", "org/Mistral-7B-Instruct"], ["7B", "7B-Instruct"]),
        (["x/one", "x/one-more"], ["one", "one-more"]),
        (["x/alone-in-the-world"], ["alone-in-the-world"]),
        (["runs/math/final", "runs/code/final"], ["math", "code"]),
        (["runs/math/final", "runs/code/final", "runs/chat/last"], ["math-final", "code-final", "chat-last"]),
        (["org/math@v1", "org/math@v2"], ["v1", "v2"]),
        (["a/same", "a/same"], ["same", "same-2"]),
        (["---", "..-"], ["---", "..-"]),
        (["x/a.b", "x/a_b"], ["b", "b-2"]),
        (["/c/models--org--x-math/snapshots/abcdef", "/c/models--org--x-code/snapshots/123456"], ["math", "code"]),
        (["/a/m\x1b[31m", "/a/\u202en"], ["m[31m", "n"]),
        (["/" + "x" * 200, "/" + "x" * 200 + "y"], ["x" * 60, "x" * 60 + "-2"]),
        (["/\x07", "/\x08"], ["model", "model-2"]),
    ],
)
def test_short_names(paths: list[str], expected: list[str]) -> None:
    found = model_names([(path, path, None) for path in paths])
    assert [each.short for each in found] == expected


def test_short_names_are_those_of_adapters() -> None:
    found = model_names([("a", "org/chat", "org/lora-math"), ("b", "org/chat", "org/lora-code")])
    assert [each.short for each in found] == ["math", "code"]
    found = model_names([("a", "org/x-chat", "org/lora"), ("b", "org/x-plain", "org/lora")])
    assert [each.short for each in found] == ["chat", "plain"]
    found = model_names([("a", "base", "runs/math/last"), ("b", "base", "runs/code/last")])
    assert [each.short for each in found] == ["math", "code"]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("math", "math"),
        ("MATH", "math"),
        ("llama-3-8b-code", "code"),
        ("./src/Llama-3-8B-code", "code"),
        ("mat", "math"),
        ("my-math-data", "math"),
        (" code ", "code"),
    ],
)
def test_whom_a_name_means(key: str, expected: str) -> None:
    names = model_names([(f"./src/{name}", f"/x/src/{name}", None) for name in (MATH, CODE)])
    assert find_name(key, names, "data").short == expected


def test_a_short_name_inside_of_another_word_is_not_meant() -> None:
    names = model_names([(f"./src/tiny-{name}", f"/x/tiny-{name}", None) for name in "ab"])
    assert find_name("tiny_a.v2", names, "data").short == "a"
    with pytest.raises(RecipeError, match=r"data: found 'math', which is no model's name; expected one of a .*, b "):
        find_name("math", names, "data")


@pytest.mark.parametrize("key", ["", "physics", "src", "math and code", "o", "Llama-3-8B"])
def test_names_that_mean_nobody(key: str) -> None:
    names = model_names([(f"./src/{name}", name, None) for name in (MATH, CODE, "Llama-3-8B-coding")])
    with pytest.raises(RecipeError, match=r"data: found .*; expected one of .*\(\./src/Llama"):
        find_name(key, names, "data")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"data": {}},
            r"data: missing for math \(src/.*math\), code \(src/.*\); expected --data math=FILE .* --skip math",
        ),
        ({"data": {"math": "a"}}, r"data: missing for code \(src/Llama-3-8B-code\); expected --data code=FILE"),
        ({"data": {"math": "a", "physics": "b"}}, "data: found 'physics', which is no model's name"),
        ({"data": [("math", "a"), ("Llama-3-8B-math", "b")]}, "data: found two for math .*'b' too"),
        ({"skip": ["math"]}, "skip: found math .* for which there is data, too"),
        ({"data": {}, "skip": ["math", "code"]}, "skip: found all merged models"),
        ({"data": {"math": "a"}, "skip": ["physics"]}, "skip: found 'physics'"),
        ({"data": {"math": "a"}, "skip": ["code", "Code"]}, "skip: found code .* twice"),
        ({"data": {"math": ""}}, "data"),
        ({"base": "./nowhere"}, "base: './nowhere' is no folder"),
        ({"base": "~nobody-there/x"}, "base: .*names no home"),
    ],
)
def test_data_that_does_not_fit(options: dict[str, Any], message: str, work: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(work, **options)


def test_who_is_left_out(work: Path) -> None:
    for skip in (["MATH"], "math"):
        assert list(recipe_of(work, data={"code": "code.safetensors"}, skip=skip).experts) == ["code"]


def test_a_base_that_is_merged_too_is_told_of(work: Path) -> None:
    """linear merges its base_model as any other; who means what they were fine-tuned from has to say so."""
    models = [{"model": "src/base"}, *TIES["models"]]
    config = {"merge_method": "linear", "base_model": "src/base", "models": models}
    with pytest.raises(
        RecipeError, match=r"data: missing for base .* base_model src/base is one of .* linear merges.*--base"
    ):
        recipe_of(work, config)
    assert short(work, recipe_of(work, config, base="src/base")) == ("src/base", EXPERTS)


def test_data_of_the_hub_and_of_elsewhere(work: Path) -> None:
    recipe = recipe_of(work, data={"math": "org/texts:test", "code": work / "not-yet.jsonl"})
    assert [each.data for each in recipe.experts.values()] == ["org/texts:test", str(work / "not-yet.jsonl")]
