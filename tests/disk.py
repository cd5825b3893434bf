"""A disk that loses power: what was synced is on it afterwards, and of the rest whatever it likes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from file_operations import Operation

Survives = Callable[[str], bool]  # whether a "name", a "size" or "data" that nobody has synced is there all the same
ROOT = 0


class Event(NamedTuple):
    """An operation that was done: its arguments, with data as it was and a number for an open file."""

    name: str
    arguments: tuple[Any, ...]
    opened: int | None = None


class Log(list[Event]):
    """Does operations and writes them down, in the order in which they were done."""

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[FileIO, int] = {}
        self._one_by_one = threading.RLock()

    def __call__(self, operation: Operation) -> Any:
        with self._one_by_one:
            place = len(self)
            arguments = tuple(self._plain(each) for each in operation.arguments)
            result = operation.do()
            opened = None
            if isinstance(result, FileIO):
                opened = self._open[result] = len(self._open)
            self.insert(place, Event(operation.name, arguments, opened))  # before what it is made of
            return result

    def _plain(self, argument: Any) -> Any:
        if isinstance(argument, FileIO):
            return self._open[argument]
        return bytes(argument) if isinstance(argument, memoryview) else argument


class _File:
    def __init__(self, synced: bytes = b"") -> None:
        self.synced = synced
        self.size = len(synced)
        self.changes: list[tuple[str, int, bytes]] = []  # since: sizes, and data with its position

    def resize(self, size: int) -> None:
        self.size = size
        self.changes.append(("size", size, b""))

    def write(self, data: bytes, position: int) -> None:
        if position + len(data) > self.size:
            self.resize(position + len(data))
        self.changes.append(("data", position, data))

    def sync(self) -> None:
        self.synced, self.changes = self.content(lambda _: True), []

    def content(self, survives: Survives) -> bytes:
        """Data may be lost where the room for it is not: it reads as zeros then."""
        found = bytearray(self.synced)
        for kind, number, data in self.changes:
            if not survives(kind):
                continue
            if kind == "size":
                found[number:] = bytes(max(0, number - len(found)))
            else:
                found += bytes(max(0, number - len(found)))
                found[number : number + len(data)] = data
        return bytes(found)


class Disk:
    """What a folder holds, as its programs see it and as it will be after a power cut.

    Args:
        folder: what it holds now is safe.
    """

    def __init__(self, folder: Path) -> None:
        self._root = folder
        self._files: dict[int, _File] = {}
        self._names: dict[int, dict[str, int]] = {ROOT: {}}  # of folders, as programs see them
        self._synced: dict[int, dict[str, int]] = {ROOT: {}}
        self._renames: list[list[tuple[int, str, int | None]]] = []  # since: names that came or went, together
        self._open: dict[int, _File] = {}
        self._nodes = 0
        for path in sorted(folder.rglob("*")):
            if path.is_dir():
                self.make_folder(path)
            else:
                node = self._node()
                self._files[node] = _File(path.read_bytes())
                self._rename((path, node))
        for each in self._names:
            self._sync(each)

    def do(self, event: Event) -> None:
        """An operation of the log."""
        if event.name == "create":
            node = self._node()
            self._open[self._opened(event)] = self._files[node] = _File()
            self._rename((event.arguments[0], node))
        elif event.name == "open_to_write":
            self._open[self._opened(event)] = self._files[self._find(event.arguments[0])]
        elif event.name == "create_unnamed":
            self._open[self._opened(event)] = _File()
        elif event.name not in ("lock", "close"):
            getattr(self, event.name)(*event.arguments)

    def write_at(self, file: int, data: bytes, position: int) -> None:
        self._open[file].write(data, position)

    def reserve(self, file: int, size: int) -> None:
        self._open[file].resize(max(size, self._open[file].size))

    def truncate(self, file: int, size: int) -> None:
        self._open[file].resize(size)

    def sync(self, file: int) -> None:
        self._open[file].sync()

    def make_folder(self, path: Path) -> None:
        node = self._node()
        self._names[node], self._synced[node] = {}, {}
        self._rename((path, node))

    def rename(self, path: Path, target: Path) -> None:
        self._rename((path, None), (target, self._find(path)))

    def remove(self, path: Path) -> None:
        self._rename((path, None))

    remove_folder = remove

    def sync_folder(self, path: Path) -> None:
        self._sync(self._find(path))

    def after_power_cut(self, survives: Survives) -> dict[str, bytes | None]:
        """Every file's content by its path, and None for a folder."""
        names = {folder: dict(held) for folder, held in self._synced.items()}
        for change in self._renames:
            if survives("name"):
                _apply(names, change)
        found: dict[str, bytes | None] = {}

        def look(folder: int, path: str) -> None:
            for name, node in names[folder].items():
                file = self._files.get(node)
                found[path + name] = None if file is None else file.content(survives)
                if file is None:
                    look(node, f"{path}{name}/")

        look(ROOT, "")
        return found

    def _node(self) -> int:
        self._nodes += 1
        return self._nodes

    def _opened(self, event: Event) -> int:
        assert event.opened is not None
        return event.opened

    def _find(self, path: Path) -> int:
        node = ROOT
        for name in path.relative_to(self._root).parts:
            node = self._names[node][name]
        return node

    def _rename(self, *changes: tuple[Path, int | None]) -> None:
        change = [(self._find(path.parent), path.name, node) for path, node in changes]
        _apply(self._names, change)
        self._renames.append(change)

    def _sync(self, folder: int) -> None:
        concerned = [change for change in self._renames if change[-1][0] == folder]  # of a rename, where it leads
        for change in concerned:
            _apply(self._synced, change)
            self._renames.remove(change)


def _apply(names: dict[int, dict[str, int]], change: list[tuple[int, str, int | None]]) -> None:
    for folder, name, node in change:
        if node is None:
            names[folder].pop(name, None)
        else:
            names[folder][name] = node
