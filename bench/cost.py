"""What a job costs as it grows: seconds and peak memory against samples, tasks, layers and width.

    python -m bench.cost                    # a few minutes; writes bench/results/cost-cpu.json and .png
    python -m bench.cost --device cuda

One small CLIP is changed in one way at a time; every job is a process of its own (`bench.jobs`), with hidden states on
disk, and the cheapest of `--runs`. An exponent is the slope between the two largest sizes on logarithmic axes: of the
seconds inside the loop over layers, and of the memory above that of the smallest job.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.jobs import run_job
from bench.machine import machine
from bench.workloads import VISION, Workload, write

ROOT = Path(__file__).resolve().parent.parent
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--sizes", type=int, default=4, help="of each axis, the smallest first")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "featcal-bench")
    parser.add_argument("--out", type=Path, help="by default bench/results/cost-<device>.json")
    args = parser.parse_args(arguments)
    out = args.out or ROOT / "bench" / "results" / f"cost-{args.device.partition(':')[0]}.json"
    points: dict[str, list[dict[str, Any]]] = {}
    for axis, sizes in AXES.items():
        points[axis] = []
        for size in sizes[: args.sizes]:
            folder = args.folder / f"cost-{axis}-{size}"
            write(job(axis, size), folder)
            runs = [run_job(folder, args.device, args.threads, str(args.folder)) for _ in range(args.runs)]
            best = min(runs, key=lambda run: run["seconds_in_layers"])
            points[axis].append({"size": size, **best})
            print(json.dumps({"axis": axis, **points[axis][-1]}), flush=True)
    results = {"machine": machine(args.threads), "points": points, "exponents": exponents(points)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")
    plot(results, out.with_suffix(".png"))
    Console().print(table(results))
    print(f"Wrote {out} and {out.with_suffix('.png')}")


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


def table(results: dict[str, Any]) -> Table:
    found = Table(title="Cost as one thing doubles")
    for column in ("", "sizes", "seconds in layers", "peak memory, MiB", "exponent of time", "of memory"):
        found.add_column(column, justify="left" if column in ("", "sizes") else "right")
    for axis, points in results["points"].items():
        fitted = results["exponents"][axis]
        found.add_row(
            axis,
            ", ".join(str(point["size"]) for point in points),
            ", ".join(f"{point['seconds_in_layers']:.1f}" for point in points),
            ", ".join(f"{point['peak_host_gib'] * 1024:.0f}" for point in points),
            f"{fitted['seconds']:.2f}",
            f"{fitted['memory']:.2f}",
        )
    return found


def plot(results: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    drawn = {
        "seconds in layers": lambda point: point["seconds_in_layers"],
        "peak memory, MiB": lambda point: 1024 * point["peak_host_gib"],
    }
    for place, (name, value) in zip(figure.subplots(1, 2), drawn.items(), strict=True):
        for axis, points in results["points"].items():
            doublings = [point["size"] / points[0]["size"] for point in points]
            kind = "seconds" if name.startswith("seconds") else "memory"
            label = f"{axis} (from {points[0]['size']}): exponent {results['exponents'][axis][kind]:.2f}"
            place.plot(doublings, [value(point) for point in points], marker="o", label=label)
        time = name.startswith("seconds")
        place.set(xscale="log", yscale="log" if time else "linear", xlabel="times the smallest size", ylabel=name)
        place.set_xticks([1, 2, 4, 8])
        for scale in (place.xaxis, place.yaxis) if time else (place.xaxis,):
            scale.set_major_formatter(ScalarFormatter())
            scale.set_minor_formatter(NullFormatter())
        if not time:
            place.set_ylim(bottom=0)
        place.grid(alpha=0.3)
        place.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
