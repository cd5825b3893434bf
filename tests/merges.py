"""A workplace in mergekit's form: models, adapters, a merge with its config, data."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pico
import torch
import yaml
from forms import factors, write_adapter
from safetensors.torch import load_file, save_file

import featcal_fast as ff

MATH, CODE = "Llama-3-8B-math", "Llama-3-8B-code"
SIZES = {
    "layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 100,
}
TIES = {
    "merge_method": "ties",
    "base_model": "src/base",
    "models": [{"model": f"src/{MATH}"}, {"model": f"src/{CODE}"}],
}
PAIR = [{"model": f"src/{name}", "layer_range": [0, 2]} for name in (MATH, CODE)]
EXPERTS = {"math": f"src/{MATH}", "code": f"src/{CODE}"}
DATA = {"math": "math.safetensors", "code": "code.safetensors"}


def make_sources(root: Path) -> Path:
    """As mergekit is used: models and adapters in `src`, what it wrote in `out/merged`, data beside them."""
    job = pico.job("llama", 3, **SIZES)
    (root / "src").mkdir()
    (root / "out").mkdir()
    job.base.save_pretrained(root / "src" / "base")
    job.merged.save_pretrained(root / "out" / "merged")
    for name, task in ((MATH, "task0"), (CODE, "task1"), ("Llama-3-8B-chat", "task2")):
        job.experts[task].save_pretrained(root / "src" / name)
    for task, texts in (("math", ["2 and 2", "3"]), ("code", ["print", "a"])):
        ids = [[1 + len(text) + i for i in range(12)] for text in texts]
        save_file({"input_ids": torch.tensor(ids)}, root / f"{task}.safetensors")
    weights = load_file(root / "src" / "base" / "model.safetensors")
    for task in ("math", "code"):
        write_adapter(root / "src" / f"lora-{task}", factors(weights, layers=2))
    return root


def make_work(root: Path, made: Path) -> Path:
    """A folder of one's own; the sources are links."""
    (root / "src").symlink_to(made / "src")
    shutil.copytree(made / "out", root / "out")
    for task in DATA:
        (root / f"{task}.safetensors").symlink_to(made / f"{task}.safetensors")
    configure(root, TIES)
    return root


def configure(work: Path, config: Any) -> None:
    text = config if isinstance(config, str) else yaml.safe_dump(config, sort_keys=False)
    (work / "out" / "merged" / "mergekit_config.yml").write_text(text)


def recipe_of(work: Path, config: Any = None, **options: Any) -> ff.Recipe:
    if config is not None:
        configure(work, config)
    return ff.from_mergekit("out/merged", options.pop("data", DATA), **options)


def short(work: Path, recipe: ff.Recipe) -> tuple[str, dict[str, str]]:
    """Base and experts of a recipe, relative to the working directory."""
    strip = f"{work}/"
    experts = {task: each.model.replace(strip, "") for task, each in recipe.experts.items()}
    return recipe.base_model.replace(strip, ""), experts
