"""Charts as SVG: a text, the same on every machine, without a library that draws.

Ink is `currentColor`, and what has a meaning has it as its class too, so that a page may choose other colours for a
dark screen. What is hovered over says its values (`<title>`), without a script.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from featcal_fast.errors import printable
from featcal_fast.reporting.charts import COLOURS, Curve, Heat, Panel, numbered, short_names, stack

RIGHT, TOP, BOTTOM = 16, 20, 48  # margins, in pixels
LEGEND = 20  # pixels above the rest, where there is one
PAGE = 920  # pixels that a heat map's cells may take, unless there are very many
HOVERS = 2000  # layers that can be hovered over, on a page: more would make it large
NAME = 28  # characters of a module's name that are shown
ROW = 24  # pixels of a heat map's row


def panel_svg(panel: Panel, width: int = 640, height: int = 360, *, alone: bool = False, hover: bool = True) -> str:
    """A panel, without its title.

    Args:
        panel: what to draw, of at least one layer.
        width, height: pixels.
        alone: whether it is a document of its own, on white.
        hover: whether each layer says its values when it is hovered over.
    """
    return "\n".join([*_Canvas(panel, width, height).draw(alone, hover), "</svg>"]) + "\n"


class _Canvas:
    """Where a panel's values are in a picture."""

    def __init__(self, panel: Panel, width: int, height: int) -> None:
        self.panel, self.width, self.height = panel, width, height
        self.low, self.high = panel.limits
        self.left = 64 if width > 300 else 48
        self.small = width < 300
        named = panel.stacked or any(curve.name for curve in panel.curves)
        self.top, self.foot = TOP + (LEGEND if named else 0), height - (34 if self.small else BOTTOM)

    def x(self, number: float) -> float:
        count, inner = len(self.panel.layers), self.width - self.left - RIGHT - 24
        if self.panel.stacked:
            return self.left + 12 + inner * (number + 0.5) / count
        return self.left + 12 + (inner * number / (count - 1) if count > 1 else inner / 2)

    def y(self, height: float) -> float:
        return self.foot - (self.foot - self.top) * ((height - self.low) / (self.high - self.low))

    def draw(self, alone: bool, hover: bool) -> Iterator[str]:
        yield opening(self.width, self.height, alone, self.panel.title)
        if alone:
            yield f'<rect width="{self.width}" height="{self.height}" fill="#fff"/>'
        yield from self._axes()
        yield from self._bars()
        for curve in sorted(self.panel.curves, key=lambda each: not each.faint):
            yield from self._curve(curve)
        yield from self._legend()
        if hover:
            yield from self._hovers()

    def _axes(self) -> Iterator[str]:
        panel, every = self.panel, 5 if self.small else 16
        edge = self.width - RIGHT
        for value, text in panel.ticks:
            y = self.y(value)
            strength = ' stroke-opacity=".15"' if value else ""
            yield f'<path d="M{self.left} {y:.1f}H{edge}" stroke="currentColor"{strength}/>'
            yield f'<text x="{self.left - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        for number in numbered(len(panel.layers), every):
            yield _text(self.x(number), self.foot + 16, str(panel.layers[number]), 'text-anchor="middle"')
        for name, first in panel.stages.items():
            at = self.x(first - 0.5) if first else self.left
            if first:
                yield f'<path d="M{at:.1f} {self.top}V{self.foot}" stroke="currentColor" stroke-dasharray="3 3"/>'
            yield _text(at + 4, self.top - 4, name, 'fill-opacity=".7"')
        middle = (self.left + edge) / 2
        yield _text(middle, self.height - (4 if self.small else 10), "layer", 'text-anchor="middle"')
        if not self.small:
            half = (self.top + self.foot) // 2
            yield _text(16, half, panel.unit, f'text-anchor="middle" transform="rotate(-90 16 {half})"')

    def _bars(self) -> Iterator[str]:
        count = len(self.panel.layers)
        wide = min(40.0, 0.8 * (self.width - self.left - RIGHT - 24) / count)
        for number in range(count if self.panel.stacked else 0):
            for part, start, stop in stack(self.panel.stacked, number)[0]:
                top, bottom = sorted((self.y(start), self.y(stop)))
                yield (
                    f'<rect class="{part.kind}" x="{self.x(number) - wide / 2:.1f}" y="{top:.1f}" width="{wide:.1f}" '
                    f'height="{bottom - top:.1f}" fill="{COLOURS[part.kind]}"/>'
                )

    def _curve(self, curve: Curve) -> Iterator[str]:
        colour = f'class="{curve.kind}" stroke="{COLOURS[curve.kind]}" fill="none"'
        look = 'stroke-width="1" stroke-opacity=".3"' if curve.faint else 'stroke-width="1.8"'
        radius = 3 if len(self.panel.layers) <= 40 else 1.5
        for part in self.panel.segments(curve.values):
            points = [f"{self.x(number):.1f},{self.y(value):.1f}" for number, value in part]
            if len(points) > 1:
                yield f'<polyline points="{" ".join(points)}" {colour} {look}/>'
            if not curve.faint and (not self.small or len(points) == 1):
                for x, y in (each.split(",") for each in points):
                    yield f'<circle class="{curve.kind}" cx="{x}" cy="{y}" r="{radius}" fill="{COLOURS[curve.kind]}"/>'

    def _legend(self) -> Iterator[str]:
        """Above the curves, from the left; what has no name is not in it."""
        x = float(self.left)
        for part in self.panel.stacked:
            colour = COLOURS[part.kind]
            yield f'<rect class="{part.kind}" x="{x}" y="4" width="12" height="12" fill="{colour}"/>'
            yield _text(x + 17, 14, part.name)
            x += 32 + 7 * len(part.name)
        for curve in self.panel.curves:
            if curve.name:
                yield (f'<path class="{curve.kind}" d="M{x} 10h20" stroke="{COLOURS[curve.kind]}" stroke-width="1.8"/>')
                yield _text(x + 25, 14, curve.name)
                x += 40 + 7 * len(curve.name)

    def _hovers(self) -> Iterator[str]:
        half = (self.x(1) - self.x(0)) / 2 if len(self.panel.layers) > 1 else 20.0
        for number, layer in enumerate(self.panel.layers):
            values = [
                f"{curve.name or curve.kind} {value:.4g}"
                for curve in (*self.panel.curves, *self.panel.stacked)
                if not curve.faint and (value := curve.values[number]) is not None
            ]
            said = safe(f"layer {layer}: " + ", ".join(values))
            place = f'x="{self.x(number) - half:.1f}" y="{self.top}" width="{2 * half:.1f}"'
            yield f'<rect {place} height="{self.foot - self.top}" fill-opacity="0"><title>{said}</title></rect>'


def heat_svg(heat: Heat) -> str:
    """A heat map, without its title, as wide as it needs to be."""
    names = short_names(heat.rows, NAME)
    left = 16 + round(7.2 * max(map(len, names)))
    count = len(heat.layers)
    cell = min(44, max(8, PAGE // count))
    width, foot = max(left + cell * count + RIGHT, left + 330), TOP + ROW * len(heat.rows)
    lines = [opening(width, foot + 92, False, heat.title)]
    for row, (name, short) in enumerate(zip(heat.rows, names, strict=True)):
        y = TOP + ROW * row
        lines.append(_text(left - 8, y + 16, short, 'text-anchor="end"', name))
        for number, layer in enumerate(heat.layers):
            value = heat.values.get((name, number))
            if value is not None:
                lines += _cell(heat, name, layer, value, heat.marked.get((name, number)), left + cell * number, y, cell)
    for number in numbered(count, 24):
        x = left + cell * (number + 0.5)
        lines.append(_text(x, foot + 16, str(heat.layers[number]), 'text-anchor="middle"'))
    for name, first in heat.stages.items():
        x = left + cell * first
        lines.append(_text(x + 2, TOP - 4, name, 'fill-opacity=".7"'))
        if first:
            lines.append(f'<path d="M{x} {TOP - 12}V{foot}" stroke="currentColor"/>')
    lines.append(_text(left + cell * count / 2, foot + 34, "layer", 'text-anchor="middle"'))
    return "\n".join([*lines, *_scale(heat, left, foot + 50), "</svg>"]) + "\n"


def _cell(
    heat: Heat, name: str, layer: int, value: float, reason: str | None, x: float, y: float, cell: int
) -> Iterator[str]:
    said = safe(f"layer {layer}, {name}: {heat.long(value)}{f'; kept: {reason}' if reason else ''}")
    colour = heat.colour(value)
    yield f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{ROW - 1}" fill="{colour}"><title>{said}</title></rect>'
    middle, ink = x + (cell - 1) / 2, "#fff" if heat.strength(value) > 0.55 else "#222"
    if reason:
        place = f'cx="{middle:g}" cy="{y + ROW / 2:g}" r="{min(3, cell // 4)}"'
        yield f'<circle {place} fill="none" stroke="{ink}" pointer-events="none"/>'
    elif cell >= 28:
        yield _text(middle, y + 16, heat.short(value), f'text-anchor="middle" fill="{ink}" pointer-events="none"')


def _scale(heat: Heat, x: float, y: float) -> Iterator[str]:
    """What colours mean."""
    steps, (low, high) = 20, heat.limits
    for number in range(steps + 1):
        colour = heat.colour(low + (high - low) * number / steps)
        yield f'<rect x="{x + 9 * number}" y="{y}" width="9" height="12" fill="{colour}"/>'
    edge = x + 9 * (steps + 1)
    for at, value in ((x, low), ((x + edge) / 2, (low + high) / 2), (edge, high)):
        yield _text(at, y + 27, heat.short(value) + ("" if heat.powers else "%"), 'text-anchor="middle"')
    if heat.marked:
        yield f'<circle cx="{edge + 26}" cy="{y + 6}" r="3" fill="none" stroke="currentColor"/>'
        yield _text(edge + 36, y + 10, "kept merged")


def safe(text: str) -> str:
    """A text in HTML or XML, that may be a stranger's."""
    return escape(printable(text))


def opening(width: float, height: float, alone: bool, title: str) -> str:
    """The beginning of a picture."""
    kind = 'xmlns="http://www.w3.org/2000/svg" color="#333" ' if alone else ""
    return (
        f'<svg {kind}viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{safe(title)}" font-family="sans-serif" font-size="12" fill="currentColor">'
    )


def _text(x: float, y: float, text: str, look: str = "", title: str | None = None) -> str:
    more = "" if title is None or title == text else f"<title>{safe(title)}</title>"
    return f'<text x="{x:.1f}" y="{y:.1f}"{" " + look if look else ""}>{safe(text)}{more}</text>'
