"""A run that was stopped, wherever that was, goes on to the bits of one that was not, or says why it cannot."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from file_operations import killing, operations
from runs import (
    EXHAUSTIVE,
    Case,
    Cases,
    Layers,
    check_all,
    contents,
    done,
    exit_code,
    goes_on,
    left_in,
    refusal,
    start,
    stopped,
)

import featcal_fast as ff
from featcal_fast import files
from featcal_fast.checkpoints import work_path
from featcal_fast.errors import ResumeError

KILLED = -signal.SIGKILL
WAYS = [(kind, on_disk) for kind in ("llama", "clip", "t5") for on_disk in (False, True)]
BEGINNING = 25  # operations, about, before the first weight is written
# Every how manieth of those after is tried: all of one kind; of the others steps that have no common divisor.
STEPS = dict(zip(WAYS, (1, 13, 17, 19, 53, 59), strict=True))


def kill(task: Callable[[], object], number: int) -> bool:
    """Do something in a process that is killed at one of its file operations; whether it came so far."""

    def run() -> None:
        with operations(killing(number)):
            task()

    code = exit_code(run)
    assert code in (0, KILLED)
    return code == KILLED


def killed(case: Case, folder: Path, number: int, **options: Any) -> bool:
    """Run a case in such a process."""
    return kill(lambda: case.run(folder, **options), number)


@pytest.mark.parametrize(("kind", "on_disk"), WAYS)
def test_killed_at_any_file_operation_it_goes_on_to_the_same_bits(
    kind: str, on_disk: bool, cases: Cases, tmp_path: Path
) -> None:
    case = cases(kind, on_disk)
    step = 1 if EXHAUSTIVE else STEPS[kind, on_disk]

    def check(number: int) -> None:
        folder = tmp_path / str(number)
        assert killed(case, folder, number)
        goes_on(case, folder)

    first = BEGINNING if kind == "llama" else 0  # the same of all kinds
    numbers = range(1, len(case.operations) + 1)
    check_all(check, [number for number in numbers if number <= first or number % step == step // 2])


@pytest.mark.parametrize(("kind", "on_disk"), WAYS if EXHAUSTIVE else WAYS[-1:])
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(
    kind: str, on_disk: bool, cases: Cases, tmp_path: Path
) -> None:
    case = cases(kind, on_disk)

    def run(number: int | str) -> None:
        with operations():
            case.run(tmp_path / str(number))

    began = time.perf_counter()
    assert exit_code(lambda: run("whole")) == 0
    longest = time.perf_counter() - began

    def check(number: int) -> None:
        process = start(lambda: run(number))
        time.sleep(random.Random(number).uniform(0, longest))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        goes_on(case, tmp_path / str(number))

    check_all(check, range(50 if EXHAUSTIVE else 5))


@pytest.mark.parametrize("on_disk", [False, True])
def test_killed_again_while_it_goes_on_it_still_comes_to_the_same_bits(
    on_disk: bool, cases: Cases, tmp_path: Path
) -> None:
    case = cases("clip", on_disk)
    stopped(case, tmp_path / "whole", after=1)
    with operations() as again:
        case.run(tmp_path / "whole", resume=True)

    def check(number: int) -> None:
        folder = tmp_path / str(number)
        out = stopped(case, folder, after=1)
        assert killed(case, folder, number, resume=True)
        assert out.exists() or done(out) >= 1
        goes_on(case, folder)

    step = 1 if EXHAUSTIVE else 20
    check_all(check, range(1 + step // 2, len(again) + 1, step))


def test_killed_while_it_starts_over_it_does_so_or_goes_on(case: Case, tmp_path: Path) -> None:
    """Old and new layers never mix: what was there is gone, or whole."""
    other = case.changed(settings={"anchor_rho": 1.5})
    stopped(other, tmp_path / "stopped")
    with operations() as names:
        shutil.copytree(tmp_path / "stopped", tmp_path / "whole")
        case.run(tmp_path / "whole", fresh=True)

    def check(number: int) -> None:
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "stopped", folder)
        assert killed(case, folder, number, fresh=True)
        if not (told := refusal(case, folder)):
            return
        assert "settings: anchor_rho: 1.5, now 2.0" in told, told  # nothing was removed yet
        other.run(folder, resume=True)
        assert contents(folder / "out") == contents(tmp_path / "other" / "out")

    other.run(tmp_path / "other")
    cleared = names.index("reserve")  # the new output begins
    check_all(check, range(1, cleared + 1, 1 if EXHAUSTIVE else 2))


@pytest.mark.parametrize("every", [2, None])
def test_layers_that_were_not_kept_are_done_again(every: int | None, case: Case, tmp_path: Path) -> None:
    out = stopped(case, tmp_path, after=1, checkpoint_every=every)
    assert done(out) == (0 if every else 1)  # nothing is known before the first time of how long it takes
    case.resume(tmp_path, checkpoint_every=every)
    out = stopped(case, tmp_path / "again", after=2, checkpoint_every=every)
    assert 0 < done(out) <= 2
    case.resume(tmp_path / "again", checkpoint_every=1)


def test_an_interrupted_run_is_named_with_both_ways_to_go_on(case: Case, tmp_path: Path) -> None:
    out = stopped(case, tmp_path, after=1)
    with pytest.raises(ResumeError, match=rf"has left 1 of 3 layers in {re.escape(str(work_path(out)))}") as error:
        case.run(tmp_path)
    assert "--resume goes on" in str(error.value)
    assert "--fresh starts over" in str(error.value)
    assert done(out) == 1
    case.resume(tmp_path)


def test_what_was_left_without_a_layer_done_is_named_and_both_ways_work(case: Case, tmp_path: Path) -> None:
    for way in ("resume", "fresh"):
        folder = tmp_path / way
        assert killed(case, folder, 40)
        with pytest.raises(ResumeError, match=r"no layer of it done: --resume or --fresh starts over"):
            case.run(folder)
        case.run(folder, **{way: True})
        case.check(folder)


@pytest.mark.parametrize("every", [1, 0])
def test_a_finished_model_that_lacks_its_name_is_told_apart_and_gets_it(every: int, case: Case, tmp_path: Path) -> None:
    with operations() as names:
        case.run(tmp_path / "whole", checkpoint_every=every)
    folder = tmp_path / "killed"
    assert killed(case, folder, names.index("rename") + 1, checkpoint_every=every)
    with pytest.raises(ResumeError, match="holds a finished model that could not be given its name") as error:
        case.run(folder)
    assert "--resume gives it" in str(error.value)
    layers = Layers()
    case.resume(folder, progress=layers)
    assert layers.seen == []


def test_a_model_that_got_its_name_leaves_nothing_to_go_on_with(case: Case, tmp_path: Path) -> None:
    """Not even where the process ended before it could tidy up: no weights, no hidden states, nothing in the way."""
    assert killed(case, tmp_path, case.operations.index("rename") + 2)
    case.check(tmp_path)
    assert left_in(tmp_path) == [".out.partial", ".out.partial/lock", ".out.partial/manifest"]
    shutil.rmtree(tmp_path / "out")
    case.run(tmp_path)
    case.check(tmp_path)


def test_a_merge_that_was_killed_is_in_nobodys_way(case: Case, tmp_path: Path) -> None:
    recipe = {name: value for name, value in case.recipe.items() if name != "merged_model"}
    recipe["merge"] = {"method": "average"}

    def merge(folder: Path) -> list[bytes]:
        folder.mkdir(exist_ok=True)
        with operations():
            return [path.read_bytes() for path in files.list_below(ff.merge(recipe, out=folder / "out"))]

    with operations() as names:
        whole = merge(tmp_path / "whole")
    assert not left_in(tmp_path / "whole")

    def check(number: int) -> None:
        folder = tmp_path / str(number)
        assert kill(lambda: merge(folder), number)
        if number % 2 and not (folder / "out").exists():
            case.resume(folder)
            return
        if (folder / "out").exists():
            shutil.rmtree(folder / "out")
        assert merge(folder) == whole

    check_all(check, range(1, len(names) + 1, 1 if EXHAUSTIVE else 7))


def test_without_anything_left_resuming_just_runs(case: Case, tmp_path: Path) -> None:
    case.resume(tmp_path)


def test_starting_over_takes_nothing_from_before(case: Case, tmp_path: Path) -> None:
    """Not even where it is damaged, or another job's."""
    out = stopped(case, tmp_path)
    for path in work_path(out).rglob("*"):
        if path.is_file() and path.name != "manifest":
            path.write_bytes(b"\0" * path.stat().st_size)
    layers = Layers()
    case.run(tmp_path, fresh=True, progress=layers)
    case.check(tmp_path)
    assert layers.seen == [0, 1, 2]


def test_what_is_done_is_not_done_again(case: Case, tmp_path: Path) -> None:
    stopped(case, tmp_path)
    layers = Layers()
    case.run(tmp_path, resume=True, progress=layers)
    assert layers.told == 2
    assert layers.seen == [2]


def test_nothing_is_kept_where_nothing_shall_be(case: Case, tmp_path: Path) -> None:
    out = stopped(case, tmp_path, checkpoint_every=0)
    assert not work_path(out).exists()
