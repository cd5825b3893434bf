"""Where a recipe's paths may lead, what may be written where, and what stays when that fails."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import Case, stopped

import featcal_fast as ff
from featcal_fast import files
from featcal_fast.checkpoints import Manifest, WorkFolder, check_output, check_scratch, states_path, work_path
from featcal_fast.checkpoints.work import OWNER, STATES, size_text
from featcal_fast.errors import FeatCalError, OutputError, RecipeError, ResumeError
from featcal_fast.inputs.paths import checked_path

GOOD = {
    "base_model": "base",
    "merged_model": "merged",
    "experts": {"math": {"model": "math", "data": "math.jsonl"}},
    "out": "out",
}
KEYS = ("base_model", "merged_model", "out", "experts.math.model", "experts.math.data")
BAD = {
    "home": ("~nosuchuser/x", "'~nosuchuser/x' names no home that is there"),
    "zero": ("a\0b", r"found 'a\\x00b', expected a path; no path holds a null byte"),
    "half": ("a\ud800b", r"found 'a\\ud800b', expected whole characters"),
    "no-utf-8": ("a\udcffb", r"found 'a\\udcffb', expected whole characters"),
    "long-name": ("x" * 256, "found '.*', expected a path of at most 4095 bytes, 255 for each name"),
    "long": ("x/" * 2048, "found '.*', expected a path of at most 4095 bytes"),
    "empty": ("", "found '', expected a text"),
    "number": (5, "found 5, expected a text"),
    "truth": (True, "found True, expected a text"),
    "list": (["a"], r"found \['a'\], expected a text"),
}


def with_path(key: str, value: Any) -> dict[str, Any]:
    *outer, last = key.split(".")
    if not outer:
        return {**GOOD, last: value}
    return {**GOOD, "experts": {"math": {"model": "math", "data": "math.jsonl", last: value}}}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("case", BAD)
def test_what_is_no_path_is_named_with_its_key(key: str, case: str) -> None:
    value, message = BAD[case]
    with pytest.raises(RecipeError, match=f"^{key}: {message}"):
        ff.Recipe.load(with_path(key, value))


@pytest.mark.parametrize("case", ["home", "zero", "long-name", "long"])
def test_of_a_path_of_a_recipe_too(case: str) -> None:
    value, message = BAD[case]
    with pytest.raises(RecipeError, match=f"^recipe: {message}"):
        ff.Recipe.load(str(value))


@pytest.mark.parametrize("value", [5, None, b"recipe.yaml", ["recipe.yaml"], "", object()])
def test_what_is_no_recipe_is_refused(value: Any) -> None:
    with pytest.raises(RecipeError, match=r"^recipe: found .*, expected a path"):
        ff.Recipe.load(value)


def test_a_path_that_is_not_in_utf_8_may_come_from_the_operating_system() -> None:
    assert checked_path("out", os.fsdecode(b"a\xff")) == Path(os.fsdecode(b"a\xff"))
    with pytest.raises(RecipeError, match="whole characters"):
        checked_path("out", "a\ud800")


def test_a_recipe_needs_a_place_to_start_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(RecipeError, match="the working directory, where a recipe's paths start, is gone"):
        ff.Recipe.load(GOOD)


def test_a_recipe_that_cannot_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.yaml"
    path.touch()

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, "open_to_read", denied)
    with pytest.raises(RecipeError, match=r"recipe.yaml cannot be read: Permission denied; check the file"):
        ff.Recipe.load(path)


# The output


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with an input folder, a file, links in a circle, a pipe."""
    monkeypatch.chdir(tmp_path)
    for name in ("input/deep", "full", "empty"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("full/file", "data.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "alias").symlink_to("input")
    (tmp_path / "dangling").symlink_to("not-yet")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


OUTPUTS = {
    "input": r"lies in the input folder .*input \(base model\), which is never written to",
    "input/out": "lies in the input folder",
    "input/deep/below/out": "lies in the input folder",
    "empty/../input/out": "lies in the input folder",
    "alias/out": "lies in the input folder",
    "data.jsonl": r"lies in the input folder .*data.jsonl \(data of task a\)",
    "data.jsonl/out": "lies in the input folder",
    "full": "already holds something",
    "full/": "already holds something",
    "full/file": "already holds something",
    "full/file/out": "is a file",
    ".": "already holds something",
    "..": "already holds something",
    "nothing/..": "already holds something",
    "nothing/../full": "already holds something",
    "circle": "Too many levels of symbolic links",
    "circle/out": "Too many levels of symbolic links",
    "x" * 300: "File name too long",
    "pipe": "already holds something",
    "pipe/out": "is a file",
    "/dev/null/x": "is a file",
    "/proc/x": "0 bytes free",
    "/": "already holds something",
}


@pytest.mark.parametrize("out", OUTPUTS)
def test_outputs_that_are_refused(out: str, place: Path) -> None:
    before = sorted(os.walk(place))
    inputs = {"base model": place / "input", "expert": place / "circle", "data of task a": place / "data.jsonl"}
    with pytest.raises(OutputError, match=OUTPUTS[out]) as error:
        check_output(Path(out), inputs, 1)
    assert "out: " in str(error.value)
    assert sorted(os.walk(place)) == before


@pytest.mark.parametrize(
    "out", ["out", "empty", "empty/", "new/deep/out", "input/../out", "dangling", "nothing/../out"]
)
def test_outputs_that_may_be_written(out: str, place: Path) -> None:
    check_output(Path(out), {"base model": place / "input"}, 1)


def test_the_working_directory_is_no_output(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is in it would be left in a folder that has no name any more."""
    monkeypatch.chdir(place / "empty")
    for out in (Path(), place / "empty", Path("nothing/..")):
        with pytest.raises(OutputError, match="is the working directory; name a folder in it"):
            check_output(out, {}, 1)


@pytest.mark.parametrize("call", ["stat", "list_folder"])
def test_a_folder_that_cannot_be_entered_is_no_output(call: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, call, denied)
    with pytest.raises(OutputError, match=r"^out: empty cannot be written: Permission denied"):
        check_output(Path("empty"), {}, 1)


def test_small_sizes_are_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [size_text(size) for size in (0, 99, 12_345, 9.9e7, 1.5e8, 2.5e12)] == [
        *("0 bytes", "99 bytes", "12.3 kB", "99.0 MB", "0.1 GB", "2500.0 GB")
    ]
    monkeypatch.setattr(files, "free_bytes", lambda _: 1000)
    with pytest.raises(OutputError, match=r"out: new needs 12.3 kB, but .* has 1.0 kB free"):
        check_output(Path("new"), {}, 12_345)


@pytest.mark.parametrize(
    ("scratch", "message"),
    [
        ("input", "lies in the input folder"),
        ("alias/x", "lies in the input folder"),
        ("out", "lies in the output folder"),
        ("out/x", "lies in the output folder"),
        (".out.partial", "lies in the output folder"),
        (".out.partial/states", "lies in the output folder"),
        ("circle", "cannot hold hidden states: Too many levels of symbolic links"),
        ("nothing", "cannot hold hidden states: No such file or directory; make it first"),
        ("nothing/..", "cannot hold hidden states: No such file or directory; make it first"),
    ],
)
def test_folders_for_hidden_states_that_are_refused(scratch: str, message: str, place: Path) -> None:
    with pytest.raises(OutputError, match=f"^scratch: {scratch} {message}"):
        check_scratch(Path(scratch), {"base model": place / "input"}, Path("out"))


def test_folders_for_hidden_states_may_be_elsewhere(place: Path) -> None:
    for scratch in ("empty", ".", "/tmp"):
        check_scratch(Path(scratch), {"base model": place / "input"}, Path("out"))
        check_scratch(Path(scratch), {"base model": place / "input"}, None)


@pytest.mark.parametrize("run", [ff.plan, ff.calibrate])
def test_nothing_is_written_into_inputs(run: Callable[..., Any], case: Case, tmp_path: Path) -> None:
    data = Path(case.recipe["experts"]["task0"]["data"])
    base = Path(case.recipe["base_model"])
    before = sorted(os.walk(base))
    for changes, options in (
        ({"out": str(base / "out")}, {}),
        ({"out": str(data)}, {}),
        ({"out": str(tmp_path / "out")}, {"scratch": base}),
        ({"out": str(tmp_path / "out")}, {"scratch": tmp_path / "out"}),
    ):
        with pytest.raises(OutputError, match=r"lies in the (input|output) folder"):
            run({**case.recipe, **changes}, device="cpu", **options)
    assert sorted(os.walk(base)) == before
    assert list(tmp_path.iterdir()) == []


# What stays


def fail(*_: object, **__: object) -> None:
    raise FeatCalError("broken")


def test_a_failed_job_leaves_no_parents_that_it_made(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.setattr("featcal_fast.job.run.load_data", fail)
    with pytest.raises(FeatCalError, match="broken"):
        ff.calibrate(case.recipe, out=tmp_path / "there" / "a" / "b" / "out", device="cpu")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_parents_stay_with_what_others_put_there(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def others(*_: object, **__: object) -> None:
        (tmp_path / "a" / "theirs").touch()
        fail()

    monkeypatch.setattr("featcal_fast.job.run.load_data", others)
    with pytest.raises(FeatCalError, match="broken"):
        ff.calibrate(case.recipe, out=tmp_path / "a" / "b" / "out", device="cpu")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "theirs"]


# What strangers may have put beside an output


@pytest.mark.parametrize("name", ["", "model", "states"])
def test_links_in_place_of_what_a_run_leaves_are_refused(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").touch()
    link = work_path(out) / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "theirs")
    with pytest.raises(OutputError, match="is a link, which no run leaves; remove it"), WorkFolder(out):
        pass
    assert os.listdir(tmp_path / "theirs") == ["file"]


@pytest.mark.parametrize("states", ["theirs", "x/.featcal-fast-a/../../theirs", "/", 5, ["a"], {}])
def test_a_manifest_says_not_what_is_removed(states: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "theirs").mkdir()
    work_path(out).mkdir()
    named = str(tmp_path / states) if isinstance(states, str) else states
    Manifest(work_path(out) / "manifest").append({"fingerprint": {}, "states": named})
    with pytest.raises(ResumeError, match="manifest names no folder of hidden states"), WorkFolder(out) as work:
        work.clear()
    assert (tmp_path / "theirs").exists()


def test_a_link_to_a_folder_of_theirs_is_all_that_is_removed(tmp_path: Path) -> None:
    theirs, link = tmp_path / "theirs", tmp_path / f"{STATES}0"
    theirs.mkdir()
    (theirs / OWNER).write_text(str(tmp_path / "gone"))
    link.symlink_to(theirs)
    with WorkFolder(tmp_path / "out") as work:
        work.remove_unowned(tmp_path)
    assert (theirs / OWNER).exists()
    assert not link.is_symlink()


@pytest.mark.parametrize("text", ["[" * 100_000, "5", '{"a": 1, "a": 2}', "NaN"])
def test_a_line_of_a_manifest_that_no_run_writes_ends_it(text: str, tmp_path: Path) -> None:
    from featcal_fast.checkpoints.manifest import _checksum

    path = tmp_path / "manifest"
    path.write_text(f"{_checksum(text)} {text}\n")
    assert Manifest(path).entries == []


def test_a_manifest_may_be_long(tmp_path: Path) -> None:
    """A model of many tensors has more of it than documents of strangers may have."""
    manifest = Manifest(tmp_path / "manifest")
    manifest.append({"a": "x" * files.LARGEST})
    assert len(Manifest(manifest.path).entries) == 1


def test_outputs_that_are_not_in_utf_8_have_folders_of_their_own(tmp_path: Path) -> None:
    first, second = (tmp_path / os.fsdecode(name) for name in (b"a\xff", b"a\xfe"))
    assert states_path(first, tmp_path) != states_path(second, tmp_path)
    with WorkFolder(first) as work:
        work.begin({}, tmp_path)
        assert os.fsencode(str(first)) == (work.states / OWNER).read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_stopped_keeps_its_parents(case: Case, tmp_path: Path) -> None:
    out = stopped(case, tmp_path / "deep")
    assert work_path(out).is_dir()
