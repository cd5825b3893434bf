"""mergekit configs: what they are mapped to, with models that are only looked for, and the recipe that is written."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import yaml

import featcal_fast as ff
from featcal_fast.inputs.mergekit import _Inputs, _read_config
from featcal_fast.inputs.names import model_names
from featcal_fast.inputs.recipe_file import recipe_text
from tests.fuzz import damaged

FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-")
ROOT = Path(FOLDER.name)
MERGED = ROOT / "merged"
for _name in ("merged", "base", "a-math", "a-code", "c++", "at@home", "lora-math"):
    (ROOT / _name).mkdir()
    _file = "adapter_config.json" if _name.startswith("lora") else "config.json"
    (ROOT / _name / _file).write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 4}))
SEEDS = [
    b"""merge_method: ties
base_model: base
models:
  - model: base
  - model: ./a-math
    parameters: {weight: 0.5, density: [1, 0.5]}
  - {model: a-code+lora-math}
  - model: org/name@main+org/lora@v1
tokenizer: {source: union}
dtype: bfloat16
""",
    b"""merge_method: slerp
base_model: {model: {path: a-math}, lora: null}
slices:
  - sources: &all
    - {model: a-math, layer_range: [0, 4]}
    - {model: a-code, layer_range: [0, 4]}
    base_model: a-math
parameters: {t: [{filter: mlp, value: 0.5}, {value: 1}]}
x: {y: [*all]}
""",
    b"""merge_method: linear
modules:
  decoder: {models: [{model: c++}, {model: at@home}, {model: {model: base, lora: lora-math}}]}
  encoder: {models: [{model: c++}, {model: at@home}, {model: base+lora-math}]}
""",
]
ODD: list[Any] = [
    *(None, True, -1, 0, 4, 1.5, 10**30, "", " ", "+", "@", "base", "./base", "base+lora-math", "base@main", "merged"),
    *("..", "/", "~", "~x/y", "a\0b", "\x1b[2J", "\u202e", "\ud800", "a+" * 300, "../" * 300, "x" * 300, "org/name"),
    *([], {}, [0, 4], [1, 4], [0, 5], {"model": "a-math"}, [{"model": "a-math"}], {"path": "base", "revision": "x"}),
]
WRAPPERS = ["model", "path", "lora", "sources", "models", "x"]
ADDED = ["model", "lora", "base_model", "slices", "teacher", "dtype", "\x1b"]


def target(data: bytes) -> None:
    """As `from_mergekit` does, with data for every expert that there turns out to be; the recipe must mean the same."""
    (MERGED / "mergekit_config.yml").write_bytes(data)
    inputs = _Inputs(MERGED, ROOT, _read_config(MERGED), None)
    names = model_names([(reference.text, model.path, model.adapter) for reference, model in inputs.experts])
    recipe = ff.from_mergekit(MERGED, [(name.short, ROOT / "data.jsonl") for name in names], out=ROOT / "out")
    path = ROOT / "recipe.yaml"
    path.write_text(recipe_text(recipe, "fuzz"))
    again = ff.Recipe.load(path)
    assert (again.base_model, again.merged_model) == (recipe.base_model, recipe.merged_model)
    assert (list(again.experts.items()), again.settings) == (list(recipe.experts.items()), recipe.settings)


def damage(data: bytes, chance: random.Random) -> bytes:
    """A value changed, a key added or moved, an entry repeated."""
    values = damaged(data, chance, ODD, [1, 2, 300], WRAPPERS, ADDED)
    if values is None:
        return data
    return yaml.safe_dump(values, sort_keys=False).encode("utf-8", "surrogatepass")
