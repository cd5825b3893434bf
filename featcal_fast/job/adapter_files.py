"""The files of a LoRA adapter as PEFT reads them: a config, tensors, a card."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featcal_fast import files
from featcal_fast.checkpoints import TensorInfo
from featcal_fast.checkpoints.adapter import PREFIX
from featcal_fast.checkpoints.writer import make_header
from featcal_fast.models.linear import is_transposed
from featcal_fast.reporting.own_card import is_hub_id
from featcal_fast.reporting.usage import python_quoted
from featcal_fast.version import __version__

CARD = """\
---
library_name: peft
{base}tags:
- featcal
- lora
---

# A calibration as an adapter

What featcal_fast {version} changed in a merged model, as a LoRA adapter of that merged model: {summary}.

```python
from peft import PeftModel
from transformers import {cls}

merged = {cls}.from_pretrained({merged})
model = PeftModel.from_pretrained(merged, {folder})
```

Names of modules are those of transformers {transformers}. Of each linear weight `delta.json` has the energy that is
kept, 1 - ||W' - W - B A||^2 / ||W' - W||^2. {exact}
"""
ON_THE_FLY = "what `featcal-fast merge` writes for the recipe"
EXACT = "Biases and norms that changed ({count}) are here as they are; where they are, vLLM takes no such adapter."
NO_EXACT = "Nothing else changed."


def tensor_names(module: str, linear: bool) -> dict[str, str]:
    """What an adapter calls the tensors of a module of the model's class."""
    if linear:
        own = {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "base_layer.bias"}
    else:
        own = {"weight": "weight", "bias": "bias"}
    return {key: f"{PREFIX}{module}.{name}" for key, name in own.items()}


def adapter_config(
    model: nn.Module,
    base: Mapping[str, str],
    rank: int,
    ranks: Mapping[str, int],
    saved: Collection[str],
    biases: bool,
) -> dict[str, Any]:
    """`adapter_config.json`: of scale 1, so that a module adds `B A`.

    Args:
        model: that is adapted; parameters may be on meta.
        base: where the merged model is: `base_model_name_or_path`, and `revision` where there is one.
        rank: of most modules.
        ranks: of each adapted linear module, by its full name.
        saved: full names of modules that are stored whole.
        biases: whether biases of linear modules are stored, too.
    """
    own = {re.escape(name): each for name, each in ranks.items() if each != rank}
    return {
        "peft_type": "LORA",
        "task_type": _task(model),
        "base_model_name_or_path": None,
        **base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": own,
        "alpha_pattern": own,
        "lora_dropout": 0.0,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": any(map(is_transposed, model.modules())),
        "target_modules": _shortest(ranks, model, "."),
        "modules_to_save": _shortest(saved, model, "") or None,
    }


def _task(model: Any) -> str | None:
    """What PEFT calls a model that generates; of others it would add heads to what an adapter holds."""
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder and name.endswith("ForConditionalGeneration") else None


def card(model: nn.Module, summary: str, base: Mapping[str, str], folder: str, exact: int) -> str:
    """`README.md` in the hub's form.

    Args:
        model: that is adapted.
        summary: of what is kept, in a line.
        base: as for `adapter_config`.
        folder: the last part of the adapter's path: a card is published, and names no folder of this machine.
        exact: how many tensors are stored as they are.
    """
    import transformers

    merged = base.get("base_model_name_or_path", ON_THE_FLY)
    revision = f", revision={python_quoted(base['revision'])}" if "revision" in base else ""
    hub = is_hub_id(merged)
    return CARD.format(
        base=f"base_model: {merged}\n" if hub else "",
        version=__version__,
        summary=summary,
        cls=type(model).__name__,
        merged=python_quoted(merged if hub else Path(merged).name) + revision,
        folder=python_quoted(folder),
        transformers=transformers.__version__,
        exact=EXACT.format(count=exact) if exact else NO_EXACT,
    )


def _shortest(chosen: Collection[str], model: nn.Module, before: str) -> list[str]:
    """The last parts of modules' names, where no other module's name ends so; else the full names."""
    ends = sorted({name.rpartition(".")[2] for name in chosen})
    every = {name for name, _ in model.named_modules()}
    alike = {name for name in every if name in ends or name.endswith(tuple(f"{before}{end}" for end in ends))}
    return ends if alike == set(chosen) else sorted(chosen)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """A new safetensors file, synced; how many bytes it has.

    Args:
        path: of the file.
        tensors: by name, in memory.
    """
    members = {name: TensorInfo(path.name, tuple(each.shape), each.dtype) for name, each in tensors.items()}
    header, offsets, size = make_header(members, {})
    with closing(files.create(path)) as file:
        files.write_at(file, header, 0)
        for name, tensor in tensors.items():
            files.write_at(file, _memory(tensor), offsets[name])
        files.sync(file)
    return size


def _memory(tensor: Tensor) -> memoryview:
    found: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return found
