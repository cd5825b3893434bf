"""An input that cannot be read, or is gone, at whatever moment of a run: the error names it, and never the output."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from file_operations import READS, Operation, operations
from runs import EXHAUSTIVE, Case

import featcal_fast as ff
from featcal_fast import files
from featcal_fast.checkpoints import work_path
from featcal_fast.errors import DataError
from featcal_fast.reporting.progress import Progress

SAMPLES = 12  # of the operations that read inputs


def path_of(operation: Operation) -> Path:
    first = operation.arguments[0]
    return Path(str(first.name if isinstance(first, FileIO) else first))


class Inputs:
    """Counts the operations on files of `folder`; from the `failing`-th on none of that file works."""

    def __init__(self, folder: Path, failing: int | None = None, code: int = errno.EACCES) -> None:
        self.folder, self.failing, self.code, self.count = folder, failing, code, 0
        self.file: Path | None = None

    def act(self, operation: Operation) -> Any:
        path = path_of(operation)
        if self.folder in path.parents:
            self.count += 1
            if self.count == self.failing:
                self.file = path
            if path == self.file:
                raise OSError(self.code, os.strerror(self.code), str(path))
        return operation.do()


@pytest.fixture(scope="module")
def job(cases: Callable[..., Case], tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    """A case whose inputs lie in a folder of their own, with a file beside the merged model's weights."""
    case = cases("clip")
    folder = Path(case.recipe["base_model"]).parent
    root = tmp_path_factory.mktemp("inputs")
    for name in ("base", "merged", "task0", "task0.safetensors"):
        (shutil.copytree if (folder / name).is_dir() else shutil.copy)(folder / name, root / name)
    (root / "merged" / "notes.txt").write_text("beside the weights")
    experts = {"task0": {**case.recipe["experts"]["task0"], "model": str(root / "task0")}}
    experts["task0"]["data"] = str(root / "task0.safetensors")
    models = {"base_model": str(root / "base"), "merged_model": str(root / "merged")}
    return case.changed(**models, experts=experts), root


def test_data_that_cannot_be_looked_at_is_named_with_whose_it_is(
    job: tuple[Case, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For instance `/proc/1/cwd`, where somebody says that `/` holds a task's data."""
    case, root = job
    stat = files.stat

    def refused(path: Path) -> os.stat_result:
        if path == root / "task0.safetensors":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path)

    monkeypatch.setattr(files, "stat", refused)
    with pytest.raises(DataError, match=r"^data of task0: .*: cannot be looked through: Permission denied"):
        case.run(tmp_path / "out")


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOENT])
def test_the_input_is_named(code: int, job: tuple[Case, Path], tmp_path: Path) -> None:
    case, root = job
    whole = Inputs(root)
    with operations(whole.act, READS):
        case.run(tmp_path / "whole")
    assert whole.count > SAMPLES
    step = 1 if EXHAUSTIVE else whole.count // SAMPLES
    for number in range(1, whole.count + 1, step):
        folder = tmp_path / str(number)
        broken = Inputs(root, number, code)
        with operations(broken.act, READS), pytest.raises(ff.FeatCalError) as found:
            case.run(folder)
        said = str(found.value)
        assert broken.file is not None
        assert str(broken.file) in said, f"{broken.file}: {said}"
        assert "cannot be written" not in said, said
        assert not (folder / "out").exists()


class Meanwhile(Progress):
    """Does something to the inputs after the first layer."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act: Callable[[], object] | None = act

    def layer(self, _: object) -> None:
        if self.act:
            self.act()
            self.act = None


@pytest.mark.parametrize("name", ["task0", "merged", "base", "task0/model.safetensors", "task0.safetensors"])
def test_an_input_that_is_removed_while_it_is_read(name: str, job: tuple[Case, Path], tmp_path: Path) -> None:
    case, root = job
    moved = partial((root / name).rename, tmp_path / "moved")
    try:
        with pytest.raises(ff.FeatCalError) as found:
            case.run(tmp_path / "run", progress=Meanwhile(moved))
    finally:
        (tmp_path / "moved").rename(root / name)
    said = str(found.value)
    assert str(root / name.split("/")[0]) in said or f"data of task0: {name}" in said, said
    assert "cannot be written" not in said
    assert not (tmp_path / "run" / "out").exists()
    if work_path(tmp_path / "run" / "out").exists():  # with all inputs back, it goes on
        case.run(tmp_path / "run", resume=True)
