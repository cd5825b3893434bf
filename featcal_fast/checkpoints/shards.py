"""The safetensors files of one folder: headers checked when it is opened, tensors read on demand, nothing trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import torch
from torch import Tensor

from featcal_fast.errors import CheckpointError, UnsupportedModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000  # bytes, as the safetensors library has it
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
    """A tensor's entry in its file's header; `start` counts from the beginning of the file."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    start: int


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
        headers: of all tensors, by name.
        bytes_read: of tensors, so far.

    Raises:
        CheckpointError: pickled only, truncated, incomplete, or with unsafe file names.
    """

    def __init__(self, path: Path, label: str, single: str = SINGLE, index: str = INDEX) -> None:
        self.path, self.label, self._index = path, label, index
        self.bytes_read = 0
        self._counting = Lock()  # blocks are read in a thread of their own
        listed: dict[str, str] = {}
        if (path / single).is_file():
            files = [single]
        elif (path / index).is_file():
            listed = self._read_index()
            files = sorted(set(listed.values()))
        else:
            raise self._no_weights(single)
        self.headers: dict[str, Header] = {}
        for file in files:
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
            with open(self.inside(file), "rb", buffering=0) as handle:
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
        info, position = self.tensors[name], 0
        tensor = torch.empty(info.shape, dtype=info.dtype)
        # A view of the memory itself; numpy has no bfloat16, so it goes as bytes.
        memory = tensor.reshape(-1).view(torch.uint8).numpy().data
        handle.seek(self.headers[name].start)
        while position < info.nbytes:
            count = handle.readinto(memory[position:])
            if not count:
                raise CheckpointError(
                    f"{self.label}: {self.where(name)} ends early; the file changed while it was being read"
                )
            position += count
        with self._counting:
            self.bytes_read += info.nbytes
        return tensor

    def _read_header(self, file: str) -> dict[str, Header]:
        path = self.inside(file)
        if not path.is_file():
            raise CheckpointError(
                f"{self.label}: {path} is missing, though {self._index} names it; the download is incomplete"
            )
        try:
            with open(path, "rb") as handle:
                header, data = _parse_header(handle, path.stat().st_size)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.label}: {path} is not a complete safetensors file ({error}); download or copy it again"
            ) from error
        return {
            name: Header(file, tuple(entry["shape"]), entry["dtype"], data + entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        }

    def _read_index(self) -> dict[str, str]:
        path = self.path / self._index
        try:
            listed = json.loads(path.read_text())["weight_map"]
            items = {str(name): str(file) for name, file in listed.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.label}: {path} is not a weight index: {error!r}") from error
        for name, file in items.items():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{self.label}: {path} places tensor {name} in {file!r}; expected the name of a .safetensors file "
                    "in the folder"
                )
        return items

    def inside(self, name: str) -> Path:
        """The file `name`, refused where it is a link out of the folder (the hub cache's own links are fine)."""
        path, root = self.path / name, self.path.resolve()
        target = path.resolve()
        if target.parent != root and target.parent != root.parent.parent / "blobs":
            raise CheckpointError(
                f"{self.label}: {path} is a link to {target}, outside of the model folder; expected a file"
            )
        return path

    def _no_weights(self, single: str) -> CheckpointError:
        pickled = sorted(file.name for file in self.path.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            return CheckpointError(
                f"{self.label}: {self.path} has only pickled weights ({pickled[0]}), which are never opened because "
                "they can run code; convert them to safetensors first (load in transformers and save_pretrained)"
            )
        return CheckpointError(f"{self.label}: {self.path} has neither {single} nor {self._index}")


def _parse_header(handle: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and where its data begins; nothing is mapped, however large the file.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: the tensors do not fill the file without gaps, or are not of
            the size that their shapes say.
    """
    length = int.from_bytes(handle.read(8), "little")
    data = 8 + length
    if length > MAX_HEADER or data > size:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = json.loads(handle.read(length))
    position = 0
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        (start, end), shape, dtype = entry["data_offsets"], entry["shape"], str(entry["dtype"])
        if any(type(value) is not int or value < 0 for value in (start, end, *shape)):
            raise ValueError(f"tensor {name} has the shape {shape} at {start} to {end}")
        numel = math.prod(shape)
        if start != position or (dtype in DTYPES and end - start != numel * DTYPES[dtype].itemsize):
            raise ValueError(f"tensor {name}, {dtype} of shape {shape}, lies at {start} to {end}")
        position = end
    if data + position != size:
        raise ValueError(f"{data + position} bytes expected, {size} found")
    return header, data
