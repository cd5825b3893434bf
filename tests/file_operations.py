"""The file operations of a run, one by one: counted, recorded, failing, or the last thing that a process does."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import FileIO
from typing import Any, NamedTuple
from unittest.mock import patch

from featcal_fast import files

# Functions of `files`, of which the others are made. The first change something on the disk, or say whose it is.
SYNCS = ("sync", "sync_folder")
CHANGES = SYNCS + (
    *("create", "create_unnamed", "open_to_write", "write_at", "reserve", "truncate", "close", "lock"),
    *("make_folder", "rename", "remove", "remove_folder"),
)
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
READS = ("open_to_read", "read_into", "read_bytes", "list_folder", "stat")


class Operation(NamedTuple):
    """A call of one of these functions, the how manieth it is from 1 on, and what does it."""

    number: int
    name: str
    arguments: tuple[Any, ...]
    function: Callable[..., Any]

    def do(self) -> Any:
        """Nothing here loses power: waiting for the disk would only take time."""
        return None if self.name in SYNCS else self.function(*self.arguments)

    def do_half(self) -> None:
        """As far as it gets before it fails, or its process ends."""
        if self.name == "write_at":
            file, data, position = self.arguments
            data = memoryview(data).cast("B")
            self.function(file, data[: len(data) // 2], position)
        elif self.name == "close":  # what cannot be written is told when the file is closed already
            self.do()


@contextmanager
def operations(act: Callable[[Operation], Any] = Operation.do, names: Sequence[str] = CHANGES) -> Iterator[list[str]]:
    """Within the block, `act` does what these functions would, which come from any thread.

    Yields:
        Their names, in order, as they come.
    """
    done: list[str] = []
    counting = threading.Lock()

    def acting(name: str) -> Callable[..., Any]:
        function = getattr(files, name)

        def wrapped(*arguments: Any) -> Any:
            with counting:
                done.append(name)
                number = len(done)
            return act(Operation(number, name, arguments, function))

        return wrapped

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(files, name, acting(name)))
        yield done


def killing(number: int) -> Callable[[Operation], Any]:
    """The process is gone in the midst of an operation."""

    def act(operation: Operation) -> Any:
        if operation.number == number:
            operation.do_half()
            os.kill(os.getpid(), signal.SIGKILL)
        return operation.do()

    return act


def failing(number: int, code: int) -> Callable[[Operation], Any]:
    """One operation fails, once, of a write after half of it."""

    def act(operation: Operation) -> Any:
        if operation.number == number:
            operation.do_half()
            raise OSError(code, os.strerror(code), place(operation))
        return operation.do()

    return act


def place(operation: Operation) -> str | None:
    """The path that an operation is given; as the operating system does, none for an open file."""
    first = operation.arguments[0]
    return None if isinstance(first, FileIO) else str(first)
