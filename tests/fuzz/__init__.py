"""Random damage to what is read; see README.md."""

from __future__ import annotations

from typing import Any


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every list or mapping in a document with each of its indices or keys, from the outermost on."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [place for key in keys for place in ((value, key), *places(value[key]))]
