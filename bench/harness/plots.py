"""Lines over sizes that double."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def plot(path: Path, size: tuple[float, float], *drawings: Callable[[Any], None]) -> None:
    """Draw side by side, each on axes of its own with a grid and a legend, and write `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=130, layout="constrained")
    for draw, axes in zip(drawings, figure.subplots(1, len(drawings), squeeze=False)[0], strict=True):
        draw(axes)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_png(path)


def plain(axis: Any, ticks: Sequence[int] | None = None) -> None:
    """Numbers as they are on a logarithmic axis, at these places only if they are given."""
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    if ticks is not None:
        axis.set_ticks(ticks)
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())
