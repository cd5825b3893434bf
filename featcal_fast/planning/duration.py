"""How long something will take, as well as that is known: two ends, in seconds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# The unit that a time is told in is the first in which it is at most so many of them.
UNITS = (("s", 1, 600), ("min", 60, 120), ("h", 3600, 72), ("days", 86400, math.inf))
SHORT = 10  # seconds; what takes less is not worth two ends


@dataclass(frozen=True)
class Duration:
    """From one time to another.

    Attributes:
        low, high: seconds.
        source: how that is known, a few words.
    """

    low: float
    high: float
    source: str

    def __str__(self) -> str:
        """`150 to 210 s`, in two digits; the low end is rounded down, the high one up, or `under 60 s`."""
        if self.high <= SHORT:
            return f"under {SHORT} s"
        unit, size = next((unit, size) for unit, size, most in UNITS if self.high <= most * size)
        if self.low == self.high:
            return f"{_two_digits(self.low / size, round)} {unit}"
        high = f"{_two_digits(self.high / size, math.ceil)} {unit}"
        if self.low < min(size, self.high / 10):
            return f"under {high}"
        return f"{_two_digits(self.low / size, math.floor)} to {high}"


def _two_digits(number: float, to_whole: Callable[[float], int]) -> str:
    """A number's first two digits: `1.5`, `15`, `150`, `1,500`."""
    if math.isinf(number):
        return "inf"
    step: float = 10.0 ** max(-1, math.floor(math.log10(number)) - 1) if number > 0 else 0.1
    rounded = to_whole(round(number / step, 6)) * step
    return f"{rounded:,.0f}" if step >= 1 else f"{rounded:.1f}"
