"""The parts of `bench.gpu`: budgets, rows that cannot be measured, tests run apart, tiles, jobs."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import readme
from bench.gpu import __main__ as command
from bench.gpu import checks, goals, jobs, layer, moments
from bench.gpu.budget import Budget, seconds
from bench.gpu.sections import DeviceLost, LeftOut, Row, Section, run_section
from bench.gpu.timing import Run
from bench.harness import process
from bench.harness import results as results_file
from bench.harness.results import Results
from bench.harness.tests import run_tests
from bench.jobs import run_job
from bench.workers import ours
from bench.workloads import WORKLOADS, write

CPU = torch.device("cpu")
DRY = Run(CPU, dry=True, peak=1.0)


# Budgets


@pytest.mark.parametrize(("text", "value"), [("12m", 720), ("90s", 90), ("720", 720), ("1.5m", 90)])
def test_a_budget_in_words(text: str, value: float):
    assert seconds(text) == value


def test_what_a_section_leaves_over_flows_on():
    clock = [0.0]
    budget = Budget(100.0, lambda: clock[0])
    budget.share_out({"a": 0.2, "b": 0.2, "c": 0.4})
    budget.begin("a")
    assert budget.left == pytest.approx(25)
    clock[0] = 10
    budget.begin("b")
    assert budget.left == pytest.approx(30)
    clock[0] = 60  # longer than its share
    budget.begin("c")
    assert budget.left == pytest.approx(40)
    clock[0] = 101
    assert budget.left < 0


def test_no_budget_is_no_limit():
    budget = Budget(None)
    budget.share_out({"a": 1.0})
    budget.begin("a")
    assert budget.left == float("inf")


# Rows


def test_code_is_told_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(results_file, "ROOT", tmp_path)
    (tmp_path / "a").mkdir()
    for name in ("a/one.py", "two.py", "three.py"):
        (tmp_path / name).write_text("x = 1\n")
    sources, found = ("a", "two.py"), set()
    for name in ("three.py", "a/one.py", "two.py"):
        found.add(results_file.code_hash(sources))
        (tmp_path / name).write_text("x = 2\n")
    found.add(results_file.code_hash(sources))
    assert len(found) == 3, "three.py is none of them"


def section(*rows: Row) -> Section:
    return Section("some", 1.0, lambda run, results: iter(rows), "Some", lambda rows, peak: [])


def unlimited() -> Budget:
    budget = Budget(None)
    budget.share_out({"some": 1.0})
    budget.begin("some")
    return budget


def raises(error: Exception) -> Callable[[float], dict]:
    def measure(left: float) -> dict:
        raise error

    return measure


def test_rows_that_fail_take_a_line_each_and_the_next_goes_on(capsys: pytest.CaptureFixture[str]):
    results = Results(None, {})
    measured, _ = run_section(
        section(
            Row("broken", raises(ValueError("one\ntwo"))),
            Row("memory", raises(torch.OutOfMemoryError("much\nmore"))),
            Row("disk", raises(OSError(28, "No space left on device"))),
            Row("absent", raises(LeftOut("no such thing"))),
            Row("fine", lambda left: {"ms": 1}),
        ),
        DRY,
        results,
        unlimited(),
    )
    assert results.of("some") == {"fine": {"ms": 1}}
    assert results.failed["some"] == {"broken": "ValueError: one"}
    assert measured == 1
    assert capsys.readouterr().out.splitlines() == [
        "some: broken: failed: ValueError: one",
        "some: memory: left out: ran out of device memory",
        "some: disk: left out: no space left on the disk",
        "some: absent: left out: no such thing",
    ]


def test_what_failed_is_not_tried_again():
    results, calls = Results(None, {}), []

    def broken(left: float) -> dict:
        calls.append(left)
        raise ValueError

    for _ in range(2):
        run_section(section(Row("broken", broken)), DRY, results, unlimited())
    assert len(calls) == 1


def test_a_row_is_not_begun_without_time_for_it():
    results, budget = Results(None, {}), Budget(10.0, lambda: 0.0)
    budget.share_out({"some": 1.0})
    budget.begin("some")
    row = Row("long", raises(AssertionError()), 11.0)
    assert run_section(section(row), replace(DRY, dry=False), results, budget) == (
        0,
        {"long": "takes about 11 s, more than was left"},
    )
    assert set(results.left_out["some"]) == {"long"}


def test_a_lost_device_ends_a_section_with_the_row_that_lost_it_on_record(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: raises(RuntimeError("CUDA error"))(0))
    results = Results(None, {})
    rows = Row("bad", raises(RuntimeError("illegal access"))), Row("next", raises(AssertionError()))
    with pytest.raises(DeviceLost, match="bad"):
        run_section(section(*rows), Run(torch.device("cuda"), False), results, unlimited())
    assert results.failed["some"] == {"bad": "RuntimeError: illegal access"}


def test_sections_keep_no_tensors():
    """Not even until garbage is collected: the next section's memory is its own."""
    chosen = [each for each in command.SECTIONS.values() if each.name not in ("checks", "tiles", "jobs")]
    results = Results(None, {})
    for each in chosen:  # imports and compiled forwards, which keep what they like
        run_section(each, DRY, results, unlimited())
    results.rows.clear()
    gc.collect()
    gc.disable()
    try:
        before = set(map(id, _tensors()))
        for each in chosen:
            assert run_section(each, DRY, results, unlimited())[0]
        after = [x.shape for x in _tensors() if id(x) not in before]
    finally:
        gc.enable()
    assert not after


def _tensors() -> list[torch.Tensor]:
    return [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]


# Tests run apart

TESTS = """
import pytest, time

def test_good(): pass

def test_moments(): assert False, "off by\\n 1"

@pytest.mark.skip
def test_skipped(): pass

@pytest.fixture
def torn():
    yield
    raise RuntimeError("as it ends")

def test_torn(torn): pass
"""


@pytest.mark.parametrize("processes", [0, 2])
def test_outcomes_are_read_test_by_test(processes: int, tmp_path: Path):
    if processes:
        pytest.importorskip("xdist")
    path = tmp_path / "test_some.py"
    path.write_text(TESTS)
    row = run_tests([str(path)], 60, processes)
    assert (row["passed"], row["failed"], row["skipped"]) == (1, 2, 1)
    assert {name.rpartition("::")[2]: each["error"] for name, each in row["failures"].items()} == {
        "test_moments": "AssertionError: off by",
        "test_torn": "RuntimeError: as it ends",
    }


def test_tests_that_take_too_long_are_ended_and_what_is_known_stays(tmp_path: Path):
    path = tmp_path / "test_some.py"
    path.write_text("def test_bad(): assert 0\n\ndef test_slow():\n    import time; time.sleep(60)\n")
    row = run_tests([str(path)], 6, 0)
    assert row["unfinished"] == "ended after 6 s"
    assert row["failed"] == 1


def test_a_broken_pytest_is_a_failure(tmp_path: Path):
    row = run_tests([str(tmp_path / "absent.py")], 60, 0)
    assert row["failed"] == 1
    assert "file or directory not found" in row["failures"]["pytest"]["error"]


def test_tests_that_are_all_skipped_prove_nothing(tmp_path: Path):
    path = tmp_path / "test_some.py"
    path.write_text("import pytest\n@pytest.mark.skip\ndef test_some(): pass\n")
    row = run_tests([str(path)], 60, 0)
    assert (row["failed"], row["skipped"]) == (1, 1)
    assert row["failures"]["pytest"]["error"] == "no test ran"


def test_all_tests_that_need_a_gpu_are_run():
    assert {"tests/kernels/test_gpu.py", "tests/test_gpu_job.py"} <= set(checks.gpu_tests())
    assert "tests/test_engine.py" not in checks.gpu_tests()


@pytest.mark.parametrize(
    ("test", "sections"),
    [
        ("tests/kernels/test_gpu.py::test_each_path[x]", {"moments", "tiles", "layer", "jobs"}),
        ("tests/kernels/test_gpu.py::test_fold[fp16x3]", {"fold", "solve", "layer", "jobs"}),
        ("tests/kernels/test_gpu.py::test_triangle[1]", {"fold", "solve", "layer", "jobs"}),
        ("tests/kernels/test_gpu.py::test_the_host_never_waits", set()),
        ("tests/test_gpu_job.py::test_a_system_is_solved_where_it_lies", {"solve", "layer", "jobs"}),
        ("tests/test_gpu_job.py::test_it_gives_what_the_cpu_gives[device-clip]", {"layer", "jobs"}),
        ("tests/test_gpu_job.py::test_memory_that_runs_out_halves_the_chunks", set()),
        ("tests/test_precision.py::test_convolutions", {"layer", "jobs"}),
        ("pytest", {"moments", "tiles", "layer", "jobs"}),
    ],
)
def test_what_a_failure_stops(test: str, sections: set[str]):
    results = Results(None, {})
    results.add("checks", "tests", {"failures": {test: {"error": "", "text": ""}}})
    assert set(checks.stopped(results)) == sections


def test_failures_of_tests_that_have_changed_stop_nothing():
    results = Results(None, {})
    results.add("checks", "tests before", {"failures": {"tests/kernels/test_gpu.py::test_fold": {"error": ""}}})
    assert checks.stopped(results)
    list(checks.rows(DRY, results))
    assert not checks.stopped(results)


# Goals


def fake_gpu() -> dict[str, dict]:
    """Rows as a GPU would give them."""
    phases = {"forward": 250.0, "moments": 100.0, "fold": 100.0, "solve": 50.0, "advance": 100.0}
    flops = dict.fromkeys(phases, 70e12)
    layers = {
        layer.ENGINE: {"ms": {**phases, "forward": 350.0}, "flops": flops, "tasks": 5, "tokens": 32768},
        layer.COMPILED: {"ms": phases, "flops": flops, "tasks": 5, "tokens": 32768},
        layer.OFFICIAL: {"ms": {"forward": 6600.0}},
        layer.FUSIONEVAL: {"ms": {"forward": 5400.0}},
    }
    shapes = {
        str(shape): {
            "dtype": str(shape.dtype).removeprefix("torch."),
            **{"d": shape.d, "m": shape.m, "n": shape.n},
            "flops": shape.flops,
            "ms": {"taken": shape.flops * 1e-9 / 680, "torch": shape.flops * 1e-9 / 600},
            "error": 1e-5,
        }
        for shape in moments.shapes(dry=False)
    }
    systems = {"systems": 1, "d": 14336, "m": 4096, "ms": {"potrf": 1.0, "trsm": 1.0, "LU": 9.0}}
    return {
        "checks": {"tests": {"passed": 200, "failed": 0, "skipped": 12, "unfinished": "", "failures": {}}},
        "layer": layers,
        "solve": {str(i): systems for i in range(4)},
        "moments": shapes,
        "jobs": {
            "clip-b32": {"seconds": 9.0},
            "clip-b32, official": {"seconds": 80.0},
            "llama-8b": {"seconds": 119.0, "peak_device_gib": 8.5},
            "llama-1b": {"seconds": 9.0},
        },
    }


def test_goals():
    found = {(each.section, each.what): each for each in goals.figures(fake_gpu(), 800.0)}
    met = {what: each.met for (_, what), each in found.items()}
    assert met == {
        "tests: 200 passed, 12 skipped": True,
        "600 ms, of the ideal": True,
        f"{layer.OFFICIAL}, by ours": True,
        f"{layer.FUSIONEVAL}, by ours": False,
        "of a Llama-8B layer at 16k, of the peak": True,
        "cuBLAS's time by ours, the least": True,
        "float32: largest error": True,
        "clip-b32, official, by ours": False,
        "llama-8b: seconds": True,
        "llama-8b: GPU GiB": False,
    }
    assert found["layer", "600 ms, of the ideal"].found == "73%"
    assert found["moments", "of a Llama-8B layer at 16k, of the peak"].found == "85%"


def test_goals_fit_a_terminal():
    parts = {name: {"failed": {}, "left_out": {str(i): "" for i in range(20)}} for name in command.SECTIONS}
    lines = goals.as_table(goals.figures(fake_gpu(), 800.0), parts).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines[:-1])) <= 80


def test_the_readme_has_a_table_of_a_gpu():
    sections = {name: {"rows": rows} for name, rows in fake_gpu().items()}
    sections["peak"] = {"rows": {"product": {"TFLOP/s": 800.0}}}
    environment = {"device": "NVIDIA H200", "driver, power limit, clock": "570.1, 700 W, 1980 MHz", "torch": "2.13"}
    text = readme.gpu_tables({"environment": environment, "sections": sections})
    assert text.startswith("**NVIDIA H200** (driver, power limit, clock 570.1, 700 W, 1980 MHz; torch 2.13). Its peak")
    assert "| bfloat16 | 4096 | 4096 | 16384 |" in text
    assert "| 65536 |" not in text, "16k tokens only"
    assert "share of ideal" in text


# Jobs


def test_a_job_without_room_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**20))
    job = next(job for job in jobs.jobs(dry=False) if job.name == "llama-8b")
    assert 60 * 2**30 < job.disk_bytes < 70 * 2**30  # three models, and the hidden states that are kept
    with pytest.raises(LeftOut, match=r"about 6\d\.\d GiB of disk; .* has 0\.0 free; --folder names another"):
        jobs._place(job, replace(DRY, folders=(tmp_path,)))


def test_a_job_is_written_where_there_is_room(tmp_path: Path):
    (job, *_) = jobs.jobs(dry=True)
    assert jobs._place(job, replace(DRY, folders=(tmp_path / "absent", tmp_path))) == tmp_path


@pytest.mark.parametrize(
    ("error", "known"), [(process.TookTooLong("ended after 3 s"), "left_out"), (RuntimeError("it broke"), "failed")]
)
def test_what_a_job_that_ends_early_wrote_is_gone(
    error: Exception, known: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(process, "last_json", lambda *_, **__: raises(error)(0))
    results = Results(None, {})
    run_section(jobs.JOBS, replace(DRY, folders=(tmp_path,)), results, unlimited())
    assert not results.of("jobs")
    assert len(getattr(results, known)["jobs"]) == 3
    assert not list(tmp_path.iterdir())


def test_a_job_that_is_ended_says_how_far_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    layers, spent = 1, {"forward": 0.25}

    def ended(command: list[str], *_: object, **__: object) -> dict:
        progress = ours.SoFar(Path(command[command.index("--so-far") + 1]), 0.0, lambda: spent)
        progress.stage(2, 100)
        for _ in range(layers):
            progress.layer(None)
        raise process.TookTooLong("ended after 3 s")

    monkeypatch.setattr(ours.time, "perf_counter", lambda: 2.5)
    monkeypatch.setattr(process, "last_json", ended)
    with pytest.raises(
        process.TookTooLong, match=r"^ended after 3 s; 1 of 2 layers were done after 2.5 s: forward 0.25$"
    ):
        run_job(tmp_path, "cpu", threads=1)
    monkeypatch.setattr(process, "last_json", lambda *_, **__: raises(process.TookTooLong("ended after 3 s"))(0))
    with pytest.raises(process.TookTooLong, match=r"^ended after 3 s before its first layer$"):
        run_job(tmp_path, "cpu", threads=1)


def test_what_a_large_job_takes_is_told_by_a_short_one():
    job = next(job for job in jobs.jobs(dry=False) if job.name == jobs.LARGE)
    results = Results(None, {})
    assert jobs.seconds(job, results) == job.seconds
    results.add("jobs", jobs.SHORT, {"seconds": 50.0, "seconds_in_layers": 20.0})
    assert jobs.seconds(job, results) == 50 + 28 * 5


def test_a_reason_is_not_forgotten_when_there_is_no_time_to_try_again():
    results, budget = Results(None, {}), SimpleNamespace(left=1.0)
    late = process.TookTooLong("ended after 3 s; 1 of 2 layers were done")
    section = Section("jobs", 1.0, lambda run, results: iter([Row("large", raises(late))]), "", lambda rows, peak: [])
    run_section(section, DRY, results, budget)
    budget.left = 0.0
    run_section(section, DRY, results, budget)
    assert results.left_out["jobs"] == {"large": str(late)}


def test_one_expert_stands_for_all(tmp_path: Path):
    work = replace(WORKLOADS["llama-8b"].small, tasks=3)
    recipe = write(work, tmp_path / "job", CPU)
    base, first, last = (tmp_path / "job" / name for name in ("base", "task0", "task2"))
    assert last.is_symlink()
    assert last.resolve() == first
    assert recipe["experts"]["task2"] == {"model": str(last), "data": f"{last}.safetensors"}
    file = "model.safetensors"
    assert (base / file).read_bytes() != (first / file).read_bytes()
    assert first.with_suffix(".safetensors").read_bytes() != last.with_suffix(".safetensors").read_bytes()


# Adapters


def test_a_llama_adapter_has_factors_for_every_layer(tmp_path: Path):
    from safetensors.torch import load_file

    work = replace(WORKLOADS["llama-1b"].small, lora=4, tasks=1)
    write(work, tmp_path / "job")
    factors = load_file(tmp_path / "job" / "task0" / "adapter_model.safetensors")
    expected = {
        f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{part}.weight"
        for layer in range(work.config["num_hidden_layers"])
        for name in ("q_proj", "v_proj")
        for part in "AB"
    }
    assert set(factors) == expected
    assert all(factor.count_nonzero() == factor.numel() > 0 for factor in factors.values())
    config = json.loads((tmp_path / "job" / "task0" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]


def test_a_t5_adapter_is_as_it_was(tmp_path: Path):
    write(replace(WORKLOADS["flan-t5-base"].small, tasks=1), tmp_path / "job")
    config = json.loads((tmp_path / "job" / "task0" / "adapter_config.json").read_text())
    assert config == {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q", "v"]}


def test_an_empty_adapter_is_refused(tmp_path: Path):
    work = replace(WORKLOADS["llama-1b"].small, lora=4, tasks=1, model="GPT2LMHeadModel")
    work = replace(work, config={"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 50}, toy={})
    with pytest.raises(ValueError, match="GPT2LMHeadModel: no projection is named q, v, q_proj"):
        write(work, tmp_path / "job")
