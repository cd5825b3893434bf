"""Files of texts as bytes in UTF-8, a piece at a time, unpacked where they are packed, never far more than they are."""

from __future__ import annotations

import bz2
import codecs
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from featcal_fast import files
from featcal_fast.data.samples import import_optional
from featcal_fast.errors import DataError, told

BLOCK = 2**18  # bytes of a piece
PACKINGS = {".gz", ".bz2", ".xz", ".zst"}
ROOM, MOST_TIMES = 2**26, 100  # bytes that any file may unpack to, and times its size besides
WINDOW = 2**27  # bytes that what unpacks may look back: those of `zstd --long`, twice those of `xz -9`
GIVEN = 2**14  # bytes that are unpacked at a time: there may be many streams in them
MOST_PADDING = 2**20  # zeros behind the last stream
GZIP = 31  # how zlib calls the form, with a window of any size
BOM = codecs.BOM_UTF8
OTHER_TEXTS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
POINTER = b"version https://git-lfs"
# How packed files begin, whatever they are called.
MAGIC = {b"\x1f\x8b": ".gz", b"BZh91AY&SY": ".bz2", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}


def is_packed(path: Path) -> bool:
    """Whether a file is packed, by its name."""
    return path.suffix.lower() in PACKINGS


def pieces(path: Path) -> Iterator[bytes]:
    """A file's content, 256 KiB at a time.

    Raises:
        DataError: it cannot be unpacked, unpacks to more than a hundred times its size and 64 MiB, is a text in
            another encoding than UTF-8, packed (again), or a pointer that Git LFS left in its place.
    """
    with closing(files.open_to_read(path)) as file:
        read = _unpacked(file, path) if is_packed(path) else _plain(file)
        first = True
        for piece in read:
            if first:
                _check_beginning(piece, path)
                if packing := next((name for magic, name in MAGIC.items() if piece.startswith(magic)), None):
                    raise DataError(
                        f"{path}: found what is packed as {packing}, expected a text in UTF-8; give it a name "
                        "that ends so"
                    )
            first = False
            yield piece


def _check_beginning(piece: bytes, path: Path) -> None:
    encoding = next((name for mark, name in OTHER_TEXTS.items() if piece.startswith(mark)), None)
    if encoding:
        raise DataError(
            f"{path}: found a text in {encoding}, expected UTF-8; save it so (iconv -f {encoding} -t UTF-8)"
        )
    if piece.startswith(POINTER):
        raise DataError(f"{path}: line 1: found what Git LFS left in the file's place; fetch the file (git lfs pull)")


def _plain(file: FileIO) -> Iterator[bytes]:
    position = 0
    while piece := files.read_at(file, BLOCK, position):
        position += len(piece)
        yield piece


def _unpacked(file: FileIO, path: Path) -> Iterator[bytes]:
    size = files.stat(path).st_size
    total, waiting = 0, bytearray()
    try:
        for part in _parts(file, path):
            total += len(part)
            if total > ROOM + MOST_TIMES * size:
                raise DataError(
                    f"{path}: it unpacks to more than {total / 2**20:.0f} MiB, which is too large for its {size} "
                    "bytes; unpack it, if it is what it should be"
                )
            waiting += part
            for _ in range(len(waiting) // BLOCK):
                yield bytes(waiting[:BLOCK])
                del waiting[:BLOCK]
    except (zlib.error, lzma.LZMAError, EOFError, ValueError) as error:
        raise _broken(path, error) from error
    except OSError as error:
        if error.errno is not None:  # the operating system's, not that of bz2
            raise
        raise _broken(path, error) from error
    if waiting:
        yield bytes(waiting)


def _broken(path: Path, error: Exception) -> DataError:
    kind = path.suffix.lower()
    return DataError(f"{path}: cannot be unpacked as {kind} ({told(error)}); copy or pack it again")


class _Unpacker(Protocol):
    """What the libraries have: one stream of several that may follow each other in a file."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


def _parts(file: FileIO, path: Path) -> Iterator[bytes]:
    make, size = _unpackers(path)
    unpacker: _Unpacker | None = make()
    position = padding = 0
    while data := files.read_at(file, size, position):
        if not position:
            _check_beginning(data, path)
        position += size
        while data:
            if unpacker is None and not (data := data.lstrip(b"\0")):
                if (padding := padding + size) > MOST_PADDING:
                    raise EOFError("it goes on with zeros")
                break
            unpacker = unpacker or make()
            yield unpacker.decompress(data, BLOCK)
            while not unpacker.eof and not unpacker.needs_input:
                yield unpacker.decompress(b"", BLOCK)
            data = b""
            if unpacker.eof:  # another may follow, or zeros
                data, unpacker = unpacker.unused_data, None
    if unpacker is not None:
        raise EOFError("it ends in the middle")


def _unpackers(path: Path) -> tuple[Callable[[], _Unpacker], int]:
    """What unpacks a file's streams, and how many bytes it may be given at a time."""
    kind = path.suffix.lower()
    if kind == ".gz":
        return _Gzip, GIVEN
    if kind == ".bz2":
        return bz2.BZ2Decompressor, GIVEN
    if kind == ".xz":
        return lambda: lzma.LZMADecompressor(memlimit=2 * WINDOW), GIVEN
    zstandard = import_optional("zstandard", "zstandard", path)
    return lambda: _Zstandard(zstandard), 2**10  # as it may make a thousand times a hundred of it at once


class _Gzip:
    """Python's for gzip has another form."""

    def __init__(self) -> None:
        self._inner, self._full = zlib.decompressobj(GZIP), False

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail and not self._full

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        found = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self._full = len(found) == max_length
        return found


class _Zstandard:
    """That of the library, which knows no limit of what it gives."""

    def __init__(self, zstandard: Any) -> None:
        self._inner = zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj()
        self._error = zstandard.ZstdError
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._inner.unused_data)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        try:
            return bytes(self._inner.decompress(data))
        except self._error as error:
            raise EOFError(str(error)) from None
