"""The paper's settings at their true shapes, with random weights: one run each, from folders to a folder.

    python -m bench.shapes                          # all of them
    python -m bench.shapes flan-t5-base llama-3.2-1b --threads 8
    python -m bench.shapes --toy                    # the same at toy size, in seconds

Models and data are written under `--folder` once, then each shape runs in a process of its own, which reads the
folders, merges on the fly, calibrates and writes the result. Seconds and peak resident memory go to
`bench/results/shapes-<device>.json`, shape by shape; a shape that was run before is replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

import featcal_fast as ff

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Shape:
    """A job of random weights: one expert a task around a base, merged by task arithmetic 0.3."""

    model: str
    config: dict[str, Any]
    tasks: int
    preset: str
    samples: int = 256
    tokens: int = 0  # of a text
    targets: int = 0  # of its target
    dtype: str = "float32"
    batch_size: int = 16
    lora: int = 0  # rank of the experts' adapters on q and v; 0 for whole checkpoints
    toy: dict[str, Any] = field(default_factory=dict)


CLIP_TOY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CLIP_TOY |= {"image_size": 32, "patch_size": 8}
B32 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
L14 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
T5_BASE = {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12}
T5_BASE |= {"feed_forward_proj": "gated-gelu", "vocab_size": 32128, "decoder_start_token_id": 0}
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
LLAMA_1B |= {"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True}
LLAMA_1B |= {"max_position_embeddings": 131072, "rope_theta": 500000.0}

SHAPES = {
    "clip-b32": Shape("CLIPVisionModel", {**B32, "image_size": 224, "patch_size": 32}, 8, "default", toy=CLIP_TOY),
    "clip-l14": Shape("CLIPVisionModel", {**L14, "image_size": 224, "patch_size": 14}, 8, "default", toy=CLIP_TOY),
    "flan-t5-base": Shape(
        "T5ForConditionalGeneration",
        T5_BASE,
        8,
        "flan-t5",
        tokens=128,
        targets=8,
        lora=16,
        toy={"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4},
    ),
    "llama-3.2-1b": Shape(
        "LlamaForCausalLM",
        LLAMA_1B,
        3,
        "llm",
        tokens=256,
        dtype="bfloat16",
        batch_size=4,
        toy={"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"head_dim": 16, "num_key_value_heads": 2, "vocab_size": 1000},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=list(SHAPES), metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--toy", action="store_true", help="tiny models, to see that everything works")
    parser.add_argument("--samples", type=int, help="in place of each shape's own number")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "featcal-shapes")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(Path(args.worker[0]), Path(args.worker[1]), args.device, args.threads)))
        return
    unknown = [name for name in args.shapes if name not in SHAPES]
    if unknown:
        parser.error(f"unknown shape {unknown[0]!r}; expected one of {', '.join(SHAPES)}")

    results_folder = args.folder if args.toy else ROOT / "bench" / "results"
    path = results_folder / f"shapes-{torch.device(args.device).type}.json"
    for name in args.shapes:
        shape = SHAPES[name]
        if args.toy:
            shape = replace(shape, config={**shape.config, **shape.toy}, samples=16, tokens=min(shape.tokens, 12))
        shape = replace(shape, samples=args.samples or shape.samples)
        folder = args.folder / f"{name}{'-toy' if args.toy else ''}-{shape.samples}"
        write(shape, folder)
        found = _run(folder, args.device, args.threads)
        results = json.loads(path.read_text()) if path.exists() else {}
        results[name] = {**_described(shape), **found, "machine": _machine(args.threads)}
        path.write_text(json.dumps(results, indent=2) + "\n")
        print(json.dumps({"shape": name, **found}), flush=True)
    print(f"Wrote {path}")


def write(shape: Shape, folder: Path) -> None:
    """Write base, experts, data and a recipe, once; half-written folders are written again."""
    if (folder / "recipe.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    cls = getattr(transformers, shape.model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = cls(cls.config_class(**shape.config)).eval().to(getattr(torch, shape.dtype))
    base.save_pretrained(folder / "base")
    origin = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    experts = {}
    for k in range(shape.tasks):
        task, generator = f"task{k}", torch.Generator().manual_seed(k)
        if shape.lora:
            write_adapter(shape, origin, folder / task, generator)
        else:
            with torch.no_grad():
                for name, parameter in base.named_parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    scale = 0.2 * (float(origin[name].float().std()) if parameter.numel() > 1 else 0.0) + 0.004
                    parameter.copy_(origin[name].float() + scale * noise)
            base.save_pretrained(folder / task)
        save_file(inputs(shape, generator), folder / f"{task}.safetensors")
        experts[task] = {"model": str(folder / task), "data": str(folder / f"{task}.safetensors")}
    recipe = {
        "base_model": str(folder / "base"),
        "merge": {"method": "task_arithmetic", "scaling": 0.3},
        "experts": experts,
        "settings": {"preset": shape.preset},
        "samples": shape.samples,
        "batch_size": shape.batch_size,
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))


def write_adapter(shape: Shape, base: dict[str, torch.Tensor], folder: Path, generator: torch.Generator) -> None:
    """A LoRA expert: random factors for every q and v."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": shape.lora, "lora_alpha": 2 * shape.lora, "target_modules": ["q", "v"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    factors = {}
    for name, weight in base.items():
        module = name.removesuffix(".weight")
        if module.endswith((".q", ".v")):
            out, size = weight.shape
            a = torch.randn(shape.lora, size, generator=generator) / size**0.5
            b = 0.05 * float(weight.float().std()) * torch.randn(out, shape.lora, generator=generator)
            factors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    save_file(factors, folder / "adapter_model.safetensors")


def inputs(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random samples: images, or texts of a quarter to all of `tokens`, with targets for an encoder-decoder."""
    if not shape.tokens:
        side = shape.config["image_size"]
        return {"pixel_values": torch.randn(shape.samples, 3, side, side, generator=generator)}
    size = (shape.samples, shape.tokens)
    lengths = torch.randint(shape.tokens // 4, shape.tokens + 1, (shape.samples, 1), generator=generator)
    found = {
        "input_ids": torch.randint(3, shape.config["vocab_size"], size, generator=generator),
        "attention_mask": (torch.arange(shape.tokens) < lengths).long(),
    }
    if shape.targets:
        labels = torch.randint(3, shape.config["vocab_size"], (shape.samples, shape.targets), generator=generator)
        lengths = torch.randint(1, shape.targets + 1, (shape.samples, 1), generator=generator)
        found["labels"] = labels.masked_fill(torch.arange(shape.targets) >= lengths, -100)
    return found


def measure(folder: Path, out: Path, device: str, threads: int) -> dict[str, Any]:
    """Calibrate a folder's recipe in this process."""
    torch.set_num_threads(threads)
    started = time.perf_counter()
    report = ff.calibrate(json.loads((folder / "recipe.json").read_text()), out=out, device=device)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = {"seconds": round(seconds, 2), "peak_host_gib": round(peak, 3)}
    if torch.device(device).type == "cuda":
        found["peak_device_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return {
        **found,
        "tokens": sum(report.tokens.values()),
        "calibrated_weights": report.calibrated,
        "linear_weights": report.calibrated + len(report.kept),
        "drift_before": report.layers[-1].drift_before,
        "drift_after": report.layers[-1].drift_after,
    }


def _run(folder: Path, device: str, threads: int) -> dict[str, Any]:
    """`measure`, in a process of its own, and a look at what it wrote."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": str(threads)}
    arguments = ["--worker", str(folder), str(out), "--device", device, "--threads", str(threads)]
    command = [sys.executable, "-m", "bench.shapes", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    if _headers(out) != _headers(folder / "base"):
        raise SystemExit(f"{out}: tensors differ in name, shape or dtype from those of {folder / 'base'}")
    shutil.rmtree(out)
    return json.loads(done.stdout.splitlines()[-1])


def _headers(folder: Path) -> dict[str, tuple[list[int], str]]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                header = file.get_slice(name)
                found[name] = header.get_shape(), header.get_dtype()
    return found


def _described(shape: Shape) -> dict[str, Any]:
    keys = ("model", "dtype", "tasks", "samples", "tokens", "targets", "batch_size", "lora", "preset")
    return {("text_tokens" if key == "tokens" else key): getattr(shape, key) for key in keys}


def _machine(threads: int) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    found = {"cpu": cpu or platform.processor(), "threads": threads, "torch": torch.__version__}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


if __name__ == "__main__":
    main()
