"""Everything in `bench/` at its default size, then the pages' tables and figures anew: `python -m bench`.

About 25 minutes on two cores, no network. The studies of accuracy take a core each and run side by side; what is
timed runs alone. Larger jobs, GPUs, the official demo and the paper's protocol have commands of their own: see
`--help` of `bench.compare`, `bench.jobs`, `bench.gpu` and `bench.paper`.
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from bench.harness import process
from bench.harness.runs import command_line

STUDIES = ("accuracy", "language llama", "language t5")
TIMED = ("compare --reference --judge reference", "jobs", "cost", "overlap")


def main() -> None:
    command_line(__doc__).parse_args()
    started = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, STUDIES))
    for each in TIMED:
        run(each)
    run("readme")
    print(f"{(time.perf_counter() - started) / 60:.0f} minutes in all")


def run(command: str) -> None:
    """Run a module of `bench`; its output is shown when it is done."""
    started = time.perf_counter()
    module, *arguments = command.split()
    status, output = process.run([sys.executable, "-m", f"bench.{module}", *arguments])
    print(f"\npython -m bench.{command}: {time.perf_counter() - started:.0f} s\n{output}", flush=True)
    if status:
        raise SystemExit(f"python -m bench.{command} failed")


if __name__ == "__main__":
    main()
