"""The family, engine and job tests on several versions of transformers, each in an environment of its own.

    python -m bench.matrix                               # 5.0, 5.8, 5.17 and the newest
    python -m bench.matrix --versions 5.3.0 newest

Environments are made once, under `--folder`, and reused; `newest` is upgraded every time. Prints a Markdown table and
writes `bench/results/matrix.json`. Exits with 1 where a test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("5.0.0", "5.8.0", "5.17.0", "newest")
TESTS = ("tests/test_families.py", "tests/test_engine.py", "tests/test_job.py")
REQUIREMENTS = ("numpy", "pyyaml", "typer", "rich", "pillow", "pytest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=VERSIONS, help="of transformers; `newest` is what pip finds")
    parser.add_argument("--torch", default="torch", help="requirement for torch, for example torch==2.13.0")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "featcal-matrix")
    args = parser.parse_args()

    rows = []
    for version in args.versions:
        python = environment(version, args.folder / version, args.torch)
        rows.append(run(version, python, args.folder / version / "tests.xml"))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(table(rows))
    (ROOT / "bench" / "results" / "matrix.json").write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(any(row["failed"] for row in rows))


def environment(version: str, folder: Path, torch: str) -> Path:
    """The Python of an environment with this version of transformers."""
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        _install(python, torch)
        _install(python, "transformers" if version == "newest" else f"transformers=={version}", *REQUIREMENTS)
        (folder / "complete").touch()
    elif version == "newest":
        _install(python, "--upgrade", "transformers")
    return python


def run(version: str, python: Path, report: Path) -> dict[str, object]:
    """The tests' outcome: versions, numbers of tests, names of those that failed, seconds."""
    started = time.perf_counter()
    report.unlink(missing_ok=True)
    # One thread: pico models gain nothing from more.
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *TESTS]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if not report.exists():
        raise SystemExit(f"transformers {version}: pytest did not run:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "asked": version,
        "transformers": _version(python, "transformers"),
        "torch": _version(python, "torch"),
        "passed": len(cases) - len(failed) - skipped,
        "skipped": skipped,
        "failed": failed,
        "seconds": round(seconds, 1),
    }


def table(rows: list[dict[str, object]]) -> str:
    lines = ["| transformers | torch | passed | failed | seconds |", "| --- | --- | ---: | ---: | ---: |"]
    for row in rows:
        cells = (row["transformers"], row["torch"], row["passed"], len(row["failed"]), row["seconds"])  # type: ignore[arg-type]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines)


def _install(python: Path, *requirements: str) -> None:
    subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)


def _version(python: Path, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
