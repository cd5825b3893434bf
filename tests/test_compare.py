"""Comparisons and cost figures, through their motions at toy sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import featcal_fast as ff
from bench import cost
from bench.compare import OURS, difference, table
from bench.workers import fusioneval, ours, reference
from bench.workloads import WORKLOADS, write


@pytest.fixture
def small_llama(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    work = replace(WORKLOADS["llama-small"].small, samples=6)
    ff.merge(write(work, folder), out=folder / "merged")
    return folder


def test_all_ways_come_to_the_same(small_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judge = tmp_path / "judge"
    reference.main([str(small_llama), str(judge), "--dtype", "float64"])
    capsys.readouterr()
    found = {}
    for name, run in {OURS: ours.main, "fusioneval": fusioneval.main, "reference": reference.main}.items():
        run([str(small_llama), str(tmp_path / name), "--count"])
        said = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert said["seconds"] > 0
        assert said["peak_gib"] > 0.1
        found[name] = said, difference(tmp_path / name, judge, small_llama / "merged")["weight"]
    assert found["reference"][1] < 1e-4
    assert max(found[OURS][1], found["fusioneval"][1]) < 0.05  # a forward in bfloat16
    assert min(found[OURS][1], found["fusioneval"][1]) > 1e-4
    # The experts' forward and most of the student's are a part of what each counts.
    tokens = sum(int(load_file(path)["attention_mask"].sum()) for path in small_llama.glob("*.safetensors"))
    merged = load_file(small_llama / "merged" / "model.safetensors")
    weights = sum(weight.numel() for name, weight in merged.items() if "_proj" in name)
    assert min(said["tflop"] for said, _ in found.values()) > 2 * 2e-12 * tokens * weights
    report = {"median": {name: said for name, (said, _) in found.items()}, "judge": "float64 reference", "tflop": {}}
    report["difference"] = {name: {"weight": error} for name, (_, error) in found.items()}
    assert table("llama", report).row_count == 3


def test_a_workload_is_the_same_each_time(tmp_path: Path) -> None:
    work = WORKLOADS["flan-t5-base"].small
    for name in "ab":
        write(work, tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.safetensors"))
    assert len(files) == 1 + 2 * work.tasks
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_exponents_are_the_slopes_of_the_last_step() -> None:
    def points(power: float, memory: float) -> list[dict[str, float]]:
        return [{"size": n, "seconds_in_layers": 3 * n**power, "peak_host_gib": 1 + 0.1 * n**memory} for n in (2, 4, 8)]

    floor = [{"size": n, "seconds_in_layers": 1, "peak_host_gib": 1.0} for n in (1, 2)]
    found = cost.exponents({"width": points(2, 2), "samples": points(1, 0), "floor": floor})
    assert found["width"]["seconds"] == pytest.approx(2)
    assert found["width"]["memory"] == pytest.approx(2)
    assert found["samples"]["seconds"] == pytest.approx(1)
    assert found["samples"]["memory"] == pytest.approx(0)


def test_differences_leave_out_what_hardly_moves(tmp_path: Path) -> None:
    start = {"a.weight": torch.ones(4), "b.weight": torch.ones(4)}
    exact = {"a.weight": torch.full((4,), 2.0), "b.weight": torch.ones(4) + 1e-7}
    found = {"a.weight": torch.full((4,), 2.5), "b.weight": torch.zeros(4)}
    for name, weights in (("start", start), ("exact", exact), ("found", found)):
        save_file(weights, tmp_path / name)
    errors = difference(tmp_path / "found", tmp_path / "exact", tmp_path / "start")
    assert errors == {"weight": 0.5, "bias": 0.0, "layernorm": 0.0}
