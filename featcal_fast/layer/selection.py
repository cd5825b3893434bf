"""What to calibrate, in PEFT's vocabulary: a string is a regular expression, a list holds suffixes of module names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from featcal_fast.errors import RecipeError
from featcal_fast.settings import Patterns, Settings


def matches(name: str, patterns: Patterns) -> bool:
    """Whether a module's full name matches: entirely if `patterns` is a string, by its last parts if it is a list."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in patterns)


def reason_to_keep(name: str, settings: Settings) -> str | None:
    """Why the module of this full name is not to be calibrated, or None."""
    if settings.include is not None and not matches(name, settings.include):
        return "not included"
    if settings.exclude is not None and matches(name, settings.exclude):
        return "excluded"
    return None


def check_patterns(names: Iterable[str], settings: Settings) -> None:
    """Refuse patterns that match nothing: a typing error would go unnoticed.

    Raises:
        RecipeError: names the pattern.
    """
    names = list(names)
    for key in ("include", "exclude"):
        patterns = getattr(settings, key)
        for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
            if not any(matches(name, pattern if isinstance(patterns, str) else (pattern,)) for name in names):
                raise RecipeError(
                    f"settings.{key}: {pattern!r} matches no module inside of the layers; expected a regular "
                    f"expression for a module's full name, or a list of suffixes; a name is {names[0]!r}"
                )
    if all(reason_to_keep(name, settings) for name in names):
        raise RecipeError("settings: include and exclude leave no module to calibrate")
