"""The house keeps its plan: rooms import downwards only, and functions stay readable."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import featcal_fast

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, KERNELS = ROOT / "featcal_fast", ROOT / "kernels" / "featcal_kernels"
# From the top down: folders are rooms, the others single files. What stands in one line may not import each other.
FLOORS = [
    ["__main__"],
    ["cli"],
    ["terminal", "demo"],
    ["__init__"],
    ["job"],
    ["planning"],
    ["inputs"],
    ["data"],
    ["merging"],
    ["calibrate", "measure", "reference"],
    ["streaming"],
    ["layer"],
    ["forward"],
    ["models"],
    ["checkpoints"],
    ["reporting"],
    ["settings"],
    ["ranks"],
    ["untrusted"],
    ["errors", "files", "version"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LONGEST = 60  # lines of a function
# What does something to files, or reads them. Questions whether something is there (`exists`, `is_file`) do not count.
PATH_METHODS = {
    *("read_text", "read_bytes", "write_text", "write_bytes", "open", "touch", "mkdir", "rmdir", "unlink", "rename"),
    *("iterdir", "glob", "rglob", "walk", "stat", "lstat", "chmod", "symlink_to", "hardlink_to", "tofile", "fromfile"),
    *("seek", "readinto", "readline", "readlines", "writelines", "truncate"),
}
FUNCTIONS = {"open", "FileIO", "io.open", "io.FileIO", "torch.save", "torch.load", "torch.from_file"}
OTHER_MODULES = {"shutil", "tempfile", "glob", "fcntl", "mmap", "fileinput", "linecache", "pickle"}
# Of `os`, what may be used all the same: it touches no file, or asks no more than `exists` does.
OS_NAMES = {
    *("access", "R_OK", "W_OK", "X_OK", "devnull", "environ", "sysconf", "getpid", "kill", "path"),
    "sched_getaffinity",
}
OS_NAMES |= {"fork", "waitpid", "waitstatus_to_exitcode", "_exit"}


def modules(folder: Path) -> dict[str, ast.Module]:
    """Every module below a package's folder by its dotted name, `layer.solve`; a package by its own."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module, package: str, known: set[str]) -> set[str]:
    """The modules of `package` that one imports, wherever in it, for types only or named in a string too.

    Whoever gets hold of the package itself may reach anything through it, and so imports what it exports: `__init__`.
    """
    found = set()
    for name in named(tree):
        if name.split(".")[0] == package:
            inner = name.partition(".")[2]
            while inner and inner not in known:
                inner = inner.rpartition(".")[0]
            found.add(inner or "__init__")
    return found


def named(tree: ast.Module) -> Iterator[str]:
    """Dotted names of what is imported, and texts that may be such: for `import_module`, `sys.modules`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
                if alias.asname is None:  # `import a.b` gives the name `a`
                    yield alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not followed here"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            exported = {alias.name for alias in node.names} - {"files"}
            if "." not in node.module and exported:  # which may hide a module of the same name
                yield node.module
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            yield node.value


def room(module: str) -> str:
    return module.split(".")[0]


def wrong(graph: dict[str, set[str]]) -> list[str]:
    """Imports that point up, or sideways between rooms."""
    return [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in sorted(others)
        if room(other) != room(module) and FLOOR[room(other)] <= FLOOR[room(module)]
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, or none."""
    left = {module: set(others) & graph.keys() - {module} for module, others in graph.items()}
    while done := {module for module, others in left.items() if not others}:
        left = {module: others - done for module, others in left.items() if module not in done}
    return sorted(left)


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    trees = modules(PACKAGE)
    return {name: imports(tree, "featcal_fast", set(trees)) for name, tree in trees.items()}


def test_every_room_has_its_floor(graph: dict[str, set[str]]) -> None:
    assert {room(module) for module in graph} == FLOOR.keys()


def test_imports_only_point_down(graph: dict[str, set[str]]) -> None:
    assert wrong(graph) == []


def test_no_module_imports_itself_through_others(graph: dict[str, set[str]]) -> None:
    assert circle(graph) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from featcal_fast.streaming.chunks import Chunk", {"streaming.chunks"}),
        ("from featcal_fast.streaming import chunks", {"streaming.chunks"}),
        ("from featcal_fast.streaming import *", {"streaming"}),
        ("def f():\n    from featcal_fast.streaming.chunks import Chunk", {"streaming.chunks"}),
        ("if TYPE_CHECKING:\n    from featcal_fast.streaming.chunks import Chunk", {"streaming.chunks"}),
        ("import featcal_fast.streaming.chunks as chunks", {"streaming.chunks"}),
        ("import featcal_fast.errors; featcal_fast.streaming.chunks.Chunk", {"errors", "__init__"}),
        ("import featcal_fast as ff", {"__init__"}),
        ("from featcal_fast import Settings", {"__init__"}),
        ("from featcal_fast import calibrate", {"__init__", "calibrate"}),
        ("from featcal_fast import files", {"files"}),
        ("from featcal_fast import Settings, files", {"__init__", "files"}),
        ("import_module('featcal_fast.streaming.chunks')", {"streaming.chunks"}),
        ("sys.modules[f'featcal_fast.{name}']", {"__init__"}),
        ("import torch, featcal_fastest; from torch import nn; 'featcal_fast', 'a.featcal_fast'", set()),
    ],
)
def test_imports_are_found_however_they_are_made(text: str, expected: set[str]) -> None:
    known = {"streaming", "streaming.chunks", "errors", "calibrate", "files"}
    assert "files" not in featcal_fast.__all__
    assert imports(ast.parse(text), "featcal_fast", known) == expected


def test_only_optional_libraries_are_imported_by_a_variable_name() -> None:
    """Which no list of imports shows."""
    ways = {"import_module", "importlib.import_module", "__import__", "exec", "eval"}
    found = {
        name
        for name, tree in modules(PACKAGE).items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ways
    }
    assert found == {"data.samples"}


def test_what_points_up_or_sideways_would_be_found() -> None:
    graph = {"layer.solve": {"streaming.chunks", "layer"}, "reference": {"calibrate"}, "errors": set()}
    assert wrong(graph) == ["layer.solve imports streaming.chunks", "reference imports calibrate"]
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "d"]


def file_operations(tree: ast.Module) -> list[str]:
    """What a module does with files by itself, and so unseen by who looks at or wraps the functions of `files`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found += [f"from {node.module}"] * (node.module in {*OTHER_MODULES, "os", "os.path", "featcal_fast.files"})
        elif isinstance(node, ast.Import):
            hidden = {alias.name for alias in node.names if alias.asname} & {"os", "io"}
            found += [f"import {alias.name}" for alias in node.names if alias.name in OTHER_MODULES | hidden]
        elif isinstance(node, ast.Attribute):
            owner, whole = ast.unparse(node.value), ast.unparse(node)
            method = node.attr in PATH_METHODS and owner not in ("files", "Image")
            system = (owner == "os" and node.attr not in OS_NAMES) or whole.startswith("os.path.get")
            found += [whole] * (method or system or whole in FUNCTIONS)
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            plain = isinstance(node.func, ast.Name) and function in FUNCTIONS
            of_path = function.endswith(".replace") and len(node.args) == 1  # a text's has two
            found += [function] * (plain or of_path)
    return found


def test_files_are_touched_in_one_module_only() -> None:
    found = {name: file_operations(tree) for name, tree in modules(PACKAGE).items()}
    assert len(found.pop("files")) > 10
    assert {name: operations for name, operations in found.items() if operations} == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f():\n    with open('a') as file: ...", ["open"]),
        ("Path('a').open('rb')", ["Path('a').open"]),
        ("(folder / 'a').read_text()", ["(folder / 'a').read_text"]),
        ("read = path.read_bytes", ["path.read_bytes"]),
        ("sorted(path.iterdir())", ["path.iterdir"]),
        ("path.replace(target)", ["path.replace"]),
        ("import os; os.replace(a, b)", ["os.replace"]),
        ("os.path.getsize(path)", ["os.path.getsize"]),
        ("from os import unlink", ["from os"]),
        ("import os as system", ["import os"]),
        ("import shutil", ["import shutil"]),
        ("from tempfile import mkdtemp", ["from tempfile"]),
        ("FileIO(path)", ["FileIO"]),
        ("file.seek(3)", ["file.seek"]),
        ("io.open(path)", ["io.open"]),
        ("torch.save(model, path)", ["torch.save"]),
        ("from featcal_fast.files import write_at", ["from featcal_fast.files"]),
        ("from featcal_fast import files; files.open_to_read(path); files.stat(path)", []),
        ("import os; os.environ, os.access(a, os.W_OK), os.path.exists(a); path.is_file()", []),
        ("from io import BytesIO, FileIO\ndef f(file: FileIO) -> None: Image.open(BytesIO(data))", []),
        ("text.replace('a', 'b'); replace(recipe, out=out); stat.S_ISREG(mode)", []),
    ],
)
def test_file_operations_are_found(text: str, expected: list[str]) -> None:
    assert file_operations(ast.parse(text)) == expected


def test_kernels_know_nothing_of_the_engine() -> None:
    for name, tree in modules(KERNELS).items():
        assert imports(tree, "featcal_fast", set()) == set(), name


def test_no_function_is_longer_than_a_screen() -> None:
    for folder in (PACKAGE, KERNELS):
        for name, tree in modules(folder).items():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    assert node.end_lineno is not None
                    length = node.end_lineno - node.lineno + 1
                    assert length <= LONGEST, f"{folder.name}.{name}: {node.name} has {length} lines"


def test_contributing_shows_the_rooms_from_the_top_down() -> None:
    """A newcomer's plan of the house names every room and every file beside them, in their order."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    shown = [name for row in rows for name in re.findall(r"`(\w+)(?:/|\.py)`", row)]
    assert "`featcal_fast/reference.py`" in text
    assert {*shown, "reference"} == FLOOR.keys() - {"__main__", "__init__", "version"}
    assert [FLOOR[name] for name in shown] == sorted(FLOOR[name] for name in shown)
