"""Whatever fails, and whenever the power does: an output is whole or not there, and what was kept leads on to it."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from disk import Disk, Event, Log, Survives
from file_operations import CHANGES, ERRORS, READS, Operation, failing, operations
from runs import EXHAUSTIVE, Case, Cases, Layers, check_all, done, goes_on, left_in, stopped

from featcal_fast import files
from featcal_fast.errors import FeatCalError, OutputError


@pytest.fixture
def case(cases: Cases) -> Case:
    """Two layers, hidden states in memory."""
    return cases("llama")


# What a power cut leaves of what was not synced


def _chance(seed: int) -> Survives:
    dice = random.Random(seed)
    return lambda _: dice.random() < 0.5


CUTS: dict[str, Survives] = {
    "nothing": lambda kind: False,
    "names, of empty files": lambda kind: kind == "name",
    "names, of files full of zeros": lambda kind: kind != "data",
    "content without names": lambda kind: kind != "name",
    **{f"chance {seed}": _chance(seed) for seed in range(4)},
}


def _recorded(case: Case, folder: Path, **options: object) -> tuple[Disk, Log]:
    """What was in a folder before a run, and the run's operations."""
    folder.mkdir(exist_ok=True)
    if case.on_disk:
        (folder / "scratch").mkdir(exist_ok=True)
    disk, log = Disk(folder), Log()
    with operations(log):
        case.run(folder, **options)
    case.check(folder)
    return disk, log


def _out(found: dict[str, bytes | None]) -> dict[str, bytes | None]:
    return {name: data for name, data in found.items() if name.split("/")[0] == "out"}


def _broken(disk: Disk, log: list[Event], whole: dict[str, bytes | None]) -> list[str]:
    """After which operations, and how, a power cut leaves an output that is not whole."""
    found = []
    for number, event in enumerate(log):
        disk.do(event)
        for cut, survives in CUTS.items():
            if _out(disk.after_power_cut(survives)) not in ({}, whole):
                found.append(f"{number}: {event.name} {cut}")
    return found


def _whole(folder: Path) -> dict[str, bytes | None]:
    paths = [folder / "out", *(folder / "out").rglob("*")]
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in paths}


WAYS = {"new": {}, "resumed": {"resume": True}, "started over": {"fresh": True}}


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_whenever_the_power_fails_the_output_is_whole_or_not_there(
    way: str, on_disk: bool, cases: Cases, tmp_path: Path
) -> None:
    case = cases("t5" if on_disk else "llama", on_disk)
    if WAYS[way]:
        stopped(case, tmp_path, after=1)
    disk, log = _recorded(case, tmp_path, **WAYS[way])
    assert _broken(disk, log, _whole(tmp_path)) == []
    assert _out(disk.after_power_cut(CUTS["nothing"])) == _whole(tmp_path)


@pytest.mark.parametrize("missing", ["sync", "sync_folder"])
def test_without_syncing_that_would_not_be_so(missing: str, case: Case, tmp_path: Path) -> None:
    disk, log = _recorded(case, tmp_path)
    assert _broken(disk, [event for event in log if event.name != missing], _whole(tmp_path))


@pytest.mark.parametrize("way", WAYS)
def test_after_a_power_cut_what_was_kept_can_be_gone_on_with(way: str, case: Case, tmp_path: Path) -> None:
    """No layer that was said to be durable is lost, and none is taken for it that is not."""
    if WAYS[way]:
        stopped(case, tmp_path / "whole", after=1)
    disk, log = _recorded(case, tmp_path / "whole", **WAYS[way])
    states: dict[str, dict[str, bytes | None]] = {}
    lines = set()
    for number, event in enumerate(log):
        disk.do(event)
        lines.add((disk.after_power_cut(CUTS["nothing"]).get(".out.partial/manifest") or b"").count(b"\n"))
        chosen = list(CUTS) if EXHAUSTIVE else [list(CUTS)[number // 7 % len(CUTS)]] if number % 7 == 0 else []
        states |= {f"{number}, {event.name}, {cut}": disk.after_power_cut(CUTS[cut]) for cut in chosen}
    assert lines >= {0, 3, 4}  # none; what the job is and two layers; the end

    def check(state: str) -> None:
        _put(states[state], tmp_path / state)
        goes_on(case, tmp_path / state)

    check_all(check, list(states))


def _put(found: dict[str, bytes | None], folder: Path) -> None:
    folder.mkdir()
    for name, data in found.items():
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)


# Operations that fail


@pytest.mark.parametrize("on_disk", [False, True])
def test_whichever_change_fails_there_is_one_error_and_nothing_is_lost(
    on_disk: bool, cases: Cases, tmp_path: Path
) -> None:
    case = cases("llama", on_disk)
    numbers = [number for number, name in enumerate(case.operations, 1) if name != "lock"]  # which just says no

    def check(number: int) -> None:
        _fails(case, tmp_path / str(number), failing(number, ERRORS[number % len(ERRORS)]))

    check_all(check, numbers if EXHAUSTIVE else numbers[on_disk::7])


def test_whatever_cannot_be_read_is_named(cases: Cases, tmp_path: Path) -> None:
    case = cases("llama", False)
    with operations(names=READS) as reads:
        case.run(tmp_path / "whole")

    def check(number: int) -> None:
        _fails(case, tmp_path / str(number), failing(number, errno.EIO), READS)

    check_all(check, range(1, len(reads) + 1, 1 if EXHAUSTIVE else 12))


def _fails(case: Case, folder: Path, act: Callable[[Operation], Any], names: Sequence[str] = CHANGES) -> None:
    """An operation of a run fails: the error names a file or folder, and says what is kept; all is well later."""
    try:
        with operations(act, names):
            case.run(folder)
    except FeatCalError as error:
        failure = error  # kept, as notebooks do, with all that it refers to: no lock may hang on that
    else:
        case.check(folder, but="report.json: inputs")  # what failed was not needed; an input has no hash then
        return
    told = str(failure)
    inputs = Path(case.recipe["base_model"]).parent
    assert re.search(rf"({re.escape(str(folder))}|{re.escape(str(inputs))})/\S", told), told
    assert any(os.strerror(code) in told for code in ERRORS), told
    assert "\n" not in told
    if done(folder / "out"):
        assert "what is done is kept: --resume goes on from there" in told or "the finished model is in" in told, told
    goes_on(case, folder)


# Real file systems


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a file system with options, or gives them to the one that is there."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def make(options: str) -> Path:
        options = f"remount,{options}" if folder.is_mount() else options
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )
        if made.returncode:
            pytest.skip(f"no file system can be made here: {made.stderr.strip()}")
        return folder

    yield make
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


LARGE = 2**30
PAGE = 4096


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_disk_that_is_too_small_is_found_before_the_first_layer(
    on_disk: bool, cases: Cases, disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the system does not say how much is free, as with quotas: room is taken before it is needed."""
    case = cases("llama", on_disk)
    most, free_bytes = 0, files.free_bytes

    def measure(operation: Operation) -> Any:
        nonlocal most
        result = operation.do()
        most = max(most, LARGE - free_bytes(disk_folder))
        return result

    disk_folder = disk(f"size={LARGE}")
    monkeypatch.setattr(files, "free_bytes", lambda _: LARGE)
    with operations(measure):
        case.run(disk_folder / "whole")
    shutil.rmtree(disk_folder / "whole")
    few = 8 * PAGE  # what is not taken beforehand: the manifest's lines, the report
    for size in range(most // 8, most - few, most // 8):
        layers = Layers()
        with operations(), pytest.raises(OutputError, match="No space left on device; free space or choose"):
            case.run(disk(f"size={size}") / str(size), progress=layers)
        assert layers.seen == []
        assert not left_in(disk_folder / str(size))
    kept = 0
    for size in range(most - few, most, PAGE):
        folder = disk(f"size={size}") / str(size)
        with operations(), pytest.raises(OutputError, match="No space left on device; free space or choose") as error:
            case.run(folder)
        kept += "what is done is kept" in str(error.value)
        assert ("what is done is kept" in str(error.value)) == (done(folder / "out") > 0) == bool(left_in(folder))
        disk(f"size={LARGE}")
        case.resume(folder)
        shutil.rmtree(folder)
    assert kept


def test_folders_that_cannot_be_written_to_are_named(cases: Cases, disk: Callable[[str], Path], tmp_path: Path) -> None:
    case = cases("llama")
    folder = disk(f"size={LARGE}") / "job"
    stopped(case, folder, after=1)
    disk("ro")
    for options in ({}, {"resume": True}, {"fresh": True}):
        with pytest.raises(OutputError, match=re.escape(str(folder))):
            case.run(folder, **options)
    with pytest.raises(OutputError, match=rf"scratch: {re.escape(str(folder))}"):
        case.run(tmp_path / "elsewhere", scratch=folder)
    assert not left_in(tmp_path / "elsewhere")
    disk("rw")
    case.resume(folder)
