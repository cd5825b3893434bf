"""Several ranks on this machine: forked children, each with the environment that torchrun gives."""

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from file_operations import operations
from runs import Case, contents, left_in

from featcal_fast.errors import FeatCalError
from featcal_fast.ranks import panels

PATIENCE = 60.0  # seconds for all ranks to end
ALONE = ("report.json: ranks",)  # what is told of several ranks only


@contextmanager
def small_panels() -> Iterator[None]:
    """Pico models have many panels, too: of 8 KiB."""
    with patch.multiple(panels, PANEL_BYTES=8192, STEP=8):
        yield


def made_case(recipe: dict[str, Any], folder: Path, on_disk: bool = False, **options: Any) -> Case:
    """A case, and what one process makes of it below a folder."""
    case = Case(recipe, on_disk)
    with operations() as case.operations:
        case.run(folder / "whole", **options)
    case.whole = contents(folder / "whole" / "out")
    return case


def run_case(case: Case, size: int, folder: Path, **options: Any) -> list[tuple[int, str]]:
    """Run a case in so many ranks: what `run_ranks` returns, where each says its report."""
    folder.mkdir(exist_ok=True)
    return run_ranks(size, lambda _: case.run(folder, **options).to_json(), told_in(folder))


def check_case(case: Case, size: int, folder: Path, **options: Any) -> None:
    """All ranks return the same report, and what they wrote is what one process does, with nothing else left."""
    found = run_case(case, size, folder, **options)
    assert [status for status, _ in found] == [0] * size, found
    report = (folder / "out" / "report.json").read_text()
    assert [said == report for _, said in found] == [True] * size
    told = contents(folder / "out")
    for name in told.keys() | case.whole.keys():
        assert name in ALONE or told.get(name) == case.whole.get(name), (
            f"{size} ranks, {name}: found {told.get(name)}, expected {case.whole.get(name)}"
        )
    assert not left_in(folder), left_in(folder)


def told_in(folder: Path) -> Path:
    """Where ranks say what became of them: beside the folder that they work in."""
    return folder.with_name(f"{folder.name} told")


def run_ranks(
    size: int,
    work: Callable[[int], object],
    folder: Path,
    patience: float = PATIENCE,
    when: Callable[[list[int]], None] = lambda _: None,
) -> list[tuple[int, str]]:
    """Run `work(rank)` in `size` processes that know of each other.

    Args:
        size: how many.
        work: what each does; what it returns is passed on as a text.
        folder: for what they say.
        patience: seconds until they are killed.
        when: called with their process ids once they have begun.

    Returns:
        For each rank its exit status (0: returned; 1: a `FeatCalError`; below zero: a signal) and what it returned,
        or the error's text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_start(rank, size, port, work, folder) for rank in range(size)]
    when(children)
    ended: dict[int, int] = {}
    until = time.monotonic() + patience
    while len(ended) < size:
        for rank, child in enumerate(children):
            if rank not in ended and (found := os.waitpid(child, os.WNOHANG))[0]:
                ended[rank] = os.waitstatus_to_exitcode(found[1])
        if time.monotonic() > until:
            for rank in set(range(size)) - ended.keys():
                os.kill(children[rank], signal.SIGKILL)
            until += 10
        time.sleep(0.005)
    said = [folder / f"{rank}.json" for rank in range(size)]
    return [(ended[rank], json.loads(each.read_text()) if each.exists() else "") for rank, each in enumerate(said)]


def _start(rank: int, size: int, port: int, work: Callable[[int], object], folder: Path) -> int:
    (folder / f"{rank}.json").unlink(missing_ok=True)
    if child := os.fork():
        return child
    status = 70
    try:
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in own.items()})
        try:
            said, status = str(work(rank)), 0
        except FeatCalError as error:
            said, status = f"{type(error).__name__}: {error}", 1
        except SystemExit as error:
            said, status = "exit", int(error.code or 0)
        (folder / f"{rank}.json").write_text(json.dumps(said))
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(status)
