"""What a picture over layers shows, apart from what draws it: `svg` makes a text of it, `picture` a file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

# Told apart by who sees no red or no green, too, and in grey.
COLOURS = {"merged": "#b0413e", "calibrated": "#2a6f97", "local": "#e69f00", "upstream": "#7b8794"}
BETTER, NEUTRAL, WORSE, UNKNOWN = "#1f5f8b", "#f1f1ee", "#b0413e", "#999999"  # of a heat map
Values = Sequence[float | None]  # a layer each; None where there is none


@dataclass(frozen=True)
class Curve:
    """Values over layers.

    Attributes:
        name: what it is; empty where another curve's name stands for it.
        kind: a key of `COLOURS`.
        values: a layer each.
        faint: whether it is one of many, in the background.
    """

    name: str
    kind: str
    values: Values
    faint: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves, or signed parts that are stacked, over layers.

    Attributes:
        title: of the whole.
        unit: what the values are.
        layers: numbers of the layers.
        curves: over all of it.
        stacked: parts, each a bar a layer; those below zero go down.
        stages: index of the first layer of each list of blocks, by its name; of more than one.
        ends: values that are seen on the axis, whatever is shown, so that several panels have one scale.
    """

    title: str
    unit: str
    layers: Sequence[int]
    curves: Sequence[Curve] = ()
    stacked: Sequence[Curve] = ()
    stages: Mapping[str, int] = field(default_factory=dict)
    ends: tuple[float, ...] = ()

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the largest value on the axis."""
        lines = [each for curve in self.curves for each in shown(curve.values)]
        ends = [end for number in range(len(self.layers)) for end in stack(self.stacked, number)[1]]
        seen = [0.0, *self.ends, *lines, *ends]
        least, largest = min(seen), max(seen)
        step = step_of(max(largest, -least))
        return step * math.floor(least / step + 1e-9), step * max(1, math.ceil(largest / step - 1e-9))

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Marks on the axis, with their text."""
        low, high = self.limits
        step = step_of(max(high, -low))
        return [(each * step, f"{each * step:.4g}") for each in range(round(low / step), round(high / step) + 1)]

    def segments(self, values: Values) -> list[list[tuple[int, float]]]:
        """What is one line each: a stage's values, with numbers of layers from 0 on."""
        cuts = {0, *self.stages.values(), len(self.layers)}
        found: list[list[tuple[int, float]]] = []
        for start, stop in pairwise(sorted(cuts)):
            part: list[tuple[int, float]] = []
            for number in range(start, stop):
                value = values[number]
                if value is not None and math.isfinite(value):
                    part.append((number, value))
                elif part:
                    found, part = [*found, part], []
            found += [part] if part else []
        return found


@dataclass(frozen=True)
class Heat:
    """A value for each layer and module.

    Attributes:
        title: of the whole.
        rows: names of the modules.
        layers: numbers of the layers.
        values: by module and number of a layer from 0 on: shares, of which those above 0 are better.
        marked: of these, which are marked, each with the reason.
        stages: as of `Panel`.
        powers: whether they are not shares, but logarithms to the base of 10.
    """

    title: str
    rows: Sequence[str]
    layers: Sequence[int]
    values: Mapping[tuple[str, int], float]
    marked: Mapping[tuple[str, int], str] = field(default_factory=dict)
    stages: Mapping[str, int] = field(default_factory=dict)
    powers: bool = False

    @cached_property
    def limits(self) -> tuple[float, float]:
        """Values from which on colours are as strong as they get."""
        found = shown(self.values.values()) or [0.0]
        if self.powers:
            return min(found), max(max(found), min(found) + 1)
        largest = max(map(abs, found))
        scale = next((each for each in (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8) if largest <= each), 1.0)
        return -scale, scale

    def colour(self, value: float) -> str:
        """Of a value."""
        if not math.isfinite(value):
            return UNKNOWN
        ends = zip(_parts(NEUTRAL), _parts(BETTER if value > 0 or self.powers else WORSE), strict=True)
        return "#" + "".join(f"{round(a + (b - a) * self.strength(value)):02x}" for a, b in ends)

    def strength(self, value: float) -> float:
        """Of its colour, from 0 to 1."""
        low, high = self.limits
        return min(1.0, (value - low) / (high - low) if self.powers else abs(value) / high)

    def short(self, value: float) -> str:
        """What is written on its colour: per cent, or the power."""
        if not self.powers:
            return f"{100 * value:.0f}".replace("-0", "0")
        text = f"{10**value:.1g}"
        return text if len(text) <= 4 else f"{10**value:.0e}".replace("e-0", "e-").replace("e+0", "e")

    def long(self, value: float) -> str:
        """What is said of it."""
        return f"{10**value:.3g}" if self.powers else f"{value:.1%}"


def drift_panel(layers: Sequence[int], before: Values, after: Values) -> Panel:
    """Each layer's distance to the experts, before and after calibration."""
    curves = [Curve("merged", "merged", before), Curve("calibrated", "calibrated", after)]
    return Panel("Drift to the experts", "drift to the experts", layers, curves)


def stack(parts: Sequence[Curve], number: int) -> tuple[list[tuple[Curve, float, float]], tuple[float, float]]:
    """One layer's bars, each from one height to another; and how far down and up they go."""
    down = up = 0.0
    bars = []
    for part in parts:
        value = part.values[number]
        if value is None or not math.isfinite(value):
            continue
        start = up if value >= 0 else down
        bars.append((part, start, start + value))
        down, up = min(down, start + value), max(up, start + value)
    return bars, (down, up)


def shown(values: Iterable[float | None]) -> list[float]:
    """The values that can be drawn."""
    return [each for each in values if each is not None and math.isfinite(each)]


def step_of(largest: float) -> float:
    """Between marks on an axis: 1, 2 or 5 times a power of ten, so that there are 3 to 8 of them."""
    power = 10.0 ** math.floor(math.log10(largest)) if largest > 1e-300 else 1.0
    return power * next(each for each in (0.2, 0.5, 1.0, 2.0, 5.0) if largest <= 6 * each * power or each == 5.0)


def short_names(names: Sequence[str], most: int) -> list[str]:
    """Names for an axis: of a long one, what is left out is marked by `…`, and two that differ still do.

    Args:
        names: all that are on the axis.
        most: characters of each that there is room for.

    Returns:
        As many names.
    """
    for head in sorted(range(most), key=lambda each: abs(each - most // 3)):
        found = [_short(name, head, most) for name in names]
        if len(set(found)) == len(set(names)):
            return found
    room = most - len(f" {len(names)}")  # they differ where no end of them reaches
    return [f"{_short(name, room // 3, room)} {number}" for number, name in enumerate(names, 1)]


def _short(name: str, head: int, most: int) -> str:
    return name if len(name) <= most else f"{name[:head]}…{name[len(name) - (most - 1 - head) :]}"


def numbered(count: int, most: int) -> range:
    """Which of so many layers have their number written: `most` at most."""
    return range(0, count, max(1, math.ceil(count / most)))


def _parts(colour: str) -> list[int]:
    return [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
