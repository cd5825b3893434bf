"""What there is to see of drift: over depth, by task, taken apart, by module, and the settings that were picked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from featcal_fast.reporting.charts import Curve, Heat, Panel, shown
from featcal_fast.reporting.splits import CALIBRATED, MERGED, LayerSplit, Split

UNIT = "drift (share of the expert's norm)"


@dataclass(frozen=True)
class Charts:
    """Of a report.

    Attributes:
        drift: over depth, the mean over tasks.
        split: of each model, its parts.
        tasks: drift over depth of each task, in their order, all on one scale.
        removed: share of each linear module's error that calibration removed; None where nothing was compared.
        picked: the ridge_lambda of each linear module; None where none was chosen.
    """

    drift: Panel
    split: list[Panel]
    tasks: list[Panel]
    removed: Heat | None = None
    picked: Heat | None = None


def charts(layers: Sequence[LayerSplit]) -> Charts:
    """The charts of a report's `layers`, at least one."""
    models = [MERGED, CALIBRATED] if layers[-1].calibrated else [MERGED]
    numbers, stages = [layer.index for layer in layers], _stages(layers)

    def panel(title: str, curves: Sequence[Curve], stacked: Sequence[Curve] = (), ends: Sequence[float] = ()) -> Panel:
        return Panel(title, UNIT, numbers, curves, stacked, stages, tuple(ends))

    def curve(model: str, splits: Iterable[Split]) -> Curve:
        return Curve(model, model, [each.drift for each in splits])

    means = {model: [layer.mean(model) for layer in layers] for model in models}
    by_task = {
        task: [curve(model, [layer.splits(model)[task] for layer in layers]) for model in models]
        for task in layers[-1].merged
    }
    seen = [each for found in by_task.values() for one in found for each in shown(one.values)]
    parts = {model: _parts(means[model]) for model in models}
    ends = [end for each in parts.values() for end in panel("", (), each).limits]
    return Charts(
        panel("Drift over depth", [curve(model, means[model]) for model in models]),
        [panel(f"The {model} model's drift, taken apart", (), each, ends) for model, each in parts.items()],
        [panel(task, found, ends=[max(seen, default=0.0)]) for task, found in by_task.items()],
        _removed(layers, numbers, stages),
        _picked(layers, numbers, stages),
    )


def _parts(means: Sequence[Split]) -> list[Curve]:
    return [
        Curve("local mismatch", "local", [each.local_share for each in means]),
        Curve("upstream propagation", "upstream", [each.upstream_share for each in means]),
    ]


def _stages(layers: Sequence[LayerSplit]) -> dict[str, int]:
    """The first layer of each list of blocks, where there are several."""
    found: dict[str, int] = {}
    for number, layer in enumerate(layers):
        found.setdefault(layer.path.rpartition(".")[0], number)
    return found if len(found) > 1 else {}


def _removed(layers: Sequence[LayerSplit], numbers: Sequence[int], stages: dict[str, int]) -> Heat | None:
    rows = list(dict.fromkeys(module for layer in layers for module in layer.modules))
    if not rows:
        return None
    cells = {(module, number): layer for number, layer in enumerate(layers) for module in layer.modules}
    return Heat(
        "What calibration removed of each module's error",
        rows,
        numbers,
        {cell: layer.removed(cell[0]) for cell, layer in cells.items()},
        {cell: layer.kept[cell[0]] for cell, layer in cells.items() if cell[0] in layer.kept},
        stages,
    )


def _picked(layers: Sequence[LayerSplit], numbers: Sequence[int], stages: dict[str, int]) -> Heat | None:
    rows = list(dict.fromkeys(module for layer in layers for module in layer.picked))
    if not rows:
        return None
    values = {
        (module, number): math.log10(value) if value > 0 else math.nan
        for number, layer in enumerate(layers)
        for module, value in layer.picked.items()
    }
    return Heat("ridge_lambda of each module, as it was chosen", rows, numbers, values, stages=stages, powers=True)
