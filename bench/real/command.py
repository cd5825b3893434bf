"""Run the studies: units by processes side by side, then what all of them found."""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from bench import real
from bench.harness import process
from bench.harness.results import RESULTS, Results, code_hash, environment, machine, versions, write_whole
from bench.harness.runs import command_line
from bench.real import encoder, lm, sources, summary
from bench.real.plots import draw
from bench.real.texts import built
from bench.real.units import SECTION, Rows, Unit

STUDIES: dict[str, Any] = {study.NAME: study for study in (lm, encoder)}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # as glibc's malloc.h has them
PROCESSES = 2  # of one thread each
MEASURES = tuple(  # what rows depend on, beside what all benchmarks do
    f"bench/{name}.py"
    for name in (
        *("surgery", "mergers", "language/study", "language/llama"),
        *(f"real/{part}" for part in ("sources", "texts", "tasks", "units", "repairs")),
    )
)


def main() -> None:
    parser = command_line(real.__doc__, "--folder", "--fresh")
    parser.add_argument("study", nargs="?", choices=STUDIES, help="both, if it is left out")
    parser.add_argument("--quick", action="store_true", help="one seed and fewer rows, in ten minutes")
    parser.add_argument("--choose", action="store_true", help="compare settings on the validation part instead")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    began = time.perf_counter()
    archives = sources.fetch(args.folder / "sources")
    studies = {name: study for name, study in STUDIES.items() if args.study in (None, name)}
    ready = built({name: partial(study.prepare, archives, args.folder) for name, study in studies.items()})
    studies = {name: studies[name] for name in ready}
    if not studies:
        raise SystemExit("Nothing was measured.")
    results_folder = args.folder if args.quick else RESULTS
    if args.choose:
        for name, study in studies.items():
            path = results_folder / f"settings-real-{name}.json"
            rows = Rows(kept_rows(f"choose-{name}", study, args, archives))
            write_whole(path, study.choose(archives, args.folder, rows, args.quick) | {"machine": machine(1)})
            print(f"Wrote {path}")
        return
    work = [unit for study in studies.values() for unit in study.units(args.quick)]
    os.environ[process.PARENT] = str(os.getpid())
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, spawn, process.end_with_parent, max_tasks_per_child=1) as pool:
        finished = dict(zip(work, pool.map(run, work, repeat(args), repeat(archives)), strict=True))
    seconds = time.perf_counter() - began
    for name, study in studies.items():
        own = {unit: rows for unit, rows in finished.items() if unit.study == name}
        results = found(study, own, args.quick) | {"wall_seconds": seconds}
        path = results_folder / f"real-{name}.json"
        write_whole(path, results)
        print(f"{summary.show(results)}\nWrote {path}")
    if not args.quick and len(studies) == len(STUDIES):
        draw(RESULTS / "real.png")
    print(f"{seconds / 60:.0f} minutes")


def run(unit: Unit, args: argparse.Namespace, archives: dict[str, Path]) -> dict[str, Any]:
    """A unit's rows, measured in this process or before."""
    torch.set_num_threads(1)
    _keep_freed_blocks()
    study = STUDIES[unit.study]
    kept = kept_rows(unit.name, study, args, archives)
    study.run(unit, archives, args.folder, Rows(kept), args.quick)
    return kept.of(SECTION)


def _keep_freed_blocks() -> None:
    """Let the C library keep what tensors leave: fresh pages for every batch's logits were a sixth of the time."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def kept_rows(name: str, study: Any, args: argparse.Namespace, archives: dict[str, Path]) -> Results:
    """The file of finished rows of a unit, or of a study's settings."""
    path = args.folder / ("quick" if args.quick else "rows") / f"{name}.json"
    return Results(path, conditions(study, archives, args.quick), args.fresh)


def conditions(study: Any, archives: dict[str, Path], quick: bool) -> dict[str, Any]:
    """What rows must agree in to stand in one file."""
    own = tuple(f"bench/real/{name}.py" for name in study.FILES)
    return environment(
        torch.device("cpu"),
        machine=machine(1),
        measures=code_hash((*MEASURES, *own)),
        packages=versions("peft", "gguf", "tokenizers", "safetensors"),
        texts=study.fingerprint(archives),
        studied=study.describe(quick),
    )


def found(study: Any, units: dict[Unit, dict[str, Any]], quick: bool) -> dict[str, Any]:
    rows = [row for each in units.values() for row in each.values()]
    return {
        "study": study.TITLE,
        "measure": study.MEASURE,
        "digits": study.DIGITS,
        "scale": study.SCALE,
        **study.describe(quick),
        "seeds": sorted({unit.seed for unit in units}),
        "machine": machine(1),
        "thread_seconds": sum(row["row_seconds"] for row in rows),
        "forms": summary.summary(units, study.LOWER_IS_BETTER),
    }
