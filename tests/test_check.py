"""A calibrated model's folder against the hashes in its report: whole, damaged or not ours, whatever is in it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from featcal_fast import files
from featcal_fast.job.check import check

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


@pytest.fixture(autouse=True)
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared here is no model; `test_loads.py` has some."""
    monkeypatch.setattr("featcal_fast.job.check.check_loads", lambda out: None)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Two shards of two tensors each, an index, files beside them, one in a subfolder, and the report on them."""
    folder = tmp_path / "out"
    (folder / "1_Pooling").mkdir(parents=True)
    contents: dict[str, dict[str, str]] = {"tensors": {}, "headers": {}, "files": {}}
    weight_map = {}
    for number, shard in enumerate(SHARDS):
        tensors = {f"layers.{number}.{name}": torch.full((3, 5), float(number)) for name in ("weight", "more")}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        contents["tensors"] |= {name: sha256(value.numpy().tobytes()) for name, value in tensors.items()}
        data = (folder / shard).read_bytes()
        contents["headers"][shard] = sha256(data[: header_end(data)])
    texts = {INDEX: json.dumps({"weight_map": weight_map}), "config.json": "{}", "1_Pooling/config.json": "{}\n"}
    for name, text in texts.items():
        (folder / name).write_text(text)
        contents["files"][name] = sha256(text.encode())
    (folder / "report.json").write_text(json.dumps({"versions": {"featcal_fast": "1"}, "contents": contents}))
    return folder


def test_what_was_written_is_whole(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(files, "open_to_read", _recorded(files.open_to_read, opened))
    found = check(out)
    assert len(opened) == 6
    assert found.whole
    assert (found.status, found.problems, found.unlisted) == (0, [], [])
    assert (found.tensors, found.shards, found.files) == (4, 2, 3)
    as_written = "as written: 4 tensors, 2 of their files' headers, 3 other files"
    assert found.summary() == f"{out} is whole, and loads; {as_written}"


def test_other_files_are_mentioned_and_no_more(out: Path) -> None:
    (out / "2_Dense").mkdir()
    (out / "2_Dense" / "notes.txt").write_text("mine")
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("ref")
    found = check(str(out))
    assert (found.status, found.unlisted) == (0, ["2_Dense/notes.txt"])
    assert found.summary().endswith("; files besides: 1")


def test_a_folder_in_the_hubs_cache_is_compared_too(out: Path, tmp_path: Path) -> None:
    """Where it is a snapshot, whose files are links to `../../blobs`."""
    repo = tmp_path / "models--org--out"
    shutil.copytree(out, repo / "snapshots" / "abc")
    (repo / "blobs").mkdir()
    for number, path in enumerate(path for path in (repo / "snapshots" / "abc").rglob("*") if path.is_file()):
        blob = repo / "blobs" / str(number)
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    found = check(repo / "snapshots" / "abc")
    assert (found.status, found.tensors, found.files) == (0, 4, 3), found.problems


# Each breaks a whole folder in one way; the problems are those that it returns, in this order.


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def _tensor(out: Path) -> list[str]:
    flip(out / SHARDS[1], -1)
    return [f"tensor layers.1.weight in {SHARDS[1]} is not as it was written"]


def _two_tensors(out: Path) -> list[str]:
    for shard in SHARDS:
        flip(out / shard, header_end((out / shard).read_bytes()))
    return [f"tensor layers.{number}.more in {shard} is not as it was written" for number, shard in enumerate(SHARDS)]


def _header_length(out: Path) -> list[str]:
    flip(out / SHARDS[0], 7)
    return [f"{SHARDS[0]} has a damaged header"] + [f"tensor layers.0.{name} is missing" for name in ("weight", "more")]


def _header_text(out: Path) -> list[str]:
    """Still a header, of other tensors."""
    path = out / SHARDS[0]
    path.write_bytes(path.read_bytes().replace(b"layers.0.weight", b"layers.9.weight"))
    return [
        f"{SHARDS[0]} does not have the header that was written",
        f"tensor layers.9.weight in {SHARDS[0]} is one more than was written",
        "tensor layers.0.weight is missing",
    ]


def _tensor_twice(out: Path) -> list[str]:
    shutil.copyfile(out / SHARDS[0], out / SHARDS[1])
    return [
        f"{SHARDS[1]} does not have the header that was written",
        *(f"tensor layers.0.{name} in {SHARDS[1]} is one more than was written" for name in ("more", "weight")),
        *(f"tensor layers.1.{name} is missing" for name in ("weight", "more")),
    ]


def _truncated(out: Path) -> list[str]:
    size = (out / SHARDS[1]).stat().st_size
    os.truncate(out / SHARDS[1], size - 70)
    return [
        f"{SHARDS[1]} has {size - 70} bytes, expected {size}",
        *(f"tensor layers.1.{name} in {SHARDS[1]} is cut off" for name in ("more", "weight")),
    ]


def _truncated_in_the_header(out: Path) -> list[str]:
    os.truncate(out / SHARDS[1], 20)
    return [f"{SHARDS[1]} has a damaged header, or is cut off"] + ["tensor layers.1."] * 2


def _emptied(out: Path) -> list[str]:
    os.truncate(out / SHARDS[1], 0)
    return [f"{SHARDS[1]} has a damaged header, or is cut off"] + ["tensor layers.1."] * 2


def _longer(out: Path) -> list[str]:
    size = (out / SHARDS[0]).stat().st_size
    with (out / SHARDS[0]).open("ab") as file:
        file.write(b"more")
    return [f"{SHARDS[0]} has {size + 4} bytes, expected {size}"]


def _no_shard(out: Path) -> list[str]:
    (out / SHARDS[0]).unlink()
    return [f"{SHARDS[0]} is missing"] + [f"tensor layers.0.{name} is missing" for name in ("weight", "more")]


def _no_index(out: Path) -> list[str]:
    (out / INDEX).unlink()
    return [f"{INDEX} is missing"]


def _no_side_file(out: Path) -> list[str]:
    shutil.rmtree(out / "1_Pooling")
    return ["1_Pooling/config.json is missing"]


def _config(out: Path) -> list[str]:
    (out / "config.json").write_text("[]")
    return ["config.json is not as it was written"]


def _folder_for_a_file(out: Path) -> list[str]:
    (out / "config.json").unlink()
    (out / "config.json").mkdir()
    return ["config.json is not a file"]


def _pipe(out: Path) -> list[str]:
    (out / "config.json").unlink()
    os.mkfifo(out / "config.json")
    return ["config.json is not a file"]


def _link_out(out: Path) -> list[str]:
    (out / "config.json").rename(out.parent / "config.json")
    (out / "config.json").symlink_to(out.parent / "config.json")
    return ["config.json is a link out of the folder"]


def _folder_link_out(out: Path) -> list[str]:
    (out / "1_Pooling").rename(out.parent / "elsewhere")
    (out / "1_Pooling").symlink_to(out.parent / "elsewhere")
    return ["1_Pooling/config.json is a link out of the folder"]


def _link_loop(out: Path) -> list[str]:
    (out / "config.json").unlink()
    (out / "config.json").symlink_to("config.json")
    return ["config.json cannot be read: Too many levels of symbolic links"]


def _garbled_report(out: Path) -> list[str]:
    (out / "report.json").write_bytes(b"\0" * 4096)  # what a crash leaves of a file that was not synced
    return ["report.json is not valid JSON"]


def _cut_report(out: Path) -> list[str]:
    os.truncate(out / "report.json", 100)
    return ["report.json is not valid JSON"]


def _nested_report(out: Path) -> list[str]:
    (out / "report.json").write_text("[" * 10**6)
    return ["report.json is not valid JSON"]


def _latin_report(out: Path) -> list[str]:
    (out / "report.json").write_bytes(b'{"versions": "\xe9"}')
    return ["report.json is not valid JSON"]


def _huge_report(out: Path) -> list[str]:
    os.truncate(out / "report.json", 2**28 + 1)  # takes no room
    return ["report.json has 268435457 bytes, more than any"]


def _edited(change: Callable[[dict[str, Any]], object], problem: str) -> Callable[[Path], list[str]]:
    def breakage(out: Path) -> list[str]:
        report = json.loads((out / "report.json").read_text())
        change(report)
        (out / "report.json").write_text(json.dumps(report))
        return [problem]

    return breakage


SECRET = sha256(b"not yours")
REPORTS = {
    "no contents": _edited(lambda r: r.pop("contents"), "report.json lacks the hashes of tensors"),
    "contents a list": _edited(lambda r: r.update(contents=[1]), "report.json lacks the hashes of tensors"),
    "no headers": _edited(lambda r: r["contents"].pop("headers"), "report.json lacks the hashes of headers"),
    "files a text": _edited(lambda r: r["contents"].update(files="x"), "report.json lacks the hashes of files"),
    "hashes numbers": _edited(
        lambda r: r["contents"].update(files={"config.json": 1}), "report.json lacks the hashes of files"
    ),
    "no tensors": _edited(lambda r: r["contents"].update(tensors={}), "report.json names no tensors"),
    "another tensor": _edited(lambda r: r["contents"]["tensors"].update(gone="0" * 64), "tensor gone is missing"),
    "no hash": _edited(
        lambda r: r["contents"]["files"].update({"config.json": ""}), "config.json is not as it was written"
    ),
    "absolute": _edited(
        lambda r: r["contents"]["files"].update({"/dev/zero": SECRET}), "report.json names /dev/zero, which is no file"
    ),
    "above": _edited(
        lambda r: r["contents"]["files"].update({"../secret": SECRET}), "report.json names ../secret, which is no file"
    ),
    "above and back": _edited(
        lambda r: r["contents"]["files"].update({"1_Pooling/../../out/config.json": SECRET}),
        "report.json names 1_Pooling/../../out/config.json, which is no file",
    ),
    "above, a shard": _edited(
        lambda r: r["contents"]["headers"].update({"../secret": SECRET}), "report.json names ../secret, which is no"
    ),
    "no name": _edited(lambda r: r["contents"]["files"].update({"": SECRET}), "report.json names , which is no file"),
    "itself": _edited(lambda r: r["contents"]["files"].update({".": SECRET}), "report.json names ., which is no file"),
    "null": _edited(lambda r: r["contents"]["files"].update({"a\0b": SECRET}), r"report.json names 'a\x00b', which is"),
    "surrogate": _edited(
        lambda r: r["contents"]["files"].update({"\ud800": SECRET}), r"report.json names '\ud800', which is no file"
    ),
    "escapes": _edited(lambda r: r["contents"]["files"].update({"\033[2J": SECRET}), r"'\x1b[2J' is missing"),
    "long": _edited(lambda r: r["contents"]["files"].update({"a" * 9999: SECRET}), f"{'a' * 200}... cannot be read"),
}
DAMAGES = {name[1:]: value for name, value in list(globals().items()) if name[0] == "_" and name[1] != "_"}
del DAMAGES["edited"]


@pytest.mark.parametrize("breakage", (DAMAGES | REPORTS).values(), ids=(DAMAGES | REPORTS).keys())
def test_damage_is_named(breakage: Callable[[Path], list[str]], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out.parent / "secret").write_text("not yours")
    expected = breakage(out)
    opened: list[Path] = []
    monkeypatch.setattr(files, "open_to_read", _recorded(files.open_to_read, opened))
    monkeypatch.setattr(files, "read_bytes", _recorded(files.read_bytes, opened))
    found = check(out)
    assert [text[: len(start)] for text, start in zip(found.problems, expected, strict=True)] == expected
    assert (found.status, found.whole) == (1, False)
    assert found.summary().startswith(f"{out} is damaged; problems: {len(expected)}; as written: ")
    assert all(path.resolve().is_relative_to(out) for path in opened)


def _recorded(function: Callable[..., Any], opened: list[Path]) -> Callable[..., Any]:
    def recorded(path: Path, *more: Any) -> Any:
        opened.append(path)
        return function(path, *more)

    return recorded


def test_every_flipped_bit_is_found(out: Path) -> None:
    """Of every byte of a shard, the header's too."""
    path = out / SHARDS[0]
    for position in range(path.stat().st_size):
        flip(path, position)
        assert check(out).status == 1, position
        flip(path, position)
    assert check(out).whole


def _no_folder(out: Path) -> str:
    shutil.rmtree(out)
    return "there is no such folder"


def _a_file(out: Path) -> str:
    shutil.rmtree(out)
    out.write_text("")
    return "there is no such folder"


def _no_report(out: Path) -> str:
    (out / "report.json").unlink()
    return "report.json does not exist"


def _another_tools(out: Path) -> str:
    (out / "report.json").write_text('{"accuracy": 0.9, "versions": {"torch": "2"}, "contents": ["a", "b"]}')
    return "report.json is not one of featcal_fast"


def _a_list(out: Path) -> str:
    (out / "report.json").write_text("[]")
    return "report.json is not one of featcal_fast"


def _report_elsewhere(out: Path) -> str:
    (out / "report.json").rename(out.parent / "report.json")
    (out / "report.json").symlink_to("../report.json")
    return "report.json is not a file of the folder"


def _report_a_pipe(out: Path) -> str:
    (out / "report.json").unlink()
    os.mkfifo(out / "report.json")
    return "report.json is not a file of the folder"


@pytest.mark.parametrize(
    "change",
    [_no_folder, _a_file, _no_report, _another_tools, _a_list, _report_elsewhere, _report_a_pipe],
    ids=lambda change: change.__name__.strip("_"),
)
def test_what_is_not_ours_is_said_to_be_so(change: Callable[[Path], str], out: Path) -> None:
    expected = change(out)
    found = check(out)
    assert (found.status, len(found.problems)) == (2, 1)
    assert found.problems[0].endswith(expected)
    assert found.summary() == f"{out} is not a calibrated model: {found.problems[0]}"


def test_whatever_cannot_be_read_is_a_problem(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each operation on files in turn."""
    for name in ("open_to_read", "read_into", "read_bytes", "stat", "list_folder"):
        function, number = getattr(files, name), 0
        while True:
            failing = _Failing(function, number)
            with monkeypatch.context() as patch:
                patch.setattr(files, name, failing)
                found = check(out)
            if failing.calls <= number:
                break
            assert found.status == 1, (name, number)
            assert any("Input/output error" in problem for problem in found.problems), found.problems
            number += 1
        assert number
    assert check(out).whole


class _Failing:
    """A function whose n-th call fails."""

    def __init__(self, function: Callable[..., Any], number: int) -> None:
        self.function, self.number, self.calls = function, number, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls == self.number + 1:
            raise OSError(5, "Input/output error")
        return self.function(*args)


def test_of_many_tensors_that_are_missing_a_few_are_named(tmp_path: Path) -> None:
    """A shard of a large model has hundreds."""
    contents = {"tensors": {f"layers.{i}.weight": "0" for i in range(99)}, "headers": {"gone": "0"}, "files": {}}
    (tmp_path / "report.json").write_text(json.dumps({"contents": contents}))
    problems = check(tmp_path).problems
    assert problems[:2] == [
        "gone is missing",
        "tensor layers.0.weight is missing: no file with a sound header holds it",
    ]
    assert problems[-1] == "so are 95 tensors more"
    assert len(problems) == 6
