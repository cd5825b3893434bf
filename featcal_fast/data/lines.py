"""Texts of a `.jsonl` file: the drawn lines of any number of them, each an object of a known kind."""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator
from contextlib import closing
from io import FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featcal_fast import files
from featcal_fast.data.samples import TEXT_KEYS, TEXT_KINDS, Sample, draw, listed
from featcal_fast.errors import DataError
from featcal_fast.untrusted.documents import DocumentError, parse_json

TOGETHER = 2**28  # bytes of all drawn lines
BOM, LINE_FEED = b"\xef\xbb\xbf", 10
FILLED = np.array([not bytes([each]).isspace() for each in range(256)])  # whether a byte makes its line count
BLANK = b" \t\r\v\f"  # of which a line may be made that does not count
BLOCK = 2**18  # bytes that lines are counted in


def read_jsonl(path: Path, samples: int, seed: int) -> list[Sample]:
    """The drawn lines. All are counted before, without holding them: there may be a hundred million."""
    with closing(files.open_to_read(path)) as file:
        before = files.stat(path)
        index = _Index(file)
        drawn = draw(int(index.filled.sum()), samples, seed, path)
        lines = index.pick(file, drawn, path)
        now = files.stat(path)
    if len(lines) < len(drawn) or (before.st_size, before.st_mtime_ns) != (now.st_size, now.st_mtime_ns):
        raise DataError(f"{path}: it changed while it was being read; try again when it is complete")
    parsed = []
    for i in drawn:
        number, line = lines[i]
        parsed.append(_parse(line.removeprefix(BOM) if number == 1 else line, f"{path}, line {number}"))
        if parsed[-1].values.keys() != parsed[0].values.keys():
            raise DataError(
                f"{parsed[-1].where}: found {listed(parsed[-1].values)}, expected {listed(parsed[0].values)} as in "
                f"{parsed[0].where}; give each kind its own file"
            )
    return parsed


class _Index:
    """Where the lines of a file are, block by block.

    Attributes:
        starts: where each block of whole lines begins, and where the last one ends.
        lines: how many each has.
        filled: how many of them are not blank.
    """

    def __init__(self, file: FileIO) -> None:
        starts, lines, filled = array("q"), array("q"), array("q")
        position = 0
        for block in _blocks(file):
            words = np.frombuffer(block.translate(None, BLANK), np.uint8)
            ends = words == LINE_FEED
            starts.append(position)
            lines.append(block.count(b"\n") + (not block.endswith(b"\n")))
            filled.append(int(np.count_nonzero(ends[1:] & ~ends[:-1])) + (len(words) > 0 and not ends[-1]))
            position += len(block)
        self.starts = [*starts, position]
        self.lines, self.filled = np.array(lines, dtype=np.int64), np.array(filled, dtype=np.int64)

    def pick(self, file: FileIO, drawn: list[int], path: Path) -> dict[int, tuple[int, bytes]]:
        """Lines by their number among those that are not blank: the number in the file, and the line."""
        found: dict[int, tuple[int, bytes]] = {}
        together = 0
        first_filled, first_line = np.cumsum(self.filled) - self.filled, np.cumsum(self.lines) - self.lines
        wanted: dict[int, list[int]] = {}
        for i in sorted(drawn):
            wanted.setdefault(int(np.searchsorted(first_filled, i, "right")) - 1, []).append(i)
        for number, inside in wanted.items():
            block = files.read_at(file, self.starts[number + 1] - self.starts[number], self.starts[number])
            begins, full = _lines(block)
            for i in inside:
                place = i - int(first_filled[number])
                if place < len(full):  # else the file has changed
                    line = int(full[place])
                    found[i] = int(first_line[number]) + line + 1, block[int(begins[line]) : int(begins[line + 1])]
                    together += len(found[i][1])
            if together > TOGETHER:
                raise DataError(
                    f"{path}: the lines that were drawn have more than {TOGETHER // 2**20} MiB together; shorten the "
                    "texts, of which no more than max_length tokens are used, or lower samples"
                )
        return found


def _lines(block: bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where lines begin, and where the last one ends; the numbers of those that are not blank."""
    data = np.frombuffer(block, np.uint8)
    begins = np.concatenate([[0], np.flatnonzero(data[:-1] == LINE_FEED) + 1])
    return np.append(begins, len(data)), np.flatnonzero(np.logical_or.reduceat(FILLED[data], begins))


def _blocks(file: FileIO) -> Iterator[bytes]:
    """Whole lines, some thousand at a time."""
    position, number, rest = 0, 1, b""
    while piece := files.read_at(file, BLOCK, position):
        position += len(piece)
        block = rest + piece
        end = block.rfind(b"\n") + 1
        if end:
            yield block[:end]
            number += block.count(b"\n")
        rest = block[end:]
        if len(rest) > files.LARGEST:
            raise OSError(errno.EFBIG, f"line {number} is longer than {files.LARGEST // 2**20} MiB")
    if rest:
        yield rest


def _parse(line: bytes, where: str) -> Sample:
    try:
        values = parse_json(line.decode())
    except (DocumentError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: found invalid JSON; expected one object a line in UTF-8 ({error})") from error
    if not isinstance(values, dict):
        raise DataError(f"{where}: found a JSON {type(values).__name__}; expected an object with {TEXT_KEYS}")
    for kind in TEXT_KINDS:
        if set(kind) == set(values):
            return Sample(where, {key: values[key] for key in kind})
    raise DataError(f"{where}: found the keys {listed(values)}; expected {TEXT_KEYS}, and no other keys")
