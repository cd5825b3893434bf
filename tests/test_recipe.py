"""Recipes and settings: what is read, what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import featcal_fast as ff

GOOD = {
    "base_model": "base",
    "merge": {"method": "task_arithmetic"},
    "experts": {"math": {"model": "math", "data": "math.jsonl"}},
    "out": "out",
}


def test_defaults_are_the_published_ones() -> None:
    recipe = ff.Recipe.load(GOOD)
    assert recipe.settings == ff.Settings(ridge_lambda=0.05, anchor_rho=2.0, teacher_alpha=0.3, covariance_eps=1e-8)
    assert (recipe.samples, recipe.max_length, recipe.seed) == (256, 512, 0)
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
        ({"settings": {"ridge_lambda": -1}}, "settings.ridge_lambda: found -1, expected 0 or more"),
        ({"settings": {"ridge_lambda": "big"}}, "settings.ridge_lambda: found 'big', expected a number"),
        ({"settings": {"teacher_alpha": 2}}, "settings.teacher_alpha: found 2, expected a value in"),
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
        ({"samples": 0}, "samples: found 0, expected 1 or more"),
        ({"samples": "many"}, "samples: found 'many', expected an integer"),
        ({"batch_size": True}, "batch_size: found True, expected an integer"),
        ({"settings": {"preset": [1]}}, r"settings.preset: found \[1\], expected one of default"),
        ({"settings": {1: 2}}, "settings.1: unknown key; did you mean"),
        ({"settings": {"anchor_rho": float("inf")}}, "settings.anchor_rho: found inf, expected a number"),
        ({"settings": {"anchor_rho": float("nan")}}, "settings.anchor_rho: found nan, expected a number"),
        (
            {"merge": {"method": "task_arithmetic", "scaling": float("nan")}},
            "merge.scaling: found nan, expected a number",
        ),
        ({"merge": {"method": "task_arithmetic", "scaling": "a"}}, "merge.scaling: found 'a', expected a number"),
    ],
)
def test_mistakes_are_named(change: dict, message: str) -> None:
    with pytest.raises(ff.FeatCalError, match=message):
        ff.Recipe.load({**GOOD, **change})


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
