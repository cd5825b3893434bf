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
from featcal_fast.errors import OutputError

ATTEMPTS = 100  # to make a folder that others remove
STATES = ".featcal-fast-"  # a folder of hidden states in a scratch folder
OWNER = "output"  # in a folder of hidden states: what they are for
FINISHED = {"finished": True}  # the manifest's last line, of a model that only lacks its name


def nearest_existing(path: Path) -> Path:
    """`path`, or the nearest of its parents that exists."""
    path = path.resolve()
    return next(each for each in (path, *path.parents) if each.exists())


def work_path(out: Path) -> Path:
    """Where the output `out` is made."""
    out = out.resolve()
    return out.parent / f".{out.name}.partial"


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
    with write_errors(out):
        if out.exists() and (not out.is_dir() or files.list_folder(out)):
            work = work_path(out)
            beside = f", and {work} beside it, which a run has left" if work.exists() else ""
            raise OutputError(f"out: {out} already holds something; choose another folder, or remove it{beside}")
    if resolved.is_mount():  # a finished folder is renamed to it, which cannot be done to a mount point
        raise OutputError(f"out: {out} is a mount point; name a folder in it, for example {out / 'calibrated'}")
    parent = nearest_existing(resolved.parent)
    if not parent.is_dir():
        raise OutputError(f"out: {out} cannot be made, because {parent} is a file; choose another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"out: {parent} cannot be written to; choose another folder")
    free = files.free_bytes(parent) + held_bytes(out)
    if free < nbytes:
        raise OutputError(f"out: {out} needs {nbytes / 1e9:.1f} GB, but {parent} has {free / 1e9:.1f} GB free")


def held_bytes(out: Path) -> int:
    """What an interrupted run's files take on the disk of `out`, which the next one takes over or removes."""
    with suppress(OSError):
        return _disk_bytes(work_path(out))
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
        self.out = out.resolve()  # of a link, what it points to
        self.path = work_path(out)
        self.model, self.states = self.path / "model", self.path / "states"
        self.keep = False

    def __enter__(self) -> WorkFolder:
        try:
            with write_errors(self.out):
                self._lock = self._take()
                self.manifest = Manifest(self.path / "manifest")
                for entry in self.manifest.entries[:1]:
                    self.use_scratch(entry.get("scratch"))
        except BaseException:
            with suppress(OSError, AttributeError):  # where another run has it, or this one never got it
                self._lock.release()
            with suppress(OSError):  # it holds something, and stays
                files.remove_folder(self.path)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self.keep:
            with suppress(OSError):  # what cannot be removed is named when the next run finds it
                self.clear()
        self._lock.release()
        if not self.keep:
            with suppress(OSError):  # by now another run may have it
                files.remove_folder(self.path)

    def _take(self) -> Lock:
        for _ in range(ATTEMPTS):
            with suppress(FileExistsError):
                files.make_folder(self.path)
            with suppress(FileNotFoundError):  # the run before this one has removed the folder just now
                return Lock(self.path / "lock", f"out: {self.out}")
        raise OutputError(f"out: {self.path}, where {self.out} is made, cannot be had; remove it, or choose another")

    def use_scratch(self, folder: str | Path | None) -> None:
        """Keep hidden states in a folder of their own in `folder`, if one is given."""
        if folder is not None:
            digest = hashlib.sha256(str(self.out).encode()).hexdigest()[:8]
            self.states = Path(folder) / f"{STATES}{digest}"

    def remove_unowned(self, folder: Path) -> None:
        """Of a scratch folder: hidden states of runs that have ended, in whatever way, and cannot go on."""
        for path in files.list_folder(folder):
            if path.name.startswith(STATES) and path != self.states and (path / OWNER).is_file():
                owner = Path(files.read_text(path / OWNER))
                if not (work_path(owner) / "manifest").exists():
                    files.remove_tree(path)

    def begin(self, facts: Mapping[str, Any], scratch: object) -> None:
        """The manifest's first line: what the job is, and where its hidden states are kept."""
        where = str(scratch.resolve()) if isinstance(scratch, Path) else None
        self.use_scratch(where)
        files.make_folder(self.states)
        files.write_bytes(self.states / OWNER, str(self.out).encode())
        self.manifest.append({**facts, "scratch": where})

    @property
    def left_behind(self) -> bool:
        """Whether a run before this one left something here."""
        return any(each.name != "lock" for each in files.list_folder(self.path))

    @property
    def finished(self) -> bool:
        """Whether what it left is a whole model, which only lacks its name."""
        return self.manifest.entries[-1:] == [FINISHED] and self.model.is_dir()

    def clear(self) -> None:
        """Remove everything, and before all else what says that there is something."""
        if self.manifest.path.exists():
            files.remove(self.manifest.path)
            files.sync_folder(self.path)
        for path in (self.model, self.states):
            if path.exists():
                files.remove_tree(path)
        self.manifest = Manifest(self.manifest.path)

    def publish(self) -> None:
        """Give the finished model its name; what else is here has done its service.

        Raises:
            OutputError: its name cannot be given; it stays here.
        """
        self.keep = True
        with write_errors(self.out):
            if not self.finished:
                self.manifest.append(FINISHED)
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


def _disk_bytes(folder: Path) -> int:
    total = 0
    for path in files.list_folder(folder):
        if path.is_dir() and not path.is_symlink():
            total += _disk_bytes(path)
        else:
            total += files.stat(path).st_blocks * 512
    return total
