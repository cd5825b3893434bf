"""The safetensors files of one folder: headers checked when it is opened, tensors read on demand, nothing trusted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from featcal_fast import files
from featcal_fast.checkpoints.documents import (
    NOT_THE_FILE,
    POINTER,
    inside,
    is_file_name,
    is_plain,
    read_document,
    read_errors,
)
from featcal_fast.checkpoints.metadata import Metadata, repeated
from featcal_fast.errors import CheckpointError, UnsupportedModelError, shown
from featcal_fast.untrusted.documents import no_collection, parse_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 2**24  # bytes; of a model of 10**5 tensors in one file it has half of that
MAX_INDEX = 2**25
MAX_UNUSED_INDEX = 2**21  # of one beside a single file, which needs none
MAX_TENSORS = 500_000  # of one folder; the largest models have 140,000
MAX_NAME, MAX_DTYPE = 500, 32  # characters of a tensor's name, and of that of its dtype
MAX_DIMENSIONS = 64  # as torch has it
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Numbers of eight bits, which stand for others by scales beside them: who reads a file must know how.
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
if hasattr(torch, "float8_e8m0fnu"):
    FP8["F8_E8M0"] = torch.float8_e8m0fnu
SIZES = {name: dtype.itemsize for name, dtype in (DTYPES | FP8).items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's place and form, as `read` gives it."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Header(NamedTuple):
    """A tensor's entry in its file's header; `start` and `end` count from the beginning of the file."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    end: int


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or Inf. Either makes a sum so: one cheap pass, and a second one where sums overflow."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


class Shards:
    """One safetensors file of a folder, or several behind an index.

    Tensors are read from their place in the file, not mapped: what is read is what memory holds, and a file that
    shrinks meanwhile is an error, not a crash.

    Args:
        path: the folder.
        label: what to call it in errors, for example `expert math`.
        single: the name of the one file, which may be in a folder in it.
        index: the name of the index of several, beside which they are.
        dtypes: what tensors may be of, by their names in files.

    Attributes:
        files: names of the safetensors files.
        index: the name that an index has, where there is one.
        headers: of all tensors, by name.
        metadata: what its files say of themselves.
        bytes_read: of tensors, so far.

    Raises:
        CheckpointError: pickled only, truncated, incomplete, or with unsafe file names.
    """

    def __init__(
        self,
        path: Path,
        label: str,
        single: str = SINGLE,
        index: str = INDEX,
        dtypes: Mapping[str, torch.dtype] = DTYPES,
    ) -> None:
        self.path, self.label, self.index, self.dtypes = path, label, index, dtypes
        self.bytes_read = 0
        self.metadata = Metadata()
        self._counting = Lock()  # blocks are read in a thread of their own
        with read_errors(label, path):
            if (path / single).is_file():
                self.files, listed = [single], {}
                self._read_unused_index()
            elif (path / index).is_file():
                listed = self._read_index()
                self.files = sorted(set(listed.values()))
            else:
                raise self._no_weights(single)
        self.headers: dict[str, Header] = {}
        for file in self.files:
            self._add(self._read_header(file))
        for name, file in listed.items():
            if name not in self.headers or self.headers[name].file != file:
                raise CheckpointError(
                    f"{label}: {path / index} says that {file} holds tensor {name}, but it does not; the download is "
                    "incomplete or the index is stale"
                )

    @cached_property
    @no_collection()
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors, by name.

        Raises:
            UnsupportedModelError: one of a type that is neither plain numbers nor packed ones.
        """
        tensors = {}
        for name, header in self.headers.items():
            if header.dtype not in self.dtypes:
                raise UnsupportedModelError(
                    f"{self.label}: {self.path / header.file}: tensor {name} has dtype {header.dtype}, expected one of "
                    f"{', '.join(self.dtypes)}"
                )
            tensors[name] = TensorInfo(header.file, header.shape, self.dtypes[header.dtype])
        return tensors

    def where(self, name: str) -> str:
        """A tensor's file and name, for errors."""
        return f"{self.path / self.headers[name].file}: tensor {name}"

    def read(self, names: Iterable[str], *, packed: bool = False) -> dict[str, Tensor]:
        """The named tensors, in memory of their own on the CPU.

        Args:
            names: each once.
            packed: whether their bits may be no numbers; otherwise they are checked to be finite.

        Raises:
            CheckpointError: names file and tensor.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.headers[name].file, []).append(name)
        found = {}
        for file, members in by_file.items():
            path = self.path / file
            with (
                read_errors(self.label, path),
                closing(files.open_to_read(inside(path, self.path, self.label))) as handle,
            ):
                for name in sorted(members, key=lambda name: self.headers[name].start):
                    found[name] = self._read_tensor(handle, name)
                    if not packed and found[name].is_floating_point() and not is_finite(found[name]):
                        bad = int((~found[name].isfinite()).sum())
                        raise CheckpointError(
                            f"{self.label}: {self.where(name)} holds {bad} values that are NaN or Inf; expected finite "
                            "weights; download or train this model again"
                        )
        return found

    @contextmanager
    def in_parts(self, name: str) -> Iterator[Callable[[int, int], Tensor]]:
        """What reads elements of a tensor, from one to before another, `[elements]`, as `read` reads the whole.

        Raises:
            CheckpointError: names file and tensor.
        """
        path = self.path / self.headers[name].file
        with (
            read_errors(self.label, path),
            closing(files.open_to_read(inside(path, self.path, self.label))) as handle,
        ):

            def read(start: int, stop: int) -> Tensor:
                part = torch.empty(stop - start, dtype=self.tensors[name].dtype)
                self._fill(handle, name, part, start)
                if part.is_floating_point() and not is_finite(part):
                    self.read([name])  # which counts all of them
                return part

            yield read

    def _read_tensor(self, handle: FileIO, name: str) -> Tensor:
        info = self.tensors[name]
        try:
            tensor = torch.empty(info.shape, dtype=info.dtype)
        except RuntimeError as error:
            raise CheckpointError(
                f"{self.label}: {self.where(name)} takes {info.nbytes / 2**30:.1f} GiB, more than this machine's "
                "memory has room for"
            ) from error
        self._fill(handle, name, tensor, 0)
        return tensor

    def _fill(self, handle: FileIO, name: str, tensor: Tensor, first: int) -> None:
        """Read elements of a tensor, from the `first` on."""
        # A view of the memory itself; numpy has no bfloat16, so it goes as bytes.
        memory = tensor.reshape(-1).view(torch.uint8).numpy().data
        if files.fill(handle, memory, self.headers[name].start + first * tensor.itemsize) < tensor.nbytes:
            raise CheckpointError(
                f"{self.label}: {self.where(name)} ends early; the file changed while it was being read"
            )
        with self._counting:
            self.bytes_read += tensor.nbytes

    def _add(self, headers: dict[str, Header]) -> None:
        for name in headers.keys() & self.headers.keys():
            raise CheckpointError(
                f"{self.label}: {self.path}: both {self.headers[name].file} and {headers[name].file} hold tensor "
                f"{name}; nobody can tell which of them counts; download this model again"
            )
        self.headers |= headers
        if len(self.headers) > MAX_TENSORS:
            raise CheckpointError(
                f"{self.label}: {self.path} holds more than {MAX_TENSORS} tensors, more than any model that can be "
                "calibrated"
            )

    def _read_header(self, file: str) -> dict[str, Header]:
        path = self.path / file
        with read_errors(self.label, path):
            if not path.is_file():
                raise CheckpointError(
                    f"{self.label}: {path} is missing, though {self.index} names it; the download is incomplete"
                )
            with closing(files.open_to_read(inside(path, self.path, self.label))) as handle:
                size = files.stat(path).st_size
                try:
                    headers, end, self.metadata.files[file] = _parse(read_header(handle, size), file)
                    if end != size:
                        raise ValueError(f"{end} bytes expected, {size} found")
                except ValueError as error:
                    raise CheckpointError(
                        f"{self.label}: {path} is not a complete safetensors file ({error}); download or copy it again"
                    ) from error
        return headers

    def _read_unused_index(self) -> None:
        """What it says of the model; whatever is wrong with it does not matter, as nothing is read by it."""
        path = self.path / self.index
        with suppress(CheckpointError):
            if path.is_file() and isinstance(document := read_document(path, self.label, MAX_UNUSED_INDEX), dict):
                self.metadata = Metadata(repeated(document.get("metadata")))

    def _read_index(self) -> dict[str, str]:
        path = self.path / self.index
        document = read_document(path, self.label, MAX_INDEX)
        listed = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(listed, dict) or not listed:
            raise CheckpointError(
                f"{self.label}: {path} is not a weight index: found {shown(document)}, expected a weight_map of files "
                "by tensor"
            )
        fitting: set[str] = set()
        for tensor, file in listed.items():
            if isinstance(file, str) and file in fitting:
                continue
            if not is_file_name(file) or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{self.label}: {path} places tensor {shown(tensor)} in {shown(file)}; expected the name of a "
                    ".safetensors file in the folder"
                )
            fitting.add(file)
        self.metadata = Metadata(repeated(document.get("metadata")))
        places = {file: str(PurePosixPath(self.index).with_name(file)) for file in fitting}
        return {tensor: places[file] for tensor, file in listed.items()}

    def _no_weights(self, single: str) -> CheckpointError:
        folder = (self.path / single).parent
        pickled = sorted(file.name for file in files.list_folder(folder) if file.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            return CheckpointError(
                f"{self.label}: {folder} has only pickled weights ({pickled[0]}), which are never opened because "
                "they can run code; convert them to safetensors first (load in transformers and save_pretrained)"
            )
        return CheckpointError(f"{self.label}: {self.path} has neither {single} nor {self.index}")


def read_header(file: FileIO, size: int) -> bytes:
    """What comes before a safetensors file's data: the header's length in 8 bytes, and the header.

    Args:
        file: opened to be read.
        size: of the file.

    Raises:
        ValueError: it is longer than the file, or than any header.
    """
    begin = files.read_at(file, 8, 0)
    length = int.from_bytes(begin, "little")
    if begin == POINTER[:8]:
        raise ValueError(NOT_THE_FILE)
    if length > MAX_HEADER or 8 + length > size:
        raise ValueError(f"a header of {length} bytes in a file of {size}, expected at most {MAX_HEADER}")
    return files.read_at(file, 8 + length, 0)


def parse_header(data: bytes, file: str) -> tuple[dict[str, Header], int]:
    """What a safetensors file holds, and where it ends.

    Args:
        data: as `read_header` gives it.
        file: the file's name.

    Raises:
        ValueError: there are gaps between the tensors, or one is not of the size that its shape says.
    """
    headers, end, _ = _parse(data, file)
    return headers, end


@no_collection()
def _parse(data: bytes, file: str) -> tuple[dict[str, Header], int, dict[str, str]]:
    """Likewise, with what it says of itself."""
    entries = parse_json(data[8:])
    if not isinstance(entries, dict):
        raise ValueError(f"its header is {shown(entries)}, expected tensors by name")
    metadata, headers, position = entries.pop("__metadata__", None), {}, len(data)
    for name, entry in entries.items():
        if not _is_entry(entry):
            raise ValueError(
                f"in its header tensor {shown(name)} is {shown(entry)}, expected its dtype, shape and data_offsets"
            )
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        (start, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
        nbytes = math.prod(shape) * SIZES[dtype] if dtype in SIZES else max(end - start, 0)
        if len(data) + start != position or end - start != nbytes:
            raise ValueError(f"tensor {shown(name)}, {shown(dtype)} of shape {shown(shape)}, lies at {start} to {end}")
        headers[name] = Header(file, tuple(shape), dtype, position, position + nbytes)
        position += nbytes
    _check_names(headers)
    if metadata is not None and not _are_texts(metadata):
        raise ValueError(f"its __metadata__ is {shown(metadata)}, expected texts by name")
    return headers, position, repeated(metadata)


def _is_entry(entry: object) -> bool:
    """Whether a header says of a tensor what it must, in numbers that torch can count to."""
    if not isinstance(entry, dict):
        return False
    offsets, shape, dtype = entry.get("data_offsets"), entry.get("shape"), entry.get("dtype")
    return (
        isinstance(dtype, str)
        and 0 < len(dtype) <= MAX_DTYPE
        and isinstance(offsets, list)
        and len(offsets) == 2
        and isinstance(shape, list)
        and len(shape) <= MAX_DIMENSIONS
        and {int}.issuperset(map(type, offsets + shape))
        and min(offsets + shape) >= 0
        and math.prod(shape if 0 not in shape else (size or 1 for size in shape)) < 2**63
    )


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if not name or len(name) > MAX_NAME or not is_plain(name):
            raise ValueError(
                f"found a tensor of the name {shown(name)}, expected one of 1 to {MAX_NAME} printable characters"
            )


def _are_texts(metadata: object) -> bool:
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
