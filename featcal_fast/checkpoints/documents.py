"""What every reader of a model's folder asks of the files in it: that they can be read, are JSON, and lie inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

from featcal_fast import files
from featcal_fast.errors import CheckpointError, printable
from featcal_fast.untrusted.documents import DocumentError, parse_json

POINTER = b"version https://git-lfs"  # what a file of git's large file storage begins with until it is fetched
NOT_THE_FILE = "a git-lfs pointer, not the file: git lfs pull"
LONGEST_NAME = 255  # bytes, as file systems have it


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


def read_document(path: Path, label: str, largest: int = files.LARGEST) -> Any:
    """What a JSON file of a model's folder holds.

    Raises:
        CheckpointError: it cannot be read, is larger than `largest` bytes, or no JSON that one may trust.
    """
    with read_errors(label, path):
        data = files.read_bytes(inside(path, path.parent, label), largest)
    if data.startswith(POINTER):
        raise CheckpointError(f"{label}: {path} is {NOT_THE_FILE}")
    try:
        return parse_json(data)
    except DocumentError as error:
        raise CheckpointError(f"{label}: {path} is not valid JSON: {error}; download or copy it again") from error


def inside(path: Path, folder: Path, label: str) -> Path:
    """A path of a model's folder.

    Raises:
        CheckpointError: it is a link out of there.
        OSError: of a link without an end.
    """
    if leads_out(path, folder):
        raise CheckpointError(
            f"{label}: {path} is a link to {files.resolve(path)}, outside of the model folder; expected a file"
        )
    return path


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a file that exists is a link out of a model's folder; links into the hub's cache stay in the model."""
    root, target = files.resolve(folder), files.resolve(path)
    return root not in (target, *target.parents) and target.parent != root.parent.parent / "blobs"


def is_file_name(value: object) -> TypeGuard[str]:
    """Whether a stranger's value is a plain text that may be the name of a file in a folder."""
    return (
        isinstance(value, str)
        and is_plain(value)
        and Path(value).name == value
        and value not in ("", "..")
        and len(value.encode()) <= LONGEST_NAME
    )


def is_plain(text: str) -> bool:
    """Whether a text holds no control characters, marks that turn its direction, or halves of characters."""
    return text.isprintable() or (printable(text) == text and "\n" not in text)
