"""Do settings that choose themselves match the best fixed ones? `python -m bench.choice digits`, `llama` or `t5`.

For each seed, the merge of all four experts is calibrated with sixty fixed settings, with `settings: auto`, and with
the defaults, each fitted to the same samples; `auto` chooses by others, 32 of 160 samples a task and 16 of 32. All are
judged on test data that no method sees. The best fixed setting is the one that is best on the test data in the mean
over seeds, which nobody could know beforehand. Seconds are of `auto` and of the default settings, in turns, both with
the gate.
"""

from __future__ import annotations

import statistics
import time
from copy import deepcopy
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import torch
from torch import nn

import featcal_fast as ff
from bench.harness.results import RESULTS, machine, write_whole
from bench.harness.runs import command_line
from bench.harness.tables import spread, table
from bench.helps import BATCH, Batch, Digits, Language, models
from bench.mergers import Pool, task_arithmetic, with_state

SAMPLES = (160, 32)  # a task; a fifth of them is held out
SCALING = 0.3
LAMBDAS, RHOS, ALPHAS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1), (1.0, 1.5, 2.0, 2.5), (0.1, 0.3, 0.6)
GRID = {
    f"{ridge:g}, {rho:g}, {alpha:g}": ff.Settings(ridge, rho, alpha)
    for ridge, rho, alpha in product(LAMBDAS, RHOS, ALPHAS)
}
SEEDS = {"digits": range(5), "llama": range(2), "t5": range(3)}
LOWER_IS_BETTER = ("llama",)
SCALES = {"digits": 100}  # to per cent
Data = dict[str, list[Batch]]


def main() -> None:
    parser = command_line(__doc__, "--folder")
    parser.add_argument("kind", choices=SEEDS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for kind in models(args.kind, args.folder, SEEDS[args.kind]):
        rows += [run(kind, count) for count in SAMPLES]
        print(f"seed {len(rows) // len(SAMPLES) - 1}: done", flush=True)
    better = min if args.kind in LOWER_IS_BETTER else max
    results = {
        "samples": list(SAMPLES),
        "seeds": len(SEEDS[args.kind]),
        "scaling": SCALING,
        "auto": asdict(ff.PRESETS["auto"]),
        "machine": machine(),
        "summary": {count: summary([row for row in rows if row["samples"] == count], better) for count in SAMPLES},
        "rows": rows,
    }
    path = RESULTS / f"choice-{args.kind}.json"
    write_whole(path, results)
    print(f"{show(results, args.kind)}\nWrote {path}")


def run(kind: Digits | Language, count: int) -> dict[str, Any]:
    """One seed's models: what every setting makes of them, on test data."""
    merged = with_state(kind.base, task_arithmetic(Pool(kind.base, kind.experts), SCALING))
    drawn = {task: kind.draw(task, count) for task in kind.tasks}
    fitted, held_out = count * 4 // 5 // BATCH, -(-count // 5 // BATCH)
    given = {
        "base": kind.base,
        "experts": kind.experts,
        "batches": {task: batches[:fitted] for task, batches in drawn.items()},
    }
    others: Data = {task: batches[-held_out:] for task, batches in drawn.items()}

    def measured(model: nn.Module) -> float:
        return statistics.fmean(kind.measure(model, task) for task in kind.tasks)

    def calibrated(settings: ff.Settings, judged: bool) -> tuple[nn.Module, ff.Report]:
        model = deepcopy(merged)
        return model, ff.calibrate_model(model, **given, held_out=others if judged else None, settings=settings)

    row: dict[str, Any] = {"samples": count, "merged": measured(merged)}
    row["experts"] = statistics.fmean(kind.measure(kind.experts[task], task) for task in kind.tasks)
    row["fixed"] = {name: measured(calibrated(settings, False)[0]) for name, settings in GRID.items()}
    seconds: dict[str, list[float]] = {"default": [], "auto": []}
    for _ in range(3):
        for name in seconds:
            started = time.perf_counter()
            model, report = calibrated(ff.PRESETS[name], True)
            seconds[name].append(time.perf_counter() - started)
            row[name] = measured(model)
    row["seconds"] = {name: min(each) for name, each in seconds.items()}
    row["chosen"] = [{name: each.ridge_lambda for name, each in layer.chosen.items()} for layer in report.layers]
    row["alphas"] = [layer.alpha.teacher_alpha for layer in report.layers if layer.alpha is not None]
    row["ungated"] = measured(calibrated(replace(ff.PRESETS["auto"], keep_better=False), True)[0])
    return row


def summary(rows: list[dict[str, Any]], better: Any) -> dict[str, Any]:
    """Means and standard deviations over seeds, and the differences to the best fixed setting, seed by seed."""
    means = {name: statistics.fmean(row["fixed"][name] for row in rows) for name in GRID}
    best, ranked = better(means, key=means.__getitem__), sorted(means.values())
    return {
        "best": best,
        "fixed": {
            "best": means[best],
            "median": statistics.median(ranked),
            "worst": ranked[-1 if better is min else 0],
        },
        **{name: spread([row[name] for row in rows]) for name in ("merged", "experts", "default", "auto", "ungated")},
        "best of grid": spread([row["fixed"][best] for row in rows]),
        "auto against best": spread([row["auto"] - row["fixed"][best] for row in rows]),
        "time": statistics.fmean(row["seconds"]["auto"] / row["seconds"]["default"] for row in rows),
    }


def show(results: dict[str, Any], kind: str) -> str:
    """A line a number of samples."""
    scale = SCALES.get(kind, 1)
    lines = []
    for count, found in results["summary"].items():
        told = {"samples a task": str(count)}
        for name in ("merged", "default", "best of grid", "auto", "auto against best", "experts"):
            mean, deviation = found[name]
            told[name] = f"{scale * mean:.3f} ± {scale * deviation:.3f}"
        told |= {"median of grid": f"{scale * found['fixed']['median']:.3f}", "time": f"{found['time']:.2f}"}
        lines.append(told | {"best": found["best"]})
    return table(f"{kind}, on test data", lines)


if __name__ == "__main__":
    main()
