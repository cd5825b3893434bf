"""The safetensors files of one folder: headers checked when it is opened, tensors read on demand, nothing trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from featcal_fast import files
from featcal_fast.errors import CheckpointError, UnsupportedModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000  # bytes, as the safetensors library has it
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
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's place and form, as `read` gives it."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Header:
    """A tensor's entry in its file's header; `start` and `end` count from the beginning of the file."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    end: int


@contextmanager
def read_errors(label: str, path: Path) -> Iterator[None]:
    """Turn what the operating system says of a model's file into a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{label}: {error.filename or path} cannot be read: {error.strerror or error}; check that the download is "
            "complete, its rights, and the disk"
        ) from error


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a file that exists is a link out of a model's folder; links into the hub's cache stay in the model."""
    root, target = folder.resolve(), path.resolve()
    return root not in (target, *target.parents) and target.parent != root.parent.parent / "blobs"


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
        single: the name of the one file.
        index: the name of the index of several.

    Attributes:
        files: names of the safetensors files.
        index: the name that an index has, where there is one.
        headers: of all tensors, by name.
        bytes_read: of tensors, so far.

    Raises:
        CheckpointError: pickled only, truncated, incomplete, or with unsafe file names.
    """

    def __init__(self, path: Path, label: str, single: str = SINGLE, index: str = INDEX) -> None:
        self.path, self.label, self.index = path, label, index
        self.bytes_read = 0
        self._counting = Lock()  # blocks are read in a thread of their own
        with read_errors(label, path):
            if (path / single).is_file():
                self.files, listed = [single], {}
            elif (path / index).is_file():
                listed = self._read_index()
                self.files = sorted(set(listed.values()))
            else:
                raise self._no_weights(single)
        self.headers: dict[str, Header] = {}
        for file in self.files:
            self.headers |= self._read_header(file)
        for name, file in listed.items():
            if name not in self.headers or self.headers[name].file != file:
                raise CheckpointError(
                    f"{label}: {path / index} says that {file} holds tensor {name}, but it does not; the download is "
                    "incomplete or the index is stale"
                )

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors, by name.

        Raises:
            UnsupportedModelError: one of a type that is neither plain numbers nor packed ones.
        """
        tensors = {}
        for name, header in self.headers.items():
            if header.dtype not in DTYPES:
                raise UnsupportedModelError(
                    f"{self.label}: {self.path / header.file}: tensor {name} has dtype {header.dtype}, expected one of "
                    f"{', '.join(DTYPES)}"
                )
            tensors[name] = TensorInfo(header.file, header.shape, DTYPES[header.dtype])
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
            with read_errors(self.label, path), closing(files.open_to_read(self._inside(path))) as handle:
                for name in sorted(members, key=lambda name: self.headers[name].start):
                    found[name] = self._read_tensor(handle, name)
                    if not packed and found[name].is_floating_point() and not is_finite(found[name]):
                        bad = int((~found[name].isfinite()).sum())
                        raise CheckpointError(
                            f"{self.label}: {self.where(name)} holds {bad} values that are NaN or Inf; expected finite "
                            "weights; download or train this model again"
                        )
        return found

    def _read_tensor(self, handle: FileIO, name: str) -> Tensor:
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        # A view of the memory itself; numpy has no bfloat16, so it goes as bytes.
        memory = tensor.reshape(-1).view(torch.uint8).numpy().data
        if files.fill(handle, memory, self.headers[name].start) < info.nbytes:
            raise CheckpointError(
                f"{self.label}: {self.where(name)} ends early; the file changed while it was being read"
            )
        with self._counting:
            self.bytes_read += info.nbytes
        return tensor

    def _read_header(self, file: str) -> dict[str, Header]:
        path = self.path / file
        with read_errors(self.label, path):
            if not path.is_file():
                raise CheckpointError(
                    f"{self.label}: {path} is missing, though {self.index} names it; the download is incomplete"
                )
            with closing(files.open_to_read(self._inside(path))) as handle:
                size = files.stat(path).st_size
                try:
                    headers, end = parse_header(read_header(handle, size), file)
                    if end != size:
                        raise ValueError(f"{end} bytes expected, {size} found")
                except ValueError as error:
                    raise CheckpointError(
                        f"{self.label}: {path} is not a complete safetensors file ({error}); download or copy it again"
                    ) from error
        return headers

    def _read_index(self) -> dict[str, str]:
        path = self._inside(self.path / self.index)
        try:
            listed = json.loads(files.read_text(path))["weight_map"]
            items = {str(name): str(file) for name, file in listed.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{self.label}: {path} is not a weight index: {error!r}") from error
        for name, file in items.items():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{self.label}: {path} places tensor {name} in {file!r}; expected the name of a .safetensors file "
                    "in the folder"
                )
        return items

    def _inside(self, path: Path) -> Path:
        if leads_out(path, self.path):
            raise CheckpointError(
                f"{self.label}: {path} is a link to {path.resolve()}, outside of the model folder; expected a file"
            )
        return path

    def _no_weights(self, single: str) -> CheckpointError:
        pickled = sorted(file.name for file in files.list_folder(self.path) if file.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            return CheckpointError(
                f"{self.label}: {self.path} has only pickled weights ({pickled[0]}), which are never opened because "
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
    length = int.from_bytes(files.read_at(file, 8, 0), "little")
    if length > MAX_HEADER or 8 + length > size:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    return files.read_at(file, 8 + length, 0)


def parse_header(data: bytes, file: str) -> tuple[dict[str, Header], int]:
    """What a safetensors file holds, and where it ends.

    Args:
        data: as `read_header` gives it.
        file: the file's name.

    Raises:
        ValueError: there are gaps between the tensors, or one is not of the size that its shape says.
    """
    headers, position = {}, len(data)
    try:
        entries = {name: entry for name, entry in json.loads(data[8:]).items() if name != "__metadata__"}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            (start, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
            if any(type(value) is not int or value < 0 for value in (start, end, *shape)):
                raise ValueError(f"tensor {name} has the shape {shape} at {start} to {end}")
            if not isinstance(dtype, str) or len(shape) > MAX_DIMENSIONS or math.prod(n or 1 for n in shape) >= 2**63:
                raise ValueError(f"tensor {name} is {dtype} of shape {shape}")
            nbytes = math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else end - start
            if len(data) + start != position or end - start != nbytes:
                raise ValueError(f"tensor {name}, {dtype} of shape {shape}, lies at {start} to {end}")
            headers[name] = Header(file, tuple(shape), dtype, position, position + nbytes)
            position += nbytes
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its JSON is none of a safetensors header ({type(error).__name__}: {error})") from error
    return headers, position
