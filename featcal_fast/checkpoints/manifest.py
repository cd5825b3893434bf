"""A file of lines that says what is durable: each is on the disk before anything is done that counts on it."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from featcal_fast import files
from featcal_fast.untrusted.documents import parse_json

DIGITS = 16  # of a line's checksum
LARGEST = 2**28  # bytes; a tensor takes some 150


class Manifest:
    """Appends JSON objects, a line each, after those that are there.

    A line that was cut off, or that holds anything else than what was written, ends what is read; the next one written
    takes its place.

    Args:
        path: of the file; made with the first line.

    Attributes:
        entries: of all whole lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self._end = 0
        with suppress(FileNotFoundError):
            for line in files.read_bytes(path, LARGEST).splitlines(keepends=True):
                entry = _parse(line)
                if entry is None:
                    break
                self.entries.append(entry)
                self._end += len(line)

    @property
    def finished(self) -> bool:
        """Whether the last line says so."""
        return bool(self.entries) and self.entries[-1].get("finished") is True

    def append(self, entry: dict[str, Any]) -> None:
        """Write a line and wait until it is on the disk."""
        text = json.dumps(entry)
        line = f"{_checksum(text)} {text}\n".encode()
        new = not self.path.exists()
        file = files.create(self.path) if new else files.open_to_write(self.path)
        try:
            files.truncate(file, self._end)
            files.write_at(file, line, self._end)
            files.sync(file)
        finally:
            files.close(file)
        if new:
            files.sync_folder(self.path.parent)
        self.entries.append(json.loads(text))
        self._end += len(line)


def _parse(line: bytes) -> dict[str, Any] | None:
    with suppress(ValueError):
        checksum, _, text = line.decode().partition(" ")
        if text.endswith("\n") and checksum == _checksum(text[:-1]):
            entry = parse_json(text)
            return entry if isinstance(entry, dict) else None
    return None


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
