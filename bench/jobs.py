"""Whole jobs from folders to a folder: seconds, and peak memory beside what `plan` says of it.

    python -m bench.jobs                            # the small ones
    python -m bench.jobs clip-b32 clip-l14 flan-t5-base llama-1b      # the paper's settings at their true shapes
    python -m bench.jobs clip-b32 --samples 128 --tasks 4 --layers 6 --scratch /tmp     # what the peak depends on
    python -m bench.jobs --toy clip-b32 llama-8b    # tiny models, to see that everything works

Random weights and data are written under `--folder` once. Each job is a process of its own that plans it from headers,
reads the folders, merges on the fly, calibrates and writes the result; the highest resident memory (VmHWM) and the
highest allocation on a GPU are what counts. Results go to `bench/results/jobs-<device>.json`, job by job; one that was
run before is replaced. Finished runs are kept under `--folder`, too, and not repeated for the same code and inputs.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from bench.harness import process
from bench.harness.results import machine, write_whole
from bench.harness.runs import Way, check, command_line, kept_runs, results_folder, take_turns
from bench.workloads import chosen, known, write

OURS = Way("ours")
OPTIONS = ("--device", "--threads", "--samples", "--tasks", "--layers", "--toy", "--folder", "--fresh")


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__, *OPTIONS)
    parser.add_argument("jobs", nargs="*", type=known, default=["clip-small", "llama-small"], metavar="JOB")
    parser.add_argument("--scratch", help="folder for hidden states; without it they wait in memory")
    args = parser.parse_args(arguments)
    check({"featcal_fast": OURS}, args.device)
    path = results_folder(args) / f"jobs-{torch.device(args.device).type}.json"
    scratch = ("--scratch", args.scratch) if args.scratch else ()
    for name in args.jobs:
        label, work = chosen(name, args)
        folder, key = args.folder / label, f"{label}-scratch" if scratch else label
        write(work, folder)
        kept = kept_runs(args.folder / f"{key}-job.json", args, work=asdict(work))
        run = partial(run_job, folder, args.device, "--plan", *scratch, threads=args.threads)
        found = take_turns({key: run}, kept)[key][0]
        described = {key: value for key, value in asdict(work).items() if key not in ("config", "toy")}
        results = json.loads(path.read_text()) if path.exists() else {}
        write_whole(path, {**results, key: {**described, **found, "machine": machine(args.threads)}})
        print(json.dumps({"job": key, **found}), flush=True)
    print(f"Wrote {path}")


def run_job(folder: Path, device: str, *options: str, threads: int, timeout: float = inf) -> dict[str, Any]:
    """Run a workload's recipe in a process of its own; what it took. Nothing is left of its result.

    Raises:
        RuntimeError: it failed, or the result's tensors are not the base model's in name, shape and dtype.
        TookTooLong: it was ended; says how far it was.
    """
    out, so_far = folder / "out", folder / "so-far.json"
    shutil.rmtree(out, ignore_errors=True)
    so_far.unlink(missing_ok=True)
    command = OURS.command(folder, out, "--device", device, "--so-far", so_far, *options)
    try:
        found = process.last_json(command, timeout, OMP_NUM_THREADS=str(threads))
    except process.TookTooLong as error:
        raise process.TookTooLong(f"{error}{how_far(so_far)}") from None
    if _headers(out) != _headers(folder / "base"):
        raise RuntimeError(f"{out}: tensors differ in name, shape or dtype from those of {folder / 'base'}")
    shutil.rmtree(out)
    return {
        "seconds": round(found.pop("seconds"), 2),
        "peak_host_gib": round(found.pop("peak_gib"), 3),
        "peak_device_gib": round(found.pop("peak_device_gib", 0), 3),
        **found,
    }


def how_far(path: Path) -> str:
    """What a worker's `--so-far` says."""
    if not path.exists():
        return " before its first layer"
    found = json.loads(path.read_text())
    phases = ", ".join(f"{phase} {seconds:.3g}" for phase, seconds in found["seconds_by_phase"].items())
    return f"; {found['layers']} of {found['of']} layers were done after {found['seconds']:.3g} s: {phases}"


def _headers(folder: Path) -> dict[str, tuple[list[int], str]]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                header = file.get_slice(name)
                found[name] = header.get_shape(), header.get_dtype()
    return found


if __name__ == "__main__":
    main()
