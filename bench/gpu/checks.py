"""The tests that need a GPU, in processes of their own, before anything is timed: what fails is not timed on top of."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.gpu import outcomes, process
from bench.gpu.results import ROOT, Results, Rows, code_hash
from bench.gpu.sections import LeftOut, Row, Section
from bench.gpu.timing import Run

DRY_TESTS = ("tests/kernels/test_naive.py",)
PROCESSES = 8
TIMEOUT = 120  # seconds a test: an encoder-decoder's twelve forwards are compiled, beside all else

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
    options = [] if run.dry else ["-m", "gpu"]
    yield Row(
        key,
        lambda left: run_tests([*options, *files], left, 0 if run.dry else PROCESSES),
        again=bool(before.get("unfinished")),
    )


def gpu_tests() -> tuple[str, ...]:
    """Files with tests that need a GPU; to collect all others would take longer than these do."""
    files = sorted(path for folder in ("tests/kernels", "tests") for path in (ROOT / folder).glob("test_*.py"))
    return tuple(str(path.relative_to(ROOT)) for path in files if "pytest.mark.gpu" in path.read_text())


def run_tests(arguments: list[str], timeout: float, processes: int) -> dict[str, Any]:
    """How many passed, failed and were skipped, and of each that failed the error."""
    if find_spec("pytest") is None:
        raise LeftOut("pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", outcomes.__name__]
    apart = bool(processes and find_spec("xdist"))
    if apart:
        command += ["-n", str(processes), "--dist", "worksteal"]
    if find_spec("pytest_timeout"):
        command += ["--timeout", str(TIMEOUT)]
        if apart:  # ends the test's process: while a kernel hangs, no signal reaches Python
            command += ["--timeout-method", "thread"]
    # Each process has compilers of its own; by default as many as there are processors.
    compilers = str(max(1, (os.cpu_count() or 1) // max(1, processes)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "outcomes")
        path.touch()
        unfinished = ""
        try:
            environment = {outcomes.FILE: str(path), "TORCHINDUCTOR_COMPILE_THREADS": compilers}
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
    if status not in (0, 1) or (status and not failures):  # pytest itself broke
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "no output")
        failures["pytest"] = {"error": f"ended with {status}: {last[:300]}", "text": output[-3000:]}
        counts["failed"] += 1
    elif not counts["passed"] and not failures and not unfinished:
        failures["pytest"] = {"error": "no test ran", "text": output[-3000:]}
        counts["failed"] += 1
    return {
        **counts,
        "unfinished": unfinished,
        "failures": {name: {key: each[key] for key in ("error", "text")} for name, each in failures.items()},
    }


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


def show(rows: Rows, run: Run, results: Results) -> str:
    lines = [f"FAILED {name}: {error}" for name, error in failures(results).items()]
    for row in rows.values():
        counts = ", ".join(f"{row[name]} {name}" for name in ("failed", "passed", "skipped"))
        lines.append(f"Tests: {counts}" + (f"; {row['unfinished']}" if row["unfinished"] else ""))
    return "\n".join(lines)


CHECKS = Section("checks", 0.35, rows, show)
