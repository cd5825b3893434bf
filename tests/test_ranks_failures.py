"""A rank that fails: all others say so, in one error, and nothing is left but what can be gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from file_operations import operations
from rank_processes import run_ranks, small_panels, told_in
from runs import Case, done, left_in, make_case

import featcal_fast as ff
from featcal_fast.checkpoints import CheckpointWriter
from featcal_fast.errors import DataError
from featcal_fast.inputs.recipe import Recipe
from featcal_fast.job import run as job
from featcal_fast.layer import dealt
from featcal_fast.layer.chain import Through
from featcal_fast.ranks import watch
from featcal_fast.streaming.streams import Streams

RAISED = 70  # the exit status of a rank that raises anything but a `FeatCalError`
# Where a rank may be: what it calls there.
ENTERING = Streams, "_enter"
PASSING_ON = Through, "_leave"
SOLVING = dealt, "choose"
WRITING = CheckpointWriter, "write"
ADVANCING = Streams, "advance_student"
FINISHING = CheckpointWriter, "finish"


@pytest.fixture(autouse=True, scope="module")
def _small_panels() -> Iterator[None]:
    with small_panels():
        yield


@pytest.fixture(autouse=True)
def _quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that wait for others to hear of something wait for less."""
    monkeypatch.setattr(watch, "BEAT", 0.2)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Two layers, three tasks."""
    return make_case("clip", tmp_path_factory.mktemp("clip"), tasks=3, layers=2)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def failing(
    case: Case,
    folder: Path,
    size: int,
    victim: int,
    place: tuple[Any, str],
    end: Callable[[], None],
    call: int = 1,
    **options: Any,
) -> list[tuple[int, str]]:
    """Run a case in so many ranks, one of which does `end` at one of its calls at a place."""
    folder.mkdir(exist_ok=True)

    def work(rank: int) -> None:
        with operations():
            if rank == victim:
                owner, name = place
                with patch.object(owner, name, ending(getattr(owner, name), end, call)):
                    case.run(folder)
            else:
                case.run(folder)

    return run_ranks(size, work, told_in(folder), **options)


def ending(function: Callable[..., Any], end: Callable[[], None], call: int) -> Callable[..., Any]:
    calls: list[int] = []

    def called(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            end()
        return function(*args, **options)

    return called


def check_told(found: list[tuple[int, str]], victim: int, *words: str) -> None:
    """All other ranks have raised a `RankError`, that names the one which failed and says these words."""
    for rank, (status, said) in enumerate(found):
        if rank != victim:
            assert status == 1, f"rank {rank}: {status}, {said}"
            for word in (f"RankError: another rank has failed: rank {victim}", *words):
                assert word in said, f"rank {rank}: {said}"


@pytest.mark.parametrize(
    ("place", "size", "victim", "call"),
    [
        (ENTERING, 4, 3, 1),  # which has no samples
        (ENTERING, 2, 0, 1),
        (PASSING_ON, 3, 1, 5),
        (SOLVING, 2, 1, 2),
        (WRITING, 2, 0, 2),
        (FINISHING, 3, 0, 1),
    ],
)
def test_where_one_is_killed_all_others_name_it(
    place: tuple[Any, str], size: int, victim: int, call: int, case: Case, tmp_path: Path
) -> None:
    found = failing(case, tmp_path / "job", size, victim, place, kill, call)
    assert found[victim] == (-signal.SIGKILL, "")
    check_told(found, victim, "its process or machine is gone")
    assert not (tmp_path / "job" / "out").exists()
    with operations():
        case.resume(tmp_path / "job")


def test_an_error_of_one_is_what_all_tell(case: Case, tmp_path: Path) -> None:
    def refuse() -> None:
        raise DataError("task task1: found nothing to go by")

    found = failing(case, tmp_path / "job", 3, 1, SOLVING, refuse)
    assert found[1][0] == 1
    assert found[1][1].startswith("DataError: task task1: found nothing to go by")
    check_told(found, 1, "found nothing to go by")
    assert not left_in(tmp_path / "job")  # no layer was done


def test_a_fault_of_one_is_what_all_tell(case: Case, tmp_path: Path) -> None:
    def fail() -> None:
        raise ZeroDivisionError("of something")

    found = failing(case, tmp_path / "job", 2, 0, ADVANCING, fail)
    assert found[0] == (RAISED, "")
    check_told(found, 0, "ZeroDivisionError", "of something")
    assert not (tmp_path / "job" / "out").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_one_ends_all(victim: int, case: Case, tmp_path: Path) -> None:
    """As the command line takes it: the handler raises."""

    def end() -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

    found = failing(case, tmp_path / "job", 2, victim, SOLVING, end, call=2)
    assert found[victim] == (128 + signal.SIGTERM, "exit")
    check_told(found, victim, "it was interrupted")
    assert done(tmp_path / "job" / "out") == 1
    with operations():
        case.resume(tmp_path / "job")


def test_one_that_says_nothing_any_more_is_missed(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MISSED", 3.0)
    told = told_in(tmp_path / "job")

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def begun(children: list[int]) -> None:
        def end() -> None:
            until = time.monotonic() + 40
            while not all((told / f"{rank}.json").exists() for rank in (0, 2)) and time.monotonic() < until:
                time.sleep(0.05)
            os.kill(children[1], signal.SIGKILL)

        threading.Thread(target=end, daemon=True).start()

    found = failing(case, tmp_path / "job", 3, 1, PASSING_ON, stop, when=begun)
    assert found[1] == (-signal.SIGKILL, "")
    check_told(found, 1, "no sign of life for 3 seconds")


def other(case: Case, folder: Path, facts: Callable[[dict[str, Any]], None]) -> list[tuple[int, str]]:
    """Run a case in three ranks, one of which finds other facts about its job."""
    fingerprint = job.fingerprint

    def changed(*args: Any) -> dict[str, Any]:
        found = fingerprint(*args)
        facts(found)
        return found

    def work(rank: int) -> None:
        with patch.object(job, "fingerprint", changed if rank == 2 else fingerprint):
            case.run(folder)

    return run_ranks(3, work, told_in(folder))


def check_other(found: list[tuple[int, str]], *words: str) -> None:
    for status, said in found:
        assert status == 1, found
        for word in ("RankError: ranks 0 and 2 have not the same job: ", *words):
            assert word in said, said


def test_ranks_of_other_versions_are_refused(case: Case, tmp_path: Path) -> None:
    found = other(case, tmp_path / "job", lambda facts: facts["versions"].update(torch="1.0"))
    check_other(found, "versions: torch: ", "on rank 2 1.0")
    assert not left_in(tmp_path / "job")


def test_ranks_with_another_recipe_are_refused(case: Case, tmp_path: Path) -> None:
    changed = case.changed(settings={"ridge_lambda": 0.5})
    changed.plan = case.plan
    found = run_ranks(3, lambda rank: (changed if rank == 2 else case).run(tmp_path / "job"), told_in(tmp_path / "job"))
    check_other(found, "settings: ridge_lambda: 0.05, on rank 2 0.5")
    assert not left_in(tmp_path / "job")


def test_ranks_with_other_data_are_refused(case: Case, tmp_path: Path) -> None:
    """Of the same name and size, on a disk of another machine."""
    folder = Path(case.recipe["base_model"]).parent
    recipe = Recipe.load(json.loads(json.dumps(case.recipe).replace(f"{folder}/", "")))
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("whole", "planned"))
    data = tmp_path / "copy" / "task1.safetensors"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)

    def work(rank: int) -> None:
        root = tmp_path / "copy" if rank == 2 else folder
        ff.calibrate(replace(recipe, root=root), out=tmp_path / "job" / "out", device="cpu")

    check_other(run_ranks(3, work, told_in(tmp_path / "job")), "content: data of task1: task1.safetensors: ")
    assert not left_in(tmp_path / "job")
