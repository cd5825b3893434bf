"""Comparisons and cost figures, through their motions at toy sizes."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import featcal_fast as ff
from bench import compare, cost, jobs, overlap
from bench.compare import OURS, difference
from bench.harness import process
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
    ways = {OURS: (ours, "--merged"), "fusioneval": (fusioneval,), "reference": (reference,)}
    for name, (worker, *options) in ways.items():
        worker.main([str(small_llama), str(tmp_path / name), "--count", *options])
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


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Workers run in this process; their commands."""
    commands = []

    def last_json(command: list[str], *_: object, **__: object) -> dict:
        if "--check" not in command:
            commands.append(" ".join(command[2:]))
        with redirect_stdout(io.StringIO()) as printed, suppress(SystemExit):
            import_module(command[2]).main(command[3:])
        return json.loads(printed.getvalue().splitlines()[-1])

    monkeypatch.setattr(process, "last_json", last_json)
    return commands


def test_a_comparison_that_was_ended_goes_on(
    here: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["clip-small", "--toy", "--device", "cpu", "--folder", str(tmp_path), "--runs", "2"]
    arguments += ["--reference", "--judge", "reference"]
    run = process.last_json

    def ended(command: list[str], *rest: object, **more: object) -> dict:
        if len(here) == 4:
            raise KeyboardInterrupt
        return run(command, *rest, **more)

    monkeypatch.setattr(process, "last_json", ended)
    with pytest.raises(KeyboardInterrupt):
        compare.main(arguments)
    monkeypatch.setattr(process, "last_json", run)
    first = capsys.readouterr().out
    compare.main(arguments)
    ways = [OURS, compare.LOWER, "reference"]
    assert [line.split(", ")[1].split(":")[0] for line in first.splitlines()] == [*ways, OURS], "in turns"
    assert len(here) == 2 * 3 + 1, "three ways twice, and the judge"
    report = json.loads((tmp_path / "compare-toy-clip-small.json").read_text())
    assert {way: len(runs) for way, runs in report["runs"].items()} == dict.fromkeys(ways, 2)
    assert report["judge"] == "float64 reference"
    assert 0 < report["difference"][OURS]["weight"] < 1e-4 < report["difference"][compare.LOWER]["weight"]
    assert report["versions"][OURS]["torch"] == report["machine"]["torch"] == torch.__version__
    assert f"{report['difference'][OURS]['weight']:.1e}" in capsys.readouterr().out

    compare.main(arguments)
    assert len(here) == 7, "all was finished"
    compare.main([*arguments, "--fresh"])
    assert len(here) == 14


def test_what_a_way_lacks_is_found_before_anything_is_timed(tmp_path: Path) -> None:
    package = tmp_path / "checkout" / "src" / "featcal"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "featcal.py").write_text("import a_package_that_is_missing\n")
    folder, official = tmp_path / "folder", ["--official", str(tmp_path / "checkout")]
    with pytest.raises(SystemExit) as error:
        compare.main(["clip-small", "--toy", "--device", "cpu", "--folder", str(folder), *official])
    assert str(error.value).splitlines() == [
        "official cannot run: bench.workers.official ended with 1: ModuleNotFoundError: No module named "
        f"'a_package_that_is_missing' (by {sys.executable})",
        "Nothing was timed.",
    ]
    assert not folder.exists()


def test_a_job_is_planned_and_run_once(here: list[str], tmp_path: Path) -> None:
    arguments = ["clip-b32", "--toy", "--device", "cpu", "--tasks", "2", "--folder", str(tmp_path)]
    for _ in range(2):
        jobs.main(arguments)
    assert len(here) == 1
    found = json.loads((tmp_path / "jobs-cpu.json").read_text())["toy-clip-b32-2-tasks"]
    assert found["tasks"] == 2
    assert found["calibrated_weights"] == found["linear_weights"] > 0
    assert found["plan"]["host"] > 0
    assert found["peak_host_gib"] > 0.1
    assert found["peak_device_gib"] == 0
    assert {"experts' forward", "moments", "fold", "solve"} <= set(found["seconds_by_phase"])


def test_a_slow_disk_is_as_slow_as_was_asked(here: list[str], tmp_path: Path) -> None:
    overlap.main(["--toy", "--device", "cpu", "--folder", str(tmp_path)])
    found = json.loads((tmp_path / "overlap-cpu.json").read_text())
    assert found["read_seconds"] > 1.5 * found["compute_seconds"]
    assert found["total_seconds"] >= found["read_seconds"]


def test_cost(here: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "AXES", {"samples": [4, 8], "width": [64, 128]})
    monkeypatch.setattr(cost, "START", replace(cost.START, samples=8))
    monkeypatch.setattr(cost, "WIDTH", 64)
    monkeypatch.setattr(cost, "LAYERS", 2)
    cost.main(["--device", "cpu", "--runs", "2", "--toy", "--folder", str(tmp_path)])
    assert len(here) == 8
    found = json.loads((tmp_path / "cost-cpu.json").read_text())
    assert [point["size"] for point in found["points"]["width"]] == [64, 128]
    assert set(found["exponents"]) == {"samples", "width"}
    assert (tmp_path / "cost-cpu.png").stat().st_size > 1000


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
