"""Runs the interpreter's and the compiler's tests, in a process each: Triton decides at import which of them it is."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("interpreter", "compile")


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, tuple[subprocess.Popen, IO[str]]]]:
    """Both at once: a core each."""
    pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be interpreted or compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    with ExitStack() as stack:
        started = {}
        for folder in FOLDERS:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/kernels/{folder}"]
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
            stack.callback(run.kill)
            started[folder] = run, output
        yield started


@pytest.mark.parametrize("folder", FOLDERS)
def test_in_its_own_process(folder: str, runs: dict[str, tuple[subprocess.Popen, IO[str]]]):
    run, output = runs[folder]
    run.wait()
    output.seek(0)
    assert run.returncode == 0, output.read()[-20_000:]
