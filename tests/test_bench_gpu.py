"""`python -m bench.gpu`, through all its motions at toy sizes, and cut off in every way."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import readme
from bench.gpu import __main__ as command
from bench.gpu import checks, moments, sections
from bench.harness import results

ROOT = Path(__file__).resolve().parent.parent
NAMES = set(command.SECTIONS)


def run(*arguments: str) -> tuple[int, str]:
    """Exit status and what was printed."""
    with redirect_stdout(io.StringIO()) as printed:
        status = command.main(["--dry-run", *arguments])
    return status, printed.getvalue()


def rows(out: Path, section: str) -> dict:
    return json.loads(out.read_text())["sections"].get(section, {}).get("rows", {})


@pytest.fixture(autouse=True, scope="module")
def _same_code() -> Iterator[None]:
    """Whoever edits the code while the tests run does not part one run from the next."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (results, checks):
            patch.setattr(module, "code_hash", lambda sources: "0")
        yield


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> SimpleNamespace:
    """One run of everything."""
    folder = tmp_path_factory.mktemp("gpu")
    out, jobs = folder / "sub" / "result.json", folder / "jobs"
    jobs.mkdir()
    status, text = run("--out", str(out), "--folder", str(jobs))
    return SimpleNamespace(status=status, text=text, out=out, jobs=jobs, found=json.loads(out.read_text()))


def test_every_section_is_measured(dry: SimpleNamespace):
    found = dry.found["sections"]
    assert set(found) == NAMES | {"peak"}
    for name, part in found.items():
        if name == "tiles" and find_spec("triton") is None:
            continue
        assert part["rows"], name
        assert not part["failed"], name
        assert not part["left_out"], name
    assert dry.status == 0


def test_a_run_is_described(dry: SimpleNamespace):
    assert {"device", "code", "torch", "triton", "transformers"} <= set(dry.found["environment"])


def test_tests_are_counted(dry: SimpleNamespace):
    (row,) = dry.found["sections"]["checks"]["rows"].values()
    assert row["passed"] > 10
    assert row["failed"] == 0
    assert ["0", str(row["passed"]), "0"] in [line.split() for line in dry.text.splitlines()]


def test_tiles_are_compiled_for_a_gpu_that_is_not_there(dry: SimpleNamespace):
    pytest.importorskip("triton")
    found = {row["kind"]: row for row in dry.found["sections"]["tiles"]["rows"].values()}
    assert set(found) == {"half", "split"}
    assert not found["half"]["refused"]
    assert "The row for the table: Arch(half=Tile(" in dry.text


def test_sums_are_right(dry: SimpleNamespace):
    found = dry.found["sections"]["moments"]["rows"].values()
    assert {row["dtype"] for row in found} == {"bfloat16", "float32"}
    assert all(row["ms"]["taken"] > 0 and row["error"] < 1e-6 for row in found)


def test_systems_are_solved_in_every_way(dry: SimpleNamespace):
    (row,) = dry.found["sections"]["solve"]["rows"].values()
    assert set(row["ms"]) == set(row["host ms"]) == {"LU", "potrf library", "trsm library", "trsm blocks"}


def test_jobs_are_planned_and_run(dry: SimpleNamespace):
    found = dry.found["sections"]["jobs"]["rows"]
    assert set(found) == {"clip-b32", "llama-8b", "llama-8b, 4 layers"}
    for row in found.values():
        assert row["seconds"] > 0
        assert row["plan"]["host"] > 0
        assert row["calibrated_weights"] > 0
        assert row["folder"] == str(dry.jobs)
        assert {"experts' forward", "moments", "fold", "solve", "advance"} <= set(row["seconds_by_phase"])
        assert 0 < sum(row["seconds_by_phase"].values()) <= row["seconds"]
    assert not list(dry.jobs.iterdir()), "what jobs wrote is gone"


def test_the_last_table_fits_a_terminal(dry: SimpleNamespace):
    lines = dry.text.rstrip().rpartition("\n\n")[2].splitlines()
    assert lines[0].split() == ["found", "goal"]
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert {line.split()[0] for line in lines[1:]} >= {"checks", "layer", "moments", "jobs"}


def test_the_readme_shows_it(dry: SimpleNamespace):
    tables = readme.gpu_tables(dry.found)
    assert tables.startswith("**cpu** (torch ")
    for text in ("| found | goal |", "| engine, blocks compiled |", "| ideal |", "| clip-b32 |"):
        assert text in tables


def test_what_was_measured_is_not_measured_again(dry: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "run_tests", lambda *_: 1 / 0)
    monkeypatch.setattr(moments, "measure_shape", lambda *_: 1 / 0)
    status, _ = run("--out", str(dry.out))
    assert status == 0
    again = json.loads(dry.out.read_text())["sections"]
    assert {**again, "peak": {}} == {**dry.found["sections"], "peak": {}}
    assert again["peak"]["rows"]["bfloat16 product"] == dry.found["sections"]["peak"]["rows"]["bfloat16 product"]


def test_rows_of_other_versions_do_not_stay(tmp_path: Path):
    out = tmp_path / "result.json"
    run("--sections", "fold", "--out", str(out))
    out.write_text(out.read_text().replace(torch.__version__, "2.0"))
    run("--sections", "solve", "--out", str(out))
    assert rows(out, "solve")
    assert not rows(out, "fold")
    assert '"fold"' in out.with_suffix(".json.before").read_text()


def test_a_file_that_is_none_of_ours_stays_apart(tmp_path: Path):
    out = tmp_path / "result.json"
    out.write_text("half a fi")
    run("--sections", "fold", "--out", str(out))
    assert rows(out, "fold")
    assert out.with_suffix(".json.before").read_text() == "half a fi"


def test_a_budget_ends_a_section_and_the_next_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, measure_shape, measured = tmp_path / "result.json", moments.measure_shape, []
    clock = [0.0]

    def slow(shape: moments.Shape, *how) -> dict:
        clock[0] += 7.0
        measured.append(str(shape))
        return measure_shape(shape, *how)

    monkeypatch.setattr(moments, "measure_shape", slow)
    monkeypatch.setattr(command.budget.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(command.budget.Budget.__init__, "__defaults__", (lambda: clock[0],))
    status, text = run("--sections", "moments", "--budget", "10s", "--out", str(out))
    assert status == 0
    assert len(rows(out, "moments")) == 2
    assert "moments: float32 48 48 100; float32 64 24 100: left out: no time left" in text
    assert text.rstrip().endswith("Rows left out: moments 2")
    status, text = run("--sections", "moments", "--out", str(out))
    assert measured == [str(shape) for shape in moments.shapes(dry=True)], "each once"
    assert "left out" not in text


def test_a_budget_that_is_too_small_for_anything(tmp_path: Path):
    status, text = run("--sections", "fold", "--budget", "0.0001", "--out", str(tmp_path / "result.json"))
    assert "fold: 48 32: left out: no time left" in text
    assert status == 1


def test_a_killed_run_keeps_what_it_had(tmp_path: Path):
    out = tmp_path / "result.json"
    code = f"""
import os, signal
from bench.gpu import __main__ as command, moments
from bench.harness import results
results.code_hash = lambda sources: "0"
measure, calls = moments.measure_shape, []
def third_kills(*given):
    calls.append(given)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(*given)
moments.measure_shape = third_kills
command.main(["--dry-run", "--sections", "moments", "--out", {str(out)!r}])
"""
    assert python(code).returncode == -signal.SIGKILL
    kept = rows(out, "moments")
    assert len(kept) == 2
    status, _ = run("--sections", "moments", "--out", str(out))
    assert status == 0
    assert len(rows(out, "moments")) == 4
    assert kept.items() <= rows(out, "moments").items()


def test_a_new_process_goes_on_when_the_device_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started = []

    def execv(python: str, command: list[str]) -> None:
        started.append(command)
        raise SystemExit

    monkeypatch.setattr(moments, "measure_shape", lambda *_: 1 / 0)
    monkeypatch.setattr(sections, "_lost", lambda run: True)
    monkeypatch.setattr(command.os, "execv", execv)
    arguments = ["--sections", "fold,moments", "--out", str(tmp_path / "result.json"), "--budget", "1000s"]
    with pytest.raises(SystemExit):
        run(*arguments, "--fresh")
    ((python, *again, left),) = started
    assert python == sys.executable
    assert again == ["-m", "bench.gpu", "--dry-run", *arguments, "--budget"]
    assert 900 < float(left) < 1000
    found = json.loads((tmp_path / "result.json").read_text())["sections"]
    assert found["fold"]["rows"]
    assert list(found["moments"]["failed"]) == ["bfloat16 48 48 100"], "it goes on after this one"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "result.json"
    kept = results.Results(out, {"time": ""})
    kept.add("fold", "first", {})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        kept.add("fold", "second", {})
    assert list(rows(out, "fold")) == ["first"]


def test_a_failed_test_stops_what_is_timed_on_top_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    test = tmp_path / "test_it.py"
    test.write_text("def test_moments():\n    assert 1 + 1 == 3\n\ndef test_fine(): pass\n")
    monkeypatch.setattr(checks, "DRY_TESTS", (str(test),))
    out = tmp_path / "result.json"
    status, text = run("--sections", "checks,fold,moments", "--out", str(out))
    assert status == 1
    assert "FAILED" in text
    assert text.index("FAILED") < text.index("Folding a task")
    assert "test_moments: assert (1 + 1) == 3" in text
    assert ["1", "1", "0"] in [line.split() for line in text.splitlines()]
    assert text.count("moments: all: left out: not timed: ") == 1
    assert not rows(out, "moments")
    assert rows(out, "fold")
    status, _ = run("--sections", "moments", "--out", str(out))
    assert status == 1, "the test still fails"
    assert rows(out, "moments")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "soon"], "found 'soon', expected minutes or seconds, as in 12m, 90s or 720"),
        (["--budget", "0"], "found '0', expected"),
        (["--sections", "moments,nonsense"], "no section nonsense; there are checks, tiles, "),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as error:
        command.main(["--dry-run", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_no_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU that torch can use; --dry-run goes through the motions on the CPU"):
        command.main([])


@pytest.mark.parametrize(
    ("triton", "why"),
    [(None, "triton is not installed"), (SimpleNamespace(__version__="3.5.1"), "found triton 3.5.1, expected 3.6")],
)
def test_kernels_that_cannot_run(triton, why: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "triton", triton)
    arch, found = command._kernels(torch.device("cuda"))
    assert arch is None
    assert found.startswith(why)


def test_without_kernels_the_rest_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "_kernels", lambda device: (None, "found triton 3.5.1, expected 3.6 or later"))
    out = tmp_path / "result.json"
    status, text = run("--sections", "tiles,solve,fold", "--out", str(out))
    assert status == 0
    for name in ("tiles", "fold"):
        assert text.count(f"{name}: all: left out: found triton 3.5.1, expected 3.6 or later") == 1
        assert not rows(out, name)
    assert rows(out, "solve")


def test_a_file_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"result.json cannot be written: .*; --out names another"):
        run("--sections", "fold", "--out", str(tmp_path / "file" / "result.json"))


ABSENT = """
import functools, importlib.machinery
find = importlib.machinery.PathFinder.find_spec
def without(name, *args):
    wanted = name.partition(".")[0] not in {"bitsandbytes", "datasets", "matplotlib", "PIL", "rich", "sklearn", "typer"}
    return find(name, *args) if wanted else None
importlib.machinery.PathFinder.find_spec = functools.partial(without)
"""


def test_it_needs_no_more_than_torch_and_transformers(tmp_path: Path):
    """It runs from a checkout; what only terminals and demos need may be absent, also where jobs run."""
    (tmp_path / "sitecustomize.py").write_text(ABSENT)  # of every process
    code = "import importlib.util; assert importlib.util.find_spec('rich') is None\n"
    code += "from bench.gpu import jobs, __main__ as command\nevery = jobs.jobs\n"
    code += "jobs.jobs = lambda dry: every(dry)[1:]\n"  # the first is a shorter one of the second's kind
    code += "command.main(['--dry-run', '--sections', 'fold,jobs'])"
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Whole jobs" in done.stdout
    assert "failed" not in done.stdout


def python(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*folders, ROOT, ROOT / "kernels")))}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
