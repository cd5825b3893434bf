"""The official demo and featcal_fast on the same folders: seconds, peak memory, and how far their weights differ.

    git clone https://github.com/egangu/featcal
    python -m venv old && old/bin/pip install torch 'transformers==5.5.0' datasets pillow
    python -m bench.compare --official featcal --official-python old/bin/python --workload clip-b32-64

Each run is a process of its own; runs are interleaved; medians are reported. Ours includes reading the models from
disk and writing the result, which the official figure leaves out. `--judge` adds how far either is from the plain
reference in float64, which takes long at full depth: use `clip-b32-shallow`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from bench.workloads import WORKLOADS, write

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", required=True, type=Path, help="checkout of github egangu/featcal")
    parser.add_argument("--official-python", default=sys.executable, help="a Python with transformers 5.5 or older")
    parser.add_argument("--workload", default="clip-small", choices=WORKLOADS)
    parser.add_argument("--batch-size", type=int, default=16, help="images a forward pass, for both")
    parser.add_argument("--judge", action="store_true", help="also compare both with the float64 reference")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "featcal-bench")
    args = parser.parse_args()

    folder = args.folder / args.workload
    write(WORKLOADS[args.workload], folder)
    results: dict[str, list[dict[str, float]]] = {"official": [], "featcal_fast": []}
    out = args.folder / f"{args.workload}-out"
    out.mkdir(exist_ok=True)
    for _ in range(args.runs):
        shutil.rmtree(out / "ours", ignore_errors=True)
        worker = ["-m", "bench.workers.ours", str(folder), str(out / "ours"), str(args.batch_size)]
        results["featcal_fast"].append(_run(sys.executable, worker))
        worker = [str(args.official), str(folder), str(out / "official.safetensors"), str(args.batch_size)]
        results["official"].append(_run(args.official_python, ["-m", "bench.workers.official", *worker]))

    summary = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in results.items()
    }
    report = {
        "workload": args.workload,
        "batch_size": args.batch_size,
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "torch": torch.__version__},
        "runs": results,
        "median": summary,
        "speedup": summary["official"]["seconds"] / summary["featcal_fast"]["seconds"],
        "memory_share": summary["featcal_fast"]["peak_gib"] / summary["official"]["peak_gib"],
        "difference": difference(out / "ours/model.safetensors", out / "official.safetensors", folder),
    }
    if args.judge:
        _run(sys.executable, ["-m", "bench.workers.judge", str(folder), str(out / "judge.safetensors")])
        report["error"] = {
            "official": difference(out / "official.safetensors", out / "judge.safetensors", folder),
            "featcal_fast": difference(out / "ours/model.safetensors", out / "judge.safetensors", folder),
        }
    path = ROOT / "bench" / "results" / f"compare-{args.workload}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({key: value for key, value in report.items() if key != "runs"}, indent=2))
    print(f"Wrote {path}")


def difference(found: Path, judge: Path, folder: Path) -> dict[str, float]:
    """`||W - W_judge||_F / ||W_judge - W_merged||_F`, the largest of any parameter of each kind.

    Parameters that the judge moves by less than 1e-5 of their size are within rounding and left out.
    """
    merged, weights, exact = (_weights(path) for path in (folder / "merged" / "model.safetensors", found, judge))
    worst = {"weight": 0.0, "bias": 0.0, "layernorm": 0.0}
    for name, weight in merged.items():
        update = (exact[name] - weight).norm()
        if update > 1e-5 * weight.norm():
            kind = "layernorm" if "norm" in name else name.rpartition(".")[2]
            worst[kind] = max(worst[kind], float((weights[name] - exact[name]).norm() / update))
    return worst


def _weights(path: Path) -> dict[str, torch.Tensor]:
    weights = load_file(path)
    return {name.removeprefix("vision_model."): w.double() for name, w in weights.items() if w.is_floating_point()}


def _run(python: str, arguments: list[str]) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    result = subprocess.run(
        [python, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(result.stdout.splitlines()[-1])


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
