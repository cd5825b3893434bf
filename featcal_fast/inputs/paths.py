"""Paths as users write them: in a recipe, on the command line, from Python."""

from __future__ import annotations

from pathlib import Path, PurePath

from featcal_fast.errors import RecipeError, shown

LONGEST, LONGEST_NAME = 4095, 255  # bytes that Linux allows


def checked_path(key: str, text: object) -> Path:
    """A path, with the home that a `~` stands for; whether something is there is for others to say.

    Args:
        key: what the text stands under, for errors.
        text: a text or a path.

    Raises:
        RecipeError: it is neither, empty, too long, holds what no path can (a null byte, half a character), or names
            no home.
    """
    found = str(text) if isinstance(text, PurePath) else text
    if not isinstance(found, str) or not found:
        raise RecipeError(f"{key}: found {shown(text)}, expected a path")
    if "\0" in found:
        raise RecipeError(f"{key}: found {shown(found)}, expected a path; no path holds a null byte")
    try:
        data = found.encode(errors="surrogateescape")  # as the operating system has names that are not in UTF-8
    except UnicodeEncodeError as error:
        raise RecipeError(f"{key}: found {shown(found)}, expected a path of whole characters") from error
    if len(data) > LONGEST or max(map(len, data.split(b"/"))) > LONGEST_NAME:
        raise RecipeError(
            f"{key}: found {shown(found)}, expected a path of at most {LONGEST} bytes, {LONGEST_NAME} for each name"
        )
    try:
        return Path(found).expanduser()
    except RuntimeError as error:
        raise RecipeError(f"{key}: {shown(found)} names no home that is there: {error}; write the path out") from error


def check_text(key: str, value: object) -> None:
    """Refuse halves of characters in what was written as a text; names that an operating system gives may have them.

    Raises:
        RecipeError: there are some.
    """
    try:
        str.encode(value if isinstance(value, str) else "")
    except UnicodeEncodeError as error:
        raise RecipeError(f"{key}: found {shown(value)}, expected whole characters, as UTF-8 has them") from error
