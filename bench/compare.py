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

All are started once before any is timed: what cannot run says so at once. A finished run is kept under `--folder` and
not repeated for the same code, versions and inputs, so that a comparison that was ended goes on.

Differences are `||W - W'|| / ||W' - W_merged||`, the largest of any parameter of a kind; W' comes from `official`, or
else from `featcal_fast`; with `--judge reference` from our plain torch in float64, with `--judge official` from the
demo's code in float64. Both take long for deep models. `--count` adds a run of each that counts FLOPs (on a CPU).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

import featcal_fast as ff
from bench.harness import process
from bench.harness.results import machine, write_whole
from bench.harness.runs import Way, check, command_line, kept_runs, official, results_folder, take_turns
from bench.harness.tables import table
from bench.workloads import T5, TEXT, VISION, Workload, chosen, known, write

OURS, LOWER, PLAIN = "featcal_fast", "featcal_fast bfloat16", "featcal_fast without Triton"
MEASURES = ("seconds", "peak_gib", "peak_device_gib", "tflop")
OPTIONS = ("--device", "--runs", "--samples", "--tasks", "--layers", "--toy", "--folder", "--fresh")


@dataclass(frozen=True)
class Comparison:
    """A workload, the ways through it, and who judges their weights: one of these, or one of `judges`."""

    label: str
    work: Workload
    ways: dict[str, Way]
    judges: dict[str, Way]

    @classmethod
    def of(cls, name: str, args: argparse.Namespace) -> Comparison:
        (label, work), on_gpu = chosen(name, args), args.device.startswith("cuda")
        label = label.replace("-samples", "") + "-gpu" * on_gpu
        ways = {OURS: Way("ours", ("--merged",))}
        if work.dtype == "float32":
            ways[LOWER] = Way("ours", ("--merged", "--settings", '{"forward_dtype": "bfloat16"}'))
        if on_gpu:
            ways[PLAIN] = Way("ours", ("--merged", "--plain-ops"))
        if work.model == TEXT:
            ways["fusioneval"] = Way("fusioneval")
        if work.model == VISION and args.official:
            ways["official"] = official(args)
        if args.reference or work.model == T5:
            ways["reference"] = Way("reference")
        judges = {}
        if args.judge == "reference":
            judges["float64 reference"] = Way("reference", ("--dtype", "float64"))
        elif args.judge and "official" in ways:
            judges["official in float64"] = official(args, "--dtype", "float64")
        return cls(label, work, ways, judges)

    @property
    def judge(self) -> str:
        return next(iter(self.judges), "official" if "official" in self.ways else OURS)


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__, *OPTIONS, "--official", "--official-python")
    parser.add_argument("workloads", nargs="*", type=known, default=["clip-small", "llama-small"], metavar="WORKLOAD")
    parser.add_argument("--reference", action="store_true", help="also run the plain reference in float32")
    parser.add_argument("--judge", choices=["reference", "official"], help="run it in float64; measure errors by it")
    parser.add_argument("--count", action="store_true", help="also count FLOPs")
    args = parser.parse_args(arguments)
    if args.judge == "official" and args.official is None:
        parser.error("--judge official needs --official CHECKOUT")
    wanted = [Comparison.of(name, args) for name in args.workloads]
    versions = check({way: how for each in wanted for way, how in {**each.ways, **each.judges}.items()}, args.device)
    for each in wanted:
        report = compare(each, args, versions)
        path = results_folder(args) / f"compare-{each.label}.json"
        write_whole(path, report)
        print(f"{show(each.label, report)}\nWrote {path}", flush=True)


def compare(job: Comparison, args: argparse.Namespace, versions: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All ways through one workload."""
    folder = args.folder / job.label
    recipe = write(job.work, folder)
    if not (folder / "merged").exists():
        ff.merge(recipe, out=folder / "merged")
    ways = job.ways | job.judges
    out = args.folder / f"{job.label}-out"
    versions = {way: versions[way] for way in ways}
    kept = kept_runs(out / "runs.json", args, work=asdict(job.work), versions=versions)
    weights = {way: out / way.replace(" ", "-") for way in ways}

    def run(way: str, *options: str) -> dict[str, float]:
        shutil.rmtree(weights[way], ignore_errors=True)
        weights[way].unlink(missing_ok=True)
        found = process.last_json(ways[way].command(folder, weights[way], "--device", args.device, *options))
        what = " ".join([way, *options])
        print(f"{job.label}, {what}: {found['seconds']:.1f} s, {found['peak_gib']:.2f} GiB", flush=True)
        return {key: found[key] for key in MEASURES if key in found}

    runs = take_turns({way: partial(run, way) for way in job.ways}, kept, args.runs)
    count = {way: partial(run, way, "--count") for way in job.ways if args.count}
    tflop = {way: round(found["tflop"], 3) for way, (found,) in take_turns(count, kept, section="count").items()}
    take_turns({way: partial(run, way) for way in job.judges}, kept, section="judge")
    return {
        "machine": machine(),
        "device": args.device,
        "versions": versions,
        "runs": runs,
        "median": {
            way: {key: statistics.median(run[key] for run in found) for key in found[0]} for way, found in runs.items()
        },
        "tflop": tflop,
        "judge": job.judge,
        "difference": {
            way: difference(weights[way], weights[job.judge], folder / "merged") for way in job.ways if way != job.judge
        },
    }


def show(name: str, report: dict[str, Any]) -> str:
    ours = report["median"][OURS]["seconds"]
    rows = [
        {"": way, "seconds": round(median["seconds"], 1), "x ours": median["seconds"] / ours}
        | ({"TFLOP": report["tflop"][way]} if way in report["tflop"] else {})
        | {title: median[key] for title, key in (("GiB", "peak_gib"), ("on GPU", "peak_device_gib")) if key in median}
        | {kind: f"{error:.1e}" for kind, error in report["difference"].get(way, {}).items() if error}
        for way, median in report["median"].items()
    ]
    return table(f"{name}: differences from {report['judge']}, relative to the update", rows)


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


if __name__ == "__main__":
    main()
