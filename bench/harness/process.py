"""Processes of their own: ended with all they started, and what they said in one line if they fail."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any

from bench.harness.results import ROOT

PARENT = "BENCH_PARENT"  # tells a process who waits for it

_running: set[int] = set()


class TookTooLong(Exception):
    pass


def run(command: Sequence[str], timeout: float = inf, **environment: str) -> tuple[int, str]:
    """Its exit status and what it printed.

    Raises:
        TookTooLong: it was ended.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, PARENT: str(os.getpid()), **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        _running.add(process.pid)
        try:
            status = process.wait(None if timeout == inf else max(timeout, 0))
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise TookTooLong(f"ended after {timeout:.0f} s") from None
            raise
        finally:
            _running.discard(process.pid)
        output.seek(0)
        return status, output.read()


def end_with_parent() -> None:
    """Where this process was started by `run`: end, on Linux, as soon as whoever waits for it is gone."""
    parent = os.environ.pop(PARENT, None)
    if parent is not None:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if parent != str(os.getppid()):
            sys.exit(1)


def end_all() -> None:
    """End what other threads wait for."""
    for group in list(_running):
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def last_json(command: Sequence[str], timeout: float = inf, **environment: str) -> dict[str, Any]:
    """The last object that it printed, as JSON on a line.

    Raises:
        RuntimeError: it failed; says its error, or its last line.
        TookTooLong: it was ended.
    """
    status, output = run(command, timeout, **environment)
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    if status:
        name = next((part for part in command if part.startswith("bench.")), Path(command[0]).name)
        why = next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception): ", line)), lines[-1])
        raise RuntimeError(f"{name} ended with {status}: {why[:300]}")
    return json.loads(next(line for line in reversed(lines) if line.startswith("{")))
