"""Merging on a GPU: the CPU's bits where each element is by itself, and near them where a whole matrix counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors.torch import load_file

import featcal_fast as ff
from featcal_fast.merging.merged import merge_stack
from featcal_fast.merging.method import Options
from featcal_fast.merging.methods import METHODS
from featcal_fast.merging.stack import Stack, whole

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]
EXACT = ("average", "task_arithmetic", "ties", "dare_linear", "dare_ties")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_merges_as_a_cpu_does(method: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base, *others = torch.randn(4, 311, 517, generator=generator)
    count = 2 if method == "slerp" else 3
    experts = {f"task{i}": (base + 0.1 * each).to(dtype) for i, each in enumerate(others[:count])}
    base = base.to(dtype)
    options = Options((0.5, 1.0, 2.0)[: len(experts)], **{**METHODS[method].defaults, "seed": 3})
    found = {}
    for device in ("cpu", "cuda"):
        readers = {task: whole(tensor) for task, tensor in experts.items()}
        stack = Stack("w", base.shape, whole(base), readers, torch.device(device), transposed=False, size=10_000)
        found[device] = merge_stack(METHODS[method], options, stack, dtype)
        assert found[device].device.type == "cpu"
    if method in EXACT:
        assert torch.equal(found["cpu"], found["cuda"])
    else:
        update = (found["cpu"].double() - base.double()).norm()
        rounding = torch.finfo(dtype).eps * base.double().norm()
        assert (found["cpu"].double() - found["cuda"].double()).norm() < 1e-4 * update + rounding


@pytest.mark.parametrize("method", ["average", "ties", "dare_linear", "wudi", "tsv"])
def test_a_job_merges_where_it_computes(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe: dict[str, Any] = pico.save(pico.job("llama", 3), tmp_path)
    del recipe["merged_model"]
    recipe |= {"merge": {"method": method}, "settings": {"compile_blocks": False}}
    merged = load_file(ff.merge(recipe, out=tmp_path / "plain", device="cuda") / "model.safetensors")
    found = []
    for name in ("first", "second"):
        report = ff.calibrate(recipe, out=tmp_path / name, device="cuda", delta=tmp_path / f"{name}-delta")
        assert report.peaks.device_bytes <= 1.05 * report.peaks.planned_device_bytes
        found.append(load_file(tmp_path / name / "model.safetensors"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in merged)
    assert torch.equal(found[0]["model.embed_tokens.weight"], merged["model.embed_tokens.weight"])
    ff.delta(tmp_path / "first", out=tmp_path / "delta-again")  # which merges again, where the run did
