"""Charts as a file, drawn by matplotlib where that is installed: PNG, PDF or SVG."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

from featcal_fast.errors import FeatCalError
from featcal_fast.reporting.charts import COLOURS, Heat, Panel, numbered, short_names, stack

MISSING = "plots need matplotlib: pip install 'featcal-fast[demo]'"
ACROSS = 2  # panels beside each other, of several
NAME = 60  # characters of a module's name that are shown


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(charts: Sequence[Panel | Heat], path: str | Path) -> None:
    """Draw charts below each other, panels in pairs.

    Args:
        charts: at least one; a heat map takes a row of its own.
        path: the file to write; its suffix says what kind.

    Raises:
        FeatCalError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FeatCalError(MISSING) from error
    rows = _rows(charts)
    heights = [_height(row[0]) for row in rows]
    width = 6.4 if len(charts) == 1 else 6.4 * ACROSS
    figure = Figure(figsize=(width, sum(heights)), layout="constrained", dpi=150 if len(charts) == 1 else 110)
    parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]  # each with its own margins
    for row, part in zip(rows, parts, strict=True):
        for chart, axes in zip(row, part.subplots(1, len(row), squeeze=False)[0], strict=True):
            if len(charts) > 1:
                title = _plain(shorten(chart.title, 80, placeholder="..."))
                axes.set_title(title, fontsize=11, loc="left", pad=16 if chart.stages else 6)
            if isinstance(chart, Heat):
                _draw_heat(part, axes, chart)
            else:
                _draw_panel(axes, chart)
    figure.savefig(path)


def _rows(charts: Sequence[Panel | Heat]) -> list[list[Panel | Heat]]:
    """Panels in pairs; a heat map, and the first panel of several, alone."""
    rows: list[list[Panel | Heat]] = []
    for number, chart in enumerate(charts):
        alone = isinstance(chart, Heat) or number == 0
        open_row = rows and len(rows[-1]) < ACROSS and len(rows) > 1 and not isinstance(rows[-1][0], Heat)
        if alone or not open_row:
            rows.append([chart])
        else:
            rows[-1].append(chart)
    return rows


def _height(chart: Panel | Heat) -> float:
    return 1.4 + 0.24 * len(chart.rows) if isinstance(chart, Heat) else 3.6


def _draw_panel(axes: Any, panel: Panel) -> None:
    count = len(panel.layers)
    for number in range(count if panel.stacked else 0):
        for part, start, stop in stack(panel.stacked, number)[0]:
            name = None if number else part.name
            axes.bar(number, stop - start, 0.8, bottom=start, color=COLOURS[part.kind], label=name)
    for curve in panel.curves:
        look: dict[str, Any]
        look = {"lw": 0.8, "alpha": 0.35} if curve.faint else {"lw": 1.6, "marker": "o" if count <= 40 else "", "ms": 4}
        for number, line in enumerate(panel.segments(curve.values)):
            numbers, heights = zip(*line, strict=True)
            look["label"] = None if number else curve.name or None
            order = 1 if curve.faint else 2
            axes.plot(numbers, heights, color=COLOURS[curve.kind], zorder=order, clip_on=False, **look)
    low, high = panel.limits
    ticks = [each for each in panel.ticks if low <= each[0] <= high]
    named = bool(axes.get_legend_handles_labels()[1])
    top = high + (0.13 * (high - low) if named else 0)  # names are above all values
    axes.set(ylim=(low, top), xlabel="layer", ylabel=panel.unit, xlim=(-0.6, max(count - 0.4, 0.6)))
    axes.set_yticks([value for value, _ in ticks], [text for _, text in ticks])
    if low < 0:
        axes.axhline(0, color="#333", lw=0.8)
    _number_layers(axes, panel)
    axes.spines[["top", "right"]].set_visible(False)
    if named:
        axes.legend(ncols=2, loc="upper left", borderaxespad=0, facecolor="w", edgecolor="w", framealpha=1)


def _draw_heat(figure: Any, axes: Any, heat: Heat) -> None:
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    low, high = heat.limits
    colours = [heat.colour(each) for each in (low, (low + high) / 2, high)]
    nothing = float("nan")
    values = [[heat.values.get((row, number), nothing) for number in range(len(heat.layers))] for row in heat.rows]
    image = axes.imshow(
        values,
        cmap=LinearSegmentedColormap.from_list("heat", colours),
        norm=Normalize(low, high),
        aspect="auto",
        interpolation="none",
    )
    for row, number in heat.marked:
        axes.plot(number, heat.rows.index(row), "o", mfc="none", mec="#333", ms=5)
    axes.set_yticks(range(len(heat.rows)), map(_plain, short_names(heat.rows, NAME)), fontsize=8)
    axes.set_xlabel("layer" + (" (circle: kept its merged weights)" if heat.marked else ""))
    _number_layers(axes, heat)
    figure.colorbar(image, ax=axes, format=lambda value, _: heat.long(value), fraction=0.03, pad=0.01)


def _number_layers(axes: Any, chart: Panel | Heat) -> None:
    places = numbered(len(chart.layers), 16)
    axes.set_xticks(places, [str(chart.layers[place]) for place in places])
    for name, first in chart.stages.items():
        if first:
            axes.axvline(first - 0.5, color="#333", lw=0.8, ls="--")
        axes.annotate(
            _plain(name), (max(first - 0.4, -0.4), 1.02), xycoords=("data", "axes fraction"), fontsize=8, color="#666"
        )


def _plain(text: str) -> str:
    """A text without what would be taken for a formula."""
    return text.replace("$", r"\$")
