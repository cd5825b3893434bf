"""Files of strangers: headers, indices, names and links that would hurt whoever trusts them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pico
import pytest

import featcal_fast as ff
from featcal_fast import files
from featcal_fast.checkpoints import Checkpoint, find_checkpoint, find_expert
from featcal_fast.checkpoints.find import find_folder

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def header(entries: object, length: int | None = None) -> bytes:
    """A safetensors file's beginning; entries may be bytes, or whatever JSON can hold."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def entry(start: int = 0, size: int = 4, **changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [size // 4], "data_offsets": [start, start + size], **changes}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small checkpoint that can be read; tests break it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / SINGLE).write_bytes(header({"a": entry(), "b": entry(4)}) + bytes(8))
    assert set(Checkpoint(folder, "model").tensors) == {"a", "b"}
    return folder


HEADERS = {
    "a list of dtypes": header({"a": entry(dtype=["F32"])}) + bytes(4),
    "no dtype": header({"a": {"shape": [1], "data_offsets": [0, 4]}}) + bytes(4),
    "overlapping": header({"a": entry(size=8), "b": entry(4)}) + bytes(8),
    "the same place": header({"a": entry(), "b": entry()}) + bytes(4),
    "a gap": header({"a": entry(), "b": entry(8)}) + bytes(12),
    "a gap at the start": header({"a": entry(4)}) + bytes(8),
    "backwards": header({"a": entry(dtype="F4", data_offsets=[0, 8]), "b": entry(dtype="F4", data_offsets=[8, 4])}),
    "no name": header({"": entry()}) + bytes(4),
    "a long name": header({"a" * 501: entry()}) + bytes(4),
    "an escape code": header({"\x1b[31mred": entry()}) + bytes(4),
    "a line feed": header({"a\nb": entry()}) + bytes(4),
    "half a character": header({"\ud800": entry()}) + bytes(4),
    "text that turns round": header({"a\u202eb": entry()}) + bytes(4),
    "a number as metadata": header({"__metadata__": 7, "a": entry()}) + bytes(4),
    "numbers as metadata": header({"__metadata__": {"format": 7}, "a": entry()}) + bytes(4),
    "a mapping as shape": header({"a": entry(shape={})}) + bytes(4),
    "a text as shape": header({"a": entry(shape="")}) + bytes(4),
    "offsets that are none": header({"a": entry(data_offsets=None), "b": entry()}) + bytes(4),
    "offsets of texts": header({"a": entry(data_offsets=["0", "4"]), "b": entry()}) + bytes(4),
    "three offsets": header({"a": entry(data_offsets=[0, 4, 4])}) + bytes(4),
    "a number as entry": header({"a": 5}) + bytes(4),
    "a huge dimension": header({"a": entry(shape=[10**30])}) + bytes(4),
    "digits": header(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}') + bytes(4),
    "NaN": header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [NaN, 4]}}') + bytes(4),
    "a tensor twice": header(b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2)) + bytes(4),
    "deep": header(b"[" * 10**5),
    "many lists": header(b'{"a": [' + b"[]," * 2_000_000 + b"[]]}"),
    "a huge length": header(b"{}", 2**63),
    "a length of a TiB": header(b"{}", 2**40),
    "an empty file": b"",
    "seven bytes": b"\0" * 7,
    "zeros": bytes(4096),
    "a pointer": LFS,
}


@pytest.mark.parametrize("data", HEADERS.values(), ids=HEADERS.keys())
def test_a_header_that_cannot_be_trusted_is_refused(data: bytes, folder: Path) -> None:
    (folder / SINGLE).write_bytes(data)
    with pytest.raises(ff.FeatCalError, match=rf"model: .*{SINGLE} is not a complete safetensors file") as error:
        Checkpoint(folder, "model")
    assert len(str(error.value)) < 700
    assert str(error.value).isprintable()


def test_a_tebibyte_of_holes_is_refused_at_once(folder: Path) -> None:
    with (folder / SINGLE).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ff.FeatCalError, match="is not a complete safetensors file"):
        Checkpoint(folder, "model")


def test_a_tensor_larger_than_memory_is_named(folder: Path) -> None:
    data = header({"a": entry(size=2**43)})
    with (folder / SINGLE).open("wb") as file:
        file.write(data)
        try:
            file.truncate(len(data) + 2**43)
        except OSError:
            pytest.skip("this file system has no files of 8 TiB")
    with pytest.raises(ff.FeatCalError, match=r"tensor a takes 8192.0 GiB, more than this machine's memory"):
        Checkpoint(folder, "model").read(["a"])


def test_the_largest_headers_are_read_and_larger_ones_are_not_looked_at(folder: Path) -> None:
    entries = {f"layers.{number}": entry(number, 1, dtype="U8", shape=[]) for number in range(10_000)}
    (folder / SINGLE).write_bytes(header({"__metadata__": {"x": "y" * 10**7}, **entries}) + bytes(len(entries)))
    assert len(Checkpoint(folder, "model").tensors) == len(entries)
    (folder / SINGLE).write_bytes(header(b'{"a":' + b" " * 2**24 + b"}"))
    with pytest.raises(ff.FeatCalError, match="a header of 16777222 bytes in a file of 16777230, expected at most"):
        Checkpoint(folder, "model")


def test_a_model_has_a_bounded_number_of_tensors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcal_fast.checkpoints.shards.MAX_TENSORS", 1)
    with pytest.raises(ff.FeatCalError, match="model holds more than 1 tensors"):
        Checkpoint(folder, "model")


# Indices


def sharded(folder: Path, files: dict[str, dict[str, int]], index: object) -> None:
    (folder / SINGLE).unlink()
    for name, tensors in files.items():
        entries = {tensor: entry(4 * number) for number, tensor in enumerate(tensors)}
        (folder / name).write_bytes(header(entries) + bytes(4 * len(entries)))
    (folder / INDEX).write_bytes(index if isinstance(index, bytes) else json.dumps(index).encode())


INDICES: dict[str, tuple[object, str]] = {
    "absolute": ({"weight_map": {"a": "/etc/x.safetensors"}}, r"places tensor 'a' in '/etc/x.safetensors'"),
    "above": ({"weight_map": {"a": "../x.safetensors"}}, r"places tensor 'a' in '../x.safetensors'"),
    "a folder": ({"weight_map": {"a": "b/x.safetensors"}}, r"places tensor 'a' in 'b/x.safetensors'"),
    "a null byte": ({"weight_map": {"a": "x\0.safetensors"}}, r"places tensor 'a' in 'x\\x00.safetensors'"),
    "half a character": ({"weight_map": {"a": "\ud800.safetensors"}}, r"places tensor 'a' in '\\ud800.safetensors'"),
    "an escape code": ({"weight_map": {"a": "\x1b[2J.safetensors"}}, r"places tensor 'a' in '\\x1b\[2J.safetensors'"),
    "300 letters": ({"weight_map": {"a": "x" * 300 + ".safetensors"}}, r"places tensor 'a' in 'xxxx.*xx.safetensors'"),
    "a pickle": ({"weight_map": {"a": "x.bin"}}, r"places tensor 'a' in 'x.bin'; expected the name of a .safetensors"),
    "a list": ({"weight_map": {"a": ["s1.safetensors"]}}, r"places tensor 'a' in \['s1.safetensors'\]"),
    "a number": ({"weight_map": {"a": 5}}, r"places tensor 'a' in 5"),
    "missing files": (
        {"weight_map": {f"t{number}": f"{number}.safetensors" for number in range(5000)}},
        r"0.safetensors is missing, though model.safetensors.index.json names it",
    ),
    "one missing file": (
        {"weight_map": {f"t{number}": "none.safetensors" for number in range(5000)}},
        r"none.safetensors is missing, though model.safetensors.index.json names it",
    ),
    "another tensor": (
        {"weight_map": {"a": "s1.safetensors", "x": "s1.safetensors"}},
        r"holds tensor x, but it does not",
    ),
    "the other file": (
        {"weight_map": {"a": "s2.safetensors", "c": "s1.safetensors"}},
        r"s2.safetensors holds tensor a",
    ),
    "no files": ({"weight_map": {}}, r"is not a weight index: found \{'weight_map': \{\}\}"),
    "no map": ({"weight_map": ["a"]}, r"is not a weight index"),
    "no object": ([], r"is not a weight index: found \[\]"),
    "a key twice": (b'{"weight_map": {"a": "s1.safetensors", "a": "s2.safetensors"}}', r"the key 'a' is there twice"),
    "deep": (b"[" * 10**5, r"index.json is not valid JSON"),
    "a pointer": (LFS, r"index.json is a git-lfs pointer, not the file: git lfs pull"),
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index_that_cannot_be_trusted_is_refused(case: str, folder: Path) -> None:
    index, message = INDICES[case]
    sharded(folder, {"s1.safetensors": {"a": 0, "b": 0}, "s2.safetensors": {"c": 0}}, index)
    with pytest.raises(ff.FeatCalError, match=rf"model: {folder}.*{message}") as error:
        Checkpoint(folder, "model")
    assert len(str(error.value)) < 700
    assert str(error.value).isprintable()


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    index = {"weight_map": {"a": "s2.safetensors", "b": "s1.safetensors"}}
    sharded(folder, {"s1.safetensors": {"a": 0, "b": 0}, "s2.safetensors": {"a": 0}}, index)
    with pytest.raises(ff.FeatCalError, match=r"both s1.safetensors and s2.safetensors hold tensor a"):
        Checkpoint(folder, "model")


def test_an_index_is_bounded(folder: Path) -> None:
    sharded(folder, {"s1.safetensors": {"a": 0}}, {"weight_map": {"a": "s1.safetensors"}, "x": "y" * 2**25})
    with pytest.raises(ff.FeatCalError, match=r"index.json cannot be read: it is larger than 32 MiB"):
        Checkpoint(folder, "model")


# Links, and what is no file


@pytest.mark.parametrize("name", [SINGLE, "config.json"])
@pytest.mark.parametrize("kind", ["link out", "link to a device", "link to itself", "pipe", "folder", "device"])
def test_what_is_no_file_of_the_folder_is_refused(name: str, kind: str, folder: Path) -> None:
    path = folder / name
    path.rename(folder.parent / name)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        targets = {"link out": f"../{name}", "link to itself": name, "link to a device": "/dev/zero"}
        path.symlink_to(targets.get(kind, "/dev/full"))
    with pytest.raises(ff.FeatCalError, match=rf"model: .*({name}|{folder})"):
        Checkpoint(folder, "model")


@pytest.mark.parametrize("name", [SINGLE, "config.json"])
def test_a_pointer_says_what_to_do(name: str, folder: Path) -> None:
    (folder / name).write_bytes(LFS)
    with pytest.raises(ff.FeatCalError, match=rf"{name}.*a git-lfs pointer, not the file: git lfs pull"):
        Checkpoint(folder, "model")


def test_a_file_that_grows_while_it_is_opened_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = files.open_to_read

    def growing(path: Path):
        if path.name == SINGLE:
            with path.open("ab") as more:
                more.write(b"x")
        return plain(path)

    monkeypatch.setattr(files, "open_to_read", growing)
    with pytest.raises(ff.FeatCalError, match="is not a complete safetensors file"):
        Checkpoint(folder, "model")


# What a recipe calls a model


def test_names_of_models_are_found_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in {
        "pipe": r"pipe is not a folder",
        "file": r"file is not a folder",
        "loop": r"loop.*(is not a folder|Too many levels)",
        "o\0x": r"is not a folder",
        "x" * 300: r"File name too long",
        "org/none": r"expert: 'org/none' is neither a folder .* nor a model that could be had from the hub: \S",
        "org/none@../../x": r"found the revision '../../x', expected no `..`",
    }.items():
        with pytest.raises(ff.FeatCalError, match=message) as error:
            find_checkpoint(name, tmp_path, "expert")
        assert "\n" not in str(error.value)


def test_a_client_that_fails_without_a_word_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TimeoutError

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ff.FeatCalError, match="could be had from the hub: TimeoutError"):
        find_folder("org/none", tmp_path, "expert")


def _refs(hub: Path, data: bytes) -> None:
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_bytes(data)


SNAPSHOTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a huge ref": (lambda hub: _refs(hub, b"a" * 10**6), "refs/main cannot be read: it is larger than"),
    "a ref that leads out": (lambda hub: _refs(hub, b"../.."), ""),
    "a pipe as ref": (lambda hub: [(hub / "refs").mkdir(), os.mkfifo(hub / "refs" / "main")], ""),
    "a link as snapshot": (lambda hub: (hub / "snapshots" / "two").symlink_to(hub.parent), ""),
    "a file as snapshot": (lambda hub: (hub / "snapshots" / "two").write_text("x"), ""),
    "two snapshots": (lambda hub: (hub / "snapshots" / "two").mkdir(), "holds 2 snapshots and no ref main"),
}


@pytest.mark.parametrize("case", SNAPSHOTS)
def test_odd_folders_of_the_hubs_cache(case: str, tmp_path: Path) -> None:
    """The only snapshot is found, or the error says why not."""
    (tmp_path / "hub" / "snapshots" / "one").mkdir(parents=True)
    change, message = SNAPSHOTS[case]
    change(tmp_path / "hub")
    if not message:
        assert find_folder("hub", tmp_path, "expert") == tmp_path / "hub" / "snapshots" / "one"
        return
    with pytest.raises(ff.FeatCalError, match=message):
        find_folder("hub", tmp_path, "expert")


# What lies beside the weights


def test_names_that_cannot_be_written_are_refused(folder: Path) -> None:
    for name in (b"a\xff.json", b"a\x1b[31m.json", b"a\nb.json", "a\u202eb.json".encode()):
        path = os.path.join(os.fsencode(folder), name)
        os.close(os.open(path, os.O_CREAT))
        with pytest.raises(ff.FeatCalError, match=r"the name .* holds control characters, or is not UTF-8") as error:
            Checkpoint(folder, "model").side_files()
        assert str(error.value).isprintable()
        os.unlink(path)
    (folder / "größe 📐.json").write_text("{}")
    assert set(Checkpoint(folder, "model").side_files()) == {"config.json", "größe 📐.json"}


def test_a_folder_of_very_many_files_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcal_fast.checkpoints.side_files.MOST", 5)
    (folder / "images").mkdir()
    for number in range(4):
        (folder / "images" / f"{number}.png").touch()
    with pytest.raises(ff.FeatCalError, match="holds more than 5 files beside the weights; expected a model's folder"):
        Checkpoint(folder, "model").side_files()


def test_a_file_that_vanishes_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "gone.json").touch()
    plain = files.list_folder

    def vanishing(path: Path) -> list[Path]:
        found = plain(path)
        (folder / "gone.json").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(files, "list_folder", vanishing)
    with pytest.raises(ff.FeatCalError, match=r"gone.json cannot be read: No such file or directory"):
        Checkpoint(folder, "model").side_files()


def test_a_folder_of_no_rights_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its owner finds it; who runs tests may be allowed everything."""
    pico.llama(layers=1).save_pretrained(tmp_path / "model")
    plain = Path.is_file

    def denied(path: Path) -> bool:
        if path.parent.name == "model":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(Path, "is_file", denied)
    with pytest.raises(ff.FeatCalError, match=r"expert: .*model/config.json cannot be read: Permission denied"):
        find_expert("model", tmp_path, "expert", None)  # type: ignore[arg-type]


def test_two_names_of_one_tensor_are_refused(folder: Path) -> None:
    (folder / SINGLE).write_bytes(header({"model.norm.weight": entry(), "norm.weight": entry(4)}) + bytes(8))
    with pytest.raises(
        ff.FeatCalError, match=r"holds tensors model.norm.weight and norm.weight, which are the same one"
    ):
        Checkpoint(folder, "model").names  # noqa: B018
