"""Recipes: what is read of them, and all that is checked before a model is opened."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import yaml

import featcal_fast as ff
from featcal_fast.checkpoints import check_output
from featcal_fast.layer.selection import check_patterns
from tests.fuzz import damaged

FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-")
MODULES = [f"model.layers.{layer}.{name}" for layer in range(4) for name in ("self_attn.q_proj", "mlp.up_proj")]
SEEDS = [
    b"""base_model: models/base
merged_model: models/merged
experts:
  math: {model: models/math, data: data/math.jsonl}
  code: {model: org/code@main, data: data/code.jsonl, samples: 128, max_length: 64}
settings:
  preset: llm
  ridge_lambda: 2e-1
  include: [q_proj, up_proj]
out: models/calibrated
samples: 64
seed: 1
""",
    b"""x: &expert {model: ~/m, data: d}
""",
    b"""base_model: base
merge: {method: dare_ties, weights: {math: 1, 2: 0.5}, density: 0.3, scaling: 1, seed: 7}
experts: {math: {model: m, data: d}, 2: {model: n, data: d}}
out: out
""",
    b"""base_model: "b\\u00e9"
merge: {method: task_arithmetic, scaling: 0.3}
experts: {1: &e {model: m, data: d}, 'two': {<<: *e, data: e}}
settings: {include: 'model\\.layers\\..*', exclude: '.*up_proj', calibrate_bias: false, solve_dtype: float64}
out: ./a/../b
batch_size: 4
expert_storage: host-int8
""",
]
ODD: list[Any] = [
    *(None, True, -1, 0, 1.5, 10**45, 2**63, -(2**64), 1e308, "1:30", "yes", "1e-5", "1e999", ".inf"),
    *("", " ", "~", "~x/y", "..", "/", "a\0b", "\ud800", "\x1b[2J", "\u202e", "x" * 300, "a/" * 3000),
    *("/dev/null/x", "/proc/self/x", "recipe.yaml", "recipe.yaml/x", "float16", "average", "slerp", "q_proj"),
    *("(a+)+!", ".*", "(", "[[a]", [], {}, [[]], {"a": 1}, ["q_proj", 1]),
]
WRAPPERS = ["model", "<<", "x", 1, None]
ADDED = ["samples", "seed", "root", "scaling", "weights", "density", "exclude", 5, "a" * 500]


def target(data: bytes) -> None:
    """As a job does before it opens a model."""
    path = Path(FOLDER.name, "recipe.yaml")
    path.write_bytes(data)
    recipe = ff.Recipe.load(path)
    json.dumps(recipe.to_dict())
    check_patterns(MODULES, recipe.settings)
    if recipe.folder is not None:
        inputs = {task: recipe.path(expert.data) for task, expert in recipe.experts.items()}
        check_output(recipe.folder, inputs, 0)


def damage(data: bytes, chance: random.Random) -> bytes:
    """A value changed, a key added or given twice, whatever the text looks like."""
    values = damaged(data, chance, ODD, [1, 2, 2000], WRAPPERS, ADDED)
    if values is None:
        return data
    text = yaml.safe_dump(values, default_flow_style=chance.random() < 0.5, sort_keys=False)
    return text.encode("utf-8", "surrogatepass")
