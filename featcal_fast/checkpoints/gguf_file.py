"""GGUF files, llama.cpp's: what a header tells of one or of a split set of them, within bounds, and values of tensors.

A file is, in little-endian numbers,

    GGUF, version (u32), number of tensors (u64), number of entries (u64)
    entries: key (text), type (u32), value                  a text is its length (u64) and UTF-8
    tensors: name (text), dimensions (u32, u64 each, the innermost first), type (u32), place (u64)
    data, from the next multiple of `general.alignment` on: each tensor's as many blocks as it needs

The header is read here and not by the `gguf` package, whose reader takes gigabytes and seconds for a large vocabulary,
and as much time as a hostile count asks for; sizes of blocks and what they stand for are that package's.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from featcal_fast import files
from featcal_fast.checkpoints.documents import inside, is_plain, read_errors
from featcal_fast.checkpoints.shards import MAX_NAME
from featcal_fast.errors import CheckpointError, UnsupportedModelError, shown

MAGIC, VERSIONS = b"GGUF", (2, 3)
USUAL_HEADER, MAX_HEADER = 2**24, 2**27  # bytes; of a vocabulary of 262,144 tokens with all merges it is about 16 MiB
MAX_ENTRIES, MAX_DIMENSIONS, MAX_ALIGNMENT = 10_000, 4, 2**20
MAX_FILES = 1000  # of a split set
MAX_LIST = 2**10  # numbers of a list that are kept: at most one of each layer
MAX_TEXTS = 2**20  # of all lists together; the largest vocabularies and their merges have three quarters of that
MAX_TENSORS = 2**16  # of one model; experts of a layer are one
PIECE = 2**20  # values dequantised at a time: what that takes is many times of them
SPLIT = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
TOKENS, TOKEN_TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
KEPT = (TOKENS, TOKEN_TYPES)  # lists that are kept whatever their length
FLOAT64 = "F64"  # which the package has no reader of
SCALED = ("NVFP4",)  # types of which a file holds another scale beside the tensor


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies.

    Attributes:
        file: its name.
        shape: the innermost dimension last.
        kind: the name of its type, such as `Q4_K`.
        start: of its data, from the beginning of the file.
        block: values of a block, and its bytes.
    """

    file: str
    shape: tuple[int, ...]
    kind: str
    start: int
    block: tuple[int, int]

    @property
    def nbytes(self) -> int:
        values, size = self.block
        return math.prod(self.shape) // values * size


@dataclass
class Gguf:
    """What files of one model hold.

    Attributes:
        values: texts, numbers and short lists of the first file, by key; and its vocabulary.
        places: of tensors, by name.
    """

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)


def find_files(path: Path, label: str) -> list[Path]:
    """The files of one model: a file, or all of the split set that it is of; or those of a folder.

    Args:
        path: of a `.gguf` file, or of a folder.
        label: what to call the model in errors.

    Returns:
        Nothing of a folder without any.

    Raises:
        CheckpointError: a folder holds several models, or a set is not whole.
    """
    with read_errors(label, path):
        if not path.is_dir():
            return _whole_set(path, label)
        found = [each for each in files.list_folder(path) if each.suffix == ".gguf"]
        sets = {match["name"] if (match := SPLIT.fullmatch(each.name)) else each.name for each in found}
        if len(sets) > 1:
            raise CheckpointError(
                f"{label}: {path} holds {len(found)} GGUF files of several models ({found[0].name}, {found[-1].name}); "
                "name one of the files"
            )
        return _whole_set(found[0], label) if found else []


def _whole_set(path: Path, label: str) -> list[Path]:
    match = SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 0 < count <= MAX_FILES:
        raise CheckpointError(f"{label}: {path}: found a set of {count} files, expected 1 to {MAX_FILES}")
    found = [path.with_name(f"{match['name']}-{number:05}-of-{match['count']}.gguf") for number in range(1, count + 1)]
    for each in found:
        if not each.is_file():
            raise CheckpointError(f"{label}: {each} is missing, one of {count} files of a set; download it, too")
    return found


def read_header(paths: list[Path], label: str) -> Gguf:
    """What the files of one model hold.

    Args:
        paths: of its files, in order.
        label: what to call the model in errors.

    Raises:
        CheckpointError: one is cut off, no GGUF file, or its header contradicts itself.
        UnsupportedModelError: a type of tensors that cannot be dequantised; or the package `gguf` is not installed.
    """
    found = Gguf()
    for number, path in enumerate(paths):
        try:
            values, places = _read_one(path, label)
        except _Foreign as error:
            raise UnsupportedModelError(f"{label}: {path}: {error}") from None
        except ValueError as error:
            raise CheckpointError(
                f"{label}: {path} is not a complete GGUF file ({error}); download or copy it again"
            ) from None
        found.values = found.values if number else values
        for name in places.keys() & found.places.keys():
            raise CheckpointError(f"{label}: {path}: tensor {name} is in another file of its set, too")
        found.places |= places
        if len(found.places) > MAX_TENSORS:
            raise CheckpointError(f"{label}: {path}: found more than {MAX_TENSORS} tensors in its set")
    return found


def _read_one(path: Path, label: str) -> tuple[dict[str, Any], dict[str, Place]]:
    with read_errors(label, path), closing(files.open_to_read(inside(path, path.parent, label))) as file:
        size = files.stat(path).st_size
        for most in (USUAL_HEADER, MAX_HEADER):
            data = files.read_at(file, min(size, most), 0)
            try:
                return _Header(data, size, path.name).read()
            except _Short:
                if len(data) == size or most == MAX_HEADER:
                    raise
    raise AssertionError("unreachable")


def read_values(path: Path, place: Place, start: int, count: int, dtype: torch.dtype, label: str) -> Tensor:
    """A part of a tensor, dequantised a piece at a time.

    Args:
        path: of its file.
        place: in it.
        start: the first of its values, at the beginning of a block.
        count: of values; whole blocks.
        dtype: of the result.
        label: what to call the model in errors.

    Returns:
        `[count]`.

    Raises:
        CheckpointError: the file ends early.
    """
    import gguf

    values, size = place.block
    kind = getattr(gguf.GGMLQuantizationType, place.kind)
    found, step = torch.empty(count, dtype=dtype), max(1, PIECE // values)  # blocks
    first, blocks = start // values, count // values
    memory = bytearray(min(step, blocks) * size)
    with read_errors(label, path), closing(files.open_to_read(inside(path, path.parent, label))) as file:
        for block in range(0, blocks, step):
            part = memoryview(memory)[: min(step, blocks - block) * size]
            if files.fill(file, part, place.start + (first + block) * size) < len(part):
                raise CheckpointError(f"{label}: {path} ends early; the file changed while it was being read")
            codes = numpy.frombuffer(part, dtype=numpy.uint8)[None]
            with numpy.errstate(all="ignore"):  # what is not finite is found by whoever asked
                plain = codes.view(numpy.float64) if place.kind == FLOAT64 else gguf.dequantize(codes, kind)
            piece = found[block * values : (block + step) * values]
            piece.copy_(torch.from_numpy(numpy.array(plain.reshape(-1))))
    return found


class _Foreign(ValueError):
    """It is a GGUF file, but not one that can be read here."""


class _Short(ValueError):
    """There is more of it than was given."""


class _Header:
    """A header, read from its bytes.

    Args:
        data: the beginning of a file.
        size: of the whole file.
        file: its name.
    """

    def __init__(self, data: bytes, size: int, file: str) -> None:
        self.data, self.size, self.file, self.position, self.texts = data, size, file, 0, 0

    def read(self) -> tuple[dict[str, Any], dict[str, Place]]:
        """Its values, and the places of its tensors."""
        if self.data[:4] != MAGIC:
            raise ValueError(f"it begins with {shown(self.data[:4])}, expected {shown(MAGIC)}")
        self.position = 4
        version, tensors, entries = self._number("I"), self._number("Q"), self._number("Q")
        if version not in VERSIONS:
            found = "of a machine with the other order of bytes" if version & 0xFFFF == 0 else str(version)
            raise _Foreign(f"found version {found}, expected 2 or 3; convert it with a newer llama.cpp")
        if entries > MAX_ENTRIES or tensors > MAX_TENSORS:
            raise ValueError(f"it counts {tensors} tensors and {entries} entries")
        values: dict[str, Any] = {}
        for _ in range(entries):
            key = self._text()
            if key in values:
                raise ValueError(f"its key {shown(key)} is there twice")
            values[key] = self._value(self._number("I"), key)
        infos = [self._tensor() for _ in range(tensors)]
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or alignment.bit_count() != 1 or alignment > MAX_ALIGNMENT:
            raise ValueError(f"general.alignment is {shown(alignment)}, expected a power of two")
        return values, self._places(infos, -(-self.position // alignment) * alignment)

    def _take(self, count: int) -> int:
        """Where `count` bytes begin, which are there."""
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            larger = self.size > len(self.data)
            raise _Short(f"it has a header above {len(self.data)} bytes" if larger else "it ends within its header")
        return start

    def _number(self, form: str) -> Any:
        return struct.unpack_from(f"<{form}", self.data, self._take(struct.calcsize(f"<{form}")))[0]

    def _text(self) -> str:
        length = self._number("Q")
        start = self._take(length)
        return self.data[start : start + length].decode(errors="surrogateescape")

    def _value(self, kind: int, key: str) -> Any:
        if kind == TEXT:
            return self._text()
        if kind == LIST:
            return self._list(self._number("I"), self._number("Q"), key)
        if kind not in NUMBERS:
            raise ValueError(f"its key {shown(key)} is of the type {kind}, which is none")
        return self._number(NUMBERS[kind])

    def _list(self, kind: int, count: int, key: str) -> Any:
        """Of a long list that nobody asks for only the place is counted."""
        if kind == TEXT:
            self.texts += count
            if self.texts > MAX_TEXTS:
                raise ValueError(f"its key {shown(key)} counts {count} texts")
            if key in KEPT:
                return [self._text() for _ in range(count)]
            self._skip_texts(count)
            return None
        if kind not in NUMBERS:
            raise ValueError(f"its key {shown(key)} is a list of the type {kind}, which is none")
        size = struct.calcsize(f"<{NUMBERS[kind]}")
        start = self._take(count * size)
        if count > (MAX_TEXTS if key in KEPT else MAX_LIST):
            return None
        return list(struct.unpack_from(f"<{count}{NUMBERS[kind]}", self.data, start))

    def _skip_texts(self, count: int) -> None:
        """A million of these are merges of tokens, which nobody asks for."""
        data, position, length = self.data, self.position, struct.Struct("<Q")
        for _ in range(count):
            if position + 8 > len(data):
                self._take(len(data))  # says so
            position += 8 + length.unpack_from(data, position)[0]
        self.position = position
        self._take(0)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, count = self._text(), self._number("I")
        if not 0 < len(name) <= MAX_NAME or not is_plain(name):
            raise ValueError(f"a tensor is called {shown(name)}, expected 1 to {MAX_NAME} printable characters")
        if count > MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {count} dimensions, expected at most {MAX_DIMENSIONS}")
        shape = tuple(self._number("Q") for _ in range(count))[::-1]
        if 0 in shape or math.prod(shape) >= 2**63:
            raise ValueError(f"tensor {name} has the shape {shown(shape)}")
        return name, shape or (1,), self._number("I"), self._number("Q")

    def _places(self, found: list[tuple[str, tuple[int, ...], int, int]], data: int) -> dict[str, Place]:
        """Tensors by name: none is there twice, or shares its data with another, or ends behind the file."""
        kinds, places, end = _kinds(), {}, data
        for name, shape, number, offset in sorted(found, key=lambda each: each[3]):
            if number not in kinds:
                raise _Foreign(f"tensor {name} is of the type {number}, which cannot be dequantised here")
            kind, block = kinds[number]
            if block is None:
                raise _Foreign(f"tensor {name} is of the type {kind}, which cannot be dequantised here")
            place = Place(self.file, shape, kind, data + offset, block)
            if shape[-1] % block[0]:
                raise ValueError(f"tensor {name} has rows of {shape[-1]}, expected whole blocks of {block[0]}")
            if name in places or place.start < end or place.start + place.nbytes > self.size:
                raise ValueError(
                    f"tensor {name}, {kind} of shape {shape}, lies at {place.start} to {place.start + place.nbytes} of "
                    f"{self.size} bytes, with another one up to {end}"
                )
            places[name], end = place, place.start + place.nbytes
        return places


def _kinds() -> dict[int, tuple[str, tuple[int, int] | None]]:
    """The name of each type by its number, and the values and bytes of a block; None where there is no reader of it."""
    with imported():
        import gguf
    found: dict[int, tuple[str, tuple[int, int] | None]] = {}
    for kind, block in gguf.GGML_QUANT_SIZES.items():
        readable = kind.name == FLOAT64
        if kind.name not in (FLOAT64, *SCALED):
            with suppress(NotImplementedError):  # what the package says of types that it cannot read
                gguf.dequantize(numpy.zeros((1, block[1]), numpy.uint8), kind)
                readable = True
        found[int(kind)] = kind.name, block if readable else None
    return found


@contextmanager
def imported() -> Iterator[None]:
    """Around an import of the package `gguf`, which not everyone has."""
    try:
        yield
    except ImportError as error:
        raise _Foreign(
            f"a GGUF file is read with the package gguf, which cannot be imported ({error}); "
            "pip install featcal-fast[gguf]"
        ) from None
