"""Lines of a file, packed or not: counted without being held, of which there may be a hundred million, and picked."""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featcal_fast import files
from featcal_fast.data.packed import BOM, is_packed, pieces

LINE_FEED = 10
FILLED = np.array([not bytes([each]).isspace() for each in range(256)])  # whether a byte makes its line count
BLANK = b" \t\r\v\f"  # of which a line may be made that does not count


class Lines:
    """The lines of a file that are not blank.

    Attributes:
        path: the file.
        count: how many there are.
    """

    def __init__(self, path: Path) -> None:
        starts, lines, filled = array("q"), array("q"), array("q")
        position = 0
        for block in blocks(path):
            words = np.frombuffer(block.translate(None, BLANK), np.uint8)
            ends = words == LINE_FEED
            starts.append(position)
            lines.append(block.count(b"\n") + (not block.endswith(b"\n")))
            filled.append(int(np.count_nonzero(ends[1:] & ~ends[:-1])) + (len(words) > 0 and not ends[-1]))
            position += len(block)
        # Where each block of whole lines begins, and the last one ends; how many lines it has, and of these not blank.
        self._starts = [*starts, position]
        self._lines, self._filled = np.array(lines, dtype=np.int64), np.array(filled, dtype=np.int64)
        self.path, self.count = path, int(self._filled.sum())

    def pick(self, drawn: Sequence[int]) -> Iterator[tuple[int, int, bytes]]:
        """Lines by their number among those that are not blank, in order; fewer where the file has changed.

        Returns:
            That number, what the line is the how-manieth of the file, from 1 on, and the line.
        """
        first_filled, first_line = np.cumsum(self._filled) - self._filled, np.cumsum(self._lines) - self._lines
        wanted: dict[int, list[int]] = {}
        for i in sorted(drawn):
            wanted.setdefault(int(np.searchsorted(first_filled, i, "right")) - 1, []).append(i)
        for number, block in self._blocks(wanted):
            begins, full = _lines(block)
            for i in wanted[number]:
                place = i - int(first_filled[number])
                if place < len(full):
                    line = int(full[place])
                    found = int(first_line[number]) + line + 1
                    yield i, found, _without_mark(block[int(begins[line]) : int(begins[line + 1])], found)

    def _blocks(self, wanted: Mapping[int, object]) -> Iterator[tuple[int, bytes]]:
        """Blocks of lines by their number: of what is not packed, no others are read."""
        if is_packed(self.path):
            yield from ((number, block) for number, block in enumerate(blocks(self.path)) if number in wanted)
            return
        with closing(files.open_to_read(self.path)) as file:
            for number in wanted:
                start, end = self._starts[number : number + 2]
                yield number, files.read_at(file, end - start, start)


def _without_mark(line: bytes, number: int) -> bytes:
    return line.removeprefix(BOM) if number == 1 else line


def _lines(block: bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where lines begin, and where the last one ends; the numbers of those that are not blank."""
    data = np.frombuffer(block, np.uint8)
    if not len(data):
        return np.zeros(1, np.int64), np.zeros(0, np.int64)
    begins = np.concatenate([[0], np.flatnonzero(data[:-1] == LINE_FEED) + 1])
    return np.append(begins, len(data)), np.flatnonzero(np.logical_or.reduceat(FILLED[data], begins))


def blocks(path: Path) -> Iterator[bytes]:
    """Whole lines of a file, some thousand at a time.

    Raises:
        OSError: a line has more than 16 MiB.
    """
    number, rest = 1, b""
    for piece in pieces(path):
        block = rest + piece
        end = block.rfind(b"\n") + 1
        if end:
            yield block[:end]
            number += block.count(b"\n")
        rest = block[end:]
        if len(rest) > files.LARGEST:
            raise OSError(errno.EFBIG, f"line {number} is longer than {files.LARGEST // 2**20} MiB", str(path))
    if rest:
        yield rest
