"""Accuracy after repair, over mergers, ways of repair, calibration images and seeds: the demo's transformers on digits.

    python -m bench.accuracy

For every seed: a base and four experts, trained as the demo trains them; five merges; each repaired by FeatCal with the
demo's settings, by Surgery and by ProbSurgery, which are all given the same unlabelled images (the n of a smaller
number are among those of a larger). AdaMerging, a merger, has all 256 in every row. Accuracies are of held-out images,
which no method sees; what was chosen here was chosen on the validation part. The table has the shape of the paper's.
Seconds are wall clock.
"""

from __future__ import annotations

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
SAMPLES, OTHERS_SAMPLES = [8, 16, 32, 64, 128, 256], [8, 64, 256]
RECIPE = yaml.safe_load(demo.RECIPE)
SETTINGS = ff.Settings.from_dict(RECIPE["settings"])  # one for all mergers: chosen by the demo on task arithmetic
Row = dict[str, Any]  # seed, merger, repair, samples (None for a plain merge), seconds, accuracy by task
Cells = dict[tuple[str, str, int | None], list[float]]  # mean accuracy, seed by seed


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, nargs="+", default=SAMPLES, help="calibration images a task, up to 256")
    parser.add_argument(
        "--others-samples", type=int, nargs="+", default=OTHERS_SAMPLES, help="those for mergers but task arithmetic"
    )
    parser.add_argument("--mergers", nargs="+", choices=MERGERS, default=list(MERGERS))
    parser.add_argument("--part", choices=("held-out", "validation"), default="held-out")
    parser.add_argument("--models", type=Path, help="keep trained models here, and reuse them")
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy-digits.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    others = [n for n in args.samples if n in args.others_samples]
    samples = {merger: sorted(args.samples if merger == STUDIED else others) for merger in args.mergers}
    results = run(args.seeds, samples, args.part, args.models, demo.Config(), surgery.Training())
    write_whole(args.out, results)
    print(show(results))
    if STUDIED in args.mergers:
        draw(results, args.out.with_suffix(".png"))
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
    digits, rows = demo.Digits(), []
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
            print(f"seed {seed}: {time.perf_counter() - started:.0f} s, training excluded", flush=True)
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


def findings(rows: list[Row]) -> list[dict[str, Any]]:
    """Which of the paper's three statements hold here, with the figures."""
    found = cells(rows)
    mergers = list(dict.fromkeys(row["merger"] for row in rows if row["merger"] != EXPERTS))
    samples = {m: sorted({n for merger, _, n in found if merger == m and n}) for m in mergers}
    if STUDIED not in mergers or not samples[STUDIED]:
        return []

    def gains(merger: str, over: str) -> dict[int, list[float]]:
        """FeatCal's lead over another repair or none, by samples, seed by seed."""
        other = {n: found[merger, over, None if over == PLAIN else n] for n in samples[merger]}
        return {n: [a - b for a, b in zip(found[merger, FEATCAL, n], other[n], strict=True)] for n in other}

    def always(statement: str, gained: dict[int, list[float]], before: str = "") -> dict[str, Any]:
        figures = (
            f"{n}: {statistics.fmean(g):+.1f} ({sum(x > 0 for x in g)} of {len(g)} seeds)" for n, g in gained.items()
        )
        return {
            "statement": f"{statement} at every number of samples",
            "holds": all(statistics.fmean(g) > 0 for g in gained.values()),
            "figures": before + ", ".join(figures),
        }

    studied = {n: statistics.fmean(gain) for n, gain in gains(STUDIED, PLAIN).items()}
    first, *_ = values = list(studied.values())
    plain_accuracy = {merger: statistics.fmean(found[merger, PLAIN, None]) for merger in mergers}
    stronger = [merger for merger in mergers if plain_accuracy[merger] > plain_accuracy[STUDIED]]
    return [
        {
            "statement": "(1a) FeatCal's gain on task arithmetic grows with every step in samples",
            "holds": all(a < b for a, b in pairwise(values)),
            "figures": ", ".join(f"{n}: {gain:+.1f}" for n, gain in studied.items()),
        },
        {
            "statement": f"(1b) at {samples[STUDIED][0]} samples it is already at least half of the largest gain",
            "holds": first > 0 and first >= max(values) / 2,
            "figures": f"{first:+.1f} of {max(values):+.1f}",
        },
        *(always(f"(2) FeatCal beats {rival} on task arithmetic", gains(STUDIED, rival)) for rival in surgery.MODULES),
        *(
            always(
                f"(3) FeatCal still gains on {merger}, which is stronger than task arithmetic,",
                gains(merger, PLAIN),
                f"plain {plain_accuracy[merger]:.1f}; ",
            )
            for merger in stronger
        ),
    ]


def show(results: dict[str, Any]) -> str:
    """The table, and what holds."""
    found = cells(results["rows"])
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
    notes = [
        f"{'holds' if line['holds'] else 'DOES NOT HOLD'}: {line['statement']}\n    {line['figures']}"
        for line in results["findings"]
    ]
    seconds = "{total:.0f} s, of which training {training:.0f} s".format(**results["seconds"])
    return table(title, rows, [*notes, seconds])


def draw(results: dict[str, Any], path: Path) -> None:
    """Task arithmetic: accuracy against calibration images."""
    found = cells(results["rows"])
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
