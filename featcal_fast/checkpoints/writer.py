"""Write a model folder tensor by tensor, in any order, or go on with one that was begun."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from featcal_fast import files
from featcal_fast.checkpoints.config import plain_config
from featcal_fast.checkpoints.documents import read_document, read_errors
from featcal_fast.checkpoints.reader import TensorSource
from featcal_fast.checkpoints.shards import DTYPES, INDEX, SINGLE, TensorInfo, is_finite
from featcal_fast.checkpoints.side_files import CARD, REPORT
from featcal_fast.checkpoints.work import WorkFolder, write_errors
from featcal_fast.errors import OutputError, ResumeError

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CONFIG = "config.json"
COPIED = 2**22  # bytes of a file at a time


class CheckpointWriter:
    """Streams tensors into safetensors files laid out like `layout`'s: same names, shapes, dtypes and shards.

    The layout's card alone is not copied: what it says is not true of the output, whose own `add` takes. Used as a
    context manager. Every file has its room on the disk before the first tensor comes. With `finish` the
    folder is whole and on the disk; `WorkFolder.publish` gives it its name.

    Args:
        work: where the output is made.
        layout: the checkpoint whose form, side files and shards the output takes.
        hashes: of tensors that a run before this one has written and synced; they must still be there.

    Attributes:
        hashes: SHA-256 of what was written, by tensor; `hashed` brings it up to date.
    """

    def __init__(self, work: WorkFolder, layout: TensorSource, hashes: Mapping[str, str] | None = None) -> None:
        self.out, self.folder, self.layout = work.out, work.model, layout
        self.hashes = dict(hashes or {})
        self._resumed = bool(hashes)
        self._shards: dict[str, FileIO] = {}
        self._headers: dict[str, str] = {}  # their SHA-256
        self._side: dict[str, str] = {}
        self._offsets: dict[str, int] = {}
        self._missing = set(layout.tensors) - self.hashes.keys()
        self._unsynced: set[str] = set()
        self._hashing: dict[str, Future[str]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hashes")

    def __enter__(self) -> CheckpointWriter:
        try:
            with write_errors(self.out):
                if not self._resumed:
                    files.make_folder(self.folder)
                members: dict[str, dict[str, TensorInfo]] = {}
                for name, info in self.layout.tensors.items():
                    members.setdefault(info.file, {})[name] = info
                for file in sorted(members):
                    self._open(file, members[file])
                files.sync_folder(self.folder)
                if self._resumed:
                    self._check_written()
                self._copy_side_files()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, cast to the layout's dtypes. Each name once, unless it was forgotten.

        Raises:
            OutputError: the disk is full, or a cast overflows.
        """
        self.hashed()  # one call's tensors are kept for it, no more
        for name, tensor in tensors.items():
            info = self.layout.tensors[name]
            if tuple(tensor.shape) != info.shape:
                raise ValueError(f"{name}: found shape {tuple(tensor.shape)}, expected {info.shape}")
            self._missing.remove(name)
            data = tensor.detach().to("cpu", info.dtype).contiguous()
            if data.is_floating_point() and not is_finite(data):
                raise OutputError(f"{name}: the new values do not fit {info.dtype}: some are not finite")
            memory = data.reshape(-1).view(torch.uint8).numpy().data
            self._hashing[name] = self._thread.submit(_sha256, memory)
            with write_errors(self.out):
                files.write_at(self._shards[info.file], memory, self._offsets[name])
            self._unsynced.add(info.file)

    def add(self, name: str, text: str) -> None:
        """Write a text file beside the weights, whose `contents` have it from then on.

        Raises:
            OutputError: it cannot be written.
        """
        with write_errors(self.out):
            self._side[name] = self._add(name, text)

    def forget(self, names: Iterable[str]) -> None:
        """Take the named tensors for not written: whatever is written next takes their place."""
        self.hashed()
        for name in names:
            if self.hashes.pop(name, None) is not None:
                self._missing.add(name)

    def copy(self, names: Iterable[str]) -> None:
        """Copy the named tensors, where not written yet, from the layout's own checkpoint, one at a time."""
        for name in names:
            if name in self._missing:
                self.write(self.layout.read([name]))

    def copy_rest(self) -> None:
        """Copy every tensor not written yet."""
        self.copy(self.layout.tensors)

    def hashed(self) -> dict[str, str]:
        """`hashes`, once all that was written is hashed."""
        while self._hashing:
            name, digest = self._hashing.popitem()
            self.hashes[name] = digest.result()
        return self.hashes

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        with write_errors(self.out):
            for file in sorted(self._unsynced):
                files.sync(self._shards[file])
        self._unsynced.clear()

    def contents(self) -> dict[str, Any]:
        """SHA-256 of everything in the folder: of tensors, of their files' headers, of all other files."""
        return {"tensors": dict(sorted(self.hashed().items())), "headers": self._headers, "files": self._side}

    def finish(self, report: str | None = None) -> None:
        """Write `report.json`, if there is one, and wait until the folder is on the disk.

        Raises:
            OutputError: it cannot be written, or a tensor was never written.
        """
        if self._missing:
            raise OutputError(
                f"{self.out}: {len(self._missing)} tensors were never written, {min(self._missing)} among them"
            )
        with write_errors(self.out):
            if report is not None:
                self._add(REPORT, report)
            self.sync()
            for file in self._shards.values():
                files.close(file)
            for folder in sorted({(self.folder / name).parent for name in self._side} | {self.folder}, reverse=True):
                files.sync_folder(folder)

    def _open(self, file: str, members: Mapping[str, TensorInfo]) -> None:
        """Reserve a safetensors file, or go on with it: its header is known before any tensor is."""
        data, offsets, size = make_header(members, self.layout.metadata().files.get(file, {}))
        self._offsets |= offsets
        path = self.folder / file
        self._make_folders(path)
        try:
            self._shards[file] = shard = files.open_to_write(path) if self._resumed else files.create(path)
        except FileNotFoundError:
            raise ResumeError(f"{path} is gone, which the interrupted run wrote; --fresh starts over") from None
        self._headers[file] = _sha256(data)
        files.reserve(shard, size)
        files.write_at(shard, data, 0)
        self._unsynced.add(file)

    def _check_written(self) -> None:
        """What a run before this one has written must be as it was."""
        for name, expected in self.hashes.items():
            info = self.layout.tensors[name]
            memory = memoryview(bytearray(info.nbytes))
            files.fill(self._shards[info.file], memory, self._offsets[name])
            if _sha256(memory) != expected:
                raise ResumeError(
                    f"{self.folder / info.file}: tensor {name} is not as the interrupted run wrote it; --fresh starts "
                    "over"
                )

    def _copy_side_files(self) -> None:
        side = {name: path for name, path in self.layout.side_files().items() if name != CARD}
        for name, path in side.items():
            target = self.folder / name
            if name == self._beside_weights(CONFIG) and (text := self._plain_config(path)) is not None:
                self._side[name] = self._add(name, text)
                continue
            if target.exists():  # half-written, for all that is known
                files.remove(target)
            self._make_folders(target)
            self._side[name] = self._copy_file(path, target)
        infos, own = self.layout.tensors, self.layout.metadata().index
        if {PurePosixPath(file).name for file in self._shards} != {SINGLE} or own is not None:
            index = {
                "metadata": {**(own or {}), "total_size": sum(info.nbytes for info in infos.values())},
                "weight_map": {name: PurePosixPath(infos[name].file).name for name in sorted(infos)},
            }
            place = self._beside_weights(INDEX)
            self._side[place] = self._add(place, json.dumps(index, indent=2) + "\n")

    def _beside_weights(self, name: str) -> str:
        """A file of the folder of the weights, which may be one in the output."""
        return str(PurePosixPath(next(iter(self._shards), SINGLE)).with_name(name))

    def _make_folders(self, target: Path) -> None:
        """Those that a file of the output is to be in."""
        for folder in reversed(target.relative_to(self.folder).parents[:-1]):
            if not (self.folder / folder).exists():
                files.make_folder(self.folder / folder)

    def _plain_config(self, path: Path) -> str | None:
        """What takes its place where it tells of quantised weights: those that are written are none."""
        values = read_document(path, self.layout.label)
        return plain_config(values) if isinstance(values, dict) else None

    def _copy_file(self, path: Path, target: Path) -> str:
        """Its SHA-256."""
        digest, position, memory = hashlib.sha256(), 0, memoryview(bytearray(COPIED))
        with closing(files.create(target)) as file:
            for part in self._parts(path, memory):
                digest.update(part)
                files.write_at(file, part, position)
                position += len(part)
            files.sync(file)
        return digest.hexdigest()

    def _parts(self, path: Path, memory: memoryview) -> Iterator[memoryview]:
        """A file's content, `memory` by `memory`; what goes wrong is that file's, not the output's."""
        position = 0
        with read_errors(self.layout.label, path), closing(files.open_to_read(path)) as source:
            while count := files.read_into(source, memory, position):
                yield memory[:count]
                position += count

    def _add(self, name: str, text: str) -> str:
        """A text file beside the weights; its SHA-256."""
        path, data = self.folder / name, text.encode()
        if path.exists():
            files.remove(path)
        files.write_bytes(path, data)
        return _sha256(data)

    def _close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        for shard in self._shards.values():
            with suppress(OSError):  # what could not be written will not be missed
                shard.close()


def make_header(members: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The beginning of a safetensors file, where in it each tensor begins, and how many bytes it will have.

    Args:
        members: the file's tensors, by name.
        metadata: what it is to say of itself, besides its format.
    """
    header: dict[str, object] = {"__metadata__": {**metadata, "format": "pt"}}
    offsets, position = {}, 0
    # Wide types first, so that every tensor starts at a multiple of its item size.
    for name, info in sorted(members.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        header[name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, position + info.nbytes],
        }
        offsets[name] = position
        position += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = len(text).to_bytes(8, "little") + text
    return data, {name: len(data) + offset for name, offset in offsets.items()}, len(data) + position


def _sha256(data: memoryview | bytes) -> str:
    return hashlib.sha256(data).hexdigest()
