"""featcal_fast beside the reference implementations: same folders, one run; seconds, peak memory, differences.

    python -m bench.compare                                  # a small CLIP and a small Llama, a few minutes
    git clone https://github.com/egangu/featcal
    python -m venv old && old/bin/pip install torch 'transformers==5.5.0' datasets pillow
    python -m bench.compare clip-b32 --samples 64 --official featcal --official-python old/bin/python

What runs, each time in a process of its own, one after the other, `--runs` times over:

- `featcal_fast`, from folders to a folder, as the command does it, without Python's imports; and the same with
  `forward_dtype: bfloat16`;
- `official`, the demo's own `calibrate` from a checkout (CLIP only), without reading models and writing the result;
- `fusioneval`, a baseline in that benchmark's schedule (Llama only; `bench/workers/fusioneval.py`);
- `reference`, our plain torch in float32 (with `--reference`; for T5 always).

`--judge` adds the reference in float64 and how far everything is from it, `||W - W64|| / ||W64 - W_merged||`, the
largest of any parameter of a kind. It takes long for deep models. Without it the differences are from `official`, or
else from `featcal_fast`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

import featcal_fast as ff
from bench.machine import machine
from bench.workloads import T5, TEXT, VISION, WORKLOADS, write

ROOT = Path(__file__).resolve().parent.parent
OURS, LOWER = "featcal_fast", "featcal_fast bfloat16"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=["clip-small", "llama-small"], metavar="WORKLOAD")
    parser.add_argument("--official", type=Path, help="checkout of github egangu/featcal")
    parser.add_argument("--official-python", default=sys.executable, help="a Python with transformers 5.5 or older")
    parser.add_argument("--reference", action="store_true", help="also run the plain reference in float32")
    parser.add_argument("--judge", action="store_true", help="also run it in float64, and measure errors by it")
    parser.add_argument("--runs", type=int, default=1)
    for what in ("samples", "tasks"):
        parser.add_argument(f"--{what}", type=int, help="in place of the workload's own number")
    parser.add_argument("--toy", action="store_true", help="tiny models; nothing is kept in bench/results")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "featcal-bench")
    args = parser.parse_args(arguments)
    for name in args.workloads:
        if name not in WORKLOADS:
            parser.error(f"unknown workload {name!r}; expected one of {', '.join(WORKLOADS)}")
    console = Console()
    for name in args.workloads:
        label = f"{name}-{args.samples}" if args.samples else name
        label += f"-{args.tasks}-tasks" if args.tasks else ""
        report = compare(name, label, args)
        console.print(table(label, report))
        path = (args.folder if args.toy else ROOT / "bench" / "results") / f"compare-{label}.json"
        path.write_text(json.dumps(report, indent=2) + "\n")
        console.print(f"Wrote {path}", soft_wrap=True)


def compare(name: str, label: str, args: argparse.Namespace) -> dict[str, Any]:
    """All ways through one workload."""
    work = WORKLOADS[name].small if args.toy else WORKLOADS[name]
    work = replace(work, samples=args.samples or work.samples, tasks=args.tasks or work.tasks)
    folder = args.folder / (f"toy-{label}" if args.toy else label)
    recipe = write(work, folder)
    if not (folder / "merged").exists():
        ff.merge(recipe, out=folder / "merged")
    out = args.folder / f"{folder.name}-out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    workers = {OURS: ["ours", "{}"]}
    if work.dtype == "float32":
        workers[LOWER] = ["ours", '{"forward_dtype": "bfloat16"}']
    if work.model == TEXT:
        workers["fusioneval"] = ["fusioneval"]
    elif args.official and work.model == VISION:
        workers["official"] = ["official", str(args.official)]
    if args.reference or work.model == T5:
        workers["reference"] = ["reference", "float32"]

    runs: dict[str, list[dict[str, float]]] = {way: [] for way in workers}
    weights = {way: out / way.replace(" ", "-") for way in workers}
    for _ in range(args.runs):
        for way, (worker, *options) in workers.items():
            shutil.rmtree(weights[way], ignore_errors=True)
            python = args.official_python if way == "official" else sys.executable
            runs[way].append(_run(python, worker, folder, weights[way], *options))
    judge = "official" if "official" in workers else OURS
    if args.judge:
        judge, weights["judge"] = "judge", out / "judge"
        _run(sys.executable, "reference", folder, weights["judge"], "float64")
    return {
        "machine": machine(),
        "runs": runs,
        "median": {way: _over(statistics.median, found) for way, found in runs.items()},
        "spread": {way: _over(lambda values: max(values) - min(values), found) for way, found in runs.items()},
        "judge": judge,
        "difference": {
            way: difference(weights[way], weights[judge], folder / "merged") for way in workers if way != judge
        },
    }


def table(name: str, report: dict[str, Any]) -> Table:
    judge = "the float64 reference" if report["judge"] == "judge" else report["judge"]
    found = Table(title=f"{name}: differences from {judge}, relative to the update")
    found.add_column("")
    for column in ("seconds", "times ours", "peak GiB", "weights", "biases", "LayerNorm"):
        found.add_column(column, justify="right")
    ours = report["median"][OURS]["seconds"]
    for way, median in report["median"].items():
        seconds, errors = median["seconds"], report["difference"].get(way, {})
        cells = [f"{errors[kind]:.1e}" if errors.get(kind) else "" for kind in ("weight", "bias", "layernorm")]
        found.add_row(way, f"{seconds:.1f}", f"{seconds / ours:.2f}", f"{median['peak_gib']:.2f}", *cells)
    return found


def difference(found: Path, judge: Path, merged: Path) -> dict[str, float]:
    """`||W - W_judge||_F / ||W_judge - W_merged||_F`, the largest of any parameter of each kind.

    Parameters that the judge moves by less than 1e-5 of their size are within rounding and left out.
    """
    start, weights, exact = (_weights(path) for path in (merged, found, judge))
    worst = {"weight": 0.0, "bias": 0.0, "layernorm": 0.0}
    for name, weight in start.items():
        update = (exact[name] - weight).norm()
        if update > 1e-5 * weight.norm():
            kind = "layernorm" if "norm" in name else name.rpartition(".")[2]
            worst[kind] = max(worst[kind], float((weights[name] - exact[name]).norm() / update))
    return worst


def _weights(path: Path) -> dict[str, torch.Tensor]:
    weights = load_file(path / "model.safetensors" if path.is_dir() else path)
    return {name.removeprefix("vision_model."): w.double() for name, w in weights.items() if w.is_floating_point()}


def _over(summary: Any, runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: summary([run[key] for run in runs]) for key in runs[0]}


def _run(python: str, worker: str, folder: Path, out: Path, *options: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [python, "-m", f"bench.workers.{worker}", str(folder), str(out), *options]
    result = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
