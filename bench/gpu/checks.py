"""The tests that need a GPU, in processes of their own, before anything is timed: what fails is not timed on top of."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from bench.gpu.sections import LeftOut, Row, Section
from bench.gpu.timing import Run
from bench.harness.results import ROOT, Results, Rows, code_hash
from bench.harness.tests import run_tests

DRY_TESTS = ("tests/kernels/test_naive.py",)
PROCESSES = 8

# What a failed test stops, by its name: the first that fits counts. Tests of memory and waiting stop nothing.
STOPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"::test_\w*(wait|are_not_copied|runs_out)", ()),
    (r"::test_\w*(solve|factor|cholesky)", ("solve", "layer", "jobs")),
    (r"^tests/test_", ("layer", "jobs")),
    (r"::test_\w*(fold|addmm|pack|triangle)", ("fold", "solve", "layer", "jobs")),
    (r"", ("moments", "tiles", "layer", "jobs")),
)


def rows(run: Run, results: Results) -> Iterator[Row]:
    files = DRY_TESTS if run.dry else gpu_tests()
    key = f"tests {code_hash(('tests/pico.py', 'tests/kernels/moment_oracle.py', *files))}"
    for old in results.of("checks").keys() - {key}:  # of other tests
        del results.of("checks")[old]
    before = results.of("checks").get(key, {})
    yield Row(key, lambda left: _run(files, run, left), again=bool(before.get("unfinished")))


def _run(files: tuple[str, ...], run: Run, left: float) -> dict[str, Any]:
    if find_spec("pytest") is None:
        raise LeftOut("pytest is not installed")
    if run.dry:
        return run_tests(files, left)
    # Each process has compilers of its own; by default as many as there are processors.
    compilers = str(max(1, (os.cpu_count() or 1) // PROCESSES))
    return run_tests(["-m", "gpu", *files], left, PROCESSES, TORCHINDUCTOR_COMPILE_THREADS=compilers)


def gpu_tests() -> tuple[str, ...]:
    """Files with tests that need a GPU; to collect all others would take longer than these do."""
    files = sorted(path for folder in ("tests/kernels", "tests") for path in (ROOT / folder).glob("test_*.py"))
    return tuple(str(path.relative_to(ROOT)) for path in files if "pytest.mark.gpu" in path.read_text())


def failures(results: Results) -> dict[str, str]:
    """The error of each failed test."""
    found = results.of("checks").values()
    return {name: each["error"] for row in found for name, each in row["failures"].items()}


def stopped(results: Results) -> dict[str, str]:
    """Sections that are not timed, and why."""
    found: dict[str, list[str]] = {}
    for name in failures(results):
        for section in next(sections for pattern, sections in STOPS if re.search(pattern, name)):
            found.setdefault(section, []).append(name)
    return {
        section: f"not timed: {names[0]} failed" + (f", and {len(names) - 1} more" if len(names) > 1 else "")
        for section, names in found.items()
    }


def lines(rows: Rows, peak: float) -> list[dict[str, Any]]:
    return [{name: row[name] for name in ("failed", "passed", "skipped", "unfinished")} for row in rows.values()]


def notes(rows: Rows, peak: float) -> list[str]:
    return [f"FAILED {name}: {each['error']}" for row in rows.values() for name, each in row["failures"].items()]


CHECKS = Section("checks", 0.35, rows, "Tests", lines, notes)
