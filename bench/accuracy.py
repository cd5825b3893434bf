"""Accuracy after repair, over mergers, ways of repair, calibration images and seeds: the demo's transformers on digits.

    python -m bench.accuracy

For every seed: a base and four experts, trained as the demo trains them; five merges; each repaired by FeatCal with the
demo's settings, by Surgery and by ProbSurgery, which are all given the same unlabelled images (the n of a smaller
number are among those of a larger). AdaMerging, a merger, has all 256 in every row. Accuracies are of held-out images,
which no method sees; what was chosen here was chosen on the validation part (`--choose`). The table has the shape of
the paper's. Seconds are wall clock. Trained models are kept under `--folder`, and reused.
"""

from __future__ import annotations

import statistics
import time
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

import featcal_fast as ff
from bench import surgery
from bench.harness.plots import plain, plot
from bench.harness.results import RESULTS, machine, write_whole
from bench.harness.runs import command_line
from bench.harness.tables import spread, table
from bench.mergers import MERGERS, AdaMerging, Pool, Ties, Wudi, class_scores, with_state
from featcal_fast import demo

PLAIN, FEATCAL, EXPERTS, STUDIED = "plain", "FeatCal", "experts", "task arithmetic"
SEEDS, SAMPLES, OTHERS_SAMPLES = 5, [8, 16, 32, 64, 128, 256], [8, 64, 256]
RECIPE = yaml.safe_load(demo.RECIPE)
SETTINGS = ff.Settings.from_dict(RECIPE["settings"])  # one for all mergers: chosen by the demo on task arithmetic
Row = dict[str, Any]  # seed, merger, repair, samples (None for a plain merge), seconds, accuracy by task
Cell = tuple[str, str, int | None]  # merger, repair, samples


def main() -> None:
    parser = command_line(__doc__, "--folder")
    parser.add_argument("--choose", action="store_true", help="on the validation part instead, to compare settings")
    args = parser.parse_args()
    torch.set_num_threads(1)
    samples = {merger: SAMPLES if merger == STUDIED else OTHERS_SAMPLES for merger in MERGERS}
    part = "validation" if args.choose else "held-out"
    results = run(SEEDS, samples, part, args.folder / "digits", demo.Config(), surgery.Training())
    path = RESULTS / f"{'settings' if args.choose else 'accuracy'}-digits.json"
    write_whole(path, results)
    draw(results, path.with_suffix(".png"))
    print(f"{show(results)}\nWrote {path} and {path.with_suffix('.png')}")


def run(
    seeds: int, samples: dict[str, list[int]], part: str, folder: Path, config: demo.Config, training: surgery.Training
) -> dict[str, Any]:
    """Every accuracy, and the settings, versions and seconds that belong to them; `samples` is by merger."""
    digits, rows = demo.Digits(), []
    seconds = {"training": 0.0, "total": 0.0}
    for seed in range(seeds):
        models = folder / f"seed-{seed}"
        trained = demo.make_models(models, replace(config, seed=seed), digits, Console(quiet=True))
        seconds["training"] += sum(trained.values())
        started = time.perf_counter()
        rows += [{"seed": seed, **row} for row in run_seed(models, seed, samples, digits, part, training)]
        seconds["total"] += time.perf_counter() - started
        print(f"seed {seed}: {time.perf_counter() - started:.0f} s, training excluded", flush=True)
    seconds["total"] += seconds["training"]
    return {
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
        "summary": summary(rows),
    }


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


@torch.no_grad()
def features(model: nn.Module, images: dict[str, Tensor]) -> Tensor:
    """What the heads are given, `[tasks, images, width]`."""
    return torch.stack([model(pixel_values=pixels).pooler_output for pixels in images.values()])


# Results


def grouped(rows: list[Row]) -> dict[Cell, list[Row]]:
    """By merger, repair and samples, seed by seed."""
    groups: dict[Cell, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["merger"], row["repair"], row["samples"]), []).append(row)
    return groups


def means(rows: list[Row]) -> dict[Cell, list[float]]:
    """Mean accuracy over the tasks, seed by seed."""
    return {
        cell: [statistics.fmean(row["accuracy"].values()) for row in group] for cell, group in grouped(rows).items()
    }


def summary(rows: list[Row]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, of the mean over tasks and of each task; mean seconds."""
    lines = []
    for (merger, repair, samples), group in grouped(rows).items():
        accuracy = {task: spread([row["accuracy"][task] for row in group]) for task in group[0]["accuracy"]}
        accuracy["mean"] = spread([statistics.fmean(row["accuracy"].values()) for row in group])
        took = statistics.fmean(row["seconds"] for row in group)
        lines.append(
            {"merger": merger, "repair": repair, "samples": samples, "seconds": took, "mean_and_std": accuracy}
        )
    return lines


def leads(rows: list[Row]) -> list[str]:
    """What FeatCal gains on each merger, and beside each other repair, by samples: the paper's claims, in points."""
    found, lines = means(rows), {}
    for (merger, repair, samples), values in found.items():
        if repair == FEATCAL:
            for other in (PLAIN, *surgery.MODULES):
                theirs = found[merger, other, None if other == PLAIN else samples]
                lead = [a - b for a, b in zip(values, theirs, strict=True)]
                text = f"{samples}: {statistics.fmean(lead):+.1f} ({sum(x > 0 for x in lead)} of {len(lead)} seeds)"
                lines.setdefault(f"{FEATCAL} over {other} on {merger}", []).append(text)
    return [f"{name}: {', '.join(figures)}" for name, figures in lines.items()]


def show(results: dict[str, Any]) -> str:
    """The table, and what FeatCal gains."""
    found = means(results["rows"])
    rows = [
        {"images a task": merger if repair == PLAIN else f"  + {repair}"}
        | {
            str(n or "none"): "{:.1f} ± {:.1f}".format(*spread(values)) if values else None
            for n in (None, *results["samples"])
            for values in [found.get((merger, repair, n))]
        }
        for merger, repair in dict.fromkeys((merger, repair) for merger, repair, _ in found)
    ]
    title = f"Accuracy on {results['part']} digits, %, mean of tasks ± standard deviation over {results['seeds']} seeds"
    seconds = "{total:.0f} s, of which training {training:.0f} s".format(**results["seconds"])
    return table(title, rows, [*leads(results["rows"]), seconds])


def draw(results: dict[str, Any], path: Path) -> None:
    """Task arithmetic: accuracy against calibration images."""
    found = means(results["rows"])
    samples = sorted({n for merger, _, n in found if merger == STUDIED and n})
    looks = {
        "each task's own expert": ((EXPERTS, PLAIN), {"color": "0.35", "linestyle": "--"}),
        "+ FeatCal": ((STUDIED, FEATCAL), {"color": "C0", "marker": "o"}),
        "+ ProbSurgery": ((STUDIED, "ProbSurgery"), {"color": "C1", "marker": "s"}),
        "+ Surgery": ((STUDIED, "Surgery"), {"color": "C2", "marker": "^"}),
        "task arithmetic": ((STUDIED, PLAIN), {"color": "0.6", "linestyle": ":"}),
    }

    def lines(axes: Any) -> None:
        for label, (way, look) in looks.items():
            points = [spread(found[(*way, None if way[1] == PLAIN else n)]) for n in samples]
            axes.plot(samples, [mean for mean, _ in points], label=label, **look)
            band = [mean - std for mean, std in points], [mean + std for mean, std in points]
            axes.fill_between(samples, *band, color=look["color"], alpha=0.15, linewidth=0)
        title = f"Repairing task arithmetic: mean of 4 tasks, {results['seeds']} seeds ± 1 std"
        axes.set(xlabel="unlabelled images a task", ylabel=f"accuracy on {results['part']} digits, %", title=title)
        axes.set_xscale("log", base=2)
        plain(axes.xaxis, samples)

    plot(path, (6.4, 4.2), lines)


if __name__ == "__main__":
    main()
