"""Processes that torchrun or `--gpus` starts, on a CPU and on two GPUs: the bits of one, shown once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api

import featcal_fast as ff
from featcal_fast import reference
from featcal_fast.errors import DeviceError, RankError
from featcal_fast.ranks.start import start

PROGRAM = ("-m", "featcal_fast", "calibrate", "recipe.yaml", "--out", "two")
WAYS = {
    "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *PROGRAM),
    "--gpus": (*PROGRAM, "--gpus", "2"),
}


def launch(recipe: dict[str, Any], folder: Path, device: str, way: str) -> tuple[dict[str, Tensor], list[str]]:
    """Two processes carry out a recipe: the weights that they write, and the lines that they show."""
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    (folder / "temporary").mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        **{"COLUMNS": "120", "NO_COLOR": "1", "TMPDIR": str(folder / "temporary")},
    }
    command = [sys.executable, *WAYS[way], "--device", device]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return load_file(folder / "two" / "model.safetensors"), (done.stdout + done.stderr).splitlines()


def check_same(found: dict[str, Tensor], folder: Path) -> None:
    expected = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, found[name]), name


@pytest.mark.parametrize("way", WAYS)
def test_what_they_show_comes_from_the_first_one(way: str, tmp_path: Path) -> None:
    recipe = pico.save(pico.job("clip", 3, layers=2), tmp_path)
    ff.calibrate(recipe, out=tmp_path / "one", device="cpu")
    found, shown = launch(recipe, tmp_path, "cpu", way)
    check_same(found, tmp_path / "one")
    for once in ("layer 1/2: ", "layer 2/2: ", "Wrote ", "12 of 12 linear weights calibrated", "Feature drift"):
        assert len([line for line in shown if once in line]) == 1, (once, shown)
    assert not [line for line in shown if "rank 1" in line]
    if way == "--gpus":  # torchrun leaves a folder for logs
        assert not list((tmp_path / "temporary").iterdir())


class Ended:
    """Instead of processes, how they ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: BaseException | None = None
        self.arguments: tuple[str, ...] = ()
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setattr(api, "elastic_launch", lambda config, program: self)

    def __call__(self, *arguments: str) -> None:
        self.arguments = arguments
        if self.error is not None:
            raise self.error


def failed(status: int) -> ChildFailedError:
    return ChildFailedError("featcal_fast", {1: ProcessFailure(1, 4711, status, "")})


def test_the_short_form_ends_as_the_first_process_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = Ended(monkeypatch)
    given = ["calibrate", "recipe.yaml", "--gpus", "2", "--device=cpu", "--gpus=2", "--resume"]
    for error, code in ((None, 0), (failed(1), 1), (failed(3), 3), (SignalException("", signal.SIGTERM), 143)):
        ended.error = error
        assert start(2, "cpu", given) == code
    assert ended.arguments == ("-m", "featcal_fast", "calibrate", "recipe.yaml", "--device=cpu", "--resume")
    ended.error = failed(-signal.SIGKILL)
    with pytest.raises(RankError, match=r"rank 1 \(process 4711\) was ended by SIGKILL, .* --resume goes on"):
        start(2, "cpu", given)


def test_the_short_form_starts_what_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = Ended(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device in (None, "cuda"):
        with pytest.raises(DeviceError, match=r"found 1 GPUs, expected 2 \(--gpus\); .* --device cpu"):
            start(2, device, [])
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankError, match="--gpus 2 in one of several processes already"):
        start(2, "cpu", [])
    assert not ended.arguments


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA or ROCm devices")
@pytest.mark.parametrize("kind", ["llama", "clip"])
def test_two_gpus_give_the_bits_of_one_as_near_to_the_exact_solution(kind: str, tmp_path: Path) -> None:
    job = pico.job(kind, 3)
    recipe = pico.save(job, tmp_path)
    ff.calibrate(recipe, out=tmp_path / "one", device="cuda")
    found, _ = launch(recipe, tmp_path, "cuda", "torchrun")
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
