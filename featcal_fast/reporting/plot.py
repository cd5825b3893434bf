"""The drift of every layer as a picture in SVG: a text, the same on every machine, without a library that draws."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from featcal_fast.reporting.report import LayerReport

WIDTH, HEIGHT = 640, 360  # pixels
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 48  # margins
CURVES = (("merged", "#b0413e"), ("calibrated", "#2a6f97"))
TICKS = 16  # layers that are numbered, at most
HEAD = (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
    'font-family="sans-serif" font-size="12" fill="#333">'
)


def drift_svg(layers: Sequence[LayerReport]) -> str:
    """Each layer's distance to the experts, before and after.

    Args:
        layers: of a report, at least one.

    Returns:
        A document in SVG; empty where a drift is not finite, of which there is no picture.
    """
    curves = [[layer.drift_before for layer in layers], [layer.drift_after for layer in layers]]
    largest = max(map(max, curves))
    if not all(map(math.isfinite, curves[0] + curves[1])):
        return ""
    step = _step(largest)
    top = step * max(1, math.ceil(largest / step - 1e-9))
    places = [_across(number, len(layers)) for number in range(len(layers))]
    lines = [HEAD, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>', *_axes(layers, places, step, top)]
    for (_, colour), drifts in zip(CURVES, curves, strict=True):
        points = [f"{x:.1f},{_up(drift, top):.1f}" for x, drift in zip(places, drifts, strict=True)]
        lines.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        lines += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in (each.split(",") for each in points)]
    for number, (name, colour) in enumerate(CURVES):
        y = TOP + 12 + 18 * number
        lines.append(f'<path d="M{LEFT + 14} {y}h24" stroke="{colour}" stroke-width="1.8"/>')
        lines.append(f'<text x="{LEFT + 44}" y="{y + 4}">{name}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _axes(layers: Sequence[LayerReport], places: Sequence[float], step: float, top: float) -> Iterator[str]:
    foot = HEIGHT - BOTTOM
    for number in range(round(top / step) + 1):
        y = _up(number * step, top)
        colour = "#ddd" if number else "#333"
        yield f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{colour}"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number * step:.4g}</text>'
    for x, layer in list(zip(places, layers, strict=True))[:: max(1, math.ceil(len(layers) / TICKS))]:
        yield f'<text x="{x:.1f}" y="{foot + 18}" text-anchor="middle">{layer.index}</text>'
    yield f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">layer</text>'
    middle = (TOP + foot) // 2
    turned = f'x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})"'
    yield f"<text {turned}>drift to the experts</text>"


def _step(largest: float) -> float:
    """Between marks on the axis: 1, 2 or 5 times a power of ten, so that there are 3 to 8 of them."""
    power = 10.0 ** math.floor(math.log10(largest)) if largest > 1e-300 else 1.0
    return power * next(each for each in (0.2, 0.5, 1.0, 2.0, 5.0) if largest <= 6 * each * power or each == 5.0)


def _across(number: int, count: int) -> float:
    inner = WIDTH - LEFT - RIGHT - 24
    return LEFT + 12 + (inner * number / (count - 1) if count > 1 else inner / 2)


def _up(drift: float, top: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (drift / top)
