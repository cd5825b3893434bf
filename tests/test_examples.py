"""The examples: recipes are planned as they are, beside pico models under the names they use; the script runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pico
import pytest
import torch
import yaml
from data_files import TEMPLATE, save_image, save_tokenizer
from forms import write_adapter
from launches import check_torchrun
from safetensors.torch import load_file

import featcal_fast as ff
from bench import paper

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
CLUSTER = "kubernetes.yaml"
RECIPES = sorted(path.name for path in EXAMPLES.glob("*.yaml") if path.name != CLUSTER)
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
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.iterdir() if path.name != "README.md")


# Commands that are not here: what they are called with is kept, one argument a line.
STAND_INS = {
    "srun": """
case "$MODE" in
    wait) trap 'exit 1' TERM; printf '%s\\n' "$@" >srun.new; mv srun.new srun.called
          for _ in $(seq 600); do sleep 0.05; done ;;
    *) printf '%s\\n' "$@" >srun.called ;;
esac
[ "$MODE" = done ]
""",
    "scontrol": """
case "$1 $2" in
    "show hostnames") printf 'node7\\nnode8\\n' ;;
    "show job") echo "   PreemptEligibleTime=2026-11-01T10:00:00 PreemptTime=$PREEMPTED" ;;
    *) echo "$*" >scontrol.called ;;
esac
""",
    "torchrun": "printf '%s\\n' \"$@\" >torchrun.called\n",
}


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on a cluster, in an empty folder."""
    for name, text in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}")
        path.chmod(0o755)
    slurm = {"JOB_ID": "4321", "JOB_NODELIST": "node[7-8]", "JOB_NUM_NODES": "2", "CPUS_PER_TASK": "64"}
    own = {f"SLURM_{name}": value for name, value in slurm.items()} | {"PREEMPTED": "None", "MODE": "done"}
    return {**os.environ, **own, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("own", "status", "again"),
    [
        ({"MODE": "done"}, 0, False),
        ({"MODE": "fail"}, 1, False),
        ({"MODE": "fail", "PREEMPTED": "2026-11-01T11:00:00"}, 1, True),
        ({"MODE": "wait"}, 1, True),
    ],
    ids=["done", "an error", "preempted", "out of time"],
)
def test_a_slurm_job_goes_back_into_the_queue_only_where_it_was_stopped(
    own: dict[str, str], status: int, again: bool, cluster: dict[str, str], tmp_path: Path
) -> None:
    command = ["bash", str(EXAMPLES / "slurm.sbatch"), "recipe.yaml", "models/out"]
    with subprocess.Popen(command, env={**cluster, **own}, cwd=tmp_path) as job:
        if own["MODE"] == "wait":
            for _ in range(600):
                if (tmp_path / "srun.called").exists():
                    break
                time.sleep(0.05)
            job.send_signal(signal.SIGUSR1)
        assert job.wait(60) == status
    called = tmp_path / "scontrol.called"
    assert (called.read_text() if called.exists() else "") == ("requeue 4321\n" if again else "")
    words = (tmp_path / "srun.called").read_text().splitlines()
    found = check_torchrun(words[words.index("torchrun") + 1 :])
    assert (found.nnodes, found.nproc_per_node, found.rdzv_id) == ("2", "gpu", "4321")
    assert (found.rdzv_backend, found.rdzv_endpoint) == ("c10d", "node7:24321")
    assert found.training_script_args == ["calibrate", "recipe.yaml", "--out", "models/out", "--resume"]


def test_a_slurm_job_whose_output_is_there_is_done(cluster: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "report.json").touch()
    command = ["bash", str(EXAMPLES / "slurm.sbatch"), "recipe.yaml", "."]
    subprocess.run(command, env=cluster, cwd=tmp_path, check=True)
    assert not (tmp_path / "srun.called").exists()


def test_the_cluster_s_pods_find_each_other(cluster: dict[str, str], tmp_path: Path) -> None:
    service, job = yaml.safe_load_all((EXAMPLES / CLUSTER).read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (service["kind"], job["kind"], spec["completionMode"]) == ("Service", "Job", "Indexed")
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    assert spec["completions"] == spec["parallelism"] == int(variables["MACHINES"])
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    own = {**cluster, **variables, "JOB_COMPLETION_INDEX": "1"}
    subprocess.run(container["command"], env=own, cwd=tmp_path, check=True)
    found = check_torchrun((tmp_path / "torchrun.called").read_text().splitlines())
    assert (found.nnodes, found.node_rank, found.nproc_per_node) == ("2", 1, "gpu")
    assert found.master_addr == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert found.master_port in {port["containerPort"] for port in container["ports"]}
    assert found.training_script_args[-1] == "--resume"
    out = tmp_path / variables["OUT"]
    out.mkdir(parents=True)
    (out / "report.json").touch()
    (tmp_path / "torchrun.called").unlink()
    subprocess.run(container["command"], env=own, cwd=tmp_path, check=True)
    assert not (tmp_path / "torchrun.called").exists()
