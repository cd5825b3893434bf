"""Write a model folder tensor by tensor, in any order: it appears whole, under its name, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import torch
from torch import Tensor

from featcal_fast.checkpoints.reader import TensorSource
from featcal_fast.checkpoints.shards import DTYPES, INDEX, SINGLE, is_finite
from featcal_fast.errors import OutputError

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def nearest_existing(path: Path) -> Path:
    """`path`, or the nearest of its parents that exists."""
    path = path.resolve()
    return next(each for each in (path, *path.parents) if each.exists())


def check_output(out: Path, inputs: list[Path], nbytes: int) -> None:
    """Refuse an output folder before any work is done.

    Raises:
        OutputError: it holds something, lies in an input folder, cannot be made, or the disk lacks `nbytes`.
    """
    resolved = out.resolve()
    for folder in inputs:
        if resolved == folder.resolve() or folder.resolve() in resolved.parents:
            raise OutputError(
                f"out: {out} lies in the input folder {folder}, which is never written to; choose another folder"
            )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"out: {out} already holds something; choose another folder, or remove it first")
    if resolved.is_mount():  # a finished folder is renamed to it, which cannot be done to a mount point
        raise OutputError(f"out: {out} is a mount point; name a folder in it, for example {out / 'calibrated'}")
    parent = nearest_existing(resolved.parent)
    if not parent.is_dir():
        raise OutputError(f"out: {out} cannot be made, because {parent} is a file; choose another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"out: {parent} cannot be written to; choose another folder")
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise OutputError(f"out: {out} needs {nbytes / 1e9:.1f} GB, but {parent} has {free / 1e9:.1f} GB free")


class CheckpointWriter:
    """Streams tensors into safetensors files laid out like `layout`'s: same names, shapes, dtypes and shards.

    Used as a context manager: a clean exit publishes the folder, an exception removes what was written. Should a
    finished folder not get its name, it stays under another, which the error says.

    Args:
        out: the folder to make; must not hold anything.
        layout: the checkpoint whose form, side files and shards the output takes.
    """

    def __init__(self, out: Path, layout: TensorSource) -> None:
        self.out, self.layout = out.resolve(), layout  # of a link, what it points to
        self.partial = self.out.parent / f".{self.out.name}.partial-{uuid4().hex[:8]}"
        self._files: dict[str, BinaryIO] = {}
        self._offsets: dict[str, int] = {}
        self._missing = set(layout.tensors)

    def __enter__(self) -> CheckpointWriter:
        try:
            with self._write_errors():
                self.partial.mkdir(parents=True)
                for file in sorted({info.file for info in self.layout.tensors.values()}):
                    self._start(file)
                for path in self.layout.side_files():
                    shutil.copyfile(path, self.partial / path.name)
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException:
            self._discard()
            raise
        if kind is None:
            self._publish()
        else:
            self._discard()

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, cast to the layout's dtypes. Each name once.

        Raises:
            OutputError: the disk is full, or a cast overflows.
        """
        for name, tensor in tensors.items():
            info = self.layout.tensors[name]
            if tuple(tensor.shape) != info.shape:
                raise ValueError(f"{name}: found shape {tuple(tensor.shape)}, expected {info.shape}")
            self._missing.remove(name)
            data = tensor.detach().to("cpu", info.dtype).contiguous()
            if data.is_floating_point() and not is_finite(data):
                raise OutputError(
                    f"{name}: the new values do not fit {info.dtype}: some are not finite; nothing was written"
                )
            file = self._files[info.file]
            with self._write_errors():
                file.seek(self._offsets[name])
                file.write(data.reshape(-1).view(torch.uint8).numpy().data)

    def copy(self, names: Iterable[str]) -> None:
        """Copy the named tensors, where not written yet, from the layout's own checkpoint, one at a time."""
        for name in names:
            if name in self._missing:
                self.write(self.layout.read([name]))

    def copy_rest(self) -> None:
        """Copy every tensor not written yet."""
        self.copy(self.layout.tensors)

    def add_text(self, name: str, text: str) -> None:
        """Put a text file beside the weights."""
        with self._write_errors():
            (self.partial / name).write_text(text)

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"out: {self.out} cannot be written: {error.strerror}; nothing was left behind: free space or choose "
                "another folder"
            ) from error

    def _start(self, file: str) -> None:
        """Reserve a safetensors file: its header is known before any tensor is."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        members = {name: info for name, info in self.layout.tensors.items() if info.file == file}
        # Wide types first, so that every tensor starts at a multiple of its item size.
        for name, info in sorted(members.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
            header[name] = {
                "dtype": DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [position, position + info.nbytes],
            }
            self._offsets[name] = position
            position += info.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        handle = open(self.partial / file, "wb")  # noqa: SIM115 (closed by _publish and _discard)
        handle.write(len(text).to_bytes(8, "little") + text)
        for name in members:
            self._offsets[name] += 8 + len(text)
        handle.truncate(8 + len(text) + position)
        self._files[file] = handle

    def _finish(self) -> None:
        if self._missing:
            raise OutputError(
                f"{self.out}: {len(self._missing)} tensors were never written, {min(self._missing)} among them"
            )
        infos = self.layout.tensors
        if set(self._files) != {SINGLE}:
            index = {
                "metadata": {"total_size": sum(info.nbytes for info in infos.values())},
                "weight_map": {name: infos[name].file for name in sorted(infos)},
            }
            self.add_text(INDEX, json.dumps(index, indent=2) + "\n")
        with self._write_errors():
            for handle in self._files.values():
                handle.flush()
                os.fsync(handle.fileno())
                handle.close()

    def _publish(self) -> None:
        try:
            os.replace(self.partial, self.out)
        except OSError as error:
            raise OutputError(
                f"out: the finished model is in {self.partial}, because {self.out} could not be put in its place: "
                f"{error.strerror}; rename it yourself"
            ) from error
        with suppress(OSError):  # some file systems cannot; the folder is there all the same
            parent = os.open(self.out.parent, os.O_RDONLY)
            os.fsync(parent)
            os.close(parent)

    def _discard(self) -> None:
        for handle in self._files.values():
            with suppress(OSError):  # what could not be written will not be missed
                handle.close()
        shutil.rmtree(self.partial, ignore_errors=True)
