"""The examples: recipes are planned as they are, beside pico models under the names they use; the script runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pico
import pytest
import torch
import yaml
from data_files import TEMPLATE, save_image, save_tokenizer
from forms import write_adapter
from safetensors.torch import load_file

import featcal_fast as ff
from bench import paper

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
RECIPES = sorted(path.name for path in EXAMPLES.glob("*.yaml"))
ADAPTED = ("q", "v", "q_proj", "v_proj")  # as PEFT names them for T5 and Llama
MESSAGES = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 16},
    "crop_size": {"height": 16, "width": 16},
}


def kind(name: str) -> str:
    return next((known for known in ("clip", "flan-t5") if name.startswith(known)), "llama")


def save_adapter(base: Path, folder: Path) -> None:
    """Rank 2 on the attention's q and v."""
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.split(".")[-1] in ADAPTED:
            tensors[f"{module}.lora_A.weight"] = torch.randn(2, weight.shape[1], generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], 2, generator=generator)
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_adapter(folder, tensors, r=2, target_modules=sorted({name.split(".")[-3] for name in tensors}))


def save_data(path: Path) -> None:
    """Three samples of the kind that `path` and the task are for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.suffix:
        for shade in range(3):
            save_image(path / f"{shade}.png", (80 * shade, 0, 0))
        return
    sample = {"messages": MESSAGES} if path.stem == "chat" else {"prompt": "a b", "completion": " c d"}
    path.write_text("".join(json.dumps(sample) + "\n" for _ in range(3)))


def lay_out(name: str, folder: Path) -> Path:
    """A copy of the recipe, and what it names beside it: a hub id is a folder too, where there is one."""
    recipe = Path(shutil.copy(EXAMPLES / name, folder))
    values = yaml.safe_load(recipe.read_text())
    long = {"max_position_embeddings": 2048} if kind(name) == "llama" else {}
    job = pico.job(kind(name), len(values["experts"]), **long)
    base = folder / values["base_model"]
    job.base.save_pretrained(base)
    if kind(name) == "clip":
        (base / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    else:
        save_tokenizer(base, template=TEMPLATE)
    if "merged_model" in values:
        job.merged.save_pretrained(folder / values["merged_model"])
    for expert, model in zip(values["experts"].values(), job.experts.values(), strict=True):
        if "adapter" in expert["model"] or "lora" in expert["model"]:
            save_adapter(base, folder / expert["model"])
        else:
            model.save_pretrained(folder / expert["model"])
        save_data(folder / expert["data"])
    return recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_planned(name: str, tmp_path: Path) -> None:
    recipe = ff.Recipe.load(lay_out(name, tmp_path))
    plan = ff.plan(recipe, device="cpu")
    assert plan.problems == []
    assert plan.tokens.keys() == recipe.experts.keys()
    assert plan.calibrated


def test_what_recipes_say_of_their_presets() -> None:
    said = 0
    for name in RECIPES:
        settings = ff.Recipe.load(EXAMPLES / name).settings
        for line in re.findall(r"^settings: \{preset: .*\} # (.*)$", (EXAMPLES / name).read_text(), re.MULTILINE):
            for key, value in re.findall(r"(\w+) ([\d.e-]+)", line):
                assert getattr(settings, key) == float(value), f"{name}: {key}"
                said += 1
    assert said


def test_the_clip_recipe_is_the_one_that_bench_paper_writes() -> None:
    recipe = ff.Recipe.load(EXAMPLES / "clip-vit-b32-8-tasks.yaml")
    assert {task: expert.model for task, expert in recipe.experts.items()} == {
        task: value.expert for task, value in paper.TASKS.items()
    }
    assert recipe.merge == ff.MergeRecipe("task_arithmetic", paper.SCALING)
    assert recipe.settings == ff.PRESETS[paper.PRESET]
    assert (recipe.samples, recipe.batch_size, recipe.seed) == (paper.SAMPLES, paper.BATCH_SIZE, paper.SEED)
    assert recipe.held_out == 0


def test_the_script_brings_the_average_nearer_to_its_experts(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "calibrate_in_memory.py"), "--out", str(tmp_path / "out")]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    right = {
        name: sum(float(share) for share in re.findall(r"([\d.]+)%", rest))
        for name, rest in re.findall(r"^(\S.*?)  +(up:.*)$", done.stdout, re.MULTILINE)
    }
    assert right["experts' average"] < right["calibrated"]
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_index_has_every_file() -> None:
    listed = re.findall(r"^\| \[(.+?)\]\(\1\) \| .+ \|$", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".yaml", ".py"))
