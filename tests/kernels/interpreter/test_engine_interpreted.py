"""The engine with the kernels a GPU would run: in float32 as near to the float64 reference as on a CPU."""

from __future__ import annotations

import copy
from dataclasses import replace

import pico
import pytest
from featcal_kernels import launch, ops
from featcal_kernels.configs import Arch, Tile
from test_interpreter import pytestmark  # noqa: F401 (where the interpreter can be used)
from torch import nn

import featcal_fast as ff
from featcal_fast import reference

TILE = Tile(64, 64, 128, warps=4, stages=2)
ARCH = Arch(half=TILE, split=replace(TILE, promote=1, triple=True), single=TILE, descriptors=True)
OLDER = replace(ARCH, split=replace(TILE, promote=1), descriptors=False)


@pytest.mark.parametrize(("kind", "descriptors"), [("clip", True), ("llama", False)])
def test_update_is_exact(kind: str, descriptors: bool, monkeypatch: pytest.MonkeyPatch):
    job = pico.job(kind, 2, layers=2 if kind == "llama" else 1)
    job.batches = {task: batches[:1] for task, batches in job.batches.items()}  # interpreting is slow
    judge = _calibrated(reference.calibrate_model, job.double())
    monkeypatch.setattr(ops, "_gpu", lambda *tensors: launch)
    monkeypatch.setattr(launch, "arch_of", lambda device: ARCH if descriptors else OLDER)
    called = []
    add = launch._add
    monkeypatch.setattr(launch, "_add", lambda *args: (called.append(1), add(*args)))
    ours = _calibrated(ff.calibrate_model, job)
    assert len(called) > 20
    for name, exact in judge.named_parameters():
        assert exact.isfinite().all(), name
        start = job.merged.get_parameter(name).double()
        update = (exact - start).norm()
        if update > 0.05 * start.norm():  # well above the parameter's own rounding
            error = float((ours.get_parameter(name).detach().double() - exact).norm() / update)
            assert error < 2e-5, f"{name}: {error:.1e}"


def _calibrated(run, job: pico.Job) -> nn.Module:
    merged = copy.deepcopy(job.merged)
    run(merged, base=job.base, experts=job.experts, batches=job.batches)
    return merged
