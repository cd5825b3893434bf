"""Regular expressions from recipes and adapters: some take longer than the universe has been there."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

from featcal_fast.errors import shown
from featcal_fast.untrusted.limits import LimitError, ProgramError, limited

SECONDS = 1
LENGTH, PAIRS = 10_000, 1_000_000  # of patterns without repetitions, and of them with names, that take no time


class PatternError(ValueError):
    """A text is no regular expression, or one that takes too long; says which."""


def full_matches(patterns: Sequence[str], names: Sequence[str]) -> list[list[bool]]:
    """Which names each pattern matches as a whole.

    Raises:
        PatternError: a pattern is no regular expression, or takes too long.
    """
    short = sum(map(len, patterns)) <= LENGTH and len(patterns) * len(names) <= PAIRS
    if short and not any(each in pattern for pattern in patterns for each in "*+?{("):  # nothing in it can take long
        return _matches(patterns, names)
    try:
        found: list[list[bool]] = limited(lambda: _matches(patterns, names), SECONDS)
    except LimitError as error:
        which = "a regular expression such as " if len(patterns) > 1 else ""
        raise PatternError(f"{which}{shown(max(patterns, key=len))}: {error}") from None
    except ProgramError as error:
        raise PatternError(error.text) from None
    return found


def _matches(patterns: Sequence[str], names: Sequence[str]) -> list[list[bool]]:
    found = []
    for pattern in patterns:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of `[[`, which means what it always has
                expression = re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise PatternError(f"{shown(pattern)} is not a regular expression: {error}") from None
        found.append([expression.fullmatch(name) is not None for name in names])
    return found
