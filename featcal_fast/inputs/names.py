"""What a merge's models are called for short, and which of them a user means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from featcal_fast.errors import RecipeError, named, printable, shown

WORD = re.compile(r"[^-_. ]+")
LEVELS = 8  # names of folders, from the end of a path, that a model may be called by
LONGEST = 60  # characters of a short name
CACHE = "models--"  # what the folder of a model in the hub's cache begins with: models--org--name


@dataclass(frozen=True)
class ModelName:
    """What a model goes by.

    Attributes:
        short: of all models another one.
        full: the last part of its path or hub id; of a model with an adapter, of the adapter's.
        reference: as it is written where it is named.
    """

    short: str
    full: str
    reference: str


def model_names(models: Sequence[tuple[str, str, str | None]]) -> list[ModelName]:
    """Names of models.

    Args:
        models: of each how it is written, and paths or hub ids of the model itself and of an adapter on it.

    Returns:
        In their order. Short names are without the words that all have in common at both ends; where they would be
        alike otherwise, they hold the revision, more of the path, or a number.
    """
    paths = [_parts(model, adapter) for _, model, adapter in models]
    levels = [(1, False), *((count, True) for count in range(1, LEVELS + 1))]
    for count, revised in levels:
        texts = [
            "-".join([*parts[-count:], *([revision] if revised and revision else [])]) for parts, revision in paths
        ]
        short = [_shown(text) for text in _trimmed(texts)]
        if len({each.casefold() for each in short}) == len(short):
            break
    full = [parts[-1] for parts, _ in paths]
    return [
        ModelName(name, last, reference)
        for name, last, (reference, _, _) in zip(_numbered(short), full, models, strict=True)
    ]


def find_name(key: str, names: Sequence[ModelName], what: str) -> ModelName:
    """The model that a user means.

    Args:
        key: its short name, its full one or its reference, in letters of any case; or a part of one short name, or a
            text whose words hold one's: `my-math-data`, but `math` does not mean a model `a`.
        names: of all models.
        what: the option, for errors.

    Raises:
        RecipeError: it is none's, or more than one's.
    """
    wanted = key.strip().casefold()
    for found in (
        [each for each in names if each.short.casefold() == wanted],
        [each for each in names if each.reference.casefold() == wanted],
        [each for each in names if each.full.casefold() == wanted],
        [each for each in names if wanted and (wanted in each.short.casefold() or _within(each.short, key))],
    ):
        if len(found) == 1:
            return found[0]
        if found:
            break
    problem = f"which {len(found)} models may be meant by" if found else "which is no model's name"
    raise RecipeError(f"{what}: found {shown(key)}, {problem}; expected one of {listed(found or names)}")


def _within(short: str, key: str) -> bool:
    """Whether a name's words stand among those of a longer text, side by side."""
    inner, outer = (WORD.findall(text.casefold()) for text in (short, key))
    return any(outer[start : start + len(inner)] == inner for start in range(len(outer) - len(inner) + 1))


def listed(names: Sequence[ModelName]) -> str:
    """Names for an error, each with the reference."""
    return ", ".join(f"{each.short} ({named(each.reference)})" for each in names)


def _parts(model: str, adapter: str | None) -> tuple[list[str], str]:
    """The parts of a path or hub id, and its revision; with an adapter, both parts, each level's model before it."""
    parts, revision = _of_path(model)
    if adapter is not None:
        own, revision = _of_path(adapter)
        levels = zip_longest(reversed(own), reversed(parts))
        parts = [part for level in levels for part in level if part is not None][::-1]
    return parts, revision


def _of_path(text: str) -> tuple[list[str], str]:
    path, _, revision = text.rpartition("@")
    if not path or "/" in revision:
        path, revision = text, ""
    parts = [part for part in path.split("/") if part not in ("", ".", "..", "~")] or [path]
    if len(parts) > 2 and parts[-2] == "snapshots":  # a revision in the hub's cache
        parts, revision = parts[:-2], parts[-1]
    if parts[-1].startswith(CACHE):
        parts[-1:] = parts[-1].removeprefix(CACHE).split("--")
    return parts, revision


def _trimmed(texts: list[str]) -> list[str]:
    """Without the words that all have in common, at the beginning and at the end; something is left of each."""
    words = [list(WORD.finditer(text)) for text in texts]
    if len(texts) < 2 or not all(words):
        return texts
    first = last = 0
    while all(len(each) > first + 1 for each in words) and _same([each[first] for each in words]):
        first += 1
    while all(len(each) > first + last + 1 for each in words) and _same([each[-1 - last] for each in words]):
        last += 1
    return [text[each[first].start() : each[-1 - last].end()] for text, each in zip(texts, words, strict=True)]


def _same(words: list[re.Match[str]]) -> bool:
    return len({word[0].casefold() for word in words}) == 1


def _shown(text: str) -> str:
    """A name that can be shown, of whatever a folder may be called."""
    plain = "".join(each for each in text if each != "\n" and printable(each) == each).strip()
    return plain[:LONGEST].strip() or "model"


def _numbered(names: list[str]) -> list[str]:
    """The same names, or with a number where one was there already."""
    found: list[str] = []
    taken: set[str] = set()
    for name in names:
        number, unique = 1, name
        while unique.casefold() in taken:
            number += 1
            unique = f"{name}-{number}"
        taken.add(unique.casefold())
        found.append(unique)
    return found
