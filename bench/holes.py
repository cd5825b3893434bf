"""Llamas of which there are only headers: files that are all holes, to plan for what no disk here could take."""

from __future__ import annotations

import json
import math
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from featcal_fast.models.meta import parameters_on_meta

LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_theta": 5e5}
# Llama 3.1, by size: width, MLP, layers, attention heads.
SIZES = {"8B": (4096, 14336, 32, 32), "70B": (8192, 28672, 80, 64), "405B": (16384, 53248, 126, 128)}
LLAMAS = {
    size: LlamaConfig(
        **LLAMA, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads
    )
    for size, (width, mlp, layers, heads) in SIZES.items()
}


def write_holes(folder: Path, config: LlamaConfig) -> None:
    """A checkpoint's header, and no tensors behind it."""
    folder.mkdir()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with parameters_on_meta():
        shapes = {name: tuple(value.shape) for name, value in LlamaForCausalLM(config).named_parameters()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
