"""Every file operation of the package, a function each: what tests make fail, kill the process at, and record.

Nothing is buffered: what `write_at` was given is the operating system's when it returns, and on the disk when `sync`
has. A name is on the disk when `sync_folder` has. Errors are OSErrors, for callers to put into words. Libraries that
open files by themselves (transformers, datasets, safetensors' own reader) are the exception; by one are written only
a plot, and the models and data that the demo makes.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import stat as stat_module
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from io import FileIO
from pathlib import Path
from typing import IO
from uuid import uuid4

PIECE = 2**20  # bytes of a text at a time
LARGEST = 16 * 2**20  # bytes of what is read as a whole, a document or a line, unless its reader allows more


def open_to_read(path: Path) -> FileIO:
    """An existing file; what is none (a pipe, a device) may keep its reader waiting forever, and is an OSError."""
    return _regular(FileIO(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)), path)


def open_to_write(path: Path) -> FileIO:
    """An existing file, to be read and overwritten; no link to one, nor what is none."""
    flag = os.O_NOFOLLOW | os.O_NONBLOCK
    return _regular(open(path, "r+b", buffering=0, opener=lambda name, flags: os.open(name, flags | flag)), path)


def _regular(file: FileIO, path: Path) -> FileIO:
    if not stat_module.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return file


def create(path: Path) -> FileIO:
    """A new file, to be written and read; FileExistsError where there is one."""
    return open(path, "x+b", buffering=0)


def create_unnamed(folder: Path) -> FileIO:
    """A file without a name, which goes with the process."""
    return tempfile.TemporaryFile(dir=folder, buffering=0)


def read_into(file: FileIO, memory: memoryview, position: int) -> int:
    """Fill `memory` from a place in a file; how many bytes came, 0 at the end."""
    return os.preadv(file.fileno(), [memory], position)


def is_at(file: FileIO, path: Path) -> bool:
    """Whether `path` is still the name of an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), stat(path))
    except FileNotFoundError:
        return False


def list_folder(path: Path) -> list[Path]:
    """What a folder holds, sorted."""
    return sorted(path.iterdir(), key=lambda each: each.name)  # paths compare part by part, which takes longer


def stat(path: Path) -> os.stat_result:
    """A file's size and times; of a link, those of what it points to."""
    return path.stat()


def resolve(path: Path) -> Path:
    """Where a path leads, through all links; it need not exist. An OSError where nobody can say."""
    with suppress(FileNotFoundError, NotADirectoryError):
        stat(path)  # says so of links in a circle, of names that are too long, and of folders that cannot be entered
    try:
        return path.resolve()
    except RuntimeError as error:  # Python's word for links in a circle, until 3.13
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error


def free_bytes(folder: Path) -> int:
    """Room on the file system of a folder."""
    return shutil.disk_usage(folder).free


def write_at(file: FileIO, data: memoryview | bytes, position: int) -> None:
    """Write all of `data` at a place in a file."""
    rest = memoryview(data).cast("B")
    while rest:
        written = os.pwrite(file.fileno(), rest, position)
        rest, position = rest[written:], position + written


def reserve(file: FileIO, size: int) -> None:
    """Make a file at least so long, with its room on the disk taken where the file system can do that."""
    if not size:
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        if os.fstat(file.fileno()).st_size < size:
            os.ftruncate(file.fileno(), size)


def truncate(file: FileIO, size: int) -> None:
    """Cut a file off."""
    os.ftruncate(file.fileno(), size)


def sync(file: FileIO) -> None:
    """Wait until a file's content is on the disk."""
    os.fsync(file.fileno())


def share(size: int) -> memoryview:
    """Memory that copies of this process have in common with it, of so many bytes, all zero; a file without a name."""
    return memoryview(mmap.mmap(-1, size))


def close(file: FileIO) -> None:
    """Give a file back; some file systems tell only now what could not be written."""
    file.close()


def make_folder(path: Path) -> list[Path]:
    """A folder, with its parents where they are missing, all of them synced; FileExistsError where there is one.

    Returns what was made, from the top down; of a folder that cannot be made nothing stays.
    """
    missing = [path]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    made: list[Path] = []
    try:
        while missing:
            each = missing.pop()
            try:
                os.mkdir(each)
            except FileExistsError:
                if not missing:
                    raise
                continue  # another process was faster
            made.append(each)
            sync_folder(each.parent)
    except BaseException:
        remove_empty(made)
        raise
    return made


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system can say so."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # cannot sync folders; it keeps names by itself
            raise
    finally:
        os.close(folder)


def rename(path: Path, target: Path) -> None:
    """Give a file or folder another name: that of none, of a file that it replaces, or of an empty folder."""
    os.replace(path, target)


def link(path: Path, target: Path) -> None:
    """Give a file a second name; FileExistsError where there is one. Where the file system has no such thing, another
    process that takes the name meanwhile may be overwritten."""
    try:
        os.link(path, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        os.replace(path, target)


def remove(path: Path) -> None:
    """A file's name."""
    os.unlink(path)


def remove_folder(path: Path) -> None:
    """An empty folder."""
    os.rmdir(path)


def lock(file: FileIO) -> bool:
    """Take a file for this process until it is closed; whether no other has it, as far as the file system can tell."""
    import fcntl

    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def discard(stream: IO[str]) -> None:
    """Whatever is still to be written to a stream goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def silence() -> None:
    """Whatever this process has still to say, by whatever library, goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):  # standard output and error
        os.dup2(nowhere, number)


# Made of these


def fill(file: FileIO, memory: memoryview, position: int) -> int:
    """Fill `memory` from a place in a file; how many bytes came, fewer than it has where the file ends."""
    done = 0
    while done < len(memory) and (count := read_into(file, memory[done:], position + done)):
        done += count
    return done


def read_at(file: FileIO, size: int, position: int) -> bytes:
    """So many bytes from a place in a file; fewer where it ends."""
    memory = memoryview(bytearray(size))
    return bytes(memory[: fill(file, memory, position)])


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """A whole file, however little of it there is to `stat`; an OSError where it is larger than it may be."""
    pieces: list[bytes] = []
    with closing(open_to_read(path)) as file:
        size = 0
        while piece := read_at(file, PIECE if size else 4096, size):
            pieces.append(piece)
            size += len(piece)
            if size > largest:
                raise OSError(errno.EFBIG, f"it is larger than {largest / 2**20:g} MiB", str(path))
    return b"".join(pieces)


def read_text(path: Path, largest: int = LARGEST) -> str:
    """A whole file in UTF-8, likewise."""
    return read_bytes(path, largest).decode()


def list_below(path: Path) -> Iterator[Path]:
    """All files of a folder and of the folders in it, sorted by their parts; a link to a folder is not followed."""
    waiting = [path]  # not a call for each, whose depth a stranger's folder would say
    while waiting:
        each = waiting.pop()
        if each.is_dir() and (each == path or not each.is_symlink()):
            waiting += reversed(list_folder(each))
        else:
            yield each


def write_bytes(path: Path, data: bytes) -> None:
    """A new file with its content, synced."""
    file = create(path)
    try:
        write_at(file, data, 0)
        sync(file)
    finally:
        close(file)


def write_new(path: Path, data: bytes) -> None:
    """A new file with its content, whole or not at all, synced; FileExistsError where there is something."""
    new = path.with_name(f".{uuid4().hex}.partial")
    try:
        write_bytes(new, data)
        link(new, path)
    finally:
        with suppress(OSError):
            remove(new)
    sync_folder(path.parent)


def replace_bytes(path: Path, data: bytes) -> None:
    """A file's content, new or in place of another, whole or not at all; synced."""
    new = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        write_bytes(new, data)
        rename(new, path)
    except BaseException:
        with suppress(OSError):
            remove(new)
        raise
    sync_folder(path.parent)


def remove_empty(folders: list[Path]) -> None:
    """Folders, each in the one before, as far as nothing is in them."""
    with suppress(OSError):
        for folder in reversed(folders):
            remove_folder(folder)


def remove_tree(path: Path) -> None:
    """A folder and all that it holds, however deep; links are not followed, and one to a folder is only a name."""
    if path.is_symlink():
        remove(path)
        return
    folders = [path]
    for folder in folders:
        for each in list_folder(folder):
            if each.is_dir() and not each.is_symlink():
                folders.append(each)
            else:
                remove(each)
    for folder in reversed(folders):
        remove_folder(folder)
