"""Merges on the fly, from folders to a folder: seconds, peak memory, and what is read beside the size of the inputs.

    python -m bench.merging                     # every method: a base and two experts of Llama 3.2 1B's shape, bfloat16
    python -m bench.merging ties slerp --layers 4
    python -m bench.merging --toy               # tiny models, to see that everything works

Models of random weights are written under `--folder` once: 7 GiB. Methods that work on whole matrices, for which a CPU
takes long, have one of the sixteen layers (`MERGES`); its matrices are the largest. Each merge is a process of
its own. What is read is the system's count (`rchar`). Results go to `bench/results/merging-<device>.json`, merge by
merge; one that was run before is replaced.
"""

from __future__ import annotations

import json
import shutil
from argparse import ArgumentTypeError, Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.harness import process
from bench.harness.results import machine, write_whole
from bench.harness.runs import Way, check, command_line, kept_runs, results_folder, take_turns
from bench.workloads import chosen, write

WAY = Way("merge")
WORKLOAD, EXPERTS, FEW_LAYERS, FEW_STEPS = "llama-1b", 2, 1, 2
MERGES: dict[str, tuple[dict[str, Any], int | None]] = {  # options, and layers where they are not all
    "average": ({}, None),
    "task_arithmetic": ({}, None),
    "ties": ({}, None),
    "dare_linear": ({}, None),
    "dare_ties": ({}, None),
    "slerp": ({}, None),
    "model_stock": ({}, None),
    "iso_c": ({}, FEW_LAYERS),
    "tsv": ({}, FEW_LAYERS),
    "wudi": ({"steps": FEW_STEPS}, FEW_LAYERS),
}


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__, "--device", "--threads", "--layers", "--toy", "--folder", "--fresh")
    parser.add_argument("methods", nargs="*", type=known, default=list(MERGES), metavar="METHOD")
    args = parser.parse_args(arguments)
    check({"featcal_fast": WAY}, args.device)
    path = results_folder(args) / f"merging-{torch.device(args.device).type}.json"
    for method in args.methods:
        options, layers = MERGES[method]
        folder, layers = written(args, args.layers or layers)
        kept = kept_runs(args.folder / f"{folder.name}-merges.json", args)
        run = partial(run_merge, folder, args.device, {"method": method, **options}, threads=args.threads)
        found = take_turns({method: run}, kept)[method][0]
        results = json.loads(path.read_text()) if path.exists() else {}
        row = {**options, "experts": EXPERTS, "layers": layers, **found, "machine": machine(args.threads)}
        results[method] = row
        write_whole(path, {name: results[name] for name in MERGES if name in results})
        print(json.dumps({"method": method, **row}), flush=True)
    print(f"Wrote {path}")


def known(method: str) -> str:
    """A method's name, for a command line."""
    if method not in MERGES:
        raise ArgumentTypeError(f"unknown method {method!r}; expected one of {', '.join(MERGES)}")
    return method


def written(args: Namespace, layers: int | None) -> tuple[Path, int]:
    """The folder with a base and experts, and how many layers they have."""
    given = Namespace(**{**vars(args), "layers": layers, "tasks": EXPERTS, "samples": 1})
    label, work = chosen(WORKLOAD, given)
    write(work, args.folder / label)
    return args.folder / label, work.config["num_hidden_layers"]


def run_merge(folder: Path, device: str, merge: dict[str, Any], *, threads: int) -> dict[str, Any]:
    """A merge in a process of its own; what it took. Nothing is left of its result.

    Raises:
        RuntimeError: it failed.
    """
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = WAY.command(folder, out, "--device", device, "--merge", json.dumps(merge))
    try:
        found = process.last_json(command, OMP_NUM_THREADS=str(threads))
        written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    finally:
        shutil.rmtree(out, ignore_errors=True)
    models = [path for path in folder.glob("*/*.safetensors") if path.parent != out]
    return {
        "gib_of_inputs": round(sum(path.stat().st_size for path in models) / 2**30, 4),
        "gib_written": round(written / 2**30, 4),
        **{key: round(value, 4) for key, value in found.items()},
    }


if __name__ == "__main__":
    main()
