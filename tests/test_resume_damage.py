"""What was left, damaged: found, or done anew; no wrong bit comes out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from runs import (
    Cases,
    check_all,
    refusal,
    stopped,
)

from featcal_fast.checkpoints import Manifest, work_path


def _flipped(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


class Left(NamedTuple):
    """What an interrupted run has left."""

    work: Path
    states: Path

    @property
    def manifest(self) -> Path:
        return self.work / "manifest"

    @property
    def shard(self) -> Path:
        return self.work / "model" / "model.safetensors"


def _tensor(left: Left) -> None:
    """One of the second layer's."""
    size = int.from_bytes(left.shard.read_bytes()[:8], "little")
    header = json.loads(left.shard.read_bytes()[8 : 8 + size])
    name = next(name for name in header if ".layers.1." in name)
    _flipped(left.shard, 8 + size + header[name]["data_offsets"][0])


def _short_shard(left: Left) -> None:
    os.truncate(left.shard, 1000)


def _no_shard(left: Left) -> None:
    left.shard.unlink()


def _no_model(left: Left) -> None:
    shutil.rmtree(left.shard.parent)


def _no_states(left: Left) -> None:
    shutil.rmtree(left.states)


def _short_states(left: Left) -> None:
    for path in left.states.iterdir():
        os.truncate(path, 1000)


def _states(left: Left) -> None:
    for path in left.states.iterdir():
        _flipped(path, 3)


def _last_line_cut(left: Left) -> None:
    os.truncate(left.manifest, left.manifest.stat().st_size - 9)


def _last_line(left: Left) -> None:
    _flipped(left.manifest, -9)


def _first_line(left: Left) -> None:
    _flipped(left.manifest, 9)


def _binary(left: Left) -> None:
    left.manifest.write_bytes(bytes(range(256)))


def _no_manifest(left: Left) -> None:
    left.manifest.unlink()


DAMAGES = [
    *(_tensor, _short_shard, _no_shard, _no_model, _no_states, _short_states, _states),
    *(_last_line_cut, _last_line, _first_line, _binary, _no_manifest),
]


def test_what_follows_a_damaged_line_of_a_manifest_never_counts_again(tmp_path: Path) -> None:
    path = tmp_path / "manifest"
    for number in range(3):
        Manifest(path).append({"layer": number})
    _flipped(path, path.stat().st_size // 2)
    manifest = Manifest(path)
    assert manifest.entries == [{"layer": 0}]
    manifest.append({"layer": 1})
    assert Manifest(path).entries == manifest.entries == [{"layer": 0}, {"layer": 1}]


@pytest.mark.parametrize("on_disk", [False, True])
def test_damage_to_what_was_left_is_found_or_done_anew(on_disk: bool, cases: Cases, tmp_path: Path) -> None:
    """Whatever is lost, no wrong bit comes out."""
    case = cases("clip", on_disk)

    def check(damage: Callable[[Left], None]) -> None:
        folder = tmp_path / damage.__name__
        work = work_path(stopped(case, folder))
        damage(Left(work, next((folder / "scratch").iterdir()) if on_disk else work / "states"))
        if not (told := refusal(case, folder)):
            return
        assert told.endswith("--fresh starts over"), told
        case.run(folder, fresh=True)
        case.check(folder)

    check_all(check, DAMAGES)
