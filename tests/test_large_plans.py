"""Plans for models far larger than this machine, from headers: the files are sparse, all holes but for the header."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import featcal_fast as ff
from bench.holes import LLAMAS, write_holes

GIB = 2**30


@pytest.mark.parametrize(("size", "limit"), [("8B", 8), ("70B", 24)])
def test_five_experts_with_256_samples_of_512_tokens_fit(
    size: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcal_fast.files.free_bytes", lambda _: 2**50)  # whatever disk is here
    config = LLAMAS[size]
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
    assert plan.calibrated == 7 * config.num_hidden_layers
    assert time.perf_counter() - started < 120  # seconds, whatever else the machine does
