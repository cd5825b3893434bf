"""Hidden states on disk: for the time until they are needed again, or so that a run can go on from there."""

from __future__ import annotations

import errno
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from featcal_fast import files
from featcal_fast.errors import OutputError, ResumeError

PREFIX = "stage-"  # of files' names


class Saved(NamedTuple):
    """Where hidden states lie in a file: bytes from its beginning, `[samples, tokens, width]`, name of the dtype; and
    their `checksum`."""

    position: int
    shape: tuple[int, ...]
    dtype: str
    checksum: int


class StateFile:
    """Hidden states in a file, one after the other.

    Args:
        file: to write to and read from.
        where: it is, for errors.

    Attributes:
        written, read: bytes, so far.
    """

    def __init__(self, file: FileIO, where: Path) -> None:
        self._file, self._where, self._end = file, where, 0
        self.written = self.read = 0

    def room(self, nbytes: int) -> int:
        """The position of so many bytes that nothing else has."""
        position, self._end = self._end, self._end + nbytes
        return position

    def write(self, data: Tensor, position: int) -> None:
        """Write a contiguous tensor of the host.

        Raises:
            OutputError: the disk is full.
        """
        memory = _bytes(data)
        self.written += memory.nbytes
        with scratch_errors(self._where):
            files.write_at(self._file, memory, position)

    def read_to(self, data: Tensor, position: int) -> None:
        """Fill a contiguous tensor of the host.

        Raises:
            OutputError: the file ends before it does, or cannot be read.
        """
        rest = _bytes(data)
        self.read += rest.nbytes
        with scratch_errors(self._where):
            while rest:
                count = files.read_into(self._file, rest, position)
                if not count:
                    raise OutputError(f"{self._where}: hidden states end early; was the file changed?")
                rest, position = rest[count:], position + count

    def add(self, data: Tensor) -> Saved:
        """Write a tensor behind all others."""
        position, data = self.room(data.nbytes), data.to("cpu").contiguous()
        self.write(data, position)
        return Saved(position, tuple(data.shape), str(data.dtype).removeprefix("torch."), checksum(data))

    def get(self, saved: Saved) -> Tensor:
        """A tensor that was added, on the host.

        Raises:
            ResumeError: it is not what was added.
        """
        data = torch.empty(saved.shape, dtype=getattr(torch, saved.dtype))
        self.read_to(data, saved.position)
        if checksum(data) != saved.checksum:
            raise ResumeError(
                f"{self._where}: hidden states are not as the interrupted run wrote them; --fresh starts over"
            )
        return data

    def reserve(self, nbytes: int) -> None:
        """Take the room on the disk."""
        with scratch_errors(self._where):
            files.reserve(self._file, nbytes)

    def sync(self) -> None:
        """Wait until it is on the disk."""
        with scratch_errors(self._where):
            files.sync(self._file)


class Scratch:
    """A file without a name in a folder, which goes with the process.

    Args:
        folder: on a fast disk.

    Attributes:
        current: the file to write to.
        generation: counts the files that have been it: what is in one before is written anew, not over.

    Raises:
        OutputError: no file can be made there.
    """

    def __init__(self, folder: Path) -> None:
        with scratch_errors(folder):
            self.current = StateFile(files.create_unnamed(folder), folder)
        self.generation = 0

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes read and written."""
        return self.current.read, self.current.written


class Snapshots:
    """Two files for each stage that take turns: in one are the hidden states that a run can go on from, while those
    of the layers after it come into the other.

    Args:
        folder: for the files.
        name: of what they are for, in the files' names.
        durable: names of files that a run before this one has kept.

    Attributes:
        current, generation: as of `Scratch`.

    """

    current: StateFile

    def __init__(self, folder: Path, name: str, durable: Iterable[str] = ()) -> None:
        self.folder, self.generation, self._name = folder, 0, name
        self._durable = set(durable)
        self._names: list[str] = []  # of the stage: of `current`, and of the other
        self._files: dict[str, FileIO] = {}
        self._left: list[FileIO] = []  # of the stage before, where its hidden states may be until this one has them
        self._states: list[StateFile] = []

    def begin(self, stage: int) -> None:
        """Go on to a stage. Of the one before, what is durable stays.

        Raises:
            ResumeError: of this one, it is gone.
        """
        with scratch_errors(self.folder):
            for name in self._names:
                if name not in self._durable:
                    files.remove(self.folder / name)
                    self._left.append(self._files.pop(name))
            names = (f"{PREFIX}{stage}-{self._name}{turn}" for turn in "ab")
            self._names = sorted(names, key=self._durable.__contains__)
            for name in self._names:
                self._files[name] = self._open(name)
            files.sync_folder(self.folder)
        self._take()

    def reserve(self, nbytes: int) -> None:
        """A stage has its hidden states: take room for them in both files.

        Raises:
            OutputError: there is none.
        """
        while self._left:
            self._left.pop().close()
        for name in self._names:
            StateFile(self._files[name], self.folder).reserve(nbytes)

    def keep(self) -> str:
        """Wait until `current` is on the disk; returns its name."""
        self.current.sync()
        return self._names[0]

    def turn(self) -> None:
        """`current` is what a run can go on from, and known to be; the other file is free."""
        kept, free = self._names
        self._durable = self._durable - {free} | {kept}
        self._names = [free, kept]
        self.generation += 1
        self._take()

    def saved(self, name: str) -> StateFile:
        """A durable file of the stage."""
        return StateFile(self._files[name], self.folder / name)

    def close(self) -> None:
        """Close all files."""
        for file in (*self._files.values(), *self._left):
            with suppress(OSError):
                file.close()

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes read and written."""
        return sum(each.read for each in self._states), sum(each.written for each in self._states)

    def _open(self, name: str) -> FileIO:
        path = self.folder / name
        if name not in self._durable:
            return files.create(path)
        with _still_there(path):
            return files.open_to_write(path)

    def _take(self) -> None:
        self.current = StateFile(self._files[self._names[0]], self.folder)
        self._states.append(self.current)


def remove_others(folder: Path, durable: Iterable[str]) -> None:
    """Remove hidden states of a run before this one, but those that it can go on from.

    Args:
        folder: for the files.
        durable: names of those.

    Raises:
        OutputError: one cannot be removed.
        ResumeError: the folder is gone.
    """
    kept = set(durable)
    with scratch_errors(folder), _still_there(folder):
        for path in files.list_folder(folder):
            if path.name.startswith(PREFIX) and path.name not in kept:
                with suppress(FileNotFoundError):  # another machine's first rank did
                    files.remove(path)


@contextmanager
def _still_there(path: Path) -> Iterator[None]:
    """What a run before this one has kept, and nobody else may remove."""
    try:
        yield
    except FileNotFoundError:
        raise ResumeError(f"{path} is gone, which the interrupted run wrote; --fresh starts over") from None


@contextmanager
def scratch_errors(where: Path) -> Iterator[None]:
    """What the operating system refuses, in words."""
    try:
        yield
    except OSError as error:
        remedy = "make it first" if error.errno == errno.ENOENT else "free space or choose another folder"
        raise OutputError(f"scratch: {where} cannot hold hidden states: {error.strerror}; {remedy}") from error


def checksum(data: Tensor, before: int = 0) -> int:
    """CRC-32 of a contiguous tensor of the host, behind bytes whose own is `before`."""
    return zlib.crc32(_bytes(data), before)


def _bytes(data: Tensor) -> memoryview:
    return data.reshape(-1).view(torch.uint8).numpy().data.cast("B")
