"""Jobs on a GPU: the result is the CPU's, the bits are the same each time, wherever hidden states wait."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pico
import pytest
import torch
from safetensors.torch import load_file

import featcal_fast as ff
from featcal_fast import reference
from featcal_fast.job import run as job
from featcal_fast.layer import cholesky
from featcal_fast.layer.chain import Chain
from featcal_fast.layer.cholesky import factor_, solve_
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import LayerReport
from featcal_fast.streaming.chunks import Chunks
from featcal_fast.streaming.hidden_states import HOST

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
    # Blocks that run as they are would hide that compiling fails, also where the host is seen to wait.
    pytest.mark.filterwarnings("error:.*cannot be compiled"),
]


@pytest.mark.parametrize("kind", ["llama", "clip", "t5"])
@pytest.mark.parametrize("where", ["device", "host", "file"])
def test_it_gives_what_the_cpu_gives(kind: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = pico.save(pico.job(kind, 3), tmp_path)
    recipe["settings"] = {"compile_blocks": None if where == "device" else False}  # compiling takes its time
    ff.calibrate(recipe, out=tmp_path / "cpu", device="cpu")
    if where == "host":
        choose = job.choose_offload
        monkeypatch.setattr(job, "choose_offload", lambda *args: (choose(*args)[0], HOST))
    found = []
    for name in ("first", "second"):
        ff.calibrate(recipe, out=tmp_path / name, device="cuda", scratch=tmp_path if where == "file" else None)
        found.append(load_file(tmp_path / name / "model.safetensors"))
    merged, cpu = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "cpu"))
    for name, weight in found[0].items():
        assert torch.equal(weight, found[1][name]), name
        assert cpu[name].isfinite().all(), name
        update = (cpu[name].double() - merged[name].double()).norm()
        if update > 1e-3 * merged[name].double().norm():
            assert (weight.double() - cpu[name].double()).norm() < 1e-4 * update, name


class Interrupted(Progress):
    """Ends a run before its second layer is kept."""

    def layer(self, report: LayerReport) -> None:
        if report.index == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["llama", "clip", "t5"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_an_interrupted_run_goes_on_to_the_same_bits(kind: str, on_disk: bool, tmp_path: Path) -> None:
    recipe = {**pico.save(pico.job(kind, 2), tmp_path), "settings": {"compile_blocks": False}}
    options = {"device": "cuda", "scratch": tmp_path if on_disk else None, "checkpoint_every": 1}
    ff.calibrate(recipe, out=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        ff.calibrate(recipe, out=tmp_path / "resumed", progress=Interrupted(), **options)
    assert not (tmp_path / "resumed").exists()
    ff.calibrate(recipe, out=tmp_path / "resumed", resume=True, **options)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())


@pytest.mark.parametrize(
    ("kind", "compiled"), [*((kind, False) for kind in pico.KINDS), ("llama", True), ("clip", True)]
)
def test_it_gives_what_the_reference_gives(kind: str, compiled: bool) -> None:
    """Every family; a few with compiled blocks, which take their time."""
    assert_near_the_reference(pico.job(kind, 2), compiled, 2e-5)


@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 5e-2), (torch.float16, 6e-3)], ids=str)
@pytest.mark.parametrize("kind", ["llama", "clip"])
def test_16_bits_give_what_the_reference_gives(kind: str, dtype: torch.dtype, close: float) -> None:
    """Features go to matrix units as they are. A CPU comes as close as 1.5e-2 and 2e-3: weights are rounded."""
    job = pico.job(kind, 2)
    for model in (job.base, job.merged, *job.experts.values()):
        model.to(dtype)
    assert_near_the_reference(job, False, close)


def assert_near_the_reference(job: pico.Job, compiled: bool, close: float) -> None:
    """By parameter, relative to the update, of those whose update is well above their own rounding."""
    judge, ours = job.double(), job.copy()
    reference.calibrate_model(judge.merged, base=judge.base, experts=judge.experts, batches=judge.batches)
    settings = ff.Settings(compile_blocks=compiled)
    ff.calibrate_model(
        ours.merged, base=ours.base, experts=ours.experts, batches=ours.batches, settings=settings, device="cuda"
    )
    judged = 0
    for name, exact in judge.merged.named_parameters():
        assert exact.isfinite().all(), name
        start = job.merged.get_parameter(name).double()
        update = (exact - start).norm()
        if update > 0.05 * start.norm():
            judged += 1
            assert (ours.merged.get_parameter(name).double() - exact).norm() < close * update, name
    assert judged


@pytest.mark.parametrize("chunk", [1000, 60, 1])
@pytest.mark.parametrize("kind", ["llama", "clip"])
@pytest.mark.parametrize("where", ["device", "host"])
def test_a_task_passes_without_waiting_for_the_device(
    where: str, kind: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host only tells the device what to do, until a layer is solved; in whole batches, uneven parts, samples."""

    def never_waits(work: Callable) -> Callable:
        def run(*args):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return work(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    def chosen(*args):
        plan, place = choose(*args)
        return replace(plan, chunk=chunk), HOST if where == "host" else place

    recipe = pico.save(pico.job(kind, 3), tmp_path)
    choose = job.choose_offload
    monkeypatch.setattr(job, "choose_offload", chosen)
    ff.calibrate(recipe, out=tmp_path / "first", device="cuda")  # what is found out once is known; tokens are not
    loop = import_module("featcal_fast.calibrate")
    monkeypatch.setattr(loop, "accumulate", never_waits(loop.accumulate))
    monkeypatch.setattr(Chain, "add", never_waits(Chain.add))
    ff.calibrate(recipe, out=tmp_path / "second", device="cuda")


@torch.no_grad()
@pytest.mark.parametrize("split", [True, False])
def test_a_system_is_solved_where_it_lies(split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By blocks, the largest product copies its operands: half of the features by the other half, and by some rows."""
    n, m = 8192, 16384
    x = torch.randn(2 * n, n, device="cuda")
    a, r = x.mT @ x / n + torch.eye(n, device="cuda"), torch.randn(m, n, device="cuda")
    judge = torch.linalg.solve(a.double(), r.double().mT).mT
    warm = a.clone(), r.clone()  # libraries take memory of their own, once; what is found out once is known
    factor_(warm[0])
    solve_(warm[0], warm[1].mT, split=split)
    del warm, x
    products, addmm = [], cholesky.addmm_
    monkeypatch.setattr(cholesky, "addmm_", lambda *args: (products.append(1), addmm(*args))[1])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        info = factor_(a)
        solve_(a, r.mT, split=split)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    copied = 1.1 * 4 * n // 2 * (n // 2 + 8 * cholesky.BLOCK) if split else min(a.nbytes, r.nbytes) / 2
    assert torch.cuda.max_memory_allocated() - before < copied
    assert bool(products) == split
    assert int(info) == 0
    assert (r - judge).norm() < 1e-5 * judge.norm()


def test_memory_that_runs_out_halves_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real device, made small: the layer goes on with fewer samples at a time.

    A batch's features inside of an MLP take 256 * 200 * 2048 * 4 bytes, 0.39 GiB, and two or more are there at once.
    """
    made, make = [], Chunks.__init__
    monkeypatch.setattr(Chunks, "__init__", lambda chunks, *args: (made.append(chunks), make(chunks, *args))[1])
    model = pico.job("llama", 1, hidden_size=512, intermediate_size=2048)
    batches = {"task0": [{"input_ids": torch.randint(3, 99, (256, 200))}]}
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, 0.6 * 2**30 / total))
    try:
        report = ff.calibrate_model(
            model.merged, base=model.base, experts=model.experts, batches=batches, device="cuda"
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert report.tokens == {"task0": 256 * 200}
    assert made[0].limit is not None
    assert all(parameter.isfinite().all() for parameter in model.merged.parameters())
