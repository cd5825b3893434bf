"""featcal_fast beside the reference implementations: same folders, one run; seconds, peak memory, differences.

    python -m bench.compare                                  # a small CLIP and a small Llama, a few minutes
    git clone https://github.com/egangu/featcal
    python -m venv old && old/bin/pip install torch 'transformers==5.5.0' datasets pillow
    python -m bench.compare clip-b32 --samples 64 --official featcal --official-python old/bin/python

What runs, each time in a process of its own, one after the other, `--runs` times over, on the GPU if there is one:

- `featcal_fast`, from folders to a folder, as the command does it, without Python's imports; the same with
  `forward_dtype: bfloat16`; and, on a GPU, with its sums in plain torch instead of Triton;
- `official`, the demo's own `calibrate` from a checkout (CLIP only), without reading models and writing the result;
- `fusioneval`, a baseline in that benchmark's schedule (Llama only; `bench/workers/fusioneval.py`);
- `reference`, our plain torch in float32 (with `--reference`; for T5 always).

Differences are `||W - W'|| / ||W' - W_merged||`, the largest of any parameter of a kind; W' comes from `official`, or
else from `featcal_fast`; with `--judge reference` from our plain torch in float64, with `--judge official` from the
demo's code in float64. Both take long for deep models. `--count` adds a run of each that counts FLOPs (on a CPU).
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
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

import featcal_fast as ff
from bench.machine import machine
from bench.workloads import T5, TEXT, VISION, WORKLOADS, write

ROOT = Path(__file__).resolve().parent.parent
OURS, LOWER, PLAIN = "featcal_fast", "featcal_fast bfloat16", "featcal_fast without Triton"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=["clip-small", "llama-small"], metavar="WORKLOAD")
    parser.add_argument("--official", type=Path, help="checkout of github egangu/featcal")
    parser.add_argument("--official-python", default=sys.executable, help="a Python with transformers 5.5 or older")
    parser.add_argument("--reference", action="store_true", help="also run the plain reference in float32")
    parser.add_argument("--judge", choices=["reference", "official"], help="run it in float64; measure errors by it")
    parser.add_argument("--count", action="store_true", help="also count FLOPs")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for what in ("samples", "tasks"):
        parser.add_argument(f"--{what}", type=int, help="in place of the workload's own number")
    parser.add_argument("--toy", action="store_true", help="tiny models; nothing is kept in bench/results")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "featcal-bench")
    args = parser.parse_args(arguments)
    for name in args.workloads:
        if name not in WORKLOADS:
            parser.error(f"unknown workload {name!r}; expected one of {', '.join(WORKLOADS)}")
    if args.judge == "official" and args.official is None:
        parser.error("--judge official needs --official CHECKOUT")
    console = Console()
    for name in args.workloads:
        label = f"{name}-{args.samples}" if args.samples else name
        label += f"-{args.tasks}-tasks" if args.tasks else ""
        label += "-gpu" if args.device.startswith("cuda") else ""
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
    official = args.official is not None and work.model == VISION
    workers = {OURS: ["ours"]}
    if work.dtype == "float32":
        workers[LOWER] = ["ours", "--settings", '{"forward_dtype": "bfloat16"}']
    if args.device.startswith("cuda"):
        workers[PLAIN] = ["ours", "--plain-ops"]
    if work.model == TEXT:
        workers["fusioneval"] = ["fusioneval"]
    elif official:
        workers["official"] = ["official", "--checkout", str(args.official)]
    if args.reference or work.model == T5:
        workers["reference"] = ["reference"]
    judge = "official" if official else OURS
    judges = {}
    if args.judge == "reference":
        judges = {"float64 reference": ["reference", "--dtype", "float64"]}
    elif args.judge == "official" and official:
        judges = {"official in float64": ["official", "--checkout", str(args.official), "--dtype", "float64"]}

    def run(way: str, *options: str) -> dict[str, float]:
        worker, *own = (workers | judges)[way]
        shutil.rmtree(weights[way], ignore_errors=True)
        python = args.official_python if worker == "official" else sys.executable
        found = _run(python, worker, folder, weights[way], *own, "--device", args.device, *options)
        what = " ".join([way, *options])
        print(f"{label}, {what}: {found['seconds']:.1f} s, {found['peak_gib']:.2f} GiB", flush=True)
        return found

    weights = {way: out / way.replace(" ", "-") for way in workers | judges}
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in workers}
    for _ in range(args.runs):
        for way in workers:
            runs[way].append(run(way))
    tflop = {way: round(run(way, "--count")["tflop"], 3) for way in workers} if args.count else {}
    for judge in judges:
        run(judge)
    return {
        "machine": machine(),
        "device": args.device,
        "runs": runs,
        "median": {way: _over(statistics.median, found) for way, found in runs.items()},
        "spread": {way: _over(lambda values: max(values) - min(values), found) for way, found in runs.items()},
        "tflop": tflop,
        "judge": judge,
        "difference": {
            way: difference(weights[way], weights[judge], folder / "merged") for way in workers if way != judge
        },
    }


def table(name: str, report: dict[str, Any]) -> Table:
    title = f"{name}: differences from {report['judge']}, relative to the update"
    found = Table(title=title, box=None, padding=(0, 2, 0, 0), header_style="underline")
    ours = report["median"][OURS]["seconds"]
    columns: dict[str, list[str]] = {"": list(report["median"])}
    columns["seconds"] = [f"{median['seconds']:.1f}" for median in report["median"].values()]
    columns["x ours"] = [f"{median['seconds'] / ours:.2f}" for median in report["median"].values()]
    columns["TFLOP"] = [f"{report['tflop'][way]:.2f}" if way in report["tflop"] else "" for way in report["median"]]
    for label, key in (("GiB", "peak_gib"), ("on GPU", "peak_device_gib")):
        columns[label] = [f"{median[key]:.2f}" if key in median else "" for median in report["median"].values()]
    for label, kind in (("weights", "weight"), ("biases", "bias"), ("norms", "layernorm")):
        errors = [report["difference"].get(way, {}).get(kind) for way in report["median"]]
        columns[label] = [f"{error:.1e}" if error else "" for error in errors]
    shown = {label: cells for label, cells in columns.items() if any(cells)}
    for label in shown:
        found.add_column(label, justify="right" if label else "left", no_wrap=True)
    for row in zip(*shown.values(), strict=True):
        found.add_row(*row)
    return found


def difference(found: Path, judge: Path, merged: Path) -> dict[str, float]:
    """`||W - W_judge||_F / ||W_judge - W_merged||_F`, the largest of any parameter of each kind.

    Parameters that the judge moves by less than 1e-5 of their size are within rounding and left out.
    """
    worst = {"weight": 0.0, "bias": 0.0, "layernorm": 0.0}
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(_file(path), framework="pt")) for path in (merged, found, judge)]
        stored = [{name.removeprefix("vision_model."): name for name in file.keys()} for file in files]  # noqa: SIM118
        for name in stored[0]:  # a tensor at a time: models may be large
            start, weight, exact = (file.get_tensor(own[name]) for file, own in zip(files, stored, strict=True))
            if not start.is_floating_point():
                continue
            start, weight, exact = start.double(), weight.double(), exact.double()
            update = (exact - start).norm()
            if update > 1e-5 * start.norm():
                kind = "layernorm" if "norm" in name else name.rpartition(".")[2]
                worst[kind] = max(worst[kind], float((weight - exact).norm() / update))
    return worst


def _file(path: Path) -> Path:
    return path / "model.safetensors" if path.is_dir() else path


def _over(summary: Any, runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: summary([run[key] for run in runs]) for key in runs[0]}


def _run(python: str, worker: str, folder: Path, out: Path, *options: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [python, "-m", f"bench.workers.{worker}", str(folder), str(out), *options]
    result = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
