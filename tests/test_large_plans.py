"""Plans for models far larger than this machine, from headers: the files are sparse, all holes but for the header."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import featcal_fast as ff
from featcal_fast.models.meta import parameters_on_meta

GIB = 2**30
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_theta": 5e5}
SIZES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}


def write_holes(folder: Path, config: LlamaConfig) -> None:
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


@pytest.mark.parametrize(("size", "limit"), [("8B", 8), ("70B", 24)])
def test_five_experts_with_256_samples_of_512_tokens_fit(
    size: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcal_fast.files.free_bytes", lambda _: 2**50)  # whatever disk is here
    config = LlamaConfig(**LLAMA, **SIZES[size])
    mask = (torch.arange(512) < torch.arange(257, 513)[:, None]).long()
    save_file(
        {"input_ids": torch.zeros(256, 512, dtype=torch.long), "attention_mask": mask}, tmp_path / "ids.safetensors"
    )
    for name in ("base", "merged", *"abcde"):
        write_holes(tmp_path / name, config)
    experts = {task: {"model": str(tmp_path / task), "data": str(tmp_path / "ids.safetensors")} for task in "abcde"}
    recipe = {"base_model": str(tmp_path / "base"), "merged_model": str(tmp_path / "merged"), "experts": experts}
    started = time.perf_counter()
    plan = ff.plan(recipe, device="cuda", device_memory=limit * GIB, host_memory=64 * GIB, scratch=tmp_path)
    assert plan.problems == []
    assert plan.tokens == dict.fromkeys("abcde", 205 * 512), "a fifth is held out"
    assert limit / 2 * GIB < plan.device_bytes < limit * GIB
    assert plan.calibrated == 7 * SIZES[size]["num_hidden_layers"]
    assert time.perf_counter() - started < 120  # seconds, whatever else the machine does
