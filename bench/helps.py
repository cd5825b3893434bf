"""Does `plan --sample` foretell what calibration gains? `python -m bench.helps digits`, `llama` or `t5`.

Merges at several scalings of one to four experts are sampled, eight samples a task, then calibrated with 64 and judged
on others: by the drift after the last layer, and by the task's own measure on its held-out part. What is told
is the rank correlation, over merges, of the sample's figures with what was gained.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import combinations
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

    def __init__(self, folder: Path, seed: int = SEED) -> None:
        self._digits, self._seed = demo.Digits(), seed
        demo.make_models(folder, replace(demo.Config(), seed=seed), self._digits, Console(quiet=True))
        self.base = accuracy.load(folder / "base")
        self.experts = {task: accuracy.load(folder / "experts" / task) for task in self.tasks}
        self._heads = load_file(folder / "heads.safetensors")

    def draw(self, task: str, count: int) -> list[Batch]:
        images, _ = self._digits.see(task, "training")
        drawn = torch.randperm(len(images), generator=stream(self._seed, f"calibration {task}"))
        return [{"pixel_values": part} for part in images[drawn[:count]].split(BATCH)]

    def measure(self, model: nn.Module, task: str) -> float:
        images, labels = self._digits.see(task, "held-out")
        found = class_scores(accuracy.features(model, {task: images})[0], self._heads[task]).argmax(-1)
        return (found == labels).double().mean().item()


class Language:
    """A study's models, and the first of its measures."""

    def __init__(self, study: Study, base: nn.Module, seed: int = SEED) -> None:
        self._study, self.settings, self.tasks = study, study.settings, study.tasks
        self.base, self._seed = base, seed
        self.experts = {task: make_expert(study, self.base, task, seed) for task in self.tasks}

    def draw(self, task: str, count: int) -> list[Batch]:
        batches = self._study.calibration(task, count, stream(self._seed, f"calibration {task}"))
        return [
            {name: value[i : i + BATCH] for name, value in batch.items()}
            for batch in batches
            for i in range(0, len(next(iter(batch.values()))), BATCH)
        ]

    def measure(self, model: nn.Module, task: str) -> float:
        return self._study.measure(model, task, "held-out")[next(iter(self._study.metrics))]


def models(kind: str, folder: Path, seeds: Sequence[int]) -> Iterator[Digits | Language]:
    """The models of a study, seed by seed."""
    if kind == "digits":
        yield from (Digits(folder / "digits" / f"seed-{seed}", seed) for seed in seeds)
        return
    study = STUDIES[kind]()
    base = make_base(study)
    yield from (Language(study, base, seed) for seed in seeds)


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


def by_share(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Of merges that are not their experts, by the share that was captured: what calibration removed of the drift."""
    found = {}
    for name, least, most in (("below 20%", -9.0, SOME), ("20% to 50%", SOME, MUCH), ("50% and more", MUCH, 9.0)):
        removed = [
            gains(row)["drift removed"]
            for row in rows
            if row["distance"] >= NOTHING and least <= row["captured"] < most
        ]
        found[name] = {"merges": len(removed)}
        if removed:
            found[name] |= {"least": min(removed), "median": statistics.median(removed), "most": max(removed)}
    return found


def show(results: dict[str, Any]) -> str:
    """Both tables."""
    said = [{"a sample's": name, **each} for name, each in results["rank correlation"].items()]
    shares = [{"captured": name, **each} for name, each in results["drift removed"].items()]
    return "\n".join([table("rank correlation with", said), table("drift removed", shares)])


def main() -> None:
    parser = command_line(__doc__, "--folder")
    parser.add_argument("kind", choices=("digits", *STUDIES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    kind: Digits | Language
    if args.kind == "digits":
        kind = Digits(args.folder / "digits" / f"seed-{SEED}")
    else:
        study = STUDIES[args.kind]()
        kind = Language(study, make_base(study))
    rows = [run_case(kind, tasks, scaling) for tasks in cases(kind.tasks) for scaling in SCALINGS]
    results = {
        "samples": {"sample": SAMPLED, "calibration": FITTED, "judged by": JUDGED},
        "settings": asdict(kind.settings),
        "machine": machine(),
        "rank correlation": foretold(rows),
        "drift removed": by_share(rows),
        "rows": rows,
    }
    path = RESULTS / f"helps-{args.kind}.json"
    write_whole(path, results)
    print(f"{show(results)}\nWrote {path}")


if __name__ == "__main__":
    main()
