"""The family, engine and job tests on several versions of transformers, each in an environment of its own.

    python -m bench.matrix                               # 5.0, 5.8, 5.17 and the newest

Environments are made once, under `--folder`, and reused; the newest is upgraded every time. Prints a table and writes
`bench/results/matrix.json`. Exits with 1 where a test failed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.harness import process
from bench.harness.results import RESULTS, write_whole
from bench.harness.runs import command_line
from bench.harness.tables import table
from bench.harness.tests import run_tests

VERSIONS = ("5.0.0", "5.8.0", "5.17.0", "newest")  # what pip finds
TESTS = ("tests/test_families.py", "tests/test_engine.py", "tests/test_job.py")
REQUIREMENTS = ("torch", "numpy", "pyyaml", "typer", "rich", "pillow", "pytest")


def main() -> None:
    args = command_line(__doc__, "--folder").parse_args()
    rows = []
    for version in VERSIONS:
        rows.append(run(version, environment(version, args.folder / f"transformers-{version}")))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        write_whole(RESULTS / "matrix.json", rows)
    print(table("Tests by version", [{**row, "failed": len(row["failed"])} for row in rows]))
    sys.exit(any(row["failed"] for row in rows))


def environment(version: str, folder: Path) -> Path:
    """The Python of an environment with this version of transformers."""
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        _install(python, "transformers" if version == "newest" else f"transformers=={version}", *REQUIREMENTS)
        (folder / "complete").touch()
    elif version == "newest":
        _install(python, "--upgrade", "transformers")
    return python


def run(version: str, python: Path) -> dict[str, Any]:
    """The tests' outcome: versions, numbers of tests, names of those that failed, seconds."""
    started = time.perf_counter()
    found = run_tests(TESTS, python=python, OMP_NUM_THREADS="1")  # pico models gain nothing from more threads
    return {
        "asked": version,
        "transformers": _version(python, "transformers"),
        "torch": _version(python, "torch"),
        "passed": found["passed"],
        "skipped": found["skipped"],
        "failed": list(found["failures"]),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _install(python: Path, *requirements: str) -> None:
    subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)


def _version(python: Path, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return process.run([str(python), "-c", code])[1].strip()


if __name__ == "__main__":
    main()
