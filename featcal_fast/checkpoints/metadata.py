"""What a checkpoint's files say of themselves beside their tensors, as far as a model made of it may repeat it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MOST = 100  # entries
LONGEST = 2**16  # bytes of all entries together
UNTRUE = ("hash", "sha256", "checksum")  # in the names of what is of other weights, once these are calibrated


@dataclass(frozen=True)
class Metadata:
    """Of a checkpoint.

    Attributes:
        index: the `metadata` of its index, plain values only, without sizes; None where it has no index.
        files: the `__metadata__` of its safetensors files, by name.
    """

    index: dict[str, Any] | None = None
    files: dict[str, dict[str, str]] = field(default_factory=dict)


def repeated(found: object) -> dict[str, Any]:
    """Of a stranger's metadata what stays true: plain values, unless there are more than anyone writes.

    Args:
        found: a JSON value.

    Returns:
        Texts, numbers, truth values and null, by name; nothing where `found` is no object, or too large.
    """
    if not isinstance(found, Mapping) or len(found) > MOST:
        return {}
    plain = {name: value for name, value in found.items() if value is None or isinstance(value, (str, int, float))}
    try:
        if sum(len(f"{name}{value}".encode()) for name, value in plain.items()) > LONGEST:
            return {}
    except UnicodeEncodeError:  # halves of characters, which other readers refuse
        return {}
    return {
        name: value
        for name, value in plain.items()
        if name != "total_size" and not any(part in name.lower() for part in UNTRUE)
    }
