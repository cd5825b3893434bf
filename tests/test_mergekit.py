"""From a folder in mergekit's form to a recipe: what is mapped, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from merges import CODE, DATA, EXPERTS, MATH, PAIR, TIES, configure, recipe_of, short

import featcal_fast as ff
from featcal_fast.errors import RecipeError

ADAPTERS = {"math": "src/lora-math", "code": "src/lora-code"}
ADAPTED = [{"model": f"src/base+src/lora-{task}"} for task in ("math", "code")]
INSTRUCT = {task: f"src/Llama-3-8B-chat+src/lora-{task}" for task in ("math", "code")}
# Configs, and the base and the experts that they amount to.
FORMS: dict[str, tuple[Any, str, dict[str, str]]] = {
    "models": (TIES, "src/base", EXPERTS),
    "the base among them": ({**TIES, "models": [{"model": "src/base"}, *TIES["models"]]}, "src/base", EXPERTS),
    "the base in other words": (
        {**TIES, "models": [{"model": "./src/../src/base"}, *TIES["models"]]},
        "src/base",
        EXPERTS,
    ),
    "some twice": ({**TIES, "models": TIES["models"] * 2}, "src/base", EXPERTS),
    "an unknown method": ({**TIES, "merge_method": "of_tomorrow"}, "src/base", EXPERTS),
    "task arithmetic without a base": ({"merge_method": "linear", "models": TIES["models"]}, "out/merged", EXPERTS),
    "karcher": ({"merge_method": "karcher", "models": TIES["models"]}, "out/merged", EXPERTS),
    "slerp": (
        {"merge_method": "slerp", "base_model": f"src/{MATH}", "models": TIES["models"]},
        "out/merged",
        EXPERTS,
    ),
    "slerp that adds its base": (
        {"merge_method": "slerp", "base_model": f"src/{CODE}", "models": TIES["models"][:1]},
        "out/merged",
        EXPERTS,
    ),
    "nearswap": ({**TIES, "merge_method": "nearswap", "base_model": f"src/{CODE}"}, "out/merged", EXPERTS),
    "arcee_fusion": ({**TIES, "merge_method": "arcee_fusion", "base_model": f"src/{CODE}"}, "out/merged", EXPERTS),
    "one slice": (
        {"merge_method": "slerp", "base_model": f"src/{MATH}", "slices": [{"sources": PAIR}]},
        "out/merged",
        EXPERTS,
    ),
    "one slice with a base of its own": (
        {
            "merge_method": "ties",
            "slices": [{"sources": [*PAIR, {"model": "src/base", "layer_range": [0, 2]}], "base_model": "src/base"}],
        },
        "src/base",
        EXPERTS,
    ),
    "modules": (
        {"merge_method": "ties", "base_model": "src/base", "modules": {"default": {"models": TIES["models"]}}},
        "src/base",
        EXPERTS,
    ),
    "several modules": (
        {
            "merge_method": "ties",
            "base_model": "src/base",
            "modules": {"a": {"models": TIES["models"]}, "b": {"slices": [{"sources": PAIR[::-1]}]}},
        },
        "src/base",
        EXPERTS,
    ),
    "mappings": (
        {
            "merge_method": "ties",
            "base_model": {"model": {"path": "src/base", "revision": None}},
            "models": [
                {
                    "model": {
                        "model": {"path": f"src/{MATH}"},
                        "lora": None,
                        "override_architecture": "LlamaForCausalLM",
                    }
                },
                {"model": {"model": f"src/{CODE}"}},
            ],
        },
        "src/base",
        EXPERTS,
    ),
    "adapters of the base": ({**TIES, "models": ADAPTED}, "src/base", ADAPTERS),
    "adapters in mappings": (
        {
            **TIES,
            "models": [{"model": {"model": {"path": "src/base"}, "lora": {"path": f"src/lora-{t}"}}} for t in DATA],
        },
        "src/base",
        ADAPTERS,
    ),
    "adapters of one model and no base": ({"merge_method": "linear", "models": ADAPTED}, "src/base", ADAPTERS),
    "adapters of another model": (
        {**TIES, "models": [{"model": each} for each in INSTRUCT.values()]},
        "src/base",
        INSTRUCT,
    ),
    "hub ids": (
        {
            **TIES,
            "base_model": "org/base@v1",
            "models": [{"model": "org/x-math@main"}, {"model": "org/x-code+org/lora"}],
        },
        "org/base@v1",
        {"x-math": "org/x-math@main", "lora": "org/x-code+org/lora"},
    ),
    "everything else": (
        {
            **TIES,
            "dtype": "bfloat16",
            "out_dtype": "float16",
            "chat_template": "auto",
            "parameters": {"weight": [0, 0.5], "t": [{"filter": "mlp", "value": 1}]},
            "tokenizer": {
                "source": "union",
                "tokens": {"<x>": {"source": {"kind": "model_token", "model": "src/base"}}},
            },
            "name": "of-a-multi-merge",
            "written_by": {"a tool": "5", "version": [1, 2]},
        },
        "src/base",
        EXPERTS,
    ),
    "a tokenizer's source": ({**TIES, "tokenizer_source": f"src/{MATH}"}, "src/base", EXPERTS),
    "aliases and merged keys": (
        f"""
x: &defaults {{parameters: {{weight: 0.5, density: 1e-1}}}}
own: &math src/{MATH}
merge_method: ties
base_model: src/base
models:
  - <<: *defaults
    model: *math
  - {{<<: *defaults, model: src/{CODE}}}
parameters: {{normalize: yes, int8_mask: on, t: 1:30, when: 2024-01-01, lambda: .5, x: 0x1F, y: 1_000}}
dtype: ~
""",
        "src/base",
        EXPERTS,
    ),
    "windows and a byte order mark": (
        "\ufeffmerge_method: ties\r\nbase_model: src/base\r\nmodels:\r\n"
        f"- model: src/{MATH}  # the first\r\n- model: src/{CODE}\r\n",
        "src/base",
        EXPERTS,
    ),
    "passthrough of one": (
        {"merge_method": "passthrough", "models": TIES["models"][:1]},
        "out/merged",
        {MATH: f"src/{MATH}"},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_mapped(form: str, work: Path) -> None:
    config, base, experts = FORMS[form]
    data = dict.fromkeys(experts, "math.safetensors")
    recipe = recipe_of(work, config, data=data, out="new")
    assert short(work, recipe) == (base, experts)
    assert list(recipe.experts) == list(experts)  # in the config's order, by which sums are made
    assert recipe.merged_model == str(work / "out" / "merged")
    assert recipe.out == str(work / "new")
    assert {each.data for each in recipe.experts.values()} == {str(work / "math.safetensors")}
    assert recipe.settings == ff.PRESETS["llm"]


SLICED = {
    "merge_method": "passthrough",
    "slices": [{"sources": [{**PAIR[0], "layer_range": [0, 1]}]}, {"sources": PAIR[1:]}],
}
REFUSED: dict[str, tuple[Any, str]] = {
    "a frankenmerge": (
        SLICED,
        rf"2 slices.*slices\[0\] \(layers \[0, 1\] of src/{MATH}\), slices\[1\] \(layers \[0, 2\] of src/{CODE}\)",
    ),
    "slices that lie as in the models": (
        {"merge_method": "ties", "slices": [{"sources": PAIR}, {"sources": PAIR}]},
        r"list these under `models:` instead",
    ),
    "the first layers": (
        {"merge_method": "linear", "slices": [{"sources": [{**each, "layer_range": [0, 1]} for each in PAIR]}]},
        r"slices\[0\] cannot be mapped: it takes layers 0 to 1 of src/.*, but the merged model has 2 layers",
    ),
    "the last layers": (
        {"merge_method": "linear", "slices": [{"sources": [{**each, "layer_range": [1, 2]} for each in PAIR]}]},
        r"slices\[0\] cannot be mapped: it takes layers 1 to 2 of",
    ),
    "shifted layers": (
        {"merge_method": "linear", "slices": [{"sources": [PAIR[0], {**PAIR[1], "layer_range": [1, 3]}]}]},
        rf"it takes layers 1 to 3 of src/{CODE}, expected layers 0 to 2",
    ),
    "modules of other models": (
        {**TIES, "models": None, "modules": {"a": {"models": TIES["models"]}, "b": {"models": TIES["models"][:1]}}},
        r"modules.b is made of other models \(src/Llama-3-8B-math\) than modules.a",
    ),
    "no models": ({"merge_method": "ties", "base_model": "src/base"}, "found none of models, slices, modules"),
    "models and slices": (
        {**TIES, "slices": [{"sources": PAIR}]},
        "found models and slices of models, slices, modules",
    ),
    "no method": ({"models": TIES["models"]}, "merge_method: found None"),
    "a key that may name a model": ({**TIES, "second_base": "org/other"}, "second_base: unknown key.*org/other"),
    "such a key deeper down": ({**TIES, "more": {"x": [{"lora": "org/a"}]}}, "more: unknown key.*org/a"),
    "such a key of a model": (
        {**TIES, "models": [{**TIES["models"][0], "lora": "org/a"}]},
        r"models\[0\].lora: unknown",
    ),
    "a misspelt key of a reference": (
        {**TIES, "models": [{"model": {"model": "src/base", "adapter": "x"}}]},
        r"models\[0\].model.adapter: unknown key; expected one of model, lora",
    ),
    "keys twice": ("merge_method: ties\nmerge_method: slerp\n", "merge_method.*twice"),
    "a mixture of experts": ({"base_model": "a/b", "experts": [{"source_model": "a/c"}]}, "mergekit-moe"),
    "several merges": (f"name: a\n{yaml.safe_dump(TIES)}---\n{yaml.safe_dump(TIES)}", "mergekit-multi"),
    "the base only": ({**TIES, "models": [{"model": "src/base"}]}, "nothing is merged but the base model"),
    "the merged model itself": ({**TIES, "models": [{"model": "out/merged"}]}, "which is the merged model itself"),
    "a path that leads nowhere": (
        {**TIES, "models": [{"model": "./nowhere"}]},
        r"'./nowhere' is no folder \(looked for it in /.* or /",
    ),
    "an adapter that is nowhere": (
        {**TIES, "models": [{"model": "src/base+./no"}]},
        r"'./no' of 'src/base\+./no' is no folder",
    ),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_refused(form: str, work: Path) -> None:
    config, message = REFUSED[form]
    with pytest.raises(RecipeError, match=f"mergekit_config.yml.*{message}"):
        recipe_of(work, config)


def test_more_layers_in_a_source_are_found(work: Path) -> None:
    config = json.loads((work / "src" / CODE / "config.json").read_text())
    (work / "deep").mkdir()
    (work / "deep" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    sources = [PAIR[0], {"model": "deep", "layer_range": [0, 2]}]
    with pytest.raises(RecipeError, match=r"takes layers 0 to 2 of deep, but deep has 3 layers"):
        recipe_of(work, {"merge_method": "linear", "slices": [{"sources": sources}]})


def test_a_folder_without_a_config(work: Path) -> None:
    (work / "out" / "merged" / "mergekit_config.yml").unlink()
    with pytest.raises(RecipeError, match=r"mergekit_config.yml is missing.*--no-write-model-card: put the YAML"):
        recipe_of(work)
    (work / "out" / "merged" / "mergekit_moe_config.yml").touch()
    with pytest.raises(RecipeError, match=r"mergekit_moe_config.yml: mergekit-moe made this model"):
        recipe_of(work)


def test_relative_paths_start_here_or_above_the_folder(
    work: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    data = {task: work / f"{task}.safetensors" for task in DATA}
    assert short(work, ff.from_mergekit(work / "out" / "merged", data)) == ("src/base", EXPERTS)
    (elsewhere / "src" / MATH).mkdir(parents=True)  # holds no model
    assert short(work, ff.from_mergekit(work / "out" / "merged", data)) == ("src/base", EXPERTS)
    shutil.copy(work / "src" / MATH / "config.json", elsewhere / "src" / MATH)
    found = ff.from_mergekit(work / "out" / "merged", data)
    assert found.experts["math"].model == str(elsewhere / "src" / MATH)
    monkeypatch.setenv("HOME", str(work))
    configure(work, {**TIES, "models": [{"model": f"~/src/{name}"} for name in (MATH, CODE)]})
    assert short(work, ff.from_mergekit(work / "out" / "merged", data)) == ("src/base", EXPERTS)


@pytest.mark.parametrize(
    ("config", "preset"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "llm"),
        ({"model_type": "of-tomorrow", "architectures": ["OfTomorrowForCausalLM"]}, "llm"),
        ({"model_type": "qwen3_moe"}, "llm"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "flan-t5"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "default"),
        ({"model_type": "clip_vision_model", "architectures": 5}, "default"),
        ({}, "default"),
    ],
)
def test_settings_are_those_of_the_models_kind(config: dict[str, Any], preset: str, work: Path) -> None:
    (work / "out" / "merged" / "config.json").write_text(json.dumps(config))
    assert recipe_of(work).settings == ff.PRESETS[preset]


def test_a_merge_of_the_hub_or_in_its_cache(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = work / "hub" / "models--org--merged" / "snapshots" / "abc"
    shutil.copytree(work / "out" / "merged", snapshot)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    cached = str(work / "hub" / "models--org--merged")
    for given, kept in (("org/merged", "org/merged"), ("hub/models--org--merged", cached), (str(snapshot), None)):
        recipe = ff.from_mergekit(given, DATA, out="new")
        assert recipe.merged_model == (kept or given)
        assert short(work, recipe) == ("src/base", EXPERTS)
    report = ff.calibrate(ff.from_mergekit("org/merged", DATA), out="new", device="cpu")
    assert report.inputs.models["merged model"].revision == "abc"
    assert (
        "| merged | [org/merged](https://huggingface.co/org/merged) at `abc` |"
        in (work / "new" / "README.md").read_text()
    )
    assert (work / "new" / "mergekit_config.yml").is_file()
