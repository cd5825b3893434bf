"""The harness of all benchmarks: checks before anything is timed, turns, what is kept when a run is ended, tables."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from bench.harness import process, results
from bench.harness.results import Results, write_whole
from bench.harness.runs import Way, check, kept_runs, take_turns
from bench.harness.tables import table

ROOT = Path(__file__).resolve().parent.parent


def python(code: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


# Processes


def test_a_failure_is_one_line() -> None:
    command = [sys.executable, "-c", "print('{}'); raise ValueError('too\\nlarge')"]
    with pytest.raises(RuntimeError, match=r"^python[\d.]* ended with 1: ValueError: too$"):
        process.last_json(command)
    with pytest.raises(RuntimeError, match=r"^sh ended with 3: no luck$"):
        process.last_json(["sh", "-c", "echo no luck; exit 3"])


def test_the_last_object_counts_whatever_is_printed_around_it() -> None:
    code = 'import sys; print("{}"); print(\'{"a": 1}\'); print("a warning", file=sys.stderr)'
    assert process.last_json([sys.executable, "-c", code]) == {"a": 1}


def test_what_takes_too_long_is_ended_with_all_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    with pytest.raises(process.TookTooLong, match="ended after 1 s"):
        process.run(["sh", "-c", f"sleep 60 & echo $! > {child}; wait"], 1)
    assert ends(int(child.read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="others do not tell a process that its parent ended")
def test_a_worker_ends_with_whoever_waits_for_it(tmp_path: Path) -> None:
    child = tmp_path / "child"
    worker = (
        "import os, pathlib, time; from bench.harness import process; process.end_with_parent(); "
        f"pathlib.Path({str(child)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    parent = python(f"import sys; from bench.harness import process; process.run([sys.executable, '-c', {worker!r}])")
    deadline = time.monotonic() + 60
    while not (child.exists() and child.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    assert ends(int(child.read_text()))


def ends(pid: int) -> bool:
    """Whether a process is gone, or waits for nobody but its parent, within a few seconds."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


# Checks


def test_each_worker_is_started_once_and_all_that_cannot_run_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def last_json(command: tuple[str, ...]) -> dict[str, str]:
        started.append(command)
        if "--checkout" in command:
            raise RuntimeError("bench.workers.official ended with 1: no such file")
        return {"torch": "2.0"}

    monkeypatch.setattr(process, "last_json", last_json)
    ours = {"a": Way("ours"), "b": Way("ours")}
    assert check(ours, "cpu") == {"a": {"torch": "2.0"}, "b": {"torch": "2.0"}}
    assert started == [(sys.executable, "-m", "bench.workers.ours", "--check", "--device", "cpu")]
    with pytest.raises(
        SystemExit, match=r"^official cannot run: .* no such file \(by old/python\)\nNothing was timed.$"
    ):
        check({**ours, "official": Way("official", ("--checkout", "x"), "old/python")}, "cpu")


def test_a_python_that_is_not_there() -> None:
    with pytest.raises(SystemExit, match=r"^official cannot run: .*No such file or directory: 'absent/python'"):
        check({"official": Way("official", (), "absent/python")}, "cpu")


# Turns


def test_runs_take_turns_and_failures_end_them_with_what_was_finished_kept(tmp_path: Path) -> None:
    order: list[str] = []

    def run(name: str, fails: bool = False) -> dict[str, int]:
        order.append(name)
        if fails:
            raise RuntimeError("bench.workers.b ended with 1: out of luck")
        return {"number": len(order)}

    kept = Results(tmp_path / "runs.json", {"time": ""})
    with pytest.raises(
        SystemExit, match=r"b: bench\.workers\.b ended with 1: out of luck\nWhat was finished.*runs\.json"
    ):
        take_turns({"a": lambda: run("a"), "b": lambda: run("b", True)}, kept, 2)
    found = take_turns({name: lambda name=name: run(name) for name in "ab"}, Results(kept.path, {"time": ""}), 2)
    assert order == ["a", "b", "b", "a", "b"]
    assert found == {"a": [{"number": 1}, {"number": 4}], "b": [{"number": 3}, {"number": 5}]}


def test_a_killed_command_keeps_its_finished_runs(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    code = f"""
import os, signal
from pathlib import Path
from bench.harness.results import Results
from bench.harness.runs import take_turns
kept = Results(Path({str(path)!r}), {{"time": ""}})
take_turns({{"a": lambda: {{"seconds": 1}}, "b": lambda: os.kill(os.getpid(), signal.SIGKILL)}}, kept, 2)
"""
    assert python(code).wait() == -signal.SIGKILL
    found = take_turns({"a": lambda: {"seconds": 2}}, Results(path, {"time": ""}), 2)
    assert found == {"a": [{"seconds": 1}, {"seconds": 2}]}


def test_finished_runs_are_of_the_same_code_threads_and_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args, path = Namespace(device="cpu", threads=1, fresh=False), tmp_path / "runs.json"
    kept_runs(path, args, work={"samples": 8}).add("runs", "a, 1", {})
    again = kept_runs(path, args, work={"samples": 8})
    assert again.of("runs")
    assert again.environment["torch"] == torch.__version__
    for other in (
        lambda: kept_runs(path, args, work={"samples": 9}),
        lambda: kept_runs(path, Namespace(device="cpu", threads=2, fresh=False), work={"samples": 8}),
        lambda: kept_runs(path, Namespace(device="cpu", threads=1, fresh=True), work={"samples": 8}),
    ):
        assert not other().of("runs")
        path.with_suffix(".json.before").rename(path)
    monkeypatch.setattr(results, "code_hash", lambda sources: "other")
    assert not kept_runs(path, args, work={"samples": 8}).of("runs")


# Files and tables


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "found.json"
    write_whole(path, {"a": "±"})
    with pytest.raises(TypeError):
        write_whole(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": "±"}


def test_two_processes_may_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sync = tmp_path / "found.json", results.os.fsync

    def meanwhile(file: int) -> None:
        """What another process does before this one has moved its file."""
        monkeypatch.setattr(results.os, "fsync", sync)
        monkeypatch.setattr(results.os, "getpid", lambda: 1)
        write_whole(path, {"another": 1})

    monkeypatch.setattr(results.os, "fsync", meanwhile)
    write_whole(path, {"this": 1})
    assert json.loads(path.read_text()) == {"this": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_table() -> None:
    rows = [{"way": "ours", "ms": 1.234567, "error": 2e-7}, {"way": "theirs", "ms": 1234.5, "n": 3}]
    assert table("Times", rows, ["A note."]).splitlines() == [
        "Times",
        "way       ms    error  n",
        "ours    1.23  2.0e-07  -",
        "theirs  1234        -  3",
        "A note.",
    ]
