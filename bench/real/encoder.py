"""The study of a sentence encoder: all-MiniLM-L6-v2 and an expert a task, measured by heads that are frozen.

A unit is a fine-tuning seed. The scalings of task arithmetic and of TIES are tuned on the validation part by each unit;
FeatCal's settings were compared there once, with a seed of their own (`choose`). Calibration, Surgery and ProbSurgery
are given the same unlabelled texts of the training part.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

import featcal_fast as ff
from bench import surgery
from bench.language.study import CHOSEN_SEED
from bench.mergers import Pool, Ties, task_arithmetic, ties
from bench.real import texts
from bench.real.finetune_encoder import Training, features
from bench.real.models_encoder import Given, Line, Operations, calibrated, given, mean, pool_of
from bench.real.repairs import Repair, compare, named, with_held_out
from bench.real.sources import SOURCES, base_encoder
from bench.real.tasks import tasks
from bench.real.units import ANCHORS, ARITHMETIC, BASE, EXPERTS, ITEMS, TIES, Rows, Unit

NAME, FILES, LOWER_IS_BETTER = "encoder", ("encoder", "models_encoder", "finetune_encoder", "finetune_lm"), False
TITLE, MEASURE, DIGITS, SCALE = "all-MiniLM-L6-v2", "accuracy on test texts, %", 1, 100
FORM, SEEDS, COUNTS = "full", (0, 1, 2), (8, 32, 128, 256)  # samples a task
SCALINGS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)  # of task arithmetic, compared on validation
TIES_SCALINGS = (0.5, 1.0, 1.5, 2.0)
TRAINING = Training()
MOST = {"test": 1500, "validation": 400}  # texts a task
QUICK, QUICK_MOST = replace(TRAINING, steps=40, head_texts=2000, texts=4000), {"test": 300, "validation": 200}
PRESET = Repair(0.3, ff.Settings())
CHOSEN = Repair(0.3, ff.Settings(0.01, 3.0, 0.6))  # the best of the grid (`choose`)
CHOSEN_WITH = (32, 128)  # samples a task, when settings are compared
GRID = [  # compared on the validation part
    PRESET,
    *(
        Repair(scaling, ff.Settings(ridge, rho, alpha))
        for scaling, ridge, rho, alpha in (
            (0.3, 0.05, 2.0, 0.6),
            (0.3, 0.05, 2.0, 1.0),
            (0.3, 0.01, 2.0, 0.1),
            (0.3, 0.01, 2.0, 0.3),
            (0.3, 0.01, 2.0, 0.6),
            (0.3, 0.01, 2.0, 1.0),
            (0.3, 0.01, 1.0, 0.6),
            (0.3, 0.01, 3.0, 0.6),
            (0.3, 0.001, 2.0, 0.6),
            (0.3, 0.3, 2.0, 0.6),
            (0.3, 1.0, 2.0, 0.6),
            (0.5, 0.01, 1.2, 0.6),
        )
    ),
]


def units(quick: bool) -> list[Unit]:
    return [Unit(NAME, FORM, seed) for seed in (SEEDS[:1] if quick else SEEDS)]


def describe(quick: bool) -> dict[str, Any]:
    """Everything that was chosen."""
    return {
        "training": asdict(QUICK if quick else TRAINING),
        "most_texts": QUICK_MOST if quick else MOST,
        "preset": asdict(PRESET),
        "chosen": asdict(CHOSEN),
        "samples": list(_counts(quick)),
        "scalings": list(SCALINGS),
        "ties_scalings": list(TIES_SCALINGS),
        "surgery and probsurgery": asdict(surgery.Training()),
    }


def fingerprint(archives: Mapping[str, Path]) -> dict[str, str]:
    """Of what base and texts are from; the standard library's differ by Python's version."""
    found = {name: SOURCES[name].sha256 for name in sorted(archives)}
    return found | {"texts": texts.fingerprint(tasks(archives))}


def prepare(archives: Mapping[str, Path], folder: Path) -> None:
    """The base, which all units start from."""
    base_encoder(archives, folder)


def run(unit: Unit, archives: dict[str, Path], folder: Path, rows: Rows, quick: bool) -> None:
    """Every row of a seed."""
    by = _given(archives, folder, unit.seed, quick)
    rows.measure(ITEMS, lambda: _items(by))
    _merges(by, pool_of(by), rows, quick)
    gc.collect()  # calibration has the memory for itself
    for repair, ending in ((PRESET, ""), (CHOSEN, ", chosen")):
        for count in _counts(quick):
            rows.measure(f"FeatCal {count}{ending}", lambda r=repair, n=count: _calibrated(by, r, n))  # type: ignore[misc]


def _items(by: Given) -> dict[str, Any]:
    by.experts()  # trained now, so that this row's seconds have it
    sizes = {task: [1] * len(parts["test"].ids) for task, parts in by.texts.items()}
    files = {task: by.tasks[task].files["test"][: len(each)] for task, each in sizes.items()}
    return {"items": {}, "sizes": sizes, "files": files, "apart": []}


def _merges(by: Given, pool: Pool, rows: Rows, quick: bool) -> None:
    """The rows of what is made without FeatCal."""

    def test(model: nn.Module) -> dict[str, Any]:
        return {"items": by.measured(model, "test")}

    def own() -> dict[str, Any]:
        found = {task: features(model, by.texts[task]["test"].ids) for task, model in pool.experts.items()}
        return {"items": by.right(found, "test")}

    added = Line(pool.base, task_arithmetic(pool, 1.0))
    rows.measure(BASE, lambda: test(pool.base))
    rows.measure(EXPERTS, own)
    rows.measure(ARITHMETIC, lambda: _tuned(by, added, SCALINGS))
    for key, repair in zip(ANCHORS, (PRESET, CHOSEN), strict=True):
        rows.measure(key, lambda r=repair: test(added.at(r.anchor)))  # type: ignore[misc]
    rows.measure(TIES, lambda: _tuned(by, Line(pool.base, ties(pool, Ties(scaling=1.0))), TIES_SCALINGS))
    operations = Operations(by, pool, added.at(CHOSEN.scaling))
    for count in (32,) if quick else (32, 256):
        for kind in surgery.MODULES:
            rows.measure(f"{kind} {count}", lambda k=kind, n=count: operations.row(k, n))  # type: ignore[misc]


def _tuned(by: Given, models: Line, scalings: Sequence[float]) -> dict[str, Any]:
    """The row at the scaling that is best on the validation part, the smaller one of equals."""
    curve = {scaling: mean(by.measured(models.at(scaling), "validation")) for scaling in scalings}
    best = max(curve, key=lambda scaling: curve[scaling])
    return {
        "items": by.measured(models.at(best), "test"),
        "validation": {"scaling": best, "curve": {f"{scaling:g}": value for scaling, value in curve.items()}},
    }


def _calibrated(by: Given, repair: Repair, count: int) -> dict[str, Any]:
    model, found = calibrated(by, repair, count)
    return {"items": by.measured(model, "test"), **found}


def choose(archives: dict[str, Path], folder: Path, rows: Rows, quick: bool) -> dict[str, Any]:
    """Repairs compared on the validation part, with a seed of their own."""
    by = _given(archives, folder, CHOSEN_SEED, quick)
    pool = pool_of(by)
    added = Line(pool.base, task_arithmetic(pool, 1.0))

    def score(model: nn.Module) -> dict[str, Any]:
        found = by.measured(model, "validation")
        return {"tasks": {task: statistics.fmean(items) for task, items in found.items()}, "mean": mean(found)}

    plain = {f"task arithmetic {s:g}": rows.measure(f"{s:g}", lambda s=s: score(added.at(s))) for s in (0.0, *SCALINGS)}  # type: ignore[misc]

    def tried(repair: Repair, count: int) -> dict[str, Any]:
        model, found = calibrated(by, repair, count)
        return {**score(model), **found}

    counts = (8,) if quick else CHOSEN_WITH
    found, held_out = (compare(grid, counts, rows, tried, max) for grid in (named(GRID), with_held_out(CHOSEN)))
    return {
        "study": TITLE,
        "measure": "accuracy on validation texts, %",
        "digits": DIGITS,
        "scale": SCALE,
        "form": FORM,
        "seed": by.seed,
        **describe(quick),
        **found,
        "scores": plain | found["scores"],
        "with held-out samples": held_out,
    }


def _given(archives: Mapping[str, Path], folder: Path, seed: int, quick: bool) -> Given:
    return given(archives, folder, seed, QUICK if quick else TRAINING, QUICK_MOST if quick else MOST)


def _counts(quick: bool) -> tuple[int, ...]:
    return (32,) if quick else COUNTS
