"""Signals, closed pipes and second runs, as they come to real processes: a job ends well, or can be gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from file_operations import Operation, operations
from runs import Case, Cases, done, start

from featcal_fast import cli
from featcal_fast.checkpoints import Lock, Manifest, WorkFolder
from featcal_fast.errors import OutputError
from featcal_fast.job.interrupts import ENDING, finish_first

ROOT = Path(__file__).resolve().parent.parent
append, task = Manifest.append, cli.BarProgress.task


def arguments(case: Case, folder: Path) -> list[str]:
    """Of the command line, for a case to be run into `folder / "out"`."""
    folder.mkdir()
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(case.recipe))
    found = ["calibrate", str(recipe), "--out", str(folder / "out"), "--device", "cpu", "--checkpoint-every", "1"]
    if case.on_disk:
        (folder / "scratch").mkdir()
        found += ["--scratch", str(folder / "scratch")]
    return found


class Job:
    """A case that the command line runs in a copy of this process.

    It waits to be told to go on: in its third layer, or while it writes down that the second is done.
    """

    def __init__(self, case: Case, folder: Path, where: str) -> None:
        self.case, self.folder, self._where = case, folder, where
        self._waits, self._goes_on, self._said = (folder.with_suffix(f".{end}") for end in ("waits", "goes", "said"))
        command = ["featcal-fast", *arguments(case, folder)]
        self.process = start(lambda: self._run(command))

    def wait(self) -> None:
        """Until it waits itself."""
        _until(self._waits.exists)

    def go_on(self) -> None:
        self._goes_on.touch()

    @property
    def running(self) -> bool:
        return os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def end(self) -> tuple[int, str]:
        """Its exit code, and what it said on the standard error."""
        status = os.waitpid(self.process, 0)[1]
        return os.waitstatus_to_exitcode(status), self._said.read_text()

    def _run(self, command: list[str]) -> None:
        for number in ENDING:
            signal.signal(number, signal.SIG_DFL)
        with (
            open(os.devnull, "w") as sys.stdout,
            open(self._said, "w") as sys.stderr,
            patch.object(Manifest, "append", lambda *arguments: self._append(*arguments)),
            patch.object(cli.BarProgress, "task", lambda *arguments: self._task(*arguments)),
            patch.object(sys, "argv", command),
        ):
            try:
                cli.main()
            except SystemExit as end:
                sys.stderr.flush()
                os._exit(int(end.code or 0))

    def _append(self, manifest: Manifest, entry: dict[str, Any]) -> None:
        if self._where == "writing" and entry.get("layer") == 1:
            self._wait_itself()
        append(manifest, entry)

    def _task(self, progress: cli.BarProgress, layer: int, name: str) -> None:
        if self._where == "computing" and layer == 2:
            self._wait_itself()
        task(progress, layer, name)

    def _wait_itself(self) -> None:
        self._waits.touch()
        _until(self._goes_on.exists)


def _until(there: Callable[[], bool]) -> None:
    before = time.perf_counter()
    while not there():
        assert time.perf_counter() - before < 60
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "code", "where", "on_disk"),
    [
        (signal.SIGINT, 130, "writing", False),
        (signal.SIGTERM, 143, "writing", True),
        (signal.SIGHUP, 129, "writing", False),
        (signal.SIGTERM, 143, "computing", False),
    ],
)
def test_a_signal_ends_a_job_when_its_write_is_done_and_it_says_how_to_go_on(
    number: int, code: int, where: str, on_disk: bool, cases: Cases, tmp_path: Path
) -> None:
    case = cases("clip", on_disk)
    job = Job(case, tmp_path / "job", where)
    job.wait()
    os.kill(job.process, number)
    if where == "writing":
        time.sleep(0.1)
        assert job.running  # what it writes comes first
        job.go_on()
    found, said = job.end()
    assert found == code, said
    assert said.count("\n") == 1
    assert "has left 2 of 3 layers" in said
    assert "--resume goes on from there, --fresh starts over" in said
    assert done(job.folder / "out") == 2
    case.resume(job.folder)


def test_a_second_run_is_refused_at_once_and_told_whose_the_folder_is(cases: Cases, tmp_path: Path) -> None:
    case = cases("clip", on_disk=True)
    job = Job(case, tmp_path / "job", "computing")
    job.wait()
    whose = rf"is in use by another run \(process {job.process} on {os.uname().nodename}, since {time.strftime('%Y')}-"
    before = time.perf_counter()
    for options in ({}, {"resume": True}, {"fresh": True}):
        with pytest.raises(OutputError, match=rf"out: {job.folder / 'out'} {whose}"):
            case.run(job.folder, **options)
    with pytest.raises(OutputError, match=rf"scratch: {job.folder / 'scratch'} {whose}"):
        case.run(tmp_path / "elsewhere", scratch=job.folder / "scratch")
    assert time.perf_counter() - before < 2
    job.go_on()
    assert job.end()[0] == 0
    case.check(job.folder)


def test_no_standard_output_decides_a_jobs_fate(cases: Cases, tmp_path: Path) -> None:
    """One that is closed; a pipe whose reader is gone; and a full disk, to which `nohup` has it written."""
    case = cases("clip")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def run(name: str, stdout: int | None, before: Callable[[], object] | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "featcal_fast", *arguments(case, tmp_path / name)],
            env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, preexec_fn=before,
        )  # fmt: skip

    reading, writing = os.pipe()
    os.close(reading)
    full = os.open("/dev/full", os.O_WRONLY)
    processes = {
        "closed": run("closed", None, lambda: os.close(1)),
        "reader gone": run("reader gone", writing),
        "full": run("full", full, lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)),
    }
    os.close(writing)
    os.close(full)
    while processes["full"].poll() is None:
        processes["full"].send_signal(signal.SIGHUP)
        time.sleep(0.05)
    for name, process in processes.items():
        said = process.communicate()[1]
        assert (process.returncode, said) == (0, "")
        case.check(tmp_path / name)


# What the operating system holds a lock for ends with the process


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    def hold() -> None:
        with WorkFolder(tmp_path / "out"):
            (tmp_path / "held").touch()
            time.sleep(60)

    process = start(hold)
    _until((tmp_path / "held").exists)
    work = WorkFolder(tmp_path / "out")
    with pytest.raises(OutputError, match=rf"in use by another run \(process {process} on "):
        work.__enter__()
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    with work:
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "held"]


def test_a_lock_that_was_given_back_while_it_was_asked_for_is_asked_for_again(tmp_path: Path) -> None:
    """Else it would be one of a file that is there no more, and the next would get its own."""
    first = Lock(tmp_path / "lock", "it")

    def give_back(operation: Operation) -> bool:
        if operation.number == 1:
            first.release()
        return operation.do()

    with operations(give_back, ["lock"]) as asked:
        second = Lock(tmp_path / "lock", "it")
    assert asked == ["lock", "lock"]
    with pytest.raises(OutputError, match="it is in use by another run"):
        Lock(tmp_path / "lock", "it")
    second.release()


def test_of_many_that_want_an_output_one_has_it_at_a_time(tmp_path: Path) -> None:
    """Also while it is given back, and its folder removed and made again."""

    def want() -> None:
        had = 0
        while had < 30:
            try:
                with WorkFolder(tmp_path / "out"):
                    inside = os.open(tmp_path / "inside", os.O_CREAT | os.O_EXCL)  # fails where another is inside
                    os.close(inside)
                    os.unlink(tmp_path / "inside")
                    had += 1
            except OutputError as refusal:
                assert "in use by another run" in str(refusal)  # noqa: PT017

    processes = [start(want) for _ in range(4)]
    assert [os.waitpid(process, 0)[1] for process in processes] == [0] * len(processes)


# What waits until a write is done


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """Signals that came to this process, which has a handler for each that would end it."""
    seen: list[int] = []
    before = {number: signal.signal(number, lambda number, _: seen.append(number)) for number in ENDING}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_waits_until_the_block_is_done(number: int, handled: list[int]) -> None:
    with finish_first():
        signal.raise_signal(number)
        assert handled == []
    assert handled == [number]
    signal.raise_signal(number)
    assert handled == [number, number]


def test_of_several_signals_the_first_counts(handled: list[int]) -> None:
    with finish_first():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert handled == [signal.SIGTERM]


def test_what_is_ignored_stays_ignored(handled: list[int]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with finish_first():
        signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert handled == []
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_block_in_a_block_waits_for_the_outer_one(handled: list[int]) -> None:
    with finish_first():
        with finish_first():
            signal.raise_signal(signal.SIGINT)
        assert handled == []
    assert handled == [signal.SIGINT]


def test_an_error_in_the_block_leaves_handlers_as_they_were_and_a_signal_unlost(handled: list[int]) -> None:
    def fail() -> None:
        with finish_first():
            signal.raise_signal(signal.SIGTERM)
            raise OSError("full")

    before = [signal.getsignal(number) for number in ENDING]
    with pytest.raises(OSError, match="full"):
        fail()
    assert [signal.getsignal(number) for number in ENDING] == before
    assert handled == [signal.SIGTERM]


def test_in_another_thread_signals_are_the_main_threads(handled: list[int]) -> None:
    before = [signal.getsignal(number) for number in ENDING]
    within: list[Any] = []

    def block() -> None:
        with finish_first():
            within.extend(signal.getsignal(number) for number in ENDING)

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert within == before
