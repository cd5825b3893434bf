"""Processes of their own: ended with all they started, and what they said in one line if they fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any

from bench.gpu.results import ROOT

_running: set[int] = set()


class TookTooLong(Exception):
    pass


def run(command: list[str], timeout: float, **environment: str) -> tuple[int, str]:
    """Its exit status and what it printed.

    Raises:
        TookTooLong: it was ended.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **environment},
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


def end_all() -> None:
    """End what other threads wait for."""
    for group in list(_running):
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def last_json(command: list[str], timeout: float, **environment: str) -> dict[str, Any]:
    """The last line that it printed, as JSON.

    Raises:
        RuntimeError: it failed; says its last line.
    """
    status, output = run(command, timeout, **environment)
    lines = [line for line in output.splitlines() if line.strip()] or ["no output"]
    if status:
        name = next((part for part in command if part.startswith("bench.")), Path(command[0]).name)
        raise RuntimeError(f"{name} ended with {status}: {lines[-1].strip()[:300]}")
    return json.loads(lines[-1])
