"""GGUF files of pico models, as llama.cpp's converter writes them, by the gguf package's own writer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from torch import Tensor

# By kind of `pico.KINDS`, or class of a decoder: the architecture's name, and what the converter does to a tensor.
ARCHITECTURES = {
    "llama": "llama",
    "llama tied": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2-moe": "qwen2moe",
    "qwen3-moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "phi3": "phi3",
    "gpt2": "gpt2",
    "Starcoder2": "starcoder2",
    "Gemma": "gemma",
    "Granite": "granite",
    "SmolLM3": "smollm3",
}
STACKS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def converted(name: str, value: Tensor, architecture: str, config: Any) -> Tensor:
    """A tensor as a file of an architecture has it."""
    part = name.split(".")[-2]
    if architecture in ("llama", "granite", "smollm3") and part in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
        return value.reshape(heads, 2, len(value) // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return value + 1
    if architecture == "gpt2" and name.startswith("blk.") and value.ndim == 2:
        return value.mT
    return value.squeeze(0) if "ffn_gate_inp_shexp" in name else value


def write(
    path: Path,
    state: dict[str, Tensor],
    config: Any,
    architecture: str = "llama",
    kind: str | Callable[[str], str] = "F32",
    tokens: Iterable[str] = (),
    others: dict[str, Tensor] | None = None,
    **values: Any,
) -> Path:
    """A file of the tensors of a model, by the names of its checkpoint.

    Args:
        kind: of matrices of whole blocks, or what gives it by the file's name; others are in F32.
        others: tensors of the file alone.
        values: by a key's last part, in place of what the config says.
    """
    names = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(names[architecture], config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture)
    described = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None),
        "feed_forward_length": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        **{key.replace("__", "."): value for key, value in values.items()},
    }
    for key, value in described.items():
        if isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"{architecture}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{architecture}.{key}", value)
    tokens = list(tokens)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    for name, value in _stacked(state).items():
        prefixed = (f"{prefix}{name}" for prefix in ("", "model.", "transformer."))
        own = next(found for each in prefixed if (found := known.get_name(each, try_suffixes=(".weight", ".bias"))))
        array = converted(own, value.float(), architecture, config).contiguous().numpy()
        wanted = kind if isinstance(kind, str) else kind(own)
        type_ = gguf.GGMLQuantizationType["F32" if array.ndim == 1 else wanted]
        writer.add_tensor(own, gguf.quantize(array, type_), raw_dtype=type_)
    for name, value in (others or {}).items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts' matrices as one tensor."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        before, _, after = name.partition(".experts.")
        index, _, matrix = after.partition(".")
        if index.isdigit():
            found.setdefault(f"{before}.experts.{matrix}", {})[int(index)] = value
        else:
            found[name] = value
    return {
        name: torch.stack([value[index] for index in sorted(value)]) if isinstance(value, dict) else value
        for name, value in found.items()
    }


def rounded(value: Tensor, kind: str) -> Tensor:
    """A matrix as a type gives it back."""
    type_ = gguf.GGMLQuantizationType[kind]
    plain = gguf.dequantize(gguf.quantize(value.float().contiguous().numpy(), type_), type_)
    return torch.from_numpy(numpy.array(plain)).to(value.dtype)
