"""Whether a calibrated model's folder is as it was written, by the hashes in its `report.json`, and loads."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any

from featcal_fast import files
from featcal_fast.checkpoints import REPORT, leads_out, parse_header, read_header
from featcal_fast.errors import FeatCalError, told
from featcal_fast.inputs.paths import checked_path
from featcal_fast.job.loads import check_loads
from featcal_fast.reporting.forms import FormError
from featcal_fast.reporting.report import check_version
from featcal_fast.untrusted.documents import parse_json

WHOLE, DAMAGED, NOT_OURS, NOT_LOADING = 0, 1, 2, 3
NAME = "featcal_fast"  # what reports say of their maker, among versions
KINDS = ("tensors", "headers", "files")  # of its `contents`: hashes by name
MAX_REPORT = 2**28  # bytes
PIECE = 2**24  # bytes that are hashed at a time
NAMED = 4  # tensors of those that are missing
LONGEST = 200  # characters of a name that are shown


@dataclass
class Check:
    """What was found in a folder.

    Attributes:
        out: the folder.
        status: 0, whole; 1, damaged; 2, not a calibrated model; 3, as it was written, but it does not load.
        problems: a text each, which names a tensor or file.
        tensors: how many are as they were written.
        shards: how many files have their headers as they were written.
        files: how many others are as they were written.
        unlisted: files that the run did not write; they may be anyone's.
    """

    out: Path
    status: int = WHOLE
    problems: list[str] = field(default_factory=list)
    tensors: int = 0
    shards: int = 0
    files: int = 0
    unlisted: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether all is as it was written, and loads."""
        return self.status == WHOLE

    def summary(self) -> str:
        """One line."""
        if self.status == NOT_OURS:
            return f"{self.out} is not a calibrated model: {self.problems[0]}"
        more = f"; files besides: {len(self.unlisted)}" if self.unlisted else ""
        counts = f"as written: {self.tensors} tensors, {self.shards} of their files' headers, {self.files} other files"
        if self.whole:
            return f"{self.out} is whole, and loads; {counts}{more}"
        if self.status == NOT_LOADING:
            return f"{self.out} is whole, but does not load; {counts}{more}"
        return f"{self.out} is damaged; problems: {len(self.problems)}; {counts}{more}"


def check(out: str | Path) -> Check:
    """Compare a calibrated model's folder with its `report.json`, and see that it loads.

    Nothing outside of the folder is read, and no weight is loaded: the model that `config.json` describes is built
    without storage, held against names and shapes of the tensors, and called once.

    Args:
        out: the folder.

    Returns:
        What was found. Whatever is in the folder, nothing is raised.

    Raises:
        RecipeError: `out` is no path.
    """
    found = Check(checked_path("out", out))
    try:
        contents = _read_contents(found.out)
    except _NothingToCompare as reason:
        found.status, text = reason.args
        found.problems.append(text)
        return found
    _Comparison(found, contents).run()
    if found.problems:
        found.status = DAMAGED
    elif problem := _loading_problem(found.out):
        found.status = NOT_LOADING
        found.problems.append(problem)
    return found


def _loading_problem(out: Path) -> str:
    """Why a folder that is as it was written does not load here; its config and report may be anyone's."""
    try:
        check_loads(out)
    except Exception as error:
        return f"it does not load: {error if isinstance(error, FeatCalError) else told(error)}"
    return ""


class _NothingToCompare(Exception):
    """With the status that follows, and why."""


def _read_contents(out: Path) -> dict[str, dict[str, str]]:
    """The hashes in the report, by kind and name."""
    try:
        report = _read_report(out)
    except (FileNotFoundError, NotADirectoryError):
        what = f"{REPORT} does not exist" if out.is_dir() else "there is no such folder"
        raise _NothingToCompare(NOT_OURS, what) from None
    except OSError as error:
        raise _NothingToCompare(DAMAGED, f"{REPORT} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise _NothingToCompare(DAMAGED, f"{REPORT} is not valid JSON: {error}") from error
    versions, contents = (report.get(key) if isinstance(report, dict) else None for key in ("versions", "contents"))
    if not any(isinstance(value, dict) and key in value for key, value in ((NAME, versions), ("tensors", contents))):
        raise _NothingToCompare(NOT_OURS, f"{REPORT} is not one of {NAME}")
    try:
        check_version(report)
    except FormError as error:
        raise _NothingToCompare(NOT_OURS, f"{REPORT} is of another version: {error}") from error
    for kind in KINDS:
        hashes = contents.get(kind) if isinstance(contents, dict) else None
        if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
            raise _NothingToCompare(DAMAGED, f"{REPORT} lacks the hashes of {kind} (contents.{kind})")
        if not hashes and kind != "files":
            raise _NothingToCompare(DAMAGED, f"{REPORT} names no {kind} (contents.{kind})")
    assert isinstance(contents, dict)
    return {kind: contents[kind] for kind in KINDS}


def _read_report(out: Path) -> Any:
    path = out / REPORT
    found = files.stat(path)
    if not stat.S_ISREG(found.st_mode) or leads_out(path, out):
        raise _NothingToCompare(NOT_OURS, f"{REPORT} is not a file of the folder")
    if found.st_size > MAX_REPORT:
        raise _NothingToCompare(DAMAGED, f"{REPORT} has {found.st_size} bytes, more than any that is written")
    return parse_json(files.read_bytes(path, MAX_REPORT))


class _Comparison:
    """Of a folder with the hashes in its report.

    Args:
        found: where to note what is found.
        contents: the hashes, by kind and name.
    """

    def __init__(self, found: Check, contents: dict[str, dict[str, str]]) -> None:
        self.found, self.out, self.contents = found, found.out, contents
        self.seen: set[str] = set()  # tensors
        self.memory = memoryview(bytearray(PIECE))

    def run(self) -> None:
        for name in self.contents["headers"]:
            self._read(name, self._check_shard)
        missing = [tensor for tensor in self.contents["tensors"] if tensor not in self.seen]
        for tensor in missing[:NAMED]:
            self._note(f"tensor {shown(tensor)} is missing: no file with a sound header holds it")
        if len(missing) > NAMED:
            self._note(f"so are {len(missing) - NAMED} tensors more")
        for name in self.contents["files"]:
            self._read(name, self._check_file)
        self._list_others()

    def _note(self, problem: str) -> None:
        self.found.problems.append(problem)

    def _check_shard(self, name: str, file: FileIO, size: int) -> None:
        try:
            header = read_header(file, size)
            headers, end = parse_header(header, name)
        except ValueError as error:
            self._note(f"{shown(name)} has a damaged header, or is cut off within it: {error}")
            return
        if hashlib.sha256(header).hexdigest() == self.contents["headers"][name]:
            self.found.shards += 1
        else:
            self._note(f"{shown(name)} does not have the header that was written")
        if size != end:
            self._note(f"{shown(name)} has {size} bytes, expected {end}")
        for tensor, entry in headers.items():
            where = f"tensor {shown(tensor)} in {shown(name)}"
            if tensor in self.seen or tensor not in self.contents["tensors"]:
                self._note(f"{where} is one more than was written")
            elif self._digest(file, entry.start, entry.end) == self.contents["tensors"][tensor]:
                self.found.tensors += 1
            else:
                self._note(f"{where} is {'cut off' if entry.end > size else 'not as it was written'}")
            self.seen.add(tensor)

    def _check_file(self, name: str, file: FileIO, size: int) -> None:
        if self._digest(file, 0, size) == self.contents["files"][name]:
            self.found.files += 1
        else:
            self._note(f"{shown(name)} is not as it was written")

    def _read(self, name: str, compare: Callable[[str, FileIO, int], None]) -> None:
        """Compare a file of the folder, which may be anything but one."""
        path, where = self.out / name, PurePosixPath(name)
        try:
            if where.is_absolute() or ".." in where.parts or not where.parts:
                raise ValueError
            found = files.stat(path)
            if leads_out(path, self.out):
                self._note(f"{shown(name)} is a link out of the folder")
            elif not stat.S_ISREG(found.st_mode):
                self._note(f"{shown(name)} is not a file")
            else:
                with closing(files.open_to_read(path)) as file:
                    compare(name, file, found.st_size)
        except (FileNotFoundError, NotADirectoryError):
            self._note(f"{shown(name)} is missing")
        except OSError as error:
            self._note(f"{shown(name)} cannot be read: {error.strerror or error}")
        except ValueError:  # the operating system's word for names that no file can have
            self._note(f"{REPORT} names {shown(name)}, which is no file of the folder")

    def _digest(self, file: FileIO, start: int, end: int) -> str:
        """SHA-256 of a part of a file, as far as it goes."""
        digest = hashlib.sha256()
        while start < end and (count := files.fill(file, self.memory[: end - start], start)):
            digest.update(self.memory[:count])
            start += count
        return digest.hexdigest()

    def _list_others(self) -> None:
        """Hidden files are caches and version control."""
        listed = {*self.contents["headers"], *self.contents["files"], REPORT}
        try:
            for path in files.list_below(self.out):
                name = path.relative_to(self.out)
                if name.as_posix() not in listed and not any(part.startswith(".") for part in name.parts):
                    self.found.unlisted.append(shown(name.as_posix()))
        except OSError as error:
            self._note(f"{error.filename or self.out} cannot be listed: {error.strerror or error}")


def shown(name: str) -> str:
    """A name from a file that may be anyone's, for a terminal."""
    name = name if len(name) <= LONGEST else f"{name[:LONGEST]}..."
    return name if name.isprintable() else repr(name)
