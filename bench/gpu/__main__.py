"""Proves, tunes and measures everything on the GPU at hand: `PYTHONPATH=.:kernels python -m bench.gpu --budget 12m`.

First the tests that need a GPU, while tiles are compiled; then, in order of worth, tiles, a whole layer beside the
reference schedules, solves, folds, moments, whole jobs; last, the peak again. Each row is on disk as soon as it is
measured, and is not measured again for the same code, card and versions: a second run goes on where the first was
ended. A budget is shared out: what there was no time for is named, and what is left over at the end goes to it. What a
failed test proves wrong is not timed, unless `--sections` leaves the tests out.

The exit status is 1 if a test failed or nothing could be measured. `--dry-run` goes through it all on the CPU at toy
sizes, and writes nothing unless `--out` says where.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path

import torch
from featcal_kernels.configs import Arch, arch_of
from featcal_kernels.ops import missing

from bench.gpu import budget, checks, goals, tiles
from bench.gpu.checks import CHECKS
from bench.gpu.folds import FOLD
from bench.gpu.jobs import JOBS, MEMORY_BACKED
from bench.gpu.layer import LAYER
from bench.gpu.moments import MOMENTS
from bench.gpu.sections import DeviceLost, Section, run_section, say, say_left_out
from bench.gpu.solves import SOLVE
from bench.gpu.tiles import TILES
from bench.gpu.timing import Run, measure_peak
from bench.harness.results import RESULTS, Results, environment
from bench.harness.runs import check, command_line, official

SECTIONS = {each.name: each for each in (CHECKS, TILES, LAYER, SOLVE, FOLD, MOMENTS, JOBS)}
PEAK = "bfloat16 product"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    device = torch.device("cpu") if options.dry_run else torch.device("cuda", torch.cuda.current_device())
    torch.set_float32_matmul_precision("highest")
    if options.dry_run:
        torch.set_num_threads(1)  # enough for toys, and the tests beside it have the other
    found = environment(device)
    out = options.out
    if out is None and not options.dry_run:
        out = RESULTS / f"gpu-{found['device'].replace(' ', '-').lower()}.json"
    results = Results(out, found, options.fresh)
    print(", ".join(f"{name} {value}" for name, value in found.items() if value is not None))
    time = budget.Budget(options.budget)
    arch, no_kernels = _kernels(device)
    theirs = official(options) if options.official else None
    if theirs:
        check({"official": theirs}, str(device))
    folders = (options.folder,) if options.folder else (MEMORY_BACKED, Path(tempfile.gettempdir()))
    run = Run(device, options.dry_run, arch, folders=folders, official=theirs)
    if PEAK not in results.of("peak"):
        try:
            results.add("peak", PEAK, {"TFLOP/s": measure_peak(run)})
        except RuntimeError as error:  # another process has the device, or its memory
            raise SystemExit(f"bench.gpu: the GPU cannot be used: {str(error).partition(chr(10))[0]}") from None
        except OSError as error:
            raise SystemExit(f"bench.gpu: {out} cannot be written: {error.strerror}; --out names another") from None
    run = replace(run, peak=results.of("peak")[PEAK]["TFLOP/s"])
    print(f"peak of a bfloat16 product: {run.peak:.3g} TFLOP/s" + (f"; results go to {out}" if out else ""), flush=True)

    if TILES in options.sections and not no_kernels:
        try:
            run = replace(run, compiling=tiles.start(run, results))
        except Exception as error:  # in a compiler's set-up; only tiles need it
            say("tiles", "compiling", f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    lost = ""
    try:
        _go_through(options.sections, run, results, time, no_kernels)
    except DeviceLost as row:
        lost = str(row)
    finally:
        if run.compiling is not None:
            run.compiling.close()
    if lost:  # not before the error is gone: what its frames hold, such as a job's folder, is given back
        say("bench.gpu", lost, "lost the device for this process; a new one goes on after it")
        _go_on(sys.argv[1:] if arguments is None else arguments, time)
    if results.of("tiles"):
        row = tiles.best_row(tiles.arch_at_hand(run), results.of("tiles"), results.of("moments"))
        print(f"\nThe row for the table: {row}")
    results.add("peak", "again, at the end", {"TFLOP/s": measure_peak(run)})  # how far clocks and neighbours moved
    print(f"\nThe peak at the end: {results.of('peak')['again, at the end']['TFLOP/s']:.3g} TFLOP/s")
    print(f"\n{goals.as_table(goals.figures(results.rows, run.peak), results.to_json()['sections'])}", flush=True)
    measured = any(results.of(section.name) for section in options.sections)
    return int(bool(checks.failures(results)) or not measured)


def _go_through(chosen: list[Section], run: Run, results: Results, time: budget.Budget, no_kernels: str) -> None:
    """All sections, and again those that were cut off, as long as there is time for a row."""
    todo, late = chosen, {}
    while todo:
        time.share_out({section.name: section.share for section in todo})
        measured = 0
        for section in todo:
            time.begin(section.name)
            why = no_kernels if section.needs_kernels else ""
            if CHECKS in chosen:
                why = why or checks.stopped(results).get(section.name, "")
            count, late[section.name] = _run(section, run, results, time, why)
            measured += count
            if section is TILES and run.compiling is not None and not late[section.name]:
                run.compiling.close()  # compilers would spoil what is timed next
        todo = [section for section in todo if measured and late[section.name]]
    for name, left in late.items():
        say_left_out(name, left)


def _go_on(arguments: Sequence[str], time: budget.Budget) -> None:
    """The same command in place of this process: the file has all that was measured, and what failed."""
    again = [argument for argument in arguments if argument != "--fresh"]
    if time.rest < inf:
        again += ["--budget", f"{max(time.rest, 0.001):.3f}"]
    os.execv(sys.executable, [sys.executable, "-m", "bench.gpu", *again])


def _run(section: Section, run: Run, results: Results, time: budget.Budget, why: str) -> tuple[int, dict[str, str]]:
    """As `run_section` does, and show it; with a reason not to, leave it out."""
    try:
        if why:
            say(section.name, "all", f"left out: {why}")
            results.leave_out(section.name, {"all": why})
            return 0, {}
        measured, late = run_section(section, run, results, time)
        if results.of(section.name) and (measured or not late):
            print(f"\n{section.show(results.of(section.name), run.peak)}", flush=True)
        return measured, late
    except DeviceLost:
        raise
    except Exception as error:  # of what rows share; the next section may do
        say(section.name, "all", f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")
        return 0, {}


def _kernels(device: torch.device) -> tuple[Arch | None, str]:
    """The device's row of the table, or why the kernels cannot run."""
    if device.type == "cpu":
        return None, ""
    why = missing(device)
    return None if why else arch_of(device), why


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__, "--fresh", "--official", "--official-python", prog="python -m bench.gpu")
    parser.add_argument("--budget", type=budget.seconds, help="such as 12m or 90s; without it, as long as it takes")
    parser.add_argument("--sections", type=_sections, default=list(SECTIONS.values()), help=f"of {','.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, help="JSON file; default: bench/results/gpu-DEVICE.json")
    parser.add_argument("--folder", type=Path, help="for jobs; default: memory-backed disk, if it has room")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at toy sizes")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("bench.gpu: no GPU that torch can use; --dry-run goes through the motions on the CPU")
    return options


def _sections(text: str) -> list[Section]:
    names = text.split(",")
    if unknown := set(names) - set(SECTIONS):
        raise argparse.ArgumentTypeError(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    return [section for name, section in SECTIONS.items() if name in names]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what jobs wrote is removed, and they are ended
    sys.exit(main())
