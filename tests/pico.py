"""Pico models, built from real config classes: a base, experts around it, their merge, and calibration batches."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

Batch = dict[str, Tensor]


@dataclass
class Job:
    """Models in memory and the batches to calibrate with."""

    base: PreTrainedModel
    experts: dict[str, PreTrainedModel]
    merged: PreTrainedModel
    batches: dict[str, list[Batch]]

    def double(self) -> Job:
        return Job(
            copy.deepcopy(self.base).double(),
            {task: copy.deepcopy(model).double() for task, model in self.experts.items()},
            copy.deepcopy(self.merged).double(),
            {task: [_double(batch) for batch in items] for task, items in self.batches.items()},
        )

    def copy(self) -> Job:
        return copy.deepcopy(self)


def clip(layers: int = 3) -> PreTrainedModel:
    config = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
    )
    return CLIPVisionModel(config).eval()


def llama(layers: int = 3, **overrides: object) -> PreTrainedModel:
    settings = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "max_position_embeddings": 64,
        **overrides,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()  # type: ignore[arg-type]


def perturbed(model: nn.Module, scale: float, seed: int) -> nn.Module:
    """A copy with noise of `scale` times each parameter's own spread."""
    generator, model = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((scale * (spread + 0.02) * noise).to(parameter.dtype))
    return model


def images(count: int, seed: int, batch_size: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, 16, 16, generator=generator)
    return [{"pixel_values": part} for part in pixels.split(batch_size)]


def texts(batches: int, seed: int, padding: str = "right") -> list[Batch]:
    """Batches of four rows of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(batches):
        ids = torch.randint(0, 100, (4, 20), generator=generator)
        mask = torch.zeros_like(ids)
        for row, length in enumerate((20, 13, 7, 16)):
            mask[row, slice(0, length) if padding == "right" else slice(20 - length, 20)] = 1
        out.append({"input_ids": ids, "attention_mask": mask})
    return out


def job(kind: str, tasks: int, scaling: float = 0.3, **overrides: object) -> Job:
    """A job on pico CLIP or Llama: `tasks` experts, merged by task arithmetic."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = clip() if kind == "clip" else llama(**overrides)
    base = perturbed(fresh, 1.0, seed=99)
    experts = {f"task{k}": perturbed(base, 0.3, seed=k) for k in range(tasks)}
    merged = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            origin = base.get_parameter(name)
            deltas = [expert.get_parameter(name).float() - origin.float() for expert in experts.values()]
            parameter.copy_(origin.float() + scaling * sum(deltas))
    batches = {task: images(24, k) if kind == "clip" else texts(5, k) for k, task in enumerate(experts)}
    return Job(base, experts, merged, batches)  # type: ignore[arg-type]


def save(pico: Job, folder: Path) -> dict[str, object]:
    """Save a job's models and data as folders and files; returns a recipe for them."""
    pico.base.save_pretrained(folder / "base")
    pico.merged.save_pretrained(folder / "merged")
    experts = {}
    for task, expert in pico.experts.items():
        expert.save_pretrained(folder / task)
        rows = {key: torch.cat([batch[key] for batch in pico.batches[task]]) for key in pico.batches[task][0]}
        save_file(rows, folder / f"{task}.safetensors")
        experts[task] = {"model": str(folder / task), "data": str(folder / f"{task}.safetensors")}
    return {
        "base_model": str(folder / "base"),
        "merged_model": str(folder / "merged"),
        "experts": experts,
        "batch_size": len(next(iter(pico.batches.values()))[0][next(iter(next(iter(pico.batches.values()))[0]))]),
        "out": str(folder / "out"),
    }


def _double(batch: Batch) -> Batch:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
