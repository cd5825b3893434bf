"""Recipes and settings: what is read, what is refused, and with which words."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import featcal_fast as ff
from featcal_fast.errors import RecipeError
from featcal_fast.layer.selection import check_patterns, matches

GOOD = {
    "base_model": "base",
    "merge": {"method": "task_arithmetic"},
    "experts": {"math": {"model": "math", "data": "math.jsonl"}},
    "out": "out",
}
EXPERT = {"model": "math", "data": "math.jsonl"}


def test_defaults_are_the_published_ones() -> None:
    recipe = ff.Recipe.load(GOOD)
    assert recipe.settings == ff.Settings(ridge_lambda=0.05, anchor_rho=2.0, teacher_alpha=0.3, covariance_eps=1e-8)
    assert (recipe.samples, recipe.max_length, recipe.seed) == (256, None, 0)
    assert recipe.merge == ff.MergeRecipe("task_arithmetic", 0.3)


def test_a_preset_gives_way_to_single_values() -> None:
    recipe = ff.Recipe.load({**GOOD, "settings": {"preset": "flan-t5", "anchor_rho": 1.5}})
    assert recipe.settings == ff.Settings(ridge_lambda=1e-5, anchor_rho=1.5, teacher_alpha=0.6)


def test_a_recipe_is_plain_data_again() -> None:
    values = ff.Recipe.load({**GOOD, "settings": {"ridge_lambda": 1}}).to_dict()
    assert values["settings"]["ridge_lambda"] == 1
    assert values["experts"]["math"]["model"] == "math"
    assert "merged_model" not in values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_modle": "x"}, "base_modle: unknown key; did you mean 'base_model'"),
        ({"settings": {"lambda": 1}}, "settings.lambda: unknown key; did you mean 'ridge_lambda'"),
        ({"settings": {"ridge_lambda": -1}}, "settings.ridge_lambda: found -1, expected a number from 0 to 1,000,000"),
        ({"settings": {"ridge_lambda": "big"}}, "settings.ridge_lambda: found 'big', expected a number"),
        ({"settings": {"teacher_alpha": 2}}, "settings.teacher_alpha: found 2, expected a number from 0 to 1"),
        ({"settings": {"covariance_eps": 0}}, "settings.covariance_eps: found 0"),
        ({"settings": {"calibrate_bias": "yes"}}, "settings.calibrate_bias: found 'yes', expected true or false"),
        ({"settings": {"moment_dtype": "int8"}}, "settings.moment_dtype: found 'int8'"),
        ({"settings": {"solve_dtype": "float16"}}, "settings.solve_dtype: found 'float16'"),
        ({"settings": {"preset": "gpt"}}, "settings.preset: found 'gpt', expected one of default, clip-demo"),
        ({"settings": ["a"]}, "settings: found .* expected a mapping"),
        ({"merge": {"method": "ties_arithmetic"}}, "merge.method: .* did you mean 'task_arithmetic'"),
        ({"merge": {"scaling": 0.3}}, "merge.method: missing"),
        ({"merge": None}, "found neither of merged_model and merge"),
        ({"merged_model": "x"}, "found both of merged_model and merge"),
        ({"experts": {}}, "experts: found none"),
        ({"experts": {"math": {"model": "m"}}}, "experts.math.data: missing"),
        ({"experts": {"math": "m"}}, "experts.math: found 'm', expected a mapping"),
        ({"experts": {"math": {"model": "m", "data": ""}}}, "experts.math.data: found ''"),
        ({"base_model": 7}, "base_model: found 7, expected a text"),
        ({"samples": 0}, "samples: found 0, expected a number from 1 to"),
        ({"samples": "many"}, "samples: found 'many', expected an integer"),
        ({"batch_size": True}, "batch_size: found True, expected an integer"),
        ({"settings": {"preset": [1]}}, r"settings.preset: found \[1\], expected one of default"),
        ({"settings": {1: 2}}, "settings.1: unknown key; expected one of preset, ridge_lambda"),
        ({"settings": {"anchor_rho": float("inf")}}, "settings.anchor_rho: found inf, expected a number"),
        ({"settings": {"anchor_rho": float("nan")}}, "settings.anchor_rho: found nan, expected a number"),
        (
            {"merge": {"method": "task_arithmetic", "scaling": float("nan")}},
            "merge.scaling: found nan, expected a number",
        ),
        ({"merge": {"method": "task_arithmetic", "scaling": "a"}}, "merge.scaling: found 'a', expected a number"),
        ({"merge": {"method": "task_arithmetic", "scaling": 1e30}}, r"merge.scaling: found 1e\+30, expected a number"),
        ({"merge": {"method": "zzz"}}, "merge.method: found 'zzz', expected one of average, task_arithmetic, .*, tsv$"),
        ({"merge": 5}, "merge: found 5, expected a mapping"),
        ({"zzz": 1}, "^zzz: unknown key; expected one of base_model, experts, merged_model, merge, out, settings"),
        ({"k" * 10**6: 1}, "^'kkk.*': unknown key; expected one of"),
        ({None: 1}, "^None: unknown key"),
        ({"settings": {"zzz": 1}}, "settings.zzz: unknown key; expected one of preset, ridge_lambda"),
        (
            {"settings": {"anchor_rho": 1e300}},
            r"settings.anchor_rho: found 1e\+300, expected a number from -100 to 100",
        ),
        ({"settings": {"anchor_rho": "1" * 50 + "e1"}}, "settings.anchor_rho: found '111.*', expected a number"),
        ({"settings": {"ridge_lambda": 10**400}}, "settings.ridge_lambda: found 100000000000000000.*0000, expected"),
        ({"settings": {"ridge_lambda": True}}, "settings.ridge_lambda: found True, expected a number"),
        ({"settings": {"covariance_eps": 1e-30}}, "settings.covariance_eps: found 1e-30, expected a number from 1e-12"),
        (
            {"settings": {"forward_dtype": ["auto"]}},
            r"settings.forward_dtype: found \['auto'\], expected one of auto, bfl",
        ),
        ({"settings": {"compile_blocks": 1}}, "settings.compile_blocks: found 1, expected true, false or null"),
        ({"settings": {"include": "("}}, r"settings.include: '\(' is not a regular expression: missing \)"),
        ({"settings": {"include": "(" * 10**5}}, "settings.include: '\\(\\(.*'"),
        ({"settings": {"exclude": ["a", 1]}}, "settings.exclude: found .* expected a regular expression or a list of"),
        ({"settings": {"include": ["a"] * 1001}}, "settings.include: found 1001 name suffixes, expected at most 1000"),
        ({"settings": 5}, "settings: found 5, expected a mapping"),
        ({"seed": 2**64}, "seed: found 18446744073709551616, expected a number from 0 to 9,223,372,036,854,775,807"),
        ({"seed": -1}, "seed: found -1"),
        ({"seed": 10**5000}, "seed: found <int of too many digits to show>"),
        ({"samples": 2**31}, "samples: found 2147483648, expected a number from 1 to 2,147,483,647"),
        ({"samples": 1.5}, "samples: found 1.5, expected an integer"),
        ({"expert_storage": ["disk"]}, r"expert_storage: found \['disk'\], expected a text"),
        ({"experts": {1: EXPERT, "1": EXPERT}}, "experts: found the name '1' twice"),
        ({"experts": {None: EXPERT}}, "experts: found the name None, expected a text"),
        ({"experts": {True: EXPERT}}, "experts: found the name True, expected a text"),
        ({"experts": {"": EXPERT}}, "experts: found the name '', expected a text"),
        ({"experts": {"a\x1b[31m": EXPERT}}, r"experts: found the name 'a\\x1b\[31m', expected a text"),
        ({"experts": {"a\ud800": EXPERT}}, "experts: found the name"),
        ({"experts": {"a" * 201: EXPERT}}, "experts: found the name 'aaa.*', expected a text of 1 to 200 characters"),
        ({"experts": {("a",): EXPERT}}, r"experts: found the name \('a',\), expected a text"),
        ({"experts": None}, "experts: found None, expected a mapping"),
        ({"experts": {"math": {**EXPERT, "modle": 1}}}, "experts.math.modle: unknown key; did you mean 'model'"),
        ({"experts": {"math": {**EXPERT, "samples": 0}}}, "experts.math.samples: found 0, expected a number from 1"),
        ({"experts": {"math": {**EXPERT, "samples": "4"}}}, "experts.math.samples: found '4', expected an integer"),
    ],
)
def test_mistakes_are_named(change: dict, message: str) -> None:
    began = time.process_time()
    with pytest.raises(RecipeError, match=message) as error:
        ff.Recipe.load({**GOOD, **change})
    assert len(str(error.value)) < 1000
    assert time.process_time() - began < 2


def test_an_expert_may_be_called_by_a_number() -> None:
    assert list(ff.Recipe.load({**GOOD, "experts": {1: EXPERT, "2": EXPERT}}).experts) == ["1", "2"]


EXPERTS: dict[str, Any] = {"math": ff.ExpertRecipe("math", "math.jsonl")}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ff.Recipe(5, EXPERTS, "merged"), "base_model: found 5, expected a text"),
        (lambda: ff.Recipe("base", ["math"], "merged"), "experts: found ."),
        (lambda: ff.Recipe("base", {"math": "math"}, "merged"), "experts.math: found 'math', expected an ExpertRecipe"),
        (lambda: ff.Recipe("base", {1: EXPERTS["math"]}, "merged"), "experts: found the name 1"),
        (lambda: ff.Recipe("base", {"a": ff.ExpertRecipe(5, 5)}, "merged"), "experts.a.model: found 5"),
        (lambda: ff.Recipe("base", {"a": ff.ExpertRecipe("a", "b", True)}, "m"), "experts.a.samples: found True"),
        (lambda: ff.Recipe("base", EXPERTS, merge="average"), "merge: found 'average', expected a MergeRecipe"),
        (lambda: ff.Recipe("base", EXPERTS, merge=ff.MergeRecipe(5)), "merge.method: found 5"),
        (lambda: ff.Recipe("base", EXPERTS, "merged", settings={}), "settings: found {}, expected a Settings"),
        (lambda: ff.Recipe("base", EXPERTS, "merged", out=Path("a")), "out: found .*, expected a text"),
        (lambda: ff.Recipe("base", EXPERTS, "merged", root=5), "root: found 5, expected a path"),
        (lambda: ff.Recipe("base", EXPERTS, "merged", seed=None), "seed: found None, expected an integer"),
        (lambda: ff.Settings(ridge_lambda=None), "settings.ridge_lambda: found None"),
        (lambda: ff.Settings(ridge_lambda=1j), "settings.ridge_lambda: found 1j"),
        (lambda: ff.Settings(solve_dtype=5), "settings.solve_dtype: found 5, expected one of auto"),
        (lambda: ff.Settings(include={"a"}), "settings.include: found {'a'}"),
        (lambda: ff.Settings.from_dict([1]), r"settings: found \[1\], expected a mapping"),
    ],
)
def test_mistakes_made_in_python_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()


NAMES = [f"model.layers.{layer}.mlp.up_proj" for layer in range(4)]


def test_patterns_that_take_long_on_names_are_refused() -> None:
    settings = ff.Settings(include="(([a-z0-9_.])+)+!")
    with pytest.raises(RecipeError, match=r"settings.include: '.*': it takes longer than 1 s; write a simpler one"):
        check_patterns(NAMES, settings)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (r".*\.1\..*", [1]),
        ("up_proj", []),  # not all of the name
        (("up_proj",), [0, 1, 2, 3]),
        (("mlp.up_proj", "x"), [0, 1, 2, 3]),
        (("p_proj", "model"), []),  # no whole part, not the last
        (("model.layers.2.mlp.up_proj",), [2]),
    ],
)
def test_what_patterns_match(patterns: Any, expected: list[int]) -> None:
    assert [index for index, name in enumerate(NAMES) if matches(name, patterns)] == expected


@pytest.mark.parametrize("patterns", ["up_proj", ["up_proj", "model"]])
def test_patterns_that_match_nothing_are_refused(patterns: Any) -> None:
    with pytest.raises(RecipeError, match=r"settings.exclude: '(up_proj|model)' matches no module"):
        check_patterns(NAMES, ff.Settings(exclude=patterns))


def test_files_that_are_no_recipe_are_named(tmp_path: Path) -> None:
    with pytest.raises(ff.FeatCalError, match=r"none.yaml is not a file"):
        ff.Recipe.load(tmp_path / "none.yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text("a: [")
    with pytest.raises(ff.FeatCalError, match=r"recipe.yaml is not valid YAML"):
        ff.Recipe.load(path)
    path.write_text("- a")
    with pytest.raises(ff.FeatCalError, match=r"recipe.yaml: found list, expected a mapping"):
        ff.Recipe.load(path)
    path.write_text("base_model: x")
    with pytest.raises(ff.FeatCalError, match=r"recipe.yaml: experts: missing"):
        ff.Recipe.load(path)


def test_numbers_that_yaml_takes_for_texts_are_numbers() -> None:
    text = "{settings: {ridge_lambda: 1e-5}, merge: {method: task_arithmetic, scaling: 3e-1}}"
    recipe = ff.Recipe.load({**GOOD, **yaml.safe_load(text)})
    assert recipe.settings.ridge_lambda == 1e-5
    assert recipe.merge is not None
    assert recipe.merge.scaling == 0.3
