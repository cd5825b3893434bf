"""What `bench.gpu` times of the kernels: tiles compiled ahead, paths, and the row for the table."""

from __future__ import annotations

import signal
import time
from dataclasses import replace

import pytest
import torch
from featcal_kernels import blas, naive
from featcal_kernels.configs import TABLE

from bench.gpu import compiling, moments, tiles, timing
from bench.gpu.budget import Budget
from bench.gpu.sections import run_section
from bench.gpu.tiles import Shape
from bench.gpu.timing import Run
from bench.harness import process
from bench.harness.results import Results

CPU = torch.device("cpu")
GPU = Run(CPU, dry=False, arch=TABLE["sm_90"], peak=1.0)


@pytest.mark.parametrize(("row", "shared"), [("sm_80", 166_912), ("sm_89", 101_376), ("sm_90", 232_448)])
def test_candidates(row: str, shared: int):
    arch = TABLE[row]
    for kind, count in (("half", 8), ("split", 4)):
        found = list(tiles.candidates(arch, kind, shared).values())
        assert found[0] == getattr(arch, kind)
        assert len(found) == len(set(found)) == count
    assert {tile.triple for tile in tiles.candidates(arch, "split", shared).values()} == {False, True}


def test_a_tile_that_spills_is_refused():
    pytest.importorskip("triton")
    target = compiling.Target("cuda", 90, 32, "sm_90", 132, 232_448)
    arch = TABLE["sm_90"]
    found = compiling.Compiling(
        target,
        {"half": [(48, 32, 100)]},
        {"half": {"bad": replace(arch.half, halves=False), "odd": replace(arch.half, m=96)}},
    )
    usable, refused = found.usable("half", 120)
    assert not usable
    assert refused["bad"].startswith("spills ")
    assert refused["odd"].startswith("does not compile: ")


def test_what_is_not_compiled_in_time_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiling.process, "last_json", lambda *_: process.run(["sleep", "20"], 30))
    target, shapes = compiling.Target("cuda", 90, 32, "sm_90", 132, 232_448), {"half": []}
    found = compiling.Compiling(target, shapes, {"half": {"slow": TABLE["sm_90"].half}})
    assert found.usable("half", 0.01) == ({}, {"slow": "not compiled in time"})
    (future,) = found._futures.values()
    while not (process._running or future.done()):  # a busy machine is in no hurry to start one
        time.sleep(0.01)
    found.close()
    found._pool.shutdown(wait=True)
    assert future.result() == (-signal.SIGKILL, ""), "its process is ended"


def test_the_row_takes_what_was_fastest():
    arch = TABLE["sm_90"]
    names = {kind: list(tiles.neighbours(arch, kind)) for kind in tiles.COUNTS}
    rows = {}
    for kind, ms in (("half", (1.0, 0.5)), ("split", (1.0, 0.995)), ("small", (2.0, 3.0))):
        shape = {"kind": kind, "d": 4096, "m": 4096, "n": 16384, "refused": {}}
        rows[kind] = {**shape, "ms": dict(zip(names[kind], ms, strict=False))}
    found = tiles.best_row(arch, rows)
    assert found.half == tiles.neighbours(arch, "half")[names["half"][1]]
    assert found.split == arch.split, "not clearly better"
    assert found.small == replace(arch.small, step=2.0)  # 4 times the half tile's time, for twice as many steps
    assert (found.blas_flops, found.blas_columns) == (arch.blas_flops, arch.blas_columns), "not timed"


def test_crossovers():
    rows = [
        {"d": d, "flops": d * n * 1e6, "ms": {"triton": 1.0, "squares": 0.5 if d * n < 3000 or d >= 4096 else 2.0}}
        for d in (512, 1024, 2048, 4096)
        for n in (2, 16)
    ]
    flops, columns = tiles.crossovers(rows)
    assert 2.048e9 < flops <= 8.192e9
    assert columns == 4096


def test_grams_that_cublas_takes():
    timed = ((512, 0.5), (1024, 0.9), (2048, 1.1), (4096, 0.5))
    rows = {str(d): {"d": d, "m": 0, "n": 16384, "flops": 1e9, "ms": {"triton": 1.0, "squares": ms}} for d, ms in timed}
    assert tiles.best_row(TABLE["sm_90"], {}, rows).blas_grams == 1024


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Arguments of the launcher, which the specification stands in for."""
    launch = pytest.importorskip("featcal_kernels.launch", reason="triton is not installed")
    calls = []

    def moments_(s, h, x, y, **how) -> None:
        calls.append(how)
        naive.gram_(s, x, None)
        if y is not None:
            naive.cross_(h, y, x, None)

    monkeypatch.setattr(launch, "moments_", moments_)
    monkeypatch.setattr(blas, "available", lambda device: True)
    monkeypatch.setattr(timing, "ROUNDS", (1, 1))
    return calls


def test_every_path_and_both_ways_to_split_are_timed(launched: list[dict]):
    half = moments.measure_shape(Shape(64, 48, 100, torch.bfloat16), GPU, GPU.arch)
    assert set(half["ms"]) == set(half["host ms"]) == {"taken", "torch", "fp32", "triton", "squares"}
    gram = moments.measure_shape(Shape(64, 0, 100, torch.bfloat16), GPU, GPU.arch)
    assert set(gram["ms"]) == set(half["ms"])
    assert gram["error"] < 1e-6
    single = moments.measure_shape(Shape(64, 48, 100, torch.float32), GPU, GPU.arch)
    assert set(single["ms"]) == {"taken", "torch", "fp32", "triple", "runs"}
    splits = {how["arch"].split for how in launched if "arch" in how}
    assert {tile.triple for tile in splits} == {False, True}
    assert TABLE["sm_90"].split in splits


def test_a_way_that_the_compiler_refuses_is_not_timed(launched: list[dict], monkeypatch: pytest.MonkeyPatch):
    from featcal_kernels import launch

    moments_ = launch.moments_

    def refuses(s, h, x, y, **how) -> None:
        if how.get("path") == "squares":
            raise RuntimeError("PassManager::run failed")
        moments_(s, h, x, y, **how)

    monkeypatch.setattr(launch, "moments_", refuses)
    row = moments.measure_shape(Shape(64, 48, 100, torch.bfloat16), GPU, GPU.arch)
    assert set(row["ms"]) == {"taken", "torch", "fp32", "triton"}


def test_tiles_are_timed(launched: list[dict], monkeypatch: pytest.MonkeyPatch):
    small = Shape(48, 32, 100, torch.bfloat16)
    monkeypatch.setattr(tiles, "KINDS", {"half": [small], "split": [replace(small, dtype=torch.float32)]})

    class Compiled:
        def usable(self, kind: str, timeout: float):
            found = tiles.candidates(TABLE["sm_90"], kind, 232_448)
            name = list(found)[1]
            return {each: tile for each, tile in found.items() if each != name}, {name: "spills 8"}

    results, budget = Results(None, {}), Budget(None)
    run_section(tiles.TILES, replace(GPU, compiling=Compiled()), results, budget)
    rows = results.of("tiles")
    assert not results.failed.get("tiles")
    assert list(rows) == ["half bfloat16 48 32 100", "split float32 48 32 100"]
    assert len(rows["half bfloat16 48 32 100"]["ms"]) == 7
    forced = {how["arch"].half for how in launched if how["arch"].small is None}
    assert len(forced) == 7, "no other tile is taken in a candidate's place"
    assert "left out: half 128x256x64 8w 3s g8 halves: spills 8" in tiles.TILES.show(rows, GPU.peak)
