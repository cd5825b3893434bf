"""What a job costs as it grows: seconds and peak memory against samples, tasks, layers and width.

    python -m bench.cost                    # a few minutes; writes bench/results/cost-cpu.json and .png
    python -m bench.cost --device cuda

One small CLIP is changed in one way at a time; every job is a process of its own (`bench.jobs`), with hidden states on
disk, and the cheapest of `--runs`. An exponent is the slope between the two largest sizes on logarithmic axes: of the
seconds inside the loop over layers, and of the memory above that of the smallest job. Finished runs are kept under
`--folder`: what was ended goes on.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.harness.plots import plain, plot
from bench.harness.results import machine, write_whole
from bench.harness.runs import check, command_line, kept_runs, results_folder, take_turns
from bench.harness.tables import table
from bench.jobs import OURS, run_job
from bench.workloads import VISION, Workload, write

SIDE = {"image_size": 112, "patch_size": 16}  # 50 tokens
START = Workload(VISION, {}, tasks=2, samples=64)
WIDTH, LAYERS = 256, 4
AXES = {
    "samples": [64, 128, 256, 512],
    "tasks": [2, 4, 8, 16],
    "layers": [2, 4, 8, 16],
    "width": [128, 256, 512, 1024],
}


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__, "--device", "--threads", "--runs", "--toy", "--folder", "--fresh")
    args = parser.parse_args(arguments)
    check({"featcal_fast": OURS}, args.device)
    out = results_folder(args) / f"cost-{torch.device(args.device).type}.json"

    def run(axis: str, size: int) -> dict[str, Any]:
        folder = args.folder / f"cost-{axis}-{size}"
        write(job(axis, size), folder)
        found = run_job(folder, args.device, "--scratch", str(args.folder), threads=args.threads)
        print(f"{axis} {size}: {found['seconds_in_layers']} s, {found['peak_host_gib']} GiB", flush=True)
        return found

    axes = {axis: sizes[: 2 if args.toy else None] for axis, sizes in AXES.items()}
    jobs = {f"{axis} {size}": partial(run, axis, size) for axis, sizes in axes.items() for size in sizes}
    runs = take_turns(jobs, kept_runs(args.folder / "cost-runs.json", args), args.runs)
    points = {
        axis: [
            {"size": size, **min(runs[f"{axis} {size}"], key=lambda run: run["seconds_in_layers"])} for size in sizes
        ]
        for axis, sizes in axes.items()
    }
    results = {"machine": machine(args.threads), "points": points, "exponents": exponents(points)}
    write_whole(out, results)
    draw(results, out.with_suffix(".png"))
    print(f"{show(results)}\nWrote {out} and {out.with_suffix('.png')}")


def job(axis: str, size: int) -> Workload:
    """The small CLIP with one thing changed."""
    width, layers = (size if axis == key else start for key, start in (("width", WIDTH), ("layers", LAYERS)))
    config = {**SIDE, "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    work = replace(START, config={**config, "num_attention_heads": width // 64})
    return replace(work, **{axis: size}) if axis in ("samples", "tasks") else work


def exponents(points: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Growth between the two largest sizes: of time, and of memory above the smallest job's of all."""
    floor = min(point["peak_host_gib"] for axis in points.values() for point in axis)
    found = {}
    for axis, (*_, a, b) in points.items():
        step = math.log(b["size"] / a["size"])
        grown = [point["peak_host_gib"] - floor for point in (a, b)]
        memory = math.log(grown[1] / grown[0]) / step if min(grown) > 0.02 else 0.0  # below 20 MiB it is noise
        found[axis] = {"seconds": math.log(b["seconds_in_layers"] / a["seconds_in_layers"]) / step, "memory": memory}
    return found


def show(results: dict[str, Any]) -> str:
    rows = [
        {
            "": axis,
            "sizes": ", ".join(str(point["size"]) for point in points),
            "seconds in layers": ", ".join(f"{point['seconds_in_layers']:.1f}" for point in points),
            "peak memory, MiB": ", ".join(f"{point['peak_host_gib'] * 1024:.0f}" for point in points),
            "exponent of time": f"{results['exponents'][axis]['seconds']:.2f}",
            "of memory": f"{results['exponents'][axis]['memory']:.2f}",
        }
        for axis, points in results["points"].items()
    ]
    return table("Cost as one thing doubles", rows)


def draw(results: dict[str, Any], path: Path) -> None:
    def lines(axes: Any, kind: str, name: str, key: str, factor: float) -> None:
        for axis, points in results["points"].items():
            label = f"{axis} (from {points[0]['size']}): exponent {results['exponents'][axis][kind]:.2f}"
            doublings = [point["size"] / points[0]["size"] for point in points]
            axes.plot(doublings, [factor * point[key] for point in points], marker="o", label=label)
        axes.set(xscale="log", xlabel="times the smallest size", ylabel=name)
        plain(axes.xaxis, [1, 2, 4, 8])

    def seconds(axes: Any) -> None:
        lines(axes, "seconds", "seconds in layers", "seconds_in_layers", 1)
        axes.set_yscale("log")
        plain(axes.yaxis)

    def memory(axes: Any) -> None:
        lines(axes, "memory", "peak memory, MiB", "peak_host_gib", 1024)
        axes.set_ylim(bottom=0)

    plot(path, (10, 4), seconds, memory)


if __name__ == "__main__":
    main()
