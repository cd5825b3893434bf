"""Peak memory of a run, measured in a process of its own, against what `plan` says.

    python -m bench.memory clip-b32 llama-small --out bench/results/memory.json

Random weights in folders under `--folder`, one shape after the other; each is planned in one process, from headers,
and run in another, whose peak resident memory (VmHWM) and, on a GPU, peak allocation are what counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Shape:
    """A job of random weights: a base, a merged model and one expert a task."""

    kind: str
    config: dict[str, int]
    dtype: str = "float32"
    tasks: int = 2
    samples: int = 64
    tokens: int = 0
    batch_size: int = 16


B32 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
B32 |= {"image_size": 224, "patch_size": 32}
LLAMA = {"vocab_size": 32000, "max_position_embeddings": 4096}
SMALL = {**LLAMA, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4}
SMALL |= {"num_attention_heads": 8, "num_key_value_heads": 4}
ONE = {**LLAMA, "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
ONE |= {"num_attention_heads": 32, "num_key_value_heads": 8}
EIGHT = {**ONE, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2}
SHAPES = {
    "clip-b32": Shape("clip", B32),
    "clip-b32-more-tasks": Shape("clip", B32, tasks=4),
    "clip-b32-more-samples": Shape("clip", B32, samples=128),
    "clip-b32-fewer-layers": Shape("clip", {**B32, "num_hidden_layers": 3}),
    "llama-small": Shape("llama", SMALL, tokens=256),
    "llama-small-bf16": Shape("llama", SMALL, "bfloat16", tokens=256),
    "llama-1b": Shape("llama", ONE, "bfloat16", samples=32, tokens=512, batch_size=4),
    "llama-8b-two-layers": Shape("llama", EIGHT, "bfloat16", samples=32, tokens=512, batch_size=4),
}


def write(shape: Shape, folder: Path) -> dict[str, object]:
    """Models and data as folders and files; returns a recipe for them."""
    dtype = getattr(torch, shape.dtype)
    experts = {}
    for number in range(shape.tasks + 2):
        name = ("base", "merged")[number] if number < 2 else f"task{number - 2}"
        torch.manual_seed(0)
        model = _model(shape).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01 * number)
        model.save_pretrained(folder / name, max_shard_size="2GB")
        if number >= 2:
            save_file(_data(shape), folder / f"{name}.safetensors")
            experts[name] = {"model": str(folder / name), "data": str(folder / f"{name}.safetensors")}
    return {
        "base_model": str(folder / "base"),
        "merged_model": str(folder / "merged"),
        "experts": experts,
        "samples": shape.samples,
        "batch_size": shape.batch_size,
        "out": str(folder / "out"),
    }


def _model(shape: Shape) -> PreTrainedModel:
    if shape.kind == "clip":
        return CLIPVisionModel(CLIPVisionConfig(**shape.config))
    return LlamaForCausalLM(LlamaConfig(**shape.config))


def _data(shape: Shape) -> dict[str, torch.Tensor]:
    if shape.kind == "clip":
        side = shape.config["image_size"]
        return {"pixel_values": torch.randn(shape.samples, 3, side, side)}
    ids = torch.randint(0, shape.config["vocab_size"], (shape.samples, shape.tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


PLAN = """
import json, sys
import featcal_fast as ff
from featcal_fast.machine import return_large_blocks
return_large_blocks()  # as the command does
recipe = json.loads(sys.argv[1])
plan = ff.plan(recipe, device=sys.argv[2])
items = {"host": plan.host, "device": plan.device_items, "read": plan.bytes_read}
print(json.dumps({"host_bytes": plan.host_bytes, "device_bytes": plan.device_bytes, **items}))
"""
RUN = """
import json, sys, time
import torch
import featcal_fast as ff
from featcal_fast.machine import peak_resident_bytes, return_large_blocks
return_large_blocks()  # as the command does
recipe = json.loads(sys.argv[1])
began = time.perf_counter()
report = ff.calibrate(recipe, device=sys.argv[2])
device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
print(json.dumps({"host_bytes": peak_resident_bytes(), "device_bytes": device, "read": report.bytes_read,
                  "seconds": round(time.perf_counter() - began, 1)}))
"""


def measure(shape: Shape, device: str, folder: Path) -> dict[str, object]:
    """Plan and run a shape; what both say, and the plan's relative error."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        recipe = json.dumps(write(shape, Path(scratch)))
        planned, found = (_in_a_process(code, recipe, device) for code in (PLAN, RUN))
    error = {kind: round(planned[kind] / found[kind] - 1, 4) for kind in ("host_bytes", "device_bytes") if found[kind]}
    return {"shape": asdict(shape), "device": device, "plan": planned, "run": found, "error": error}


def _in_a_process(code: str, *arguments: str) -> dict:
    command = [sys.executable, "-c", code, *arguments]
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    result = subprocess.run(command, env={**os.environ, **path}, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, help="in place of the shape's")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for models and results")
    parser.add_argument("--out", type=Path, help="JSON to write")
    arguments = parser.parse_args()
    results = {}
    for name in arguments.shapes:
        shape = SHAPES[name]
        if arguments.layers:
            shape = replace(shape, config={**shape.config, "num_hidden_layers": arguments.layers})
        results[name] = measure(shape, arguments.device, arguments.folder)
        print(name, json.dumps(results[name], indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
