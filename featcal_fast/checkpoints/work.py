"""Where an output is made before it gets its name: a hidden folder beside it, which outlives a run that was stopped.

.NAME.partial/
    lock         whose it is
    manifest     what is durable; made by those who resume
    model/       the output, to be renamed to NAME
    states/      hidden states, where they are kept here
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from featcal_fast import files
from featcal_fast.checkpoints.lock import Lock
from featcal_fast.checkpoints.manifest import Manifest
from featcal_fast.errors import OutputError, ResumeError, shown

ATTEMPTS = 100  # to make a folder that others remove
STATES = ".featcal-fast-"  # a folder of hidden states in a scratch folder
OWNER = "output"  # in a folder of hidden states: what they are for
LONGEST = 200  # bytes of an output's name; beyond, the folder in which it is made is called by a hash


def nearest_existing(path: Path) -> Path:
    """`path`, or the nearest of its parents that exists."""
    path = files.resolve(path)
    return next(each for each in (path, *path.parents) if each.exists())


def work_path(out: Path) -> Path:
    """Where the output `out` is made.

    Raises:
        OSError: nobody can say where `out` leads.
    """
    out = files.resolve(out)
    name = out.name if len(out.name.encode(errors="surrogateescape")) <= LONGEST else _digest(out)
    return out.parent / f".{name}.partial"


def states_path(out: Path, scratch: str | Path) -> Path:
    """Where its hidden states are kept in a scratch folder."""
    return files.resolve(Path(scratch)) / f"{STATES}{_digest(out)}"


def make_states(folder: Path, out: Path) -> None:
    """Make a folder for the hidden states of the output `out`, and say there whose they are.

    Raises:
        OSError: it cannot be made, or is there.
    """
    files.make_folder(folder)
    files.write_bytes(folder / OWNER, str(files.resolve(out)).encode(errors="surrogateescape"))


def _digest(out: Path) -> str:
    return hashlib.sha256(str(files.resolve(out)).encode(errors="surrogateescape")).hexdigest()[:8]


def taken(out: Path) -> str:
    """What is said of an output folder that holds something; nothing, where it may be written.

    Raises:
        OSError: nobody can say where `out` leads.
    """
    resolved, work = files.resolve(out), work_path(out)
    if not resolved.exists() or (resolved.is_dir() and not files.list_folder(resolved)):
        return ""
    beside = f", and {work} beside it, which a run has left" if work.exists() else ""
    return f"out: {out} already holds something; choose another folder, or remove it{beside}"


def check_output(out: Path, inputs: Mapping[str, Path], nbytes: int, *, may_be_taken: bool = False) -> None:
    """Refuse an output folder before any work is done.

    Args:
        out: the folder.
        inputs: files and folders that are read, by what they are.
        nbytes: that will be written.
        may_be_taken: whether it may hold something, for a job that is only planned.

    Raises:
        OutputError: it holds something, lies in an input folder, cannot be made, or the disk lacks `nbytes`.
    """
    with write_errors(out):
        resolved, work = files.resolve(out), work_path(out)
        _check_outside("out", out, resolved, inputs)
        if not may_be_taken and (found := taken(out)):
            raise OutputError(found)
        if resolved.exists() and resolved.samefile("."):  # whoever works in it would be left in a folder without a name
            raise OutputError(f"out: {out} is the working directory; name a folder in it: {out / 'calibrated'}")
        if resolved.is_mount():  # a finished folder is renamed to it, which cannot be done to a mount point
            raise OutputError(f"out: {out} is a mount point; name a folder in it, for example {out / 'calibrated'}")
        parent = nearest_existing(resolved.parent)
        if not parent.is_dir():
            raise OutputError(f"out: {out} cannot be made, because {parent} is a file; choose another folder")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"out: {parent} cannot be written to; choose another folder")
        free = files.free_bytes(parent) + held_bytes(work)
        if free < nbytes:
            raise OutputError(f"out: {out} needs {size_text(nbytes)}, but {parent} has {size_text(free)} free")


def check_scratch(scratch: Path, inputs: Mapping[str, Path], out: Path | None) -> None:
    """Refuse a folder for hidden states before any work is done.

    Raises:
        OutputError: it lies in an input folder, or in the output's, or is not there.
    """
    try:
        resolved = files.resolve(scratch)
        _check_outside("scratch", scratch, resolved, inputs)
        if out is not None and {files.resolve(out), work_path(out)}.intersection((resolved, *resolved.parents)):
            raise OutputError(f"scratch: {scratch} lies in the output folder {out}; choose another folder")
        files.stat(scratch)  # `nothing/..` is resolved, but not there
    except OSError as error:
        raise OutputError(
            f"scratch: {scratch} cannot hold hidden states: {error.strerror}; make it first, or choose another folder"
        ) from error


def _check_outside(key: str, path: Path, resolved: Path, inputs: Mapping[str, Path]) -> None:
    for name, folder in inputs.items():
        with suppress(OSError):  # whoever reads it says so
            if files.resolve(folder) in (resolved, *resolved.parents):
                raise OutputError(
                    f"{key}: {path} lies in the input folder {folder} ({name}), which is never written to; choose "
                    "another folder"
                )


def size_text(nbytes: float) -> str:
    """A number of bytes, in words."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size / 10:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes:.0f} bytes"


def held_bytes(folder: Path) -> int:
    """What an interrupted run's files in `work_path` or `states_path` take; the next one takes them over or removes
    them."""
    with suppress(OSError):
        return sum(files.stat(path).st_blocks * 512 for path in files.list_below(folder))
    return 0


@contextmanager
def write_errors(out: Path) -> Iterator[None]:
    """What the operating system refuses, in words."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise OutputError(
            f"out: {out} cannot be written: {error.strerror}{where}; free space or choose another folder"
        ) from error


class WorkFolder:
    """The folder in which an output is made, this process's alone.

    Used as a context manager: when it ends, all is removed, unless `keep` is set.

    Args:
        out: the output.

    Attributes:
        path: of the folder.
        model: the output in the making.
        states: where hidden states may be kept; another folder, if they are to be elsewhere.
        manifest: what is durable.
        keep: whether what is there is worth keeping.

    Raises:
        OutputError: another run has it, or it cannot be made.
    """

    def __init__(self, out: Path) -> None:
        with write_errors(out):
            self.out, self.path = files.resolve(out), work_path(out)  # of a link, what it points to
        self.model, self.states = self.path / "model", self.path / "states"
        self.keep = False
        self._made: list[Path] = []  # folders, from the top down

    def __enter__(self) -> WorkFolder:
        try:
            with write_errors(self.out):
                self._refuse_links(self.path)
                self._lock = self._take()
                self.manifest = Manifest(self.path / "manifest")
                for entry in self.manifest.entries[:1]:
                    self._find_states(entry.get("states"))
                self._refuse_links(self.model, self.states)
                self.keep = self.left_behind
        except BaseException:
            with suppress(OSError, AttributeError):  # where another run has it, or this one never got it
                self._lock.release()
            self._remove_folders()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self.keep:
            with suppress(OSError):  # what cannot be removed is named when the next run finds it
                self.clear()
        self._lock.release()
        if not self.keep:
            self._remove_folders()

    def _take(self) -> Lock:
        for _ in range(ATTEMPTS):
            with suppress(FileNotFoundError):  # the run before this one has removed the folder just now
                with suppress(FileExistsError):
                    self._made = files.make_folder(self.path)
                return Lock(self.path / "lock", f"out: {self.out}")
        raise OutputError(f"out: {self.path}, where {self.out} is made, cannot be had; remove it, or choose another")

    def _remove_folders(self) -> None:
        """The work folder, and those around it that this run has made; what holds something stays."""
        files.remove_empty(self._made or [self.path])

    def _refuse_links(self, *paths: Path) -> None:
        for path in paths:
            if path.is_symlink():
                raise OutputError(f"out: {path}, where {self.out} is made, is a link, which no run leaves; remove it")

    def _find_states(self, named: object) -> None:
        """Hidden states are where the manifest says. It may be anyone's, and they are to be removed: a folder of theirs
        is told by its name."""
        if isinstance(named, str) and Path(named).name.startswith(STATES):
            self.states = Path(named)
        elif named is not None:
            raise ResumeError(f"{self.manifest.path} names no folder of hidden states: {shown(named)}; remove it")

    def remove_unowned(self, folder: Path) -> None:
        """Of a scratch folder: hidden states of runs that have ended, in whatever way, and cannot go on."""
        for path in files.list_folder(folder):
            with suppress(OSError, ValueError):  # others' are in nobody's way
                if path.name.startswith(STATES) and path != self.states and (path / OWNER).is_file():
                    owner = Path(files.read_bytes(path / OWNER).decode(errors="surrogateescape"))
                    # Where not even its parent can be seen, it may only be out of sight.
                    if owner.parent.is_dir() and not (work_path(owner) / "manifest").exists():
                        files.remove_tree(path)

    def begin(self, facts: Mapping[str, Any], scratch: str | Path | None) -> None:
        """The manifest's first line: what the job is, and where its hidden states are kept."""
        if scratch is not None:
            self.states = states_path(self.out, scratch)
        if self.states.exists():  # of a run that was killed while it made or removed it
            files.remove_tree(self.states)
        make_states(self.states, self.out)
        self.manifest.append({**facts, "states": None if scratch is None else str(self.states)})

    @property
    def left_behind(self) -> bool:
        """Whether a run before this one left something here."""
        return any(each.name != "lock" for each in files.list_folder(self.path))

    @property
    def finished(self) -> bool:
        """Whether what it left is a whole model, which only lacks its name."""
        return self.manifest.finished and self.model.is_dir()

    @property
    def published(self) -> bool:
        """Whether the model has its name, and only what had done its service is left."""
        return self.manifest.finished and not self.model.exists()

    def clear(self) -> None:
        """Remove everything, and before all else what says that there is something."""
        if self.manifest.path.exists():
            files.remove(self.manifest.path)
            files.sync_folder(self.path)
        for path in (self.model, self.states):
            if path.exists():
                files.remove_tree(path)
        self.manifest = Manifest(self.manifest.path)
        self.states, self.keep = self.path / "states", False

    def finish(self, facts: Mapping[str, Any]) -> None:
        """The model is whole and on the disk, and shall be kept until it has its name; hidden states need not be."""
        with write_errors(self.out):
            self.manifest.append({**facts, "finished": True})
        self.keep = True
        with suppress(OSError):  # they go with the rest, then
            files.remove_tree(self.states)

    def publish(self) -> None:
        """Give the whole model its name; what else is here has done its service.

        Raises:
            OutputError: its name cannot be given; it stays here.
        """
        self.keep = True
        try:
            files.rename(self.model, self.out)
        except OSError as error:
            raise OutputError(
                f"out: the finished model is in {self.model}, because {self.out} could not be put in its place: "
                f"{error.strerror}; rename it yourself"
            ) from error
        with suppress(OSError):  # the folder is there all the same
            files.sync_folder(self.out.parent)
            self.keep = False
