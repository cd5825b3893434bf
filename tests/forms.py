"""Experts in the forms users have them, written by hand as PEFT and bitsandbytes document them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ADAPTED = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def expert_at(recipe: dict, task: str, folder: Path) -> dict:
    return {"experts": {**recipe["experts"], task: {**recipe["experts"][task], "model": str(folder)}}}


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    folder.mkdir()
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [name[-6:] for name in ADAPTED], **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file({f"base_model.model.{name}": value.contiguous() for name, value in tensors.items()}, _weights(folder))
    return folder


def _weights(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def factors(base: dict[str, Tensor], rank: Callable[[str], int] = lambda name: 4, layers: int = 3) -> dict[str, Tensor]:
    generator, made = torch.Generator().manual_seed(1), {}
    for module in (f"model.layers.{i}.{name}" for i in range(layers) for name in ADAPTED):
        out, width = base[f"{module}.weight"].shape
        made[f"{module}.lora_A.weight"] = 0.1 * torch.randn(rank(module), width, generator=generator)
        made[f"{module}.lora_B.weight"] = 0.1 * torch.randn(out, rank(module), generator=generator)
    return made


def four_bit(quant_type: str, double: bool) -> Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]:
    def quantise(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        from bitsandbytes import functional

        codes, state = functional.quantize_4bit(weight, quant_type=quant_type, compress_statistics=double)
        parts = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        # As rows of one block each: bitsandbytes' CPU kernel (0.50) is wrong where blocks and rows end apart.
        state.shape = torch.Size([weight.numel() // 64, 64]) if weight.numel() % 64 == 0 else weight.shape
        return {name: codes, **parts}, functional.dequantize_4bit(codes, state).reshape(weight.shape)

    return quantise


def eight_bit(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    from bitsandbytes import functional

    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    layout = torch.zeros((), dtype=torch.uint8)
    parts = {name: codes, f"{name[:-6]}SCB": scales, f"{name}_format": layout}
    return parts, functional.int8_vectorwise_dequant(codes, scales).to(weight.dtype)


def quantised(source: Path, folder: Path, quantise: Callable, before: Path) -> Path:
    """`source` quantised in `folder`, and dequantised again in `before`."""
    stored, plain = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        stored[name] = plain[name] = weight
        if name.endswith("proj.weight"):
            parts, plain[name] = quantise(name, weight)
            del stored[name]
            stored |= parts
    config = json.loads((source / "config.json").read_text())
    for path, tensors, extra in (
        (folder, stored, {"quantization_config": {"quant_method": "bitsandbytes"}}),
        (before, plain, {}),
    ):
        path.mkdir()
        (path / "config.json").write_text(json.dumps({**config, **extra}))
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return folder


FORMS = {
    "nf4": four_bit("nf4", double=False),
    "nf4-double": four_bit("nf4", double=True),
    "fp4": four_bit("fp4", double=False),
    "fp4-double": four_bit("fp4", double=True),
    "int8": eight_bit,
}
