"""Model folders: all that is read of them before the first layer, and their tensors."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from featcal_fast.checkpoints import Checkpoint, TensorSource, find_checkpoint, find_expert
from featcal_fast.streaming.sources import CheckpointSource
from tests.fuzz import places

CPU = torch.device("cpu")
FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-")
ROOT = Path(FOLDER.name)
GOOD, TRIED = ROOT / "good", ROOT / "tried"
CONFIG, ADAPTER, INDEX = "config.json", "adapter_config.json", "model.safetensors.index.json"
# What an input is: the file that it stands for, a colon, and what is in that.
FILES = {
    b"config": CONFIG,
    b"weights": "model.safetensors",
    b"index": INDEX,
    b"adapter": ADAPTER,
    b"factors": "adapter_model.safetensors",
    b"state": "model.safetensors",
}
Q = "model.layers.0.self_attn.q_proj"
STATE = f"{Q}.weight.quant_state.bitsandbytes__nf4"
ODD: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        1,
        2,
        3.5,
        10**6,
        10**12,
        10**30,
        2**63,
        1e308,
        "64",
        "x" * 600,
        "",
        "\0",
        "\ud800",
        "\x1b[2J",
    ),
    *("..", "/etc/passwd", "org/x", "F4", "F64", "I64", "BOOL", "llama", "gpt2", "mistral", "LlamaModel", "GPT2Model"),
    *(
        "pipeline",
        "(a+)+!",
        ".*",
        "(",
        [],
        {},
        [[]],
        {"a": 1},
        [1],
        [2, 3],
        [0, 0],
        [0, 2**40],
        ["q_proj"],
        [None] * 70,
    ),
]
KEYS = ["model_type", "rope_scaling", "layer_types", "auto_map", "dtype", "__metadata__", "lm_head.weight", "to_dict"]


def _make() -> list[bytes]:
    """Good files, each a seed; a model, its two shards, an adapter, a quantised weight."""
    torch.manual_seed(0)
    values = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(**values, num_hidden_layers=1, vocab_size=10, max_position_embeddings=16)
    LlamaForCausalLM(config).save_pretrained(GOOD)
    for name in ("sharded", "quantised", "adapter"):
        (ROOT / name).mkdir()
        shutil.copy(GOOD / CONFIG, ROOT / name)
    weights = load_file(GOOD / "model.safetensors")
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({name: weights[name] for name in members}, ROOT / "sharded" / file)
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file in parts for name in parts[file]}}
    factors = {
        f"base_model.model.{Q}.lora_{factor}.weight": torch.ones(shape)
        for factor, shape in (("A", (2, 8)), ("B", (8, 2)))
    }
    factors["base_model.model.lm_head.weight"] = weights["lm_head.weight"]
    adapter = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "rank_pattern": {"k_proj": 2},
        "modules_to_save": ["lm_head"],
        "exclude_modules": r".*\.v_proj",
        "base_model_name_or_path": "org/base",
    }
    values = json.loads((GOOD / CONFIG).read_text())
    (ROOT / "quantised" / CONFIG).write_text(
        json.dumps({**values, "quantization_config": {"quant_method": "bitsandbytes"}})
    )
    save_file(factors, ROOT / "adapter" / "adapter_model.safetensors")
    (ROOT / "adapter" / ADAPTER).write_text(json.dumps(adapter))
    return [
        b"config:" + json.dumps(values).encode(),
        b"weights:" + (GOOD / "model.safetensors").read_bytes(),
        b"index:" + json.dumps(index).encode(),
        b"adapter:" + json.dumps(adapter).encode(),
        b"factors:" + save(factors),
        b"state:" + save(_quantised(weights)),
    ]


def _quantised(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float32",
        "shape": [8, 8],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": 0.01,
    }
    packed = {
        f"{Q}.weight": torch.zeros(32, 1, dtype=torch.uint8),
        f"{Q}.weight.quant_map": torch.linspace(-1, 1, 16),
        f"{Q}.weight.absmax": torch.zeros(1, dtype=torch.uint8),
        f"{Q}.weight.nested_quant_map": torch.linspace(-1, 1, 256),
        f"{Q}.weight.nested_absmax": torch.ones(1),
        STATE: torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8),
        "model.layers.0.self_attn.k_proj.weight": torch.zeros(8, 8, dtype=torch.int8),
        "model.layers.0.self_attn.k_proj.SCB": torch.ones(8),
    }
    return {**weights, **packed}


SEEDS = _make()


def target(data: bytes) -> None:
    """A folder with one file of a stranger's opened, its model built, its tensors read."""
    kind, _, content = data.partition(b":")
    if kind not in FILES:
        return
    shutil.rmtree(TRIED, ignore_errors=True)
    source = {b"index": "sharded", b"adapter": "adapter", b"factors": "adapter", b"state": "quantised"}
    shutil.copytree(ROOT / source.get(kind, "good"), TRIED, copy_function=os.link)
    (TRIED / FILES[kind]).unlink(missing_ok=True)
    (TRIED / FILES[kind]).write_bytes(content)
    if kind in (b"adapter", b"factors"):
        (TRIED / CONFIG).unlink()
    base = Checkpoint(GOOD, "base model")
    found: TensorSource = find_expert(str(TRIED), ROOT, "expert", base)
    if isinstance(found, Checkpoint):
        found = found if kind == b"state" else find_checkpoint(str(TRIED), ROOT, "merged model")
    found.side_files()
    opened = CheckpointSource(found, CPU)
    opened.check_whole()
    opened.block(0)
    found.read(found.tensors)


def damage(data: bytes, chance: random.Random) -> bytes:
    """A value of a document changed, taken away or added; of weights, in the header or in what describes one."""
    kind, colon, content = data.partition(b":")
    start, end = (0, len(content)) if kind in (b"config", b"index", b"adapter") else _document(content, kind, chance)
    try:
        values = json.loads(content[start:end])
    except (ValueError, RecursionError):
        return data
    found = places(values)
    if not found:
        return data
    owner, key = chance.choice(found)
    way = chance.randrange(5)
    if way < 2:
        owner[key] = chance.choice(ODD)
    elif way == 2:
        owner[key] = [owner[key]] * chance.choice([1, 2, 2000])
    elif way == 3 and isinstance(owner, dict):
        owner[chance.choice([*KEYS, *owner])] = owner.pop(key)
    else:
        del owner[key]
    text = json.dumps(values).encode()
    if kind == b"state" and start > 8:  # in a place of its own
        text = text[: end - start].ljust(end - start)
    elif start == 8:
        return kind + colon + len(text).to_bytes(8, "little") + text + content[end:]
    return kind + colon + content[:start] + text + content[end:]


def _document(content: bytes, kind: bytes, chance: random.Random) -> tuple[int, int]:
    """Where JSON is in a safetensors file."""
    header = 8, 8 + int.from_bytes(content[:8], "little")
    place = content.find(b'{"quant_type"')
    if kind == b"state" and place > 0 and chance.random() < 0.5:
        return place, content.find(b"}", place) + 1
    return header
