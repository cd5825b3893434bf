"""A folder is one process's at a time: its lock file says whose."""

from __future__ import annotations

import errno
import json
import os
import platform
import time
from contextlib import suppress
from io import FileIO
from pathlib import Path

from featcal_fast import files
from featcal_fast.errors import OutputError

ATTEMPTS = 100  # at a file that others make and remove


class Lock:
    """A file that this process holds; the operating system gives it back when the process ends, however it does.

    Args:
        path: of the file.
        what: what it stands for, in an error: `scratch: /tmp/fast`.

    Raises:
        OutputError: another process holds it; says which.
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        for _ in range(ATTEMPTS):  # then, the file system gives files other numbers each time
            file = _open(path)
            try:
                if not files.lock(file):
                    owner = _owner(file)
                    raise OutputError(f"{what} is in use by another run{owner}; wait for it, or choose another folder")
                there = files.is_at(file, path)
            except BaseException:
                files.close(file)
                raise
            if there:
                break
            files.close(file)  # the run before this one gave it back, and so removed it, in the meantime
        self._file = file
        mine = {"process": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        try:
            files.truncate(file, 0)
            files.write_at(file, json.dumps(mine).encode(), 0)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give it back."""
        with suppress(OSError):  # its folder may be gone, or no longer to be written to
            files.remove(self.path)
        with suppress(OSError):  # what its file says has no meaning any more
            files.close(self._file)


def _open(path: Path) -> FileIO:
    for _ in range(ATTEMPTS):
        try:
            return files.create(path)
        except FileExistsError:
            with suppress(FileNotFoundError):  # removed since
                return files.open_to_write(path)
    raise FileExistsError(errno.EEXIST, "Cannot be opened or made", str(path))


def _owner(file: FileIO) -> str:
    """Of a lock that is taken, where its file can be read: ` (process 12 on host, since ...)`."""
    memory = memoryview(bytearray(1024))
    with suppress(OSError, ValueError, KeyError, TypeError):
        owner = json.loads(bytes(memory[: files.read_into(file, memory, 0)]))
        return f" (process {owner['process']} on {owner['host']}, since {owner['since']})"
    return ""
