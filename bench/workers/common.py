"""A workload's folder as models and batches in memory, for workers that are no folder-to-folder engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar


def tasks_of(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.safetensors"))


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """A model in eval mode; a LoRA adapter's is the base beside it with `alpha / r * B A` on the weights it names."""
    if (folder / "adapter_config.json").exists():
        config = json.loads((folder / "adapter_config.json").read_text())
        model, factors = load_model(folder.parent / "base", dtype), load_file(folder / "adapter_model.safetensors")
        with torch.no_grad():
            for name, a in factors.items():
                if ".lora_A." in name:
                    change = factors[name.replace("lora_A", "lora_B")].to(dtype) @ a.to(dtype)
                    weight = model.get_parameter(name.removeprefix("base_model.model.").replace(".lora_A", ""))
                    weight.add_(change, alpha=config["lora_alpha"] / config["r"])
        return model
    disable_progress_bar()
    cls = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    return cls.from_pretrained(folder, dtype=dtype).eval()


def load_batches(folder: Path, task: str, batch_size: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Texts cut to the batch's longest."""
    tensors = {
        k: v.to(dtype) if v.is_floating_point() else v for k, v in load_file(folder / f"{task}.safetensors").items()
    }
    batches = [
        {name: tensor[start : start + batch_size] for name, tensor in tensors.items()}
        for start in range(0, len(next(iter(tensors.values()))), batch_size)
    ]
    for batch in batches:
        if "attention_mask" in batch:
            longest = int(batch["attention_mask"].sum(1).max())
            batch |= {name: batch[name][:, :longest] for name in ("input_ids", "attention_mask")}
    return batches


def save(model: nn.Module, out: Path) -> None:
    weights = dict(model.named_parameters())  # a tied weight once
    save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, out)
