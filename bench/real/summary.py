"""A study's rows, of all seeds, as what is kept in `bench/results`, and as what is printed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.harness.results import Rows
from bench.harness.tables import spread, table
from bench.real.paired import HeldOut, difference
from bench.real.units import ANCHORS, ARITHMETIC, BASE, EXPERTS, ITEMS, Unit

SURE = 2.0  # standard errors


def summary(units: Mapping[Unit, Rows], lower_is_better: bool) -> dict[str, Any]:
    """By form: every row that all of its seeds have, as means over seeds.

    A row has `scores` by task, their `mean` and its standard deviation over seeds, `differences` to other rows with
    their standard errors, the share of the gap from the base to the experts that is `closed`, `apart` from the tasks
    what it does elsewhere, and what it `took`, the mean.
    """
    forms: dict[str, list[Rows]] = {}
    for unit, rows in units.items():
        forms.setdefault(unit.form, []).append(rows)
    return {
        form: {
            "seeds": len(runs),
            "tuned": _tuned(runs),
            "rows": _rows(runs, -1.0 if lower_is_better else 1.0),
        }
        for form, runs in forms.items()
    }


def _rows(runs: Sequence[Rows], better: float) -> dict[str, Any]:
    measured = runs[0][ITEMS]  # the same of all seeds
    test, apart = HeldOut(measured["sizes"], measured["files"]), measured["apart"]
    tasks = HeldOut({task: size for task, size in test.sizes.items() if task not in apart}, test.files)
    found: dict[str, Any] = {}
    for key in runs[0]:
        if key == ITEMS or not all(key in rows for rows in runs):
            continue
        items = [rows[key]["items"] for rows in runs]
        by_seed = [tasks.scores(each) for each in items]
        means = [statistics.fmean(each.values()) for each in by_seed]
        row: dict[str, Any] = {
            "scores": {task: statistics.fmean(each[task] for each in by_seed) for task in tasks.sizes},
            "mean": statistics.fmean(means),
            "std": spread(means)[1],
            "differences": {},
        }
        for other in (BASE, ARITHMETIC, *ANCHORS):
            if other != key and all(other in rows for rows in runs):
                lead, error = difference(tasks, items, [rows[other]["items"] for rows in runs])
                row["differences"][other] = {"mean": lead, "error": error, "better": better * lead > SURE * error}
        ends = [
            [statistics.fmean(tasks.scores(rows[end]["items"]).values()) for end in (BASE, EXPERTS)] for rows in runs
        ]
        row["closed"] = statistics.fmean(
            (mean - base) / (own - base) for mean, (base, own) in zip(means, ends, strict=True)
        )
        row["apart"] = _apart(key, runs, test)
        if all("took" in rows[key] for rows in runs):
            row["took"] = _took([rows[key]["took"] for rows in runs])
        found[key] = row
    return found


def _apart(key: str, runs: Sequence[Rows], test: HeldOut) -> dict[str, Any]:
    """What is measured apart from the tasks, and how far that is from the base's."""
    found = {}
    for name in runs[0][ITEMS]["apart"]:
        if all(name in rows[key]["items"] for rows in runs):
            one = HeldOut({name: test.sizes[name]}, {name: test.files[name]})
            items = [rows[key]["items"] for rows in runs]
            value = statistics.fmean(one.scores(each)[name] for each in items)
            lead, error = difference(one, items, [rows[BASE]["items"] for rows in runs])
            found[name] = {"value": value, "difference": lead, "error": error}
    return found


def _took(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    planned = [run["plan"] for run in runs]
    return {
        "seconds": statistics.fmean(run["seconds"] for run in runs),
        "peak_gib": max(run["peak_gib"] for run in runs),
        "planned_gib": max(plan["host"] for plan in planned),
        "tflop": statistics.fmean(plan["TFLOP"] for plan in planned),
    }


def _tuned(runs: Sequence[Rows]) -> dict[str, list[Any]]:
    """What was chosen on validation by each seed, of the rows that choose."""
    return {
        key: [rows[key]["validation"] for rows in runs]
        for key in runs[0]
        if all("validation" in rows.get(key, {}) for rows in runs)
    }


def lines(results: Mapping[str, Any], form: str, what: str) -> list[dict[str, str]]:
    """A form's rows for a table: what is better than task arithmetic beyond two standard errors is bold."""
    found, (digits, scale) = [], (results["digits"], results["scale"])
    for key, row in results["forms"][form]["rows"].items():
        line = {what: key} | {task: f"{scale * value:.{digits}f}" for task, value in row["scores"].items()}
        line["mean"] = f"{scale * row['mean']:.{digits}f} ± {scale * row['std']:.{digits}f}"
        apart = row["differences"].get(ARITHMETIC)
        line["from task arithmetic"] = lead(apart, digits, scale) if apart and key not in (BASE, EXPERTS) else ""
        line["gap closed"] = "" if key in (BASE, EXPERTS) else f"{row['closed']:.0%}"
        found.append(line | {name: f"{each['value']:.{digits}f}" for name, each in row["apart"].items()})
    return found


def lead(apart: Mapping[str, Any], digits: int, scale: float) -> str:
    """A difference and its standard error, bold where it is better beyond two of them."""
    text = f"{scale * apart['mean']:+.{digits}f} ± {scale * apart['error']:.{digits}f}"
    return f"**{text}**" if apart["better"] else text


def show(results: Mapping[str, Any]) -> str:
    """For a terminal."""
    return "\n\n".join(
        table(f"{form} experts, {found['seeds']} seeds: {results['measure']}", lines(results, form, ""))
        for form, found in results["forms"].items()
    )
