"""Rows of a table in text, `.csv` or `.tsv`: a header, then a sample a row, whose fields may be quoted."""

from __future__ import annotations

import csv
import errno
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

from featcal_fast import files
from featcal_fast.data.lines import blocks
from featcal_fast.data.packed import BOM
from featcal_fast.data.samples import listed
from featcal_fast.errors import DataError, told

MOST_COLUMNS = 10_000
SEPARATORS = {".csv": ",;\t|", ".tsv": "\t,;|"}


class Rows:
    """The rows of a file, but for its header; blank lines are none.

    Args:
        path: the file.
        form: `.csv` or `.tsv`.
        known: whether a sample may have such keys.

    Attributes:
        path: the file.
        header: the columns' names.
        count: how many rows there are.

    Raises:
        DataError: it is not UTF-8, or its quotes do not match; it has no header, or one that names a column twice.
        OSError: a row has more than 16 MiB.
    """

    def __init__(self, path: Path, form: str, known: Callable[[Sequence[str]], bool]) -> None:
        self.path = path
        self.header, self._separator = _header(path, SEPARATORS[form], known)
        if twice := [name for name, count in Counter(self.header).items() if name and count > 1]:
            raise DataError(f"{path}, line 1: found the columns {listed(twice)} more than once; name each once")
        self.count = sum(1 for _ in self._all())

    def pick(self, drawn: Sequence[int]) -> Iterator[tuple[int, int, list[str]]]:
        """Rows by their number, in order; fewer where the file has changed.

        Returns:
            That number, the line of the file that the row begins in, from 1 on, and its fields.
        """
        wanted = set(drawn)
        for number, (line, row) in enumerate(self._all()):
            if number in wanted:
                yield number, line, row

    def _all(self) -> Iterator[tuple[int, list[str]]]:
        rows = _rows(self.path, self._separator)
        next(rows, None)  # the header
        return rows


def _header(path: Path, separators: str, known: Callable[[Sequence[str]], bool]) -> tuple[list[str], str]:
    """A file's header by whichever separator it has names that are known; else by the first."""
    first: list[str] | DataError | None = None
    for separator in separators:
        try:
            _, names = next(_rows(path, separator), (1, []))
        except DataError as error:  # where fields are quoted, that may be only because they are parted by another
            first = first or error
            continue
        if len(names) > MOST_COLUMNS:
            raise DataError(f"{path}, line 1: found {len(names)} columns, expected at most {MOST_COLUMNS}")
        header = [name.strip() for name in names]
        if known(header):
            return header, separator
        first = first or header
    if isinstance(first, DataError):
        raise first
    return first or [], separators[0]


def _rows(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """All rows, with the line that each begins in."""
    source = _Source(path)
    reader = csv.reader(source, delimiter=separator, strict=True)
    line = 1
    with _long_fields():
        while True:
            source.length = 0
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(
                    f"{path}, line {line}: cannot be read as a row ({told(error)}); expected fields in double quotes, "
                    "and double quotes in them twice, as in RFC 4180"
                ) from error
            if row:
                yield line, row
            line = reader.line_num + 1


class _Source:
    """Lines for the reader, which are counted, as it may want to have all of them for one row."""

    def __init__(self, path: Path) -> None:
        self.path, self.length = path, 0
        self._lines = _texts(path)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.length += len(line)
        if self.length > files.LARGEST:
            message = f"a row is longer than {files.LARGEST // 2**20} MiB; does a quote not end?"
            raise OSError(errno.EFBIG, message, str(self.path))
        return line


def _texts(path: Path) -> Iterator[str]:
    number = 1
    for block in blocks(path):
        data = block.removeprefix(BOM) if number == 1 else block
        yield from _decoded(data, path, number)
        number += block.count(b"\n")


def _decoded(data: bytes, path: Path, number: int) -> StringIO:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = number + data.count(b"\n", 0, error.start)
        raise DataError(f"{path}, line {line}: found bytes that are not UTF-8 ({told(error)}); save it so") from error
    if (place := data.find(b"\0")) >= 0:
        line = number + data.count(b"\n", 0, place)
        raise DataError(f"{path}, line {line}: found a zero byte, expected a text in UTF-8; save it so")
    return StringIO(text, newline="\n")


@contextmanager
def _long_fields() -> Iterator[None]:
    """The library has one limit for all of a process."""
    before = csv.field_size_limit(files.LARGEST + 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)
