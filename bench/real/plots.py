"""What calibration gains on the real models, over the number of samples."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.harness.plots import plain, plot
from bench.real.units import ARITHMETIC, EXPERTS

COLOURS = {"preset": "C0", "chosen": "C2"}


def draw(path: Path) -> None:
    """Both studies' results, which lie beside `path`, side by side."""
    found = [json.loads((path.parent / f"real-{name}.json").read_text()) for name in ("lm", "encoder")]
    plot(path, (9.6, 4.0), *(lambda axes, each=each: _study(axes, each) for each in found))


def _study(axes: Any, results: Mapping[str, Any]) -> None:
    form, scale = next(iter(results["forms"])), results["scale"]
    rows = results["forms"][form]["rows"]
    counts: set[int] = set()
    for settings, colour in COLOURS.items():
        points = points_of(rows, settings)
        counts |= set(points)
        values = [(scale * row["mean"], 2 * scale * row["differences"][ARITHMETIC]["error"]) for row in points.values()]
        looks = {"color": colour, "marker": "o", "capsize": 3, "label": f"FeatCal, {settings} settings"}
        axes.errorbar(list(points), [mean for mean, _ in values], [error for _, error in values], **looks)
    for key, style in ((ARITHMETIC, ":"), ("TIES", "-."), (EXPERTS, "--")):
        label = {ARITHMETIC: "task arithmetic, tuned", "TIES": "TIES, tuned", EXPERTS: "each task's own expert"}[key]
        axes.axhline(scale * rows[key]["mean"], color="0.35", linestyle=style, label=label)
    axes.set_xscale("log", base=2)
    plain(axes.xaxis, sorted(counts))
    seeds = results["forms"][form]["seeds"]
    axes.set(xlabel="unlabelled texts a task", ylabel=results["measure"], title=f"{results['study']}, {seeds} seeds")


def points_of(rows: Mapping[str, Any], settings: str) -> dict[int, Any]:
    """Rows of FeatCal, by the number of samples."""
    ending = "" if settings == "preset" else f", {settings}"
    return {int(match[1]): row for key, row in rows.items() if (match := re.fullmatch(rf"FeatCal (\d+){ending}", key))}
