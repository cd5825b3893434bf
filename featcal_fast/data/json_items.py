"""Items of a JSON array of any length: where they end is found without reading what they hold."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featcal_fast import files
from featcal_fast.data.packed import pieces
from featcal_fast.errors import DataError

QUOTE, COMMA = b'",'
STEPS = np.zeros(256, np.int64)  # how much deeper what follows a byte lies
STEPS[[*b"[{"]], STEPS[[*b"]}"]] = 1, -1
MARKS = STEPS != 0
MARKS[COMMA] = True


class Items:
    """The items of a file that is one JSON array.

    Attributes:
        path: the file.
        count: how many there are.

    Raises:
        DataError: the array does not end, or something follows it.
        OSError: an item has more than 16 MiB.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = sum(len(cuts) for _, cuts in _cut(path)) - 1
        if self.count == 1 and not any(item.strip() for _, _, item in self.pick([0])):
            self.count = 0

    def pick(self, drawn: Sequence[int]) -> Iterator[tuple[int, int, bytes]]:
        """Items by their number, in order; fewer where the file has changed.

        Returns:
            That number, the same from 1 on, and the item.
        """
        wanted, at, passed, begun = sorted(drawn), 0, 0, b""
        for block, cuts in _cut(self.path):
            while at < len(wanted) and (end := wanted[at] + 1 - passed) <= len(cuts):
                begin = int(cuts[end - 1]) + 1 if end else 0
                if end == len(cuts):  # in a later block
                    begun += block[begin:]
                    break
                yield wanted[at], wanted[at] + 1, begun + block[begin : int(cuts[end])]
                at, begun = at + 1, b""
            passed += len(cuts)


def _cut(path: Path) -> Iterator[tuple[bytes, npt.NDArray[np.int64]]]:
    """A file's content, and where in it the array begins, its items are parted, and it ends."""
    depth, inside, held, ended, number, length = 0, 0, b"", False, 0, 0
    for piece in pieces(path):
        block = held + piece
        plain = block.replace(rb"\\", b"__").replace(rb"\"", b"__")  # far faster than a pattern
        held = b"\\" if plain.endswith(b"\\") else b""  # which says of the next byte what it is
        block, data = block[: len(block) - len(held)], np.frombuffer(plain, np.uint8)[: len(plain) - len(held)]
        quotes = np.cumsum(data == QUOTE, dtype=np.int64) + inside
        marks = np.flatnonzero(MARKS[data] & (quotes % 2 == 0))
        steps = STEPS[data[marks]]
        depths = depth + np.cumsum(steps)
        ends = marks[depths == 0]
        if ended or len(ends):
            if block[0 if ended else int(ends[0]) + 1 :].strip():
                raise DataError(f"{path}: found more behind the end of its JSON array; expected one array and no more")
            ended = True
        cuts = marks[(depths == 0) | ((depths == 1) & (steps >= 0))]
        yield block, cuts
        if len(marks):
            depth = int(depths[-1])
        if len(data):
            inside = int(quotes[-1]) % 2
        number += len(cuts)
        length = len(block) - int(cuts[-1]) if len(cuts) else length + len(block)
        if length > files.LARGEST and not ended:
            raise OSError(errno.EFBIG, f"item {number} is longer than {files.LARGEST // 2**20} MiB", str(path))
    if not ended:
        raise DataError(f"{path}: its JSON array does not end; copy the file again")
