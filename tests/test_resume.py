"""A run that was stopped, wherever that was, goes on to the bits of one that was not, or says why it cannot."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from file_operations import killing, operations
from runs import EXHAUSTIVE, Case, Cases, Layers, check_all, contents, done, exit_code, goes_on, left_in, start, stopped

import featcal_fast as ff
from featcal_fast import files
from featcal_fast.checkpoints import Manifest, work_path
from featcal_fast.errors import OutputError, ResumeError
from featcal_fast.job import fingerprint
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import LayerReport

KILLED = -signal.SIGKILL
WAYS = [(kind, on_disk) for kind in ("llama", "clip", "t5") for on_disk in (False, True)]
BEGINNING = 25  # operations, about, before the first weight is written
# Every how manieth of those after is tried: all of one kind; of the others steps that have no common divisor.
STEPS = dict(zip(WAYS, (1, 13, 17, 19, 53, 59), strict=True))


@pytest.fixture
def case(cases: Cases) -> Case:
    """Three layers, hidden states in memory."""
    return cases("clip")


def kill(task: Callable[[], object], number: int) -> bool:
    """Do something in a process that is killed at one of its file operations; whether it came so far."""

    def run() -> None:
        with operations(killing(number)):
            task()

    code = exit_code(run)
    assert code in (0, KILLED)
    return code == KILLED


def killed(case: Case, folder: Path, number: int, **options: Any) -> bool:
    """Run a case in such a process."""
    return kill(lambda: case.run(folder, **options), number)


@pytest.mark.parametrize(("kind", "on_disk"), WAYS)
def test_killed_at_any_file_operation_it_goes_on_to_the_same_bits(
    kind: str, on_disk: bool, cases: Cases, tmp_path: Path
) -> None:
    case = cases(kind, on_disk)
    step = 1 if EXHAUSTIVE else STEPS[kind, on_disk]

    def check(number: int) -> None:
        folder = tmp_path / str(number)
        assert killed(case, folder, number)
        goes_on(case, folder)

    first = BEGINNING if kind == "llama" else 0  # the same of all kinds
    numbers = range(1, len(case.operations) + 1)
    check_all(check, [number for number in numbers if number <= first or number % step == step // 2])


@pytest.mark.parametrize(("kind", "on_disk"), WAYS if EXHAUSTIVE else WAYS[-1:])
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(
    kind: str, on_disk: bool, cases: Cases, tmp_path: Path
) -> None:
    case = cases(kind, on_disk)

    def run(number: int | str) -> None:
        with operations():
            case.run(tmp_path / str(number))

    began = time.perf_counter()
    assert exit_code(lambda: run("whole")) == 0
    longest = time.perf_counter() - began

    def check(number: int) -> None:
        process = start(lambda: run(number))
        time.sleep(random.Random(number).uniform(0, longest))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        goes_on(case, tmp_path / str(number))

    check_all(check, range(50 if EXHAUSTIVE else 5))


@pytest.mark.parametrize("on_disk", [False, True])
def test_killed_again_while_it_goes_on_it_still_comes_to_the_same_bits(
    on_disk: bool, cases: Cases, tmp_path: Path
) -> None:
    case = cases("clip", on_disk)
    stopped(case, tmp_path / "whole", after=1)
    with operations() as again:
        case.run(tmp_path / "whole", resume=True)

    def check(number: int) -> None:
        folder = tmp_path / str(number)
        out = stopped(case, folder, after=1)
        assert killed(case, folder, number, resume=True)
        assert out.exists() or done(out) >= 1
        goes_on(case, folder)

    step = 1 if EXHAUSTIVE else 20
    check_all(check, range(1 + step // 2, len(again) + 1, step))


def test_killed_while_it_starts_over_it_does_so_or_goes_on(case: Case, tmp_path: Path) -> None:
    """Old and new layers never mix: what was there is gone, or whole."""
    other = _with(case, settings={"anchor_rho": 1.5})
    stopped(other, tmp_path / "stopped")
    with operations() as names:
        shutil.copytree(tmp_path / "stopped", tmp_path / "whole")
        case.run(tmp_path / "whole", fresh=True)

    def check(number: int) -> None:
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "stopped", folder)
        assert killed(case, folder, number, fresh=True)
        try:
            case.resume(folder)
        except ResumeError as refusal:
            told = str(refusal)
        else:
            return
        assert "settings: anchor_rho: 1.5, now 2.0" in told, told  # nothing was removed yet
        other.run(folder, resume=True)
        assert contents(folder / "out") == contents(tmp_path / "other" / "out")

    other.run(tmp_path / "other")
    cleared = names.index("reserve")  # the new output begins
    check_all(check, range(1, cleared + 1, 1 if EXHAUSTIVE else 2))


def _with(case: Case, **changes: Any) -> Case:
    """A case of another job."""
    return replace(case, recipe={**copy.deepcopy(case.recipe), **changes})


@pytest.mark.parametrize("every", [2, None])
def test_layers_that_were_not_kept_are_done_again(every: int | None, case: Case, tmp_path: Path) -> None:
    out = stopped(case, tmp_path, after=1, checkpoint_every=every)
    assert done(out) == (0 if every else 1)  # nothing is known before the first time of how long it takes
    case.resume(tmp_path, checkpoint_every=every)
    out = stopped(case, tmp_path / "again", after=2, checkpoint_every=every)
    assert 0 < done(out) <= 2
    case.resume(tmp_path / "again", checkpoint_every=1)


def test_an_interrupted_run_is_named_with_both_ways_to_go_on(case: Case, tmp_path: Path) -> None:
    out = stopped(case, tmp_path, after=1)
    with pytest.raises(ResumeError, match=rf"has left 1 of 3 layers in {re.escape(str(work_path(out)))}") as error:
        case.run(tmp_path)
    assert "--resume goes on" in str(error.value)
    assert "--fresh starts over" in str(error.value)
    assert done(out) == 1
    case.resume(tmp_path)


def test_what_was_left_without_a_layer_done_is_named_and_both_ways_work(case: Case, tmp_path: Path) -> None:
    for way in ("resume", "fresh"):
        folder = tmp_path / way
        assert killed(case, folder, 40)
        with pytest.raises(ResumeError, match=r"no layer of it done: --resume or --fresh starts over"):
            case.run(folder)
        case.run(folder, **{way: True})
        case.check(folder)


@pytest.mark.parametrize("every", [1, 0])
def test_a_finished_model_that_lacks_its_name_is_told_apart_and_gets_it(every: int, case: Case, tmp_path: Path) -> None:
    with operations() as names:
        case.run(tmp_path / "whole", checkpoint_every=every)
    folder = tmp_path / "killed"
    assert killed(case, folder, names.index("rename") + 1, checkpoint_every=every)
    with pytest.raises(ResumeError, match="holds a finished model that could not be given its name") as error:
        case.run(folder)
    assert "--resume gives it" in str(error.value)
    layers = Layers()
    case.resume(folder, progress=layers)
    assert layers.seen == []


def test_a_model_that_got_its_name_leaves_nothing_to_go_on_with(case: Case, tmp_path: Path) -> None:
    """Not even where the process ended before it could tidy up: no weights, no hidden states, nothing in the way."""
    assert killed(case, tmp_path, case.operations.index("rename") + 2)
    case.check(tmp_path)
    assert left_in(tmp_path) == [".out.partial", ".out.partial/lock", ".out.partial/manifest"]
    shutil.rmtree(tmp_path / "out")
    case.run(tmp_path)
    case.check(tmp_path)


def test_a_merge_that_was_killed_is_in_nobodys_way(case: Case, tmp_path: Path) -> None:
    recipe = {name: value for name, value in case.recipe.items() if name != "merged_model"}
    recipe["merge"] = {"method": "average"}

    def merge(folder: Path) -> list[bytes]:
        folder.mkdir(exist_ok=True)
        with operations():
            return [path.read_bytes() for path in files.list_below(ff.merge(recipe, out=folder / "out"))]

    with operations() as names:
        whole = merge(tmp_path / "whole")
    assert not left_in(tmp_path / "whole")

    def check(number: int) -> None:
        folder = tmp_path / str(number)
        assert kill(lambda: merge(folder), number)
        if number % 2 and not (folder / "out").exists():
            case.resume(folder)
            return
        if (folder / "out").exists():
            shutil.rmtree(folder / "out")
        assert merge(folder) == whole

    check_all(check, range(1, len(names) + 1, 1 if EXHAUSTIVE else 7))


def test_without_anything_left_resuming_just_runs(case: Case, tmp_path: Path) -> None:
    case.resume(tmp_path)


def test_starting_over_takes_nothing_from_before(case: Case, tmp_path: Path) -> None:
    """Not even where it is damaged, or another job's."""
    out = stopped(case, tmp_path)
    for path in work_path(out).rglob("*"):
        if path.is_file() and path.name != "manifest":
            path.write_bytes(b"\0" * path.stat().st_size)
    layers = Layers()
    case.run(tmp_path, fresh=True, progress=layers)
    case.check(tmp_path)
    assert layers.seen == [0, 1, 2]


def test_what_is_done_is_not_done_again(case: Case, tmp_path: Path) -> None:
    stopped(case, tmp_path)
    layers = Layers()
    case.run(tmp_path, resume=True, progress=layers)
    assert layers.told == 2
    assert layers.seen == [2]


def test_nothing_is_kept_where_nothing_shall_be(case: Case, tmp_path: Path) -> None:
    out = stopped(case, tmp_path, checkpoint_every=0)
    assert not work_path(out).exists()


# Whatever changes bits is another job


def _threads(_: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "get_num_threads", lambda: 7)


def _torch(_: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    version = fingerprint.version
    patch.setattr(fingerprint, "version", lambda package: "0.1" if package == "torch" else version(package))


def _switch(_: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    patch.setenv("ATEN_CPU_CAPABILITY", "default")


def _setting(recipe: dict[str, Any], _: pytest.MonkeyPatch) -> None:
    recipe["settings"] = {"anchor_rho": 1.5}


def _seed(recipe: dict[str, Any], _: pytest.MonkeyPatch) -> None:
    recipe["seed"] = 1


def _samples(recipe: dict[str, Any], _: pytest.MonkeyPatch) -> None:
    recipe["samples"] = 12


def _batch_size(recipe: dict[str, Any], _: pytest.MonkeyPatch) -> None:
    recipe["batch_size"] = 4


def _expert(recipe: dict[str, Any], _: pytest.MonkeyPatch) -> None:
    recipe["experts"]["task0"]["model"] = recipe["base_model"]


def _touched(recipe: dict[str, Any], _: pytest.MonkeyPatch) -> None:
    os.utime(Path(recipe["base_model"]) / "model.safetensors", ns=(0, 0))


def _longer(recipe: dict[str, Any], _: pytest.MonkeyPatch) -> None:
    _unseen(Path(recipe["merged_model"]) / "config.json", lambda data: data + b" ")


def _header(recipe: dict[str, Any], _: pytest.MonkeyPatch) -> None:
    """Of a tensor that is not calibrated, another dtype of the same size."""
    path = Path(recipe["experts"]["task0"]["model"]) / "model.safetensors"
    norm = b'"post_layernorm.bias":{"dtype":'
    _unseen(path, lambda data: data.replace(norm + b'"F32"', norm + b'"I32"'))


def _data(recipe: dict[str, Any], _: pytest.MonkeyPatch) -> None:
    """Its last number is another."""
    _unseen(Path(recipe["experts"]["task0"]["data"]), lambda data: data[:-4] + b"\0\0\0\0")


def _unseen(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file that looks as old as before."""
    kept = path.stat()
    path.write_bytes(change(path.read_bytes()))
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))


OTHER_JOBS = [
    (_threads, r"device: threads: 1, now 7; put that back and --resume, or start over with --fresh"),
    (_torch, r"versions: torch: [^;]*, now 0\.1;"),
    (_switch, r"environment: ATEN_CPU_CAPABILITY: absent, now default;"),
    (_setting, r"recipe: settings: anchor_rho: 2\.0, now 1\.5;"),
    (_seed, r"recipe: seed: 0, now 1;"),
    (_samples, r"recipe: samples: 256, now 12;"),
    (_batch_size, r"recipe: batch_size: 8, now 4;"),
    (_expert, r"recipe: experts: task0: model: \S*/task0, now \S*/base;"),
    (_touched, r"inputs: base model: base/model.safetensors: ([\d,]+) bytes of 20.*, now \1 bytes of 1970-.*;"),
    (_longer, r"inputs: merged model: merged/config.json: [\d,]+ bytes of (20.*), now [\d,]+ bytes of \1;"),
    (_header, r"headers: expert task0: \w+, now \w+;"),
    (_data, r"the calibration data of task task0 has another content than it had; --fresh starts over"),
]


@contextmanager
def put_back(case: Case) -> Iterator[None]:
    """Inputs are as they were afterwards, times too."""
    folder = Path(case.recipe["base_model"]).parent
    inputs = [*(folder / name for name in ("base", "merged", "task0")), folder / "task0.safetensors"]
    paths = [path for each in inputs for path in (each.iterdir() if each.is_dir() else [each])]
    kept = [(path, path.read_bytes(), path.stat()) for path in paths]
    try:
        yield
    finally:
        for path, data, found in kept:
            path.write_bytes(data)
            os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize(("change", "told"), OTHER_JOBS, ids=[change.__name__[1:] for change, _ in OTHER_JOBS])
def test_another_job_is_refused_and_what_is_there_stays(
    change: Callable[..., None], told: str, case: Case, tmp_path: Path
) -> None:
    out = stopped(case, tmp_path)
    other = _with(case)
    with put_back(case), pytest.MonkeyPatch.context() as patch:
        change(other.recipe, patch)
        with pytest.raises(ResumeError, match=told):
            other.run(tmp_path, resume=True)
    assert done(out) == 2
    case.resume(tmp_path)


def test_another_job_may_start_over(case: Case, tmp_path: Path) -> None:
    stopped(case, tmp_path / "stopped")
    other = _with(case, seed=1, settings={"anchor_rho": 1.5})
    other.run(tmp_path / "stopped", fresh=True)
    other.run(tmp_path / "new")
    assert contents(tmp_path / "stopped" / "out") == contents(tmp_path / "new" / "out")


def test_an_input_that_changes_during_a_run_is_found_at_its_end(case: Case, tmp_path: Path) -> None:
    class Touch(Progress):
        def layer(self, report: LayerReport) -> None:
            _touched(case.recipe, pytest.MonkeyPatch())

    with put_back(case), pytest.raises(OutputError, match=r"inputs changed while they were read: .*base/model.safe"):
        case.run(tmp_path, progress=Touch())
    assert left_in(tmp_path) == []
    assert not (tmp_path / "out").exists()


# What was left, damaged


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
        try:
            case.resume(folder)
        except ResumeError as refusal:
            told = str(refusal)
        else:
            return
        assert told.endswith("--fresh starts over"), told
        case.run(folder, fresh=True)
        case.check(folder)

    check_all(check, DAMAGES)
