"""Processes that torchrun starts, on a CPU and on two GPUs: the bits of one, shown once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import featcal_fast as ff
from featcal_fast import reference


def launch(recipe: dict[str, Any], folder: Path, device: str) -> tuple[dict[str, Tensor], list[str]]:
    """Two processes carry out a recipe: the weights that they write, and the lines that they show."""
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    processes = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "featcal_fast", "calibrate", "recipe.yaml", "--out", "two", "--device", device]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "NO_COLOR": "1"}
    done = subprocess.run(
        processes + command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return load_file(folder / "two" / "model.safetensors"), (done.stdout + done.stderr).splitlines()


def check_same(found: dict[str, Tensor], folder: Path) -> None:
    expected = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, found[name]), name


def test_what_they_show_comes_from_the_first_one(tmp_path: Path) -> None:
    recipe = pico.save(pico.job("clip", 3, layers=2), tmp_path)
    ff.calibrate(recipe, out=tmp_path / "one", device="cpu")
    found, shown = launch(recipe, tmp_path, "cpu")
    check_same(found, tmp_path / "one")
    for once in ("layer 1/2: ", "layer 2/2: ", "Wrote ", "12 of 12 linear weights calibrated", "Feature drift"):
        assert len([line for line in shown if once in line]) == 1, (once, shown)
    assert not [line for line in shown if "rank 1" in line]


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA or ROCm devices")
@pytest.mark.parametrize("kind", ["llama", "clip"])
def test_two_gpus_give_the_bits_of_one_as_near_to_the_exact_solution(kind: str, tmp_path: Path) -> None:
    job = pico.job(kind, 3)
    recipe = pico.save(job, tmp_path)
    ff.calibrate(recipe, out=tmp_path / "one", device="cuda")
    found, _ = launch(recipe, tmp_path, "cuda")
    check_same(found, tmp_path / "one")
    judge = job.double()
    reference.calibrate_model(judge.merged, base=judge.base, experts=judge.experts, batches=judge.batches)
    judged = 0
    for name, exact in judge.merged.named_parameters():
        assert exact.isfinite().all(), name
        start = job.merged.get_parameter(name).double()
        update = (exact - start).norm()
        if update > 0.05 * start.norm():  # well above its own rounding
            judged += 1
            assert (found[name].double() - exact).norm() < 2e-5 * update, name
    assert judged
