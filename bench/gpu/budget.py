"""A time to end at, and each section's share of what is left until then."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Mapping
from math import inf


def seconds(text: str) -> float:
    """`12m`, `90s` or `720` as seconds, for a command line."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([sm]?)", text.strip())
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected minutes or seconds, as in 12m, 90s or 720")
    return float(found[1]) * (60 if found[2] == "m" else 1)


class Budget:
    """Time for sections that run one after the other; what one leaves over, those after it have.

    Attributes:
        end: when all must be done.
    """

    def __init__(self, total: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self.end = inf if total is None else now() + total
        self._shares: dict[str, float] = {}
        self._until = self.end

    def share_out(self, shares: Mapping[str, float]) -> None:
        """What is left of the budget is for these sections, in this order."""
        self._shares = dict(shares)

    def begin(self, section: str) -> None:
        """The section's part of what is left, by its share of the shares of all that have not begun."""
        part = self._shares[section] / sum(self._shares.values())
        del self._shares[section]
        self._until = self._now() + max(0.0, self.rest) * part

    @property
    def left(self) -> float:
        """Seconds of the section."""
        return self._until - self._now()

    @property
    def rest(self) -> float:
        """Seconds until the end."""
        return self.end - self._now()
