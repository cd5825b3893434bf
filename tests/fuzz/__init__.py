"""Random damage to what is read; see README.md."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import yaml


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every list or mapping in a document with each of its indices or keys, from the outermost on."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [place for key in keys for place in ((value, key), *places(value[key]))]


def damaged(
    data: bytes,
    chance: random.Random,
    odd: Sequence[Any],
    counts: Sequence[int],
    wrappers: Sequence[Any],
    added: Sequence[Any],
) -> Any:
    """The values of a YAML document with one of them changed; None where it has none.

    Args:
        data: the document.
        chance: says what is changed, and how.
        odd: what a value may become.
        counts: how often it may be repeated.
        wrappers: keys of a mapping that it may be put into.
        added: keys that a mapping may get.
    """
    try:
        values = yaml.safe_load(data)
        found = places(values)
    except Exception:  # no YAML, or an alias that stands for itself
        return None
    if not found:
        return None
    owner, key = chance.choice(found)
    way = chance.randrange(5)
    if way == 0:
        owner[key] = chance.choice(odd)
    elif way == 1:
        owner[key] = [owner[key]] * chance.choice(counts)
    elif way == 2:
        owner[key] = {chance.choice(wrappers): owner[key]}
    elif way == 3 and isinstance(owner, dict):
        owner[chance.choice(added)] = chance.choice(odd)
    else:
        del owner[key]
    return values
