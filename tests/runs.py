"""Pico jobs that are run again and again, in processes of their own that may be killed; what came out of them."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import pico
import pytest
from file_operations import operations

import featcal_fast as ff
from featcal_fast.checkpoints import Manifest, work_path
from featcal_fast.errors import ResumeError
from featcal_fast.job import run as job
from featcal_fast.job.resume import Past
from featcal_fast.planning.plan import Plan
from featcal_fast.planning.planner import choose_offload
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import LayerReport, Report
from featcal_fast.streaming.hidden_states import HOST, Offload

T = TypeVar("T")
Cases = Callable[..., "Case"]
EXHAUSTIVE = bool(os.environ.get("FEATCAL_EXHAUSTIVE"))  # try everything, not samples of it: takes ten minutes
CORES = len(os.sched_getaffinity(0))
TRANSIENT = ("seconds", "phases", "peaks", "out", "bytes_read")  # in a report: what differs from run to run


@dataclass
class Case:
    """A job, and what becomes of it if nobody stops it.

    Attributes:
        recipe: of the job.
        on_disk: whether hidden states wait in files, in a folder beside the output.
        operations: names of those that a run takes.
        whole: the result's `contents`.
        plan: of it.
    """

    recipe: dict[str, Any]
    on_disk: bool = False
    operations: list[str] = field(default_factory=list)
    whole: dict[str, Any] = field(default_factory=dict)
    plan: Plan | None = None

    def changed(self, **changes: Any) -> Case:
        """A case of another job."""
        return replace(self, recipe={**copy.deepcopy(self.recipe), **changes})

    def run(self, folder: Path, **options: Any) -> Report:
        """Calibrate into `folder / "out"`, durable after every layer."""
        folder.mkdir(exist_ok=True)
        if self.on_disk:
            (folder / "scratch").mkdir(exist_ok=True)
            options.setdefault("scratch", folder / "scratch")
        options.setdefault("checkpoint_every", 1)
        with patch.object(job, "choose_offload", self._plan_once):
            return ff.calibrate(self.recipe, out=folder / "out", device="cpu", **options)

    def resume(self, folder: Path, **options: Any) -> None:
        """Go on with what was left; the result must be that of a run that nobody stopped, and nothing else left."""
        with operations():
            report = self.run(folder, resume=True, **options)
        assert report.to_json() == (folder / "out" / "report.json").read_text()
        self.check(folder)
        assert not left_in(folder), left_in(folder)

    def _plan_once(self, *arguments: Any) -> tuple[Plan, Offload]:
        """A plan is the same every time, and takes longer than such a job does."""
        if self.plan is None:
            self.plan, _ = choose_offload(*arguments)
        scratch = arguments[-3]
        return self.plan, HOST if scratch is None else scratch

    def check(self, folder: Path, but: str = "") -> None:
        """The result must be that of a run that nobody stopped, `but` for one of its `contents`."""
        found = contents(folder / "out")
        assert found.keys() == self.whole.keys(), found.keys() ^ self.whole.keys()
        for name, content in self.whole.items():
            assert found[name] == content or name == but, f"{name}: found {found[name]}, expected {content}"


def make_case(kind: str, folder: Path, tasks: int = 1, on_disk: bool = False, **overrides: Any) -> Case:
    """Save a job below a folder and run it: the second time as it will be from then on, planned."""
    models = pico.job(kind, tasks, **overrides)
    models.batches = {task: batches[:2] for task, batches in models.batches.items()}
    case = Case(pico.save(models, folder), on_disk)
    case.run(folder / "planned")
    with operations() as case.operations:
        case.run(folder / "whole")
    case.whole = contents(folder / "whole" / "out")
    return case


class Stop(Progress):
    """Ends a run after so many layers, as Ctrl-C does."""

    def __init__(self, after: int) -> None:
        self.after = after

    def task(self, layer: int, task: str) -> None:
        if layer == self.after:
            raise KeyboardInterrupt


class Layers(Progress):
    """Which layers were calibrated, and how many were told to be done."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.told = 0

    def layer(self, report: LayerReport) -> None:
        self.seen.append(report.index)

    def resumed(self, layers: int) -> None:
        self.told = layers


def stopped(case: Case, folder: Path, after: int = 2, **options: Any) -> Path:
    """Run a case that is stopped after so many layers; where the result is not."""
    with pytest.raises(KeyboardInterrupt), operations():
        case.run(folder, progress=Stop(after), **options)
    return folder / "out"


def refusal(case: Case, folder: Path) -> str:
    """Go on with what was left; why that was refused, or nothing."""
    try:
        case.resume(folder)
    except ResumeError as error:
        return str(error)
    return ""


def done(out: Path) -> int:
    """Layers that an interrupted run has left."""
    return Past(Manifest(work_path(out) / "manifest").entries).layers


def goes_on(case: Case, folder: Path) -> None:
    """What a run has left that was ended from outside is the whole result, or leads to it."""
    if (folder / "out").exists():
        case.check(folder)
    else:
        case.resume(folder)


def contents(out: Path) -> dict[str, Any]:
    """Of every file its SHA-256; of the report what it says, but for what differs from run to run."""
    found: dict[str, Any] = {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path != out / "report.json"
    }
    return found | told(json.loads((out / "report.json").read_text()))


def told(report: dict[str, Any]) -> dict[str, Any]:
    """What a report says, but for what differs from run to run."""
    report["layers"] = [{**layer, "seconds": None} for layer in report["layers"]]
    report["recipe"] = {**report["recipe"], "out": None, "root": None}  # where it lies
    report["bytes_written"] = report["bytes_written"]["calibrated model"]  # the rest is the last of several runs'
    return {f"report.json: {name}": value for name, value in report.items() if name not in TRANSIENT}


def left_in(folder: Path) -> list[str]:
    """What is there besides the output; a scratch folder, and the lock file of one that was killed, do not count."""
    expected = {folder / "scratch", folder / "scratch" / ".featcal-fast.lock"}
    found = (path for path in folder.rglob("*") if path.relative_to(folder).parts[0] != "out")
    return sorted(str(path.relative_to(folder)) for path in found if path not in expected)


def start(task: Callable[[], object]) -> int:
    """Do something in a copy of this process, whose number is returned."""
    child = os.fork()
    if not child:
        _end_with(task)
    return child


def exit_code(task: Callable[[], object]) -> int:
    """Do something in a copy of this process. How that ended: 0, 1 for an error, less than 0 for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(start(task), 0)[1])


def check_all(check: Callable[[T], object], items: Sequence[T]) -> None:
    """Check items in processes beside each other, as many as there are cores."""
    running = []
    for part in range(CORES):
        reading, writing = os.pipe()
        running.append((start(partial(_check_each, check, items[part::CORES], writing)), reading))
        os.close(writing)
    said = []
    for child, reading in running:
        with open(reading, encoding="utf-8") as pipe:
            text = pipe.read()
        if os.waitpid(child, 0)[1]:
            said.append(text)
    assert not said, "\n".join(said)


def _check_each(check: Callable[[T], object], items: Sequence[T], errors: int) -> None:
    os.dup2(errors, 2)
    for item in items:
        try:
            check(item)
        except BaseException as error:
            raise AssertionError(f"at {item}") from error


def _end_with(task: Callable[[], object]) -> None:
    """Do the task, and end this process without anything that its parent had in mind."""
    code = 1
    try:
        task()
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)
