"""Workers started once before any is timed, then run in turns; and the options that commands have in common."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness import process
from bench.harness.results import RESULTS, Results, environment, machine

OPTIONS: dict[str, dict[str, Any]] = {
    "--device": {"default": "cuda" if torch.cuda.is_available() else "cpu"},
    "--threads": {"type": int, "default": os.cpu_count()},
    "--runs": {"type": int, "default": 1},
    "--samples": {"type": int, "help": "in place of the workload's own number"},
    "--tasks": {"type": int, "help": "in place of the workload's own number"},
    "--layers": {"type": int, "help": "in place of the workload's own number"},
    "--toy": {"action": "store_true", "help": "tiny models; nothing is kept in bench/results"},
    "--folder": {
        "type": Path,
        "default": Path(tempfile.gettempdir()) / "featcal-bench",
        "help": "for models and finished runs",
    },
    "--fresh": {"action": "store_true", "help": "measure again what the folder has"},
    "--official": {"type": Path, "help": "checkout of github egangu/featcal"},
    "--official-python": {"default": sys.executable, "help": "a Python with transformers 5.5 or older"},
}


def command_line(doc: str | None, *names: str, **other: Any) -> argparse.ArgumentParser:
    """A command's options, by their names in `OPTIONS`; they mean the same in all commands."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **other
    )
    for name in names:
        parser.add_argument(name, **OPTIONS[name])
    return parser


def results_folder(args: argparse.Namespace) -> Path:
    """Where a command's figures go."""
    return args.folder if args.toy else RESULTS


@dataclass(frozen=True)
class Way:
    """One way through a workload.

    Attributes:
        worker: a module of `bench.workers`.
        options: of its command line.
        python: that has what it imports.
    """

    worker: str
    options: tuple[str, ...] = ()
    python: str = sys.executable

    def command(self, *arguments: object) -> list[str]:
        return [self.python, "-m", f"bench.workers.{self.worker}", *map(str, arguments), *self.options]


def official(args: argparse.Namespace, *options: str) -> Way:
    """The official demo's code, from the checkout and by the Python that the command line names."""
    return Way("official", ("--checkout", str(args.official.resolve()), *options), args.official_python)


def check(ways: Mapping[str, Way], device: str) -> dict[str, dict[str, Any]]:
    """Start every worker once; what each would run with, by way.

    Raises:
        SystemExit: some cannot run; a line for each, with the reason.
    """
    found: dict[str, dict[str, Any]] = {}
    seen: dict[tuple[str, ...], dict[str, Any]] = {}
    broken = []
    for name, way in ways.items():
        command = tuple(way.command("--check", "--device", device))
        try:
            if command not in seen:
                seen[command] = process.last_json(command)
            found[name] = seen[command]
        except (RuntimeError, OSError) as error:  # an OSError: there is no such Python
            broken.append(f"{name} cannot run: {error} (by {way.python})")
    if broken:
        raise SystemExit("\n".join([*broken, "Nothing was timed."]))
    return found


def kept_runs(path: Path, args: argparse.Namespace, **inputs: Any) -> Results:
    """Finished runs of the same code, machine, versions and inputs; none with `--fresh`."""
    known = machine(getattr(args, "threads", None))
    return Results(path, environment(torch.device(args.device), machine=known, **inputs), args.fresh)


def take_turns(
    ways: Mapping[str, Callable[[], dict[str, Any]]], kept: Results, runs: int = 1, section: str = "runs"
) -> dict[str, list[dict[str, Any]]]:
    """Every way's runs: one of each, then the next of each; those that were finished before are not repeated.

    Raises:
        SystemExit: one failed.
    """
    for turn in range(runs):
        for name, run in ways.items():
            key = f"{name}, {turn + 1}"
            if key not in kept.of(section):
                try:
                    kept.add(section, key, run())
                except RuntimeError as error:
                    raise SystemExit(f"{name}: {error}\nWhat was finished before is kept in {kept.path}") from None
    return {name: [kept.of(section)[f"{name}, {turn + 1}"] for turn in range(runs)] for name in ways}
