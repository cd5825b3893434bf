"""Random models and data, written to folders: the same inputs for every implementation that is compared."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedModel


@dataclass(frozen=True)
class Workload:
    """A CLIP vision job of random weights: `tasks` experts around a base, merged by task arithmetic 0.3."""

    name: str
    config: dict[str, int]
    tasks: int
    samples: int


B32 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
B32 |= {"image_size": 224, "patch_size": 32}
SMALL = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
SMALL |= {"image_size": 32, "patch_size": 8}

WORKLOADS = {
    "clip-small": Workload("clip-small", SMALL, tasks=3, samples=64),
    "clip-b32-shallow": Workload("clip-b32-shallow", {**B32, "num_hidden_layers": 2}, tasks=8, samples=64),
    "clip-b32-64": Workload("clip-b32-64", B32, tasks=8, samples=64),
    "clip-b32-256": Workload("clip-b32-256", B32, tasks=8, samples=256),
}


def task_names(workload: Workload) -> list[str]:
    return [f"task{k}" for k in range(workload.tasks)]


def write(workload: Workload, folder: Path) -> None:
    """Write `base`, `merged`, one folder an expert, and one `<task>.safetensors` of pixels a task; once."""
    if (folder / "complete").exists():
        return
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = CLIPVisionModel(CLIPVisionConfig(**workload.config)).eval()
        with torch.no_grad():  # a fresh model's biases are all 0, its LayerNorm weights all 1: no trained model's are
            for parameter in base.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    merged = copy.deepcopy(base)
    base.save_pretrained(folder / "base")
    side = workload.config["image_size"]
    for task, expert in _experts(base, workload):
        with torch.no_grad():
            for name, parameter in merged.named_parameters():
                parameter.add_(expert.get_parameter(name) - base.get_parameter(name), alpha=0.3)
        expert.save_pretrained(folder / task)
        generator = torch.Generator().manual_seed(1000 + int(task[4:]))
        pixels = torch.randn(workload.samples, 3, side, side, generator=generator)
        save_file({"pixel_values": pixels}, folder / f"{task}.safetensors")
    merged.save_pretrained(folder / "merged")
    (folder / "complete").touch()


def _experts(base: PreTrainedModel, workload: Workload) -> Iterator[tuple[str, nn.Module]]:
    for k, task in enumerate(task_names(workload)):
        expert, generator = copy.deepcopy(base), torch.Generator().manual_seed(k)
        with torch.no_grad():
            for parameter in expert.parameters():
                spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2 * (spread + 0.02))
        yield task, expert
