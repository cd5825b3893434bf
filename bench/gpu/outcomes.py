"""A pytest plugin: each test's outcome as a line of JSON, at once, in the file that BENCH_GPU_OUTCOMES names.

So what is known stays when the tests, or pytest itself, are ended. `-p bench.gpu.outcomes` loads it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FILE = "BENCH_GPU_OUTCOMES"


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
