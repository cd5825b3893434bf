"""Accuracy after repair, over mergers, ways of repair, calibration images and seeds: the demo's transformers on digits.

    python -m bench.accuracy

For every seed: a base and four experts, trained as the demo trains them; five merges; each repaired by FeatCal with the
demo's settings, by Surgery and by ProbSurgery, which are all given the same unlabelled images (the n of a smaller
number are among those of a larger). AdaMerging, a merger, has all 256 in every row. Accuracies are of held-out images,
which no method sees; what was chosen here was chosen on the validation part. The table has the shape of the paper's.
Seconds are wall clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from copy import deepcopy
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

import featcal_fast as ff
from bench import surgery
from bench.machine import machine
from bench.mergers import MERGERS, AdaMerging, Pool, State, Ties, Wudi, class_scores
from featcal_fast import demo

PLAIN, FEATCAL, EXPERTS, STUDIED = "plain", "FeatCal", "experts", "task arithmetic"
REPAIRS = (PLAIN, *surgery.MODULES, FEATCAL)
SAMPLES, OTHERS_SAMPLES = [8, 16, 32, 64, 128, 256], [8, 64, 256]
RECIPE = yaml.safe_load(demo.RECIPE)
SETTINGS = ff.Settings.from_dict(RECIPE["settings"])  # one for all mergers: chosen by the demo on task arithmetic
Row = dict[str, Any]  # seed, merger, repair, samples (None for a plain merge), seconds, accuracy by task
Cells = dict[tuple[str, str, int | None], list[float]]  # mean accuracy, seed by seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, nargs="+", default=SAMPLES, help="calibration images a task, up to 256")
    parser.add_argument(
        "--others-samples", type=int, nargs="+", default=OTHERS_SAMPLES, help="those for mergers but task arithmetic"
    )
    parser.add_argument("--mergers", nargs="+", choices=MERGERS, default=list(MERGERS))
    parser.add_argument("--part", choices=("held-out", "validation"), default="held-out")
    parser.add_argument("--models", type=Path, help="keep trained models here, and reuse them")
    parser.add_argument("--out", type=Path, default=Path("bench/results/accuracy-digits.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    others = [n for n in args.samples if n in args.others_samples]
    samples = {merger: sorted(args.samples if merger == STUDIED else others) for merger in args.mergers}
    results = run(args.seeds, samples, args.part, args.models, demo.Config(), surgery.Training())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    show(results, Console())
    if STUDIED in args.mergers:
        plot(results, args.out.with_suffix(".png"))
        print(f"Wrote {args.out.with_suffix('.png')}")
    print(f"Wrote {args.out}")


def run(
    seeds: int,
    samples: dict[str, list[int]],
    part: str,
    models: Path | None,
    config: demo.Config,
    training: surgery.Training,
) -> dict[str, Any]:
    """Every accuracy, and the settings, versions and seconds that belong to them; `samples` is by merger."""
    digits, console, rows = demo.Digits(), Console(), []
    seconds = {"training": 0.0, "total": 0.0}
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(seeds):
            folder = (models or Path(temporary)) / f"seed-{seed}"
            seconds["training"] += sum(
                demo.make_models(folder, replace(config, seed=seed), digits, Console(quiet=True)).values()
            )
            started = time.perf_counter()
            rows += [{"seed": seed, **row} for row in run_seed(folder, seed, samples, digits, part, training)]
            seconds["total"] += time.perf_counter() - started
            console.print(f"seed {seed}: {time.perf_counter() - started:.0f} s, training excluded", highlight=False)
    seconds["total"] += seconds["training"]
    results = {
        "part": part,
        "samples": sorted({n for counts in samples.values() for n in counts}),
        "seeds": seeds,
        "settings": {
            "models": asdict(config),
            "featcal": asdict(SETTINGS),
            "surgery and probsurgery": asdict(training),
            "task arithmetic": RECIPE["merge"],
            "ties": asdict(Ties()),
            "wudi": asdict(Wudi()),
            "adamerging": asdict(AdaMerging()),
        },
        "machine": machine(),
        "seconds": seconds,
        "rows": rows,
    }
    return results | {"summary": summary(rows), "findings": findings(rows)}


def run_seed(
    folder: Path,
    seed: int,
    samples: dict[str, list[int]],
    digits: demo.Digits,
    part: str,
    training: surgery.Training,
) -> list[Row]:
    """The accuracies of one seed's models, which the demo left in `folder`."""
    base = load(folder / "base")
    experts = {task: load(folder / "experts" / task) for task in demo.VIEWS}
    heads = load_file(folder / "heads.safetensors")
    images = {task: load_file(folder / "data" / f"{task}.safetensors")["pixel_values"] for task in demo.VIEWS}
    test = {task: digits.see(task, part) for task in demo.VIEWS}
    unseen = {task: pixels for task, (pixels, _) in test.items()}
    targets = torch.stack([features(experts[task], {task: images[task]})[0] for task in demo.VIEWS])

    def row(merger: str, repair: str, count: int | None, took: float, found: Tensor) -> Row:
        right = {
            task: 100 * (class_scores(f, heads[task]).argmax(-1) == test[task][1]).double().mean().item()
            for task, f in zip(demo.VIEWS, found, strict=True)
        }
        return {"merger": merger, "repair": repair, "samples": count, "seconds": took, "accuracy": right}

    own = torch.cat([features(experts[task], {task: unseen[task]}) for task in demo.VIEWS])
    rows = [row(EXPERTS, PLAIN, None, 0.0, own)]
    pool = Pool(base, experts, {task: heads[task] for task in demo.VIEWS}, images, seed)
    for merger, counts in samples.items():
        started = time.perf_counter()
        merged = with_state(base, MERGERS[merger](pool))
        took = time.perf_counter() - started
        given, asked = features(merged, images), features(merged, unseen)
        rows.append(row(merger, PLAIN, None, took, asked))
        for count in counts:
            for kind in surgery.MODULES:
                started = time.perf_counter()
                module = surgery.train(kind, given[:, :count], targets[:, :count], seed, training)
                took = time.perf_counter() - started  # the features of the calibration images excluded
                with torch.no_grad():
                    rows.append(row(merger, kind, count, took, module(asked)))
            started = time.perf_counter()
            repaired = featcal(merged, pool, count)
            took = time.perf_counter() - started
            rows.append(row(merger, FEATCAL, count, took, features(repaired, unseen)))
    return rows


def featcal(merged: nn.Module, pool: Pool, count: int) -> nn.Module:
    """A calibrated copy of `merged`."""
    repaired = deepcopy(merged)
    batches = {
        task: [{"pixel_values": part} for part in images[:count].split(RECIPE["batch_size"])]
        for task, images in pool.images.items()
    }
    ff.calibrate_model(repaired, base=pool.base, experts=pool.experts, batches=batches, settings=SETTINGS)
    return repaired


def load(folder: Path) -> nn.Module:
    with demo._no_loading_bars():
        return transformers.CLIPVisionModel.from_pretrained(folder).eval()


def with_state(model: nn.Module, values: State) -> nn.Module:
    """A copy of `model` with these parameters."""
    copy = deepcopy(model)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            parameter.copy_(values[name])
    return copy


@torch.no_grad()
def features(model: nn.Module, images: dict[str, Tensor]) -> Tensor:
    """What the heads are given, `[tasks, images, width]`."""
    return torch.stack([model(pixel_values=pixels).pooler_output for pixels in images.values()])


# Results


def cells(rows: list[Row]) -> Cells:
    """Mean accuracy over the tasks, seed by seed."""
    found: Cells = {}
    for row in rows:
        key = row["merger"], row["repair"], row["samples"]
        found.setdefault(key, []).append(statistics.fmean(row["accuracy"].values()))
    return found


def summary(rows: list[Row]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, of the mean over tasks and of each task; mean seconds."""
    groups: dict[tuple[str, str, int | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["merger"], row["repair"], row["samples"]), []).append(row)
    lines = []
    for (merger, repair, samples), group in groups.items():
        accuracy = {task: spread([row["accuracy"][task] for row in group]) for task in group[0]["accuracy"]}
        accuracy["mean"] = spread([statistics.fmean(row["accuracy"].values()) for row in group])
        took = statistics.fmean(row["seconds"] for row in group)
        lines.append(
            {"merger": merger, "repair": repair, "samples": samples, "seconds": took, "mean_and_std": accuracy}
        )
    return lines


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def findings(rows: list[Row]) -> list[dict[str, Any]]:
    """Which of the paper's three statements hold here, with the figures."""
    found = cells(rows)
    mergers = list(dict.fromkeys(row["merger"] for row in rows if row["merger"] != EXPERTS))
    samples = {m: sorted({n for merger, _, n in found if merger == m and n}) for m in mergers}
    if STUDIED not in mergers or not samples[STUDIED]:
        return []

    def gains(merger: str, over: str, n: int) -> list[float]:
        other = found[merger, over, None if over == PLAIN else n]
        return [a - b for a, b in zip(found[merger, FEATCAL, n], other, strict=True)]

    studied = {n: statistics.fmean(gains(STUDIED, PLAIN, n)) for n in samples[STUDIED]}
    values = list(studied.values())
    first, largest = values[0], max(values)
    lines = [
        {
            "statement": "(1a) FeatCal's gain on task arithmetic grows with every step in samples",
            "holds": all(a < b for a, b in pairwise(values)),
            "figures": ", ".join(f"{n}: {gain:+.1f}" for n, gain in studied.items()),
        },
        {
            "statement": f"(1b) at {samples[STUDIED][0]} samples it is already at least half of the largest gain",
            "holds": first > 0 and first >= largest / 2,
            "figures": f"{first:+.1f} of {largest:+.1f}",
        },
    ]
    for rival in surgery.MODULES:
        ahead = {n: gains(STUDIED, rival, n) for n in samples[STUDIED]}
        lines.append(
            {
                "statement": f"(2) FeatCal beats {rival} on task arithmetic at every number of samples",
                "holds": all(statistics.fmean(a) > 0 for a in ahead.values()),
                "figures": ", ".join(
                    f"{n}: {statistics.fmean(a):+.1f} ({sum(x > 0 for x in a)} of {len(a)} seeds)"
                    for n, a in ahead.items()
                ),
            }
        )
    bar = statistics.fmean(found[STUDIED, PLAIN, None])
    for merger in mergers:
        plain = statistics.fmean(found[merger, PLAIN, None])
        if merger == STUDIED or plain <= bar:
            continue
        won = {n: gains(merger, PLAIN, n) for n in samples[merger]}
        lines.append(
            {
                "statement": f"(3) FeatCal still gains on {merger}, which is stronger than task arithmetic, at every "
                "number of samples",
                "holds": all(statistics.fmean(w) > 0 for w in won.values()),
                "figures": f"plain {plain:.1f}; "
                + ", ".join(
                    f"{n}: {statistics.fmean(w):+.1f} ({sum(x > 0 for x in w)} of {len(w)} seeds)"
                    for n, w in won.items()
                ),
            }
        )
    return lines


def show(results: dict[str, Any], console: Console) -> None:
    """The table, and what holds."""
    found = cells(results["rows"])
    title = f"Accuracy on {results['part']} digits, %, mean of tasks"
    table = Table("images a task", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title=title)
    for n in results["samples"]:
        table.add_column(str(n), justify="right", no_wrap=True)
    for merger in dict.fromkeys(merger for merger, _, _ in found):
        for repair in REPAIRS:
            values = [found.get((merger, repair, None if repair == PLAIN else n)) for n in results["samples"]]
            if any(values):
                shown = ["{:.1f}±{:.1f}".format(*spread(v)) if v else "" for v in values]
                if repair == PLAIN:  # one figure: it takes no samples
                    shown = shown[:1]
                label = merger if repair == PLAIN else f"  + {repair}"
                table.add_row(label, *shown, end_section=repair == FEATCAL or merger == EXPERTS)
    console.print(table)
    console.print(
        f"Mean ± standard deviation over {results['seeds']} seeds. Differences are in points.\n", highlight=False
    )
    for line in results["findings"]:
        verdict = "holds" if line["holds"] else "DOES NOT HOLD"
        console.print(
            f"{verdict}: {line['statement']}\n    {line['figures']}", highlight=False, markup=False, soft_wrap=True
        )
    seconds = results["seconds"]
    console.print(f"\n{seconds['total']:.0f} s, of which training {seconds['training']:.0f} s", highlight=False)


def plot(results: dict[str, Any], path: Path) -> None:
    """Task arithmetic: accuracy against calibration images."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = cells(results["rows"])
    samples = sorted({n for merger, _, n in found if merger == STUDIED and n})
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    looks = {"experts": ("0.35", "--", ""), FEATCAL: ("C0", "-", "o"), "ProbSurgery": ("C1", "-", "s")}
    looks |= {"Surgery": ("C2", "-", "^"), STUDIED: ("0.6", ":", "")}
    for name, (color, line, marker) in looks.items():
        flat = name in (EXPERTS, STUDIED)
        points = [spread(found[(name, PLAIN, None) if flat else (STUDIED, name, n)]) for n in samples]
        label = {EXPERTS: "each task's own expert", STUDIED: "task arithmetic"}.get(name, f"+ {name}")
        axes.plot(samples, [m for m, _ in points], color=color, linestyle=line, marker=marker, label=label)
        band = [m - s for m, s in points], [m + s for m, s in points]
        axes.fill_between(samples, *band, color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(samples, [str(n) for n in samples])
    axes.set_xlabel("unlabelled images a task")
    axes.set_ylabel(f"accuracy on {results['part']} digits, %")
    axes.set_title(f"Repairing task arithmetic: mean of 4 tasks, {results['seeds']} seeds ± 1 std", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_png(path)


if __name__ == "__main__":
    main()
