"""What both studies share: train experts, merge them, calibrate, measure; then means over seeds, JSON and tables.

A study has one base and one expert a task and seed. Training and calibration draw from the training part, settings are
compared on the validation part with a seed of their own, and the held-out part is for the reported figures alone.
"""

from __future__ import annotations

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
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
Repair = tuple[Mapping[str, list[Batch]], ff.Settings]  # batches by task, and settings
CHOSEN_WITH, CHOSEN_SEED = (8, 128), 100  # samples a task, and the seed, when settings are compared
EXPERTS, BASE = "own expert", "base"
PARTS = ("held-out", "validation", "training")
SCALING = 0.3  # of task arithmetic


class Study(ABC):
    """Models, data and measures of a study."""

    name: str
    title: str
    calibrated_on: str  # in words
    tasks: tuple[str, ...]
    metrics: dict[str, int]  # digits to print, by metric
    counts: tuple[int, ...]  # calibration samples a task
    seeds: tuple[int, ...] = (0, 1, 2)
    config: Any  # of the model and its training
    settings: ff.Settings
    grid: dict[str, ff.Settings]  # compared on the validation part

    @abstractmethod
    def new_model(self) -> nn.Module:
        """With random weights."""

    @abstractmethod
    def base_batch(self, step: int, random: torch.Generator) -> Batch:
        """What the base is trained on."""

    @abstractmethod
    def batch(self, task: str, random: torch.Generator) -> Batch:
        """What an expert is trained on."""

    @abstractmethod
    def calibration(self, task: str, count: int, random: torch.Generator) -> list[Batch]:
        """Samples of the training part."""

    def variants(self, experts: Mapping[str, nn.Module], batches: Mapping[str, list[Batch]]) -> dict[str, Any]:
        """Further rows: other calibration batches, by task, made of those with the most samples."""
        return {}

    @abstractmethod
    def measure(self, model: nn.Module, task: str, part: str) -> dict[str, float]:
        """By metric."""


def stream(seed: int, use: str) -> torch.Generator:
    """A random stream of its own for every use, so that no use shifts another."""
    return torch.Generator().manual_seed(int(sha256(f"{seed} {use}".encode()).hexdigest()[:8], 16))


def part_of(key: str) -> str:
    """The part that a file, topic, name, word or pair belongs to: a tenth is held out, a tenth is for validation."""
    return dict(enumerate(PARTS[:2])).get(int(sha256(key.encode()).hexdigest()[:8], 16) % 10, PARTS[2])


def train(model: nn.Module, draw: Callable[[int], Batch], steps: int, learning_rate: float) -> nn.Module:
    """Minimise the model's own loss with AdamW: 20 steps of warm-up, and half a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, fused=True)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        loss = model(**draw(step)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def make_base(study: Study) -> nn.Module:
    """One for all seeds."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = study.new_model()
    random, config = stream(0, "base"), study.config
    return train(model, lambda step: study.base_batch(step, random), config.base_steps, config.base_learning_rate)


def make_expert(study: Study, base: nn.Module, task: str, seed: int) -> nn.Module:
    random, config = stream(seed, f"expert {task}"), study.config
    draw = lambda _: study.batch(task, random)  # noqa: E731
    return train(deepcopy(base), draw, config.expert_steps, config.expert_learning_rate)


def scores(study: Study, model: nn.Module | Mapping[str, nn.Module], part: str) -> Scores:
    """All metrics on all tasks, of one model or of each task's own."""
    found = {
        task: study.measure(model[task] if isinstance(model, Mapping) else model, task, part) for task in study.tasks
    }
    return {metric: {task: found[task][metric] for task in study.tasks} for metric in study.metrics}


def run(study: Study, choose: bool = False) -> dict[str, Any]:
    """Every seed's models, measured on the held-out part; or the grid of settings, on the validation part."""
    began, base = time.perf_counter(), make_base(study)
    part, seeds = ("validation", (CHOSEN_SEED,)) if choose else ("held-out", study.seeds)
    runs = []
    for seed in seeds:
        experts = {task: make_expert(study, base, task, seed) for task in study.tasks}
        rows = {EXPERTS: scores(study, experts, part), BASE: scores(study, base, part)}
        for scaling in (SCALING, SCALING * study.settings.anchor_rho):  # the merge, and the anchor
            merged = with_state(base, task_arithmetic(Pool(base, experts), scaling))
            rows[arithmetic(scaling)] = scores(study, merged, part)
        for row, (batches, settings) in repairs(study, experts, seed, choose).items():
            model = with_state(base, task_arithmetic(Pool(base, experts), SCALING))
            ff.calibrate_model(model, base=base, experts=experts, batches=batches, settings=settings)
            rows[row] = scores(study, model, part)
        runs.append(rows)
        print(f"seed {seed}: done after {time.perf_counter() - began:.0f} s", flush=True)
    return {
        "study": study.title,
        "part": part,
        "merge": {"method": "task_arithmetic", "scaling": SCALING},
        **({"grid": {name: asdict(each) for name, each in study.grid.items()}} if choose else {}),
        "settings": asdict(study.settings),
        "samples": list(CHOSEN_WITH if choose else study.counts),
        "calibration": study.calibrated_on,
        "seeds": list(seeds),
        "model": asdict(study.config),
        "machine": machine(),
        "seconds": round(time.perf_counter() - began, 1),
        **summary(runs, study),
        "runs": runs,
    }


def repairs(study: Study, experts: Mapping[str, nn.Module], seed: int, choose: bool) -> dict[str, Repair]:
    """The rows of FeatCal."""
    drawn = {
        count: {task: study.calibration(task, count, stream(seed, f"calibration {task}")) for task in study.tasks}
        for count in (CHOSEN_WITH if choose else study.counts)
    }
    if choose:
        return {f"{name}, {n}": (each, settings) for name, settings in study.grid.items() for n, each in drawn.items()}
    rows = {f"FeatCal {count}": batches for count, batches in drawn.items()}
    rows |= study.variants(experts, drawn[study.counts[-1]])
    return {row: (batches, study.settings) for row, batches in rows.items()}


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
    low, found, closed = arithmetic(SCALING), {}, {}
    for metric in study.metrics:
        full = [{row: _with_mean(each[metric]) for row, each in rows.items()} for rows in runs]
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


def _with_mean(row: Mapping[str, float]) -> dict[str, float]:
    return {**row, "mean": statistics.fmean(row.values())}


def gap_closed(value: float, merged: float, experts: float) -> float:
    """How far `value` is on the way from the merge to the experts; below 0 where it is worse than the merge."""
    return (value - merged) / (experts - merged)


def mean_and_std(numbers: Sequence[float]) -> dict[str, float]:
    return dict(zip(("mean", "std"), spread(numbers), strict=True))


def lines(results: Mapping[str, Any], metric: str, digits: int) -> list[dict[str, str]]:
    """Rows of models, columns of tasks."""
    found = []
    for model, columns in results["scores"][metric].items():
        line = {f"{results['part']} {metric}": model}
        line |= {column: f"{cell['mean']:.{digits}f}" for column, cell in columns.items()}
        line["mean"] += f" ± {columns['mean']['std']:.{digits}f}"
        closed = results["gap_closed"][metric].get(model)
        found.append(line | {"gap closed": f"{closed['mean']:.0%}" if closed else ""})
    return found


def show(results: Mapping[str, Any], study: Study) -> str:
    """A table a metric."""
    return "\n".join(table("", lines(results, metric, digits)) for metric, digits in study.metrics.items())
