"""Tests run in processes of their own: how many passed, what failed and why, also when they are ended early.

This module is a plugin of pytest, too: it writes each test's outcome at once, as a line of JSON, to the file that
BENCH_OUTCOMES names. So what is known stays when the tests, or pytest itself, are ended.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Any

from bench.harness import process

PLUGIN, FILE = "bench.harness.tests", "BENCH_OUTCOMES"
TIMEOUT = 120  # seconds a test: an encoder-decoder's twelve forwards are compiled, beside all else


def run_tests(
    arguments: Sequence[str],
    timeout: float = inf,
    processes: int = 0,
    python: str | Path = sys.executable,
    **environment: str,
) -> dict[str, Any]:
    """How many passed, failed and were skipped, and of each that failed the error.

    Args:
        arguments: of pytest.
        timeout: seconds for all.
        processes: side by side, where pytest-xdist is installed, and none for longer than TIMEOUT, where
            pytest-timeout is; 0 for one after the other.
        python: to run them with.
        environment: variables.
    """
    command = [str(python), "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", PLUGIN]
    apart = bool(processes and find_spec("xdist"))
    if apart:
        command += ["-n", str(processes), "--dist", "worksteal"]
    if processes and find_spec("pytest_timeout"):
        command += ["--timeout", str(TIMEOUT)]
        if apart:  # ends the test's process: while a kernel hangs, no signal reaches Python
            command += ["--timeout-method", "thread"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "outcomes")
        path.touch()
        unfinished = ""
        try:
            environment |= {FILE: str(path)}
            status, output = process.run([*command, *arguments], timeout, **environment)
        except process.TookTooLong as error:
            status, output, unfinished = 0, "", str(error)
        found = [json.loads(line) for line in path.read_text().rpartition("\n")[0].splitlines()]
    by_test: dict[str, dict[str, str]] = {}
    for each in found:  # a test that passed may fail as it is torn down
        if each["outcome"] == "failed" or each["test"] not in by_test:
            by_test[each["test"]] = each
    counts = {
        outcome: sum(each["outcome"] == outcome for each in by_test.values())
        for outcome in ("passed", "failed", "skipped")
    }
    failures = {name: each for name, each in by_test.items() if each["outcome"] == "failed"}
    broken = ""
    if status not in (0, 1) or (status and not failures):
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "no output")
        broken = f"ended with {status}: {last[:300]}"
    elif not counts["passed"] and not failures and not unfinished:
        broken = "no test ran"
    if broken:  # pytest itself
        failures["pytest"] = {"error": broken, "text": output[-3000:]}
        counts["failed"] += 1
    return {
        **counts,
        "unfinished": unfinished,
        "failures": {name: {key: each[key] for key in ("error", "text")} for name, each in failures.items()},
    }


def pytest_configure(config: Any) -> None:
    if not hasattr(config, "workerinput"):  # of pytest-xdist's processes, the one that all report to
        config.pluginmanager.register(Outcomes(Path(os.environ[FILE])))


class Outcomes:
    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            self._add(report)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._add(report)

    def _add(self, report: Any) -> None:
        crash = getattr(report.longrepr, "reprcrash", None)
        text = str(report.longrepr or "").strip()
        found = {"test": report.nodeid, "outcome": report.outcome}
        if report.failed:
            found["error"] = (crash.message if crash else text).strip().partition("\n")[0][:300]
            found["text"] = text[-3000:]
        with self._path.open("a") as file:
            file.write(json.dumps(found) + "\n")
