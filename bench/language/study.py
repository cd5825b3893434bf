"""What both studies share: train experts, merge them, calibrate, measure; then means over seeds, JSON and tables.

A study has one base and one expert a task and seed. Training and calibration draw from the training part, settings are
compared on the validation part with a seed of their own, and the held-out part is for the reported figures alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

import featcal_fast as ff
from bench.harness.results import machine
from bench.harness.tables import spread, table
from bench.mergers import Pool, task_arithmetic, with_state

Batch = dict[str, Tensor]
Scores = dict[str, dict[str, float]]  # by metric, then task
CHOSEN_WITH = (8, 128)  # samples a task, when settings are compared
EXPERTS, BASE = "own expert", "base"
PARTS = ("held-out", "validation", "training")


class Study:
    """Models, data and measures of a study."""

    name: str
    title: str
    tasks: tuple[str, ...]
    metrics: dict[str, int]  # digits to print, by metric
    counts: tuple[int, ...]  # calibration samples a task
    seeds: tuple[int, ...] = (0, 1, 2)
    scaling = 0.3  # of task arithmetic
    settings: ff.Settings
    grid: dict[str, ff.Settings]  # compared on the validation part

    def about(self) -> dict[str, Any]:
        """Sizes, training and data, for the JSON."""
        raise NotImplementedError

    def make_base(self) -> nn.Module:
        raise NotImplementedError

    def make_expert(self, base: nn.Module, task: str, seed: int) -> nn.Module:
        raise NotImplementedError

    def calibration(self, task: str, count: int, seed: int) -> list[Batch]:
        """Samples of the training part."""
        raise NotImplementedError

    def variants(self, experts: Mapping[str, nn.Module], seed: int) -> dict[str, dict[str, list[Batch]]]:
        """Further rows: other calibration batches, by task."""
        return {}

    def measure(self, model: nn.Module, task: str, part: str) -> dict[str, float]:
        raise NotImplementedError


def stream(seed: int, use: str) -> torch.Generator:
    """A random stream of its own for every use, so that no use shifts another."""
    return torch.Generator().manual_seed(int(sha256(f"{seed} {use}".encode()).hexdigest()[:8], 16))


def part_of(key: str) -> str:
    """The part that a file, topic, name, word or pair belongs to: a tenth is held out, a tenth is for validation."""
    return dict(enumerate(PARTS[:2])).get(int(sha256(key.encode()).hexdigest()[:8], 16) % 10, PARTS[2])


def train(model: nn.Module, draw: Callable[[], Batch], steps: int, learning_rate: float) -> None:
    """Minimise the model's own loss with AdamW: 20 steps of warm-up, and half a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, fused=True)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        loss = model(**draw()).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def merge(base: nn.Module, experts: Mapping[str, nn.Module], scaling: float) -> nn.Module:
    """Task arithmetic, as the package merges."""
    return with_state(base, task_arithmetic(Pool(base, experts), scaling))


def calibrated(
    study: Study,
    base: nn.Module,
    experts: Mapping[str, nn.Module],
    batches: Mapping[str, list[Batch]],
    settings: ff.Settings,
) -> nn.Module:
    """The study's merge, calibrated."""
    model = merge(base, experts, study.scaling)
    ff.calibrate_model(model, base=base, experts=experts, batches=batches, settings=settings)
    return model


def scores(study: Study, model: nn.Module | Mapping[str, nn.Module], part: str) -> Scores:
    """All metrics on all tasks, of one model or of each task's own."""
    found = {
        task: study.measure(model[task] if isinstance(model, Mapping) else model, task, part) for task in study.tasks
    }
    return {metric: {task: found[task][metric] for task in study.tasks} for metric in study.metrics}


def run(study: Study) -> dict[str, Any]:
    """Every seed's models, measured on the held-out part."""
    began, computed = time.perf_counter(), time.process_time()
    base, spent = study.make_base(), {"base": time.perf_counter() - began, "experts": 0.0, "calibration": 0.0}
    base_scores = scores(study, base, "held-out")
    runs: list[dict[str, Scores]] = []
    for seed in study.seeds:
        started = time.perf_counter()
        experts = {task: study.make_expert(base, task, seed) for task in study.tasks}
        spent["experts"] += time.perf_counter() - started
        rows = {EXPERTS: scores(study, experts, "held-out"), BASE: base_scores}
        for scaling in (study.scaling, study.scaling * study.settings.anchor_rho):
            rows[arithmetic(scaling)] = scores(study, merge(base, experts, scaling), "held-out")
        wanted = {
            f"FeatCal {count}": {task: study.calibration(task, count, seed) for task in study.tasks}
            for count in study.counts
        }
        for row, batches in {**wanted, **study.variants(experts, seed)}.items():
            started = time.perf_counter()
            model = calibrated(study, base, experts, batches, study.settings)
            spent["calibration"] += time.perf_counter() - started
            rows[row] = scores(study, model, "held-out")
        runs.append(rows)
        print(f"seed {seed}: done after {time.perf_counter() - began:.0f} s", flush=True)
    spent |= {"in all": time.perf_counter() - began, "in all, processor": time.process_time() - computed}
    return {
        "study": study.title,
        "part": "held-out",
        "merge": {"method": "task_arithmetic", "scaling": study.scaling},
        "settings": asdict(study.settings),
        "samples": list(study.counts),
        "seeds": list(study.seeds),
        **study.about(),
        "machine": machine(),
        "seconds": {name: round(value, 1) for name, value in spent.items()},
        **summary(runs, study),
        "runs": runs,
    }


def choose(study: Study, seed: int = 100) -> dict[str, Any]:
    """The grid of settings on the validation part, with a seed that the reported figures do not use."""
    base = study.make_base()
    experts = {task: study.make_expert(base, task, seed) for task in study.tasks}
    print("trained", flush=True)
    rows = {EXPERTS: scores(study, experts, "validation"), BASE: scores(study, base, "validation")}
    rows[arithmetic(study.scaling)] = scores(study, merge(base, experts, study.scaling), "validation")
    batches = {n: {task: study.calibration(task, n, seed) for task in study.tasks} for n in CHOSEN_WITH}
    for name, settings in study.grid.items():
        for count in CHOSEN_WITH:
            row = f"{name}, {count}"
            rows[row] = scores(study, calibrated(study, base, experts, batches[count], settings), "validation")
            print(f"{row}: done", flush=True)
    grid = {name: asdict(settings) for name, settings in study.grid.items()}
    return {
        "study": study.title,
        "part": "validation",
        "seed": seed,
        "grid": grid,
        "machine": machine(),
        **summary([rows], study),
    }


def values(*points: tuple[float, float, float]) -> dict[str, ff.Settings]:
    """Settings by a printable name, from (ridge_lambda, anchor_rho, teacher_alpha)."""
    return {
        f"lambda {ridge:g}, rho {rho:g}, alpha {alpha:g}": ff.Settings(ridge, rho, alpha)
        for ridge, rho, alpha in points
    }


def arithmetic(scaling: float) -> str:
    """The row of a merge without calibration."""
    return f"task arithmetic {scaling:.2g}"


# Results


def summary(runs: Sequence[Mapping[str, Scores]], study: Study) -> dict[str, Any]:
    """Mean and standard deviation over seeds of every figure, the tasks' mean, and the share of the gap closed."""
    low, found, closed = arithmetic(study.scaling), {}, {}
    for metric in study.metrics:
        full = [{row: with_mean(scores_[metric]) for row, scores_ in rows.items()} for rows in runs]
        found[metric] = {
            row: {column: mean_and_std([one[row][column] for one in full]) for column in columns}
            for row, columns in full[0].items()
        }
        ends = [(one[low]["mean"], one[EXPERTS]["mean"]) for one in full]
        closed[metric] = {
            row: mean_and_std([gap_closed(one[row]["mean"], *end) for one, end in zip(full, ends, strict=True)])
            for row in full[0]
            if row not in (EXPERTS, BASE, low) and all(merged != experts for merged, experts in ends)
        }
    return {"scores": found, "gap_closed": closed}


def with_mean(row: Mapping[str, float]) -> dict[str, float]:
    return {**row, "mean": sum(row.values()) / len(row)}


def gap_closed(value: float, merged: float, experts: float) -> float:
    """How far `value` is on the way from the merge to the experts; below 0 where it is worse than the merge."""
    return (value - merged) / (experts - merged)


def mean_and_std(numbers: Sequence[float]) -> dict[str, float]:
    return dict(zip(("mean", "std"), spread(numbers), strict=True))


def show(results: Mapping[str, Any], metric: str, study: Study) -> str:
    """Rows of models, columns of tasks."""
    several, digits = len(results.get("seeds", ())) > 1, study.metrics[metric]

    def cell(found: Mapping[str, float] | None, form: str) -> str:
        if found is None:
            return ""
        return f"{found['mean']:{form}}" + (f" ± {found['std']:{form}}" if several else "")

    rows = [
        {"": name, **{column: f"{found['mean']:.{digits}f}" for column, found in columns.items()}}
        | {"mean": cell(columns["mean"], f".{digits}f")}
        | {"gap closed": cell(results["gap_closed"][metric].get(name), ".0%")}
        for name, columns in results["scores"][metric].items()
    ]
    return table(f"{metric}, {results['part']}", rows)
