"""Does `plan --sample` foretell what calibration gains? `python -m bench.helps digits`, `llama` or `t5`.

Merges at several scalings of one to four experts are sampled, eight samples a task, then calibrated with 64 and judged
on others: by the drift after the last layer, and by the task's own measure on its held-out part. What is told
is the rank correlation, over merges, of the sample's figures with what was gained.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

import featcal_fast as ff
from bench import accuracy
from bench.harness.results import RESULTS, machine, write_whole
from bench.harness.runs import command_line
from bench.harness.tables import table
from bench.language.llama import Llama
from bench.language.study import Study, make_base, make_expert, stream
from bench.language.t5 import T5
from bench.mergers import Pool, class_scores, task_arithmetic, with_state
from featcal_fast import demo
from featcal_fast.planning.sample import sample_source
from featcal_fast.planning.sampled import MUCH, NOTHING, SOME
from featcal_fast.reporting.progress import Progress
from featcal_fast.streaming.held_out import with_held_out
from featcal_fast.streaming.sources import ModuleSource

Batch = dict[str, Tensor]
Row = dict[str, Any]
SAMPLED, FITTED, JUDGED = 8, 64, 32  # samples a task
SCALINGS = (0.1, 0.3, 0.6, 1.0)
SEED, BATCH = 0, 16
SAID, GAINS = ("captured", "captured where fitted", "in the middle", "distance"), ("drift removed", "gap closed")
STUDIES: dict[str, type[Study]] = {study.name: study for study in (Llama, T5)}


class Digits:
    """The demo's vision transformers; accuracy."""

    settings = accuracy.SETTINGS
    tasks = tuple(demo.VIEWS)

    def __init__(self, folder: Path) -> None:
        self._digits = demo.Digits()
        demo.make_models(folder, demo.Config(), self._digits, Console(quiet=True))
        self.base = accuracy.load(folder / "base")
        self.experts = {task: accuracy.load(folder / "experts" / task) for task in self.tasks}
        self._heads = load_file(folder / "heads.safetensors")

    def draw(self, task: str, count: int) -> list[Batch]:
        images, _ = self._digits.see(task, "training")
        drawn = torch.randperm(len(images), generator=stream(SEED, f"calibration {task}"))
        return [{"pixel_values": part} for part in images[drawn[:count]].split(BATCH)]

    def measure(self, model: nn.Module, task: str) -> float:
        images, labels = self._digits.see(task, "held-out")
        found = class_scores(accuracy.features(model, {task: images})[0], self._heads[task]).argmax(-1)
        return (found == labels).double().mean().item()


class Language:
    """A study's models, and the first of its measures."""

    def __init__(self, study: Study) -> None:
        self._study, self.settings, self.tasks = study, study.settings, study.tasks
        self.base = make_base(study)
        self.experts = {task: make_expert(study, self.base, task, SEED) for task in self.tasks}

    def draw(self, task: str, count: int) -> list[Batch]:
        batches = self._study.calibration(task, count, stream(SEED, f"calibration {task}"))
        return [
            {name: value[i : i + BATCH] for name, value in batch.items()}
            for batch in batches
            for i in range(0, len(next(iter(batch.values()))), BATCH)
        ]

    def measure(self, model: nn.Module, task: str) -> float:
        return self._study.measure(model, task, "held-out")[next(iter(self._study.metrics))]


def cases(tasks: Sequence[str]) -> list[tuple[str, ...]]:
    """All four experts, each three, neighbours, and two alone."""
    pairs = list(combinations(tasks, 2))[::2]
    return [tuple(tasks), *combinations(tasks, 3), *pairs, (tasks[0],), (tasks[-1],)]


def run_case(kind: Digits | Language, tasks: Sequence[str], scaling: float) -> Row:
    """What a sample says of one merge, and what calibration makes of it."""
    device, experts = torch.device("cpu"), {task: kind.experts[task] for task in tasks}
    merged = with_state(kind.base, task_arithmetic(Pool(kind.base, experts), scaling))
    drawn = {task: kind.draw(task, FITTED + JUDGED) for task in tasks}
    halves = [{task: [part(drawn[task][0], half)] for task in tasks} for half in (0, 1)]
    sources = {task: ModuleSource(model, f"expert {task}", device) for task, model in experts.items()}
    started = time.perf_counter()
    merge = ModuleSource(merged, "merged model", device)
    sampled = sample_source(merge, sources, with_held_out(*halves), kind.settings, device, Progress())
    row: Row = {"tasks": [*tasks], "scaling": scaling, "distance": sampled.distance, "captured": sampled.captured}
    row["captured where fitted"] = sampled.fitted_captured
    row["in the middle"] = (sampled.captured + sampled.fitted_captured) / 2
    row["seconds"] = {"sample": round(time.perf_counter() - started, 2)}
    row["merged"] = statistics.fmean(kind.measure(merged, task) for task in tasks)
    row["experts"] = statistics.fmean(kind.measure(experts[task], task) for task in tasks)
    started, fitted = time.perf_counter(), FITTED // BATCH
    report = ff.calibrate_model(
        merged,
        base=kind.base,
        experts=experts,
        settings=kind.settings,
        batches={task: batches[:fitted] for task, batches in drawn.items()},
        held_out={task: batches[fitted:] for task, batches in drawn.items()},
    )
    row["seconds"]["calibration"] = round(time.perf_counter() - started, 2)
    row["calibrated"] = statistics.fmean(kind.measure(merged, task) for task in tasks)
    row["drift"] = [report.layers[-1].drift_before, report.layers[-1].drift_after]
    return row


def part(batch: Batch, half: int) -> Batch:
    """The first or the second half of the first samples."""
    count = SAMPLED // 2
    return {name: value[half * count : (half + 1) * count] for name, value in batch.items()}


def gains(row: Row) -> dict[str, float]:
    """Shares of the way to the experts: of the drift after the last layer, and of the measure on held-out data."""
    before, after = row["drift"]
    closed = (row["calibrated"] - row["merged"]) / ((row["experts"] - row["merged"]) or 1e-9)
    return {"drift removed": 1 - after / before, "gap closed": closed}


def foretold(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Rank correlations of what a sample said with what was gained, over merges that are not their experts."""
    apart = [row for row in rows if row["distance"] >= NOTHING]
    gained = [gains(row) for row in apart]
    return {
        said: {gain: rank_correlation([row[said] for row in apart], [each[gain] for each in gained]) for gain in GAINS}
        for said in SAID
    }


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, of numbers without ties."""
    ranks = [{value: rank for rank, value in enumerate(sorted(each))} for each in (first, second)]
    pairs = zip((ranks[0][x] for x in first), (ranks[1][y] for y in second), strict=True)
    count = len(first)
    return 1 - 6 * sum((a - b) ** 2 for a, b in pairs) / (count * (count**2 - 1))


def show(results: dict[str, Any]) -> str:
    """What was foretold; and of merges by the share that was captured, what calibration removed of the drift."""
    lines = [
        {"a sample's": said, **{gain: f"{value:.2f}" for gain, value in each.items()}}
        for said, each in results["rank correlation"].items()
    ]
    rows = [row for row in results["rows"] if row["distance"] >= NOTHING]
    shares = []
    for least, most in pairwise((-9, SOME, MUCH, 9)):
        found = [gains(row)["drift removed"] for row in rows if least <= row["captured"] < most]
        told = f"{min(found):.0%} to {max(found):.0%}, median {statistics.median(found):.0%}" if found else ""
        shares.append(
            {
                "captured": f"from {least:.0%} on" if least > 0 else "below",
                "merges": str(len(found)),
                "drift removed": told,
            }
        )
    return "\n".join([table("rank correlation with", lines), table("", shares)])


def main() -> None:
    parser = command_line(__doc__, "--folder")
    parser.add_argument("kind", choices=("digits", *STUDIES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    digits = args.kind == "digits"
    kind = Digits(args.folder / "digits" / f"seed-{SEED}") if digits else Language(STUDIES[args.kind]())
    rows = [run_case(kind, tasks, scaling) for tasks in cases(kind.tasks) for scaling in SCALINGS]
    results = {
        "samples": {"sample": SAMPLED, "calibration": FITTED, "judged by": JUDGED},
        "settings": asdict(kind.settings),
        "machine": machine(),
        "rank correlation": foretold(rows),
        "rows": rows,
    }
    path = RESULTS / f"helps-{args.kind}.json"
    write_whole(path, results)
    print(f"{show(results)}\nWrote {path}")


if __name__ == "__main__":
    main()
