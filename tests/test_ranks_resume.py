"""Several ranks that were stopped go on, as many or others, to the bits of a run that nobody stopped."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
from file_operations import killing, operations
from rank_processes import check_case, made_case, run_case, run_ranks, small_panels, told_in
from runs import EXHAUSTIVE, Case, Stop, done, left_in, stopped
from test_ranks import saved, shards

from featcal_fast.ranks import watch

# By name: what makes a job, and whether hidden states wait in files.
JOBS = {
    "clip in shards, on disk": (saved("clip", 2, layers=2, **shards(2)), True),
    "t5": (saved("t5", 3), False),
    "llama": (saved("llama", 2, layers=2, held_out=0.25), False),
}


@pytest.fixture(autouse=True, scope="module")
def _small_panels() -> Iterator[None]:
    with small_panels():
        yield


@pytest.fixture(autouse=True)
def _quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that wait for others to hear of something wait for less."""
    monkeypatch.setattr(watch, "BEAT", 0.2)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory):
    """Cases by name; each is made once."""

    @lru_cache
    def case(name: str) -> Case:
        make, on_disk = JOBS[name]
        folder = tmp_path_factory.mktemp("job")
        return made_case(make(folder), folder, on_disk)

    return case


def stopped_in(case: Case, size: int, folder: Path, after: int) -> None:
    """Run a case in so many ranks, the first of which is interrupted after so many layers."""
    if size == 1:
        stopped(case, folder, after)
    else:
        found = run_case(case, size, folder, progress=Stop(after))
        assert not any(status == 0 for status, _ in found)
        assert all("rank 0" in said and "it was interrupted" in said for _, said in found[1:])
    assert done(folder / "out") == after


def goes_on_in(case: Case, size: int, folder: Path) -> None:
    """What was finished, and only lacked its name, tells of the ranks that made it."""
    if size == 1:
        case.run(folder, resume=True)
        case.check(folder, but="report.json: ranks")
        assert not left_in(folder), left_in(folder)
    else:
        check_case(case, size, folder, resume=True)


@pytest.mark.parametrize(
    ("name", "before", "after", "layers"),
    [
        ("clip in shards, on disk", 2, 3, 1),
        ("t5", 2, 1, 3),  # in the decoder, whose layers need what the encoder made
        ("llama", 3, 1, 1),
        ("llama", 1, 2, 1),
    ],
)
def test_another_number_of_ranks_goes_on_to_the_same_bits(
    name: str, before: int, after: int, layers: int, jobs, tmp_path: Path
) -> None:
    with operations():
        stopped_in(jobs(name), before, tmp_path / "job", layers)
        goes_on_in(jobs(name), after, tmp_path / "job")


@pytest.mark.parametrize(
    ("name", "victim", "step"),
    [("clip in shards, on disk", 1, 29), ("llama", 0, 70), *[("clip in shards, on disk", 0, 60)] * EXHAUSTIVE],
)
def test_killed_at_any_file_operation_it_goes_on_to_the_same_bits(
    name: str, victim: int, step: int, jobs, tmp_path: Path
) -> None:
    case = jobs(name)

    def killed(number: int) -> bool:
        """Whether the rank came so far."""

        def work(rank: int) -> None:
            with operations(killing(number if rank == victim else 0)):
                case.run(folder)

        folder = tmp_path / str(number)
        found = run_ranks(2, work, told_in(folder))
        if found[victim][0]:
            assert found[victim][0] == -signal.SIGKILL
            # One that had all done, and said so, needs nobody any more.
            assert found[1 - victim][0] == 1 or (folder / "out").exists()
        if (folder / "out").exists():
            case.check(folder, but="report.json: ranks")
        else:
            with operations():
                goes_on_in(case, 1 + number % 3, folder)
        shutil.rmtree(folder)
        return found[victim][0] != 0

    step = 1 if EXHAUSTIVE else step
    number = first = step // 2 + 1
    while number <= len(case.operations) and killed(number):
        number += step
    assert number > first, "it was never killed"
