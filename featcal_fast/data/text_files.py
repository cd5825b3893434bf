"""Files of texts in all forms that people have: which is which, and the drawn samples of one or of several."""

from __future__ import annotations

import errno
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from featcal_fast import files
from featcal_fast.data.json_items import Items
from featcal_fast.data.kinds import TEXT_KEYS, as_texts, has_kind
from featcal_fast.data.lines import Lines
from featcal_fast.data.packed import BOM, is_packed, pieces
from featcal_fast.data.samples import Sample, draw, listed
from featcal_fast.data.separated import SEPARATORS, Rows
from featcal_fast.errors import DataError, shown
from featcal_fast.untrusted.documents import DocumentError, parse_json

TEXT_FORMS = (".jsonl", ".json", ".csv", ".tsv", ".txt")  # of several in one folder the first is its data
LINES = (".jsonl", ".ndjson")
TRAIN, OTHER_SPLITS = "train", {"test", "dev", "val", "valid", "validation", "eval"}
TOGETHER = 2**28  # bytes of all samples that are drawn
LARGEST_OBJECT = 2**26  # bytes of a JSON document that is not an array


class Records(Protocol):
    """What a file is made of, a sample each: how many, and some of them, see `Lines.pick`."""

    @property
    def count(self) -> int: ...
    def pick(self, drawn: Sequence[int]) -> Iterator[tuple[int, int, Any]]: ...


class Source(NamedTuple):
    """A file, opened: its records, what each is called, and how one, which was found at a place, becomes a sample."""

    path: Path
    records: Records
    word: str
    parse: Callable[[Any, str], dict[str, Any]]


def text_form(path: Path) -> str:
    """Which of the `TEXT_FORMS` a file is of, by its name; empty where it is of none."""
    suffix = Path(path.stem if is_packed(path) else path.name).suffix.lower()
    suffix = ".jsonl" if suffix in LINES else suffix
    return suffix if suffix in TEXT_FORMS else ""


def read_texts(
    paths: Sequence[Path], samples: int, seed: int, source: object, notes: list[str], targets: bool = False
) -> list[Sample]:
    """The drawn samples of files, one after the other. All are counted before, without holding them.

    Args:
        paths: of files in one of the forms, packed or not.
        samples: how many to draw.
        seed: of the draw.
        source: what they are together, for errors.
        notes: is told what of them is ignored.
        targets: see `kinds.as_texts`.

    Returns:
        Samples in one of the `kinds.FORMS`.

    Raises:
        DataError: there are none, or files change; a sample that was drawn is not what it should be.
        OSError: a file cannot be read.
    """
    before = [_state(path) for path in paths]
    sources = [_opened(path, notes) for path in paths]
    drawn = draw(sum(each.records.count for each in sources), samples, seed, source)
    found = _picked(sources, sorted(drawn), source)
    if len(found) < len(drawn) or before != [_state(path) for path in paths]:
        raise DataError(f"{source}: it changed while it was being read; try again when it is complete")
    return as_texts([_sample(*found[i]) for i in drawn], source, notes, targets)


def _picked(sources: Sequence[Source], drawn: list[int], source: object) -> dict[int, tuple[Source, int, Any]]:
    """Records by their number among those of all files: from which, the number there, and what it is."""
    found: dict[int, tuple[Source, int, Any]] = {}
    first = together = 0
    for each in sources:
        after = first + each.records.count
        inside = [i - first for i in drawn[bisect_left(drawn, first) : bisect_left(drawn, after)]]
        for i, number, raw in each.records.pick(inside) if inside else ():
            found[first + i] = each, number, raw
            together += _length(raw)
            if together > TOGETHER:
                raise DataError(
                    f"{source}: the samples that were drawn have more than {TOGETHER // 2**20} MiB together; shorten "
                    "the texts, of which no more than max_length tokens are used, or lower samples"
                )
        first = after
    return found


def _length(raw: Any) -> int:
    """Of a line, an item or a row; items that were parsed already are bounded together with their file."""
    if isinstance(raw, list):
        return sum(len(each) for each in raw if isinstance(each, str))
    return len(raw) if isinstance(raw, bytes) else 0


def _sample(source: Source, number: int, raw: Any) -> Sample:
    where = f"{source.path}, {source.word} {number}"
    return Sample(where, source.parse(raw, where))


def _state(path: Path) -> tuple[int, int]:
    found = files.stat(path)
    return found.st_size, found.st_mtime_ns


def _opened(path: Path, notes: list[str]) -> Source:
    form = text_form(path)
    if form == ".json":
        return _json(path, notes)
    if form in SEPARATORS:
        rows = Rows(path, form, has_kind)
        return Source(path, rows, "line", lambda raw, where: _cells(rows.header, raw, where))
    return Source(path, Lines(path), "line", _plain if form == ".txt" else _object)


def _json(path: Path, notes: list[str]) -> Source:
    """An array; or lines, which many call so; or one object with the samples in it."""
    beginning = b""
    for piece in pieces(path):
        beginning = piece.removeprefix(BOM).lstrip()
        if beginning:
            break
    if beginning.startswith(b"["):
        return Source(path, Items(path), "item", _item)
    try:
        lines = Lines(path)
        first = next(iter(lines.pick([0])), (0, 0, b""))[2] if lines.count > 1 else b""
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        first = b""
    if not beginning or _is_object(first):
        return Source(path, lines, "line", _object)
    return Source(path, _Listed(_inside(path, notes)), "item", _item)


def _is_object(line: bytes) -> bool:
    return line.lstrip().startswith(b"{") and isinstance(_parsed(line), dict)


def _is_sample(line: bytes) -> bool:
    return _is_object(line) and has_kind(_parsed(line))


def _parsed(line: bytes) -> Any:
    try:
        return parse_json(line, finite=False)
    except DocumentError:
        return None


class _Listed:
    """Items that were read already."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._items, self.count = items, len(items)

    def pick(self, drawn: Sequence[int]) -> Iterator[tuple[int, int, Any]]:
        return ((i, i + 1, self._items[i]) for i in drawn)


def _inside(path: Path, notes: list[str]) -> list[Any]:
    """The samples in a JSON object: itself, or the one list that it holds, or, of lists of splits, the training one."""
    data = bytearray()
    for piece in pieces(path):
        data += piece
        if len(data) > LARGEST_OBJECT:
            raise DataError(
                f"{path}: found a JSON object of more than {LARGEST_OBJECT // 2**20} MiB, expected an array of "
                "samples, which may be larger, or an object a line (.jsonl); save it so"
            )
    try:
        values = parse_json(bytes(data.removeprefix(BOM)), finite=False)
    except DocumentError as error:
        raise DataError(
            f"{path}: found invalid JSON; expected an array of samples, or an object a line, in UTF-8 ({error})"
        ) from error
    if isinstance(values, dict) and has_kind(values):
        return [values]
    if (key := _list_of_samples(values)) is None:
        keys = f"the keys {listed(values)}" if isinstance(values, dict) else f"a {type(values).__name__}"
        raise DataError(
            f"{path}: found {keys}, expected an array of samples, or an object with one under one key; save them as "
            "an array, or as an object a line (.jsonl)"
        )
    if rest := [each for each in values if each != key]:
        notes.append(f"{path}: the list {shown(key)} is read (ignored: {listed(rest, 5)})")
    found: list[Any] = values[key]
    return found


def _list_of_samples(values: Any) -> str | None:
    """Under which key an object has its samples; None where nothing tells."""
    if not isinstance(values, dict):
        return None
    lists: list[str] = [key for key, each in values.items() if isinstance(each, list)]
    if TRAIN in lists and OTHER_SPLITS.issuperset(each for each in lists if each != TRAIN):
        return TRAIN
    # Texts beside other keys are something of the one sample that the object is: labels, or tags.
    if len(lists) == 1 and (len(values) == 1 or all(isinstance(each, dict) for each in values[lists[0]])):
        return lists[0]
    return None


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = parse_json(line.decode(), finite=False)
    except (DocumentError, UnicodeDecodeError) as error:
        words = line.strip()
        array = words.startswith((b"[", b"]")) or words.endswith(b",")
        hint = "; if the file holds an array, give it a name that ends in .json" if array else ""
        raise DataError(f"{where}: found invalid JSON; expected one object a line in UTF-8 ({error}){hint}") from error
    if not isinstance(values, dict):
        raise DataError(f"{where}: found a JSON {type(values).__name__}; expected an object with keys of {TEXT_KEYS}")
    return values


def _item(item: Any, where: str) -> dict[str, Any]:
    try:
        values = parse_json(item.decode(), finite=False) if isinstance(item, bytes) else item
    except (DocumentError, UnicodeDecodeError) as error:
        raise DataError(
            f"{where}: found invalid JSON; expected objects in UTF-8, parted by commas ({error})"
        ) from error
    if isinstance(values, str):
        return {"text": values}
    if not isinstance(values, dict):
        raise DataError(
            f"{where}: found a JSON {type(values).__name__}; expected a text, or an object with keys of {TEXT_KEYS}"
        )
    return values


def _plain(line: bytes, where: str) -> dict[str, Any]:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: found bytes that are not UTF-8 ({error}); save the file so") from error
    if "\0" in text:
        raise DataError(f"{where}: found a zero byte, expected a text in UTF-8; save the file so")
    if _is_sample(line):
        raise DataError(f"{where}: found a JSON object, expected a text; give the file a name that ends in .jsonl")
    return {"text": text.rstrip("\r\n")}


def _cells(header: Sequence[str], row: Sequence[str], where: str) -> dict[str, Any]:
    if len(row) != len(header):
        raise DataError(
            f"{where}: found {len(row)} fields, expected {len(header)}, one for each column of the header; put fields "
            "in double quotes that hold line feeds or what parts fields"
        )
    return dict(zip(header, row, strict=True))
