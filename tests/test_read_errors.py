"""Reads that fail: whichever it is, the error names the file and what it is of, and says what to do."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
from data_files import save_image, save_tokenizer
from forms import factors, write_adapter
from safetensors.torch import load_file

import featcal_fast as ff
from featcal_fast import files
from featcal_fast.checkpoints import find_checkpoint, find_expert
from featcal_fast.data.batches import load_batches
from featcal_fast.inputs.recipe import Recipe

READS = ("open_to_read", "read_into", "read_bytes", "read_text", "list_folder", "stat")
ADVICE = ("check", "download")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A model in two forms, as a hub snapshot too, an adapter, data and a recipe."""
    model = pico.llama(layers=2)
    model.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    (tmp_path / "sharded" / "1_Pooling").mkdir()
    (tmp_path / "sharded" / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "hub" / "snapshots").mkdir(parents=True)
    model.save_pretrained(tmp_path / "hub" / "snapshots" / "abc")
    (tmp_path / "hub" / "refs").mkdir()
    (tmp_path / "hub" / "refs" / "main").write_text("abc\n")
    write_adapter(tmp_path / "adapter", factors(load_file(tmp_path / "model" / "model.safetensors"), layers=2))
    save_tokenizer(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"text": "a b"}\n\n{"text": "c"}\n')
    save_image(tmp_path / "images" / "red" / "a.png", "red")
    vision = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 4}}
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision" / "processor_config.json").write_text(json.dumps({"image_processor": vision}))
    recipe = {"base_model": "a", "merged_model": "b", "experts": {"c": {"model": "d", "data": "e"}}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path


def _read(name: str, root: Path) -> object:
    model = find_checkpoint(name, root, "merged model")
    return {path: value.sum().item() for path, value in model.read(model.tensors).items()}, sorted(model.side_files())


def _read_adapter(root: Path) -> object:
    expert = find_expert("adapter", root, "expert math", find_checkpoint("model", root, "base model"))
    return {name: value.sum().item() for name, value in expert.read(expert.tensors).items()}


def _read_texts(root: Path) -> object:
    return [row for batch in load_batches(root / "data.jsonl", folders=[root / "model"]) for row in batch["input_ids"]]


WAYS: dict[str, tuple[Callable[[Path], object], str]] = {
    "model": (lambda root: _read("model", root), "merged model: .*model"),
    "sharded": (lambda root: _read("sharded", root), "merged model: .*sharded"),
    "snapshot": (lambda root: _read("hub", root), "merged model: .*hub"),
    "adapter": (_read_adapter, "(base model|expert math).*: .*(adapter|model)"),
    "texts": (_read_texts, "data.jsonl"),
    "images": (lambda root: load_batches(root / "images", folders=[root / "vision"]), "images|processor_config.json"),
    "recipe": (lambda root: Recipe.load(root / "recipe.yaml"), "recipe.yaml"),
}


class Disk:
    """Counts the operations that read; the `failing`-th is refused."""

    def __init__(self, patch: pytest.MonkeyPatch, failing: int | None = None) -> None:
        self.failing, self.count = failing, 0
        for name in READS:
            patch.setattr(files, name, self._wrapped(getattr(files, name)))

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            self.count += 1
            if self.count == self.failing:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return function(*args)

        return wrapped


@pytest.mark.parametrize("way", WAYS)
def test_every_read_may_fail(way: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, where = WAYS[way]
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        read(root)
    assert disk.count
    for failing in range(1, disk.count + 1):
        with monkeypatch.context() as patch:
            Disk(patch, failing)
            with pytest.raises(ff.FeatCalError, match=rf"{where}.*Input/output error") as error:
                read(root)
        assert any(word in str(error.value) for word in ADVICE), error.value


@pytest.mark.parametrize("way", ["model", "sharded", "adapter", "texts"])
def test_a_file_may_fail_after_any_number_of_bytes(way: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or end there, while it is read."""
    read, where = WAYS[way]
    plain, expected = files.read_into, read(root)
    left = 0

    def limited(then: Callable[[], int]) -> Callable[..., int]:
        def read_into(file: Any, memory: memoryview, position: int) -> int:
            nonlocal left
            count = plain(file, memory[: max(1, min(len(memory), left, 999))], position) if left else then()
            left -= count
            return count

        return read_into

    def refuse() -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "read_into", limited(refuse))
    left = 10**9
    assert str(read(root)) == str(expected)  # in small pieces, as some file systems give them
    total = 10**9 - left
    for bytes_before in (0, 1, 7, 8, 9, total // 3, total // 2, total - 1):
        left = bytes_before
        with pytest.raises(ff.FeatCalError, match=rf"{where}.*Input/output error"):
            read(root)
    if way == "texts":
        return
    monkeypatch.setattr(files, "read_into", limited(lambda: 0))
    for bytes_before in (0, 7, 9, total // 2, total - 1):
        left = bytes_before
        with pytest.raises(ff.FeatCalError, match=rf"{where}.*(ends early|is not a complete|is not valid JSON)"):
            read(root)


def _raise(error: OSError) -> Callable[..., Any]:
    def refuse(*_: object) -> Any:
        raise error

    return refuse


NOT_ASKED = {("recipe", "is_dir"), ("texts", "is_file"), *((way, "exists") for way in WAYS if way != "texts")}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_folder_that_may_not_be_entered_is_named(number: int, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`is_file` and `exists` raise there, until Python 3.13."""
    for question in ("is_file", "is_dir", "exists"):
        for way, (read, _) in WAYS.items():
            if (way, question) in NOT_ASKED:
                continue
            with monkeypatch.context() as patch:
                patch.setattr(Path, question, _raise(OSError(number, os.strerror(number))))
                with pytest.raises(ff.FeatCalError, match=rf"{root}/.*{os.strerror(number)}"):
                    read(root)


HOSTILE = {
    "deep": b"[" * 10**6,
    "not text": b'{"a": "\xff"}',
    "a list": b"[]",
    "empty": b"",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize(
    "file", ["model/config.json", "sharded/model.safetensors.index.json", "adapter/adapter_config.json", "recipe.yaml"]
)
def test_what_is_no_json_of_ours_is_named(file: str, data: bytes, root: Path) -> None:
    (root / file).write_bytes(data)
    way = {"recipe.yaml": "recipe"}.get(file, file.partition("/")[0])
    with pytest.raises(ff.FeatCalError, match=Path(file).name):
        WAYS[way][0](root)


def _header(entry: str) -> bytes:
    text = f'{{"a": {entry}}}'.encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "header",
    [
        _header('{"dtype": "F32", "shape": [0, 9223372036854775808], "data_offsets": [0, 0]}'),
        _header('{"dtype": "F32", "shape": [0, 4294967296, 4294967296], "data_offsets": [0, 0]}'),
        _header(f'{{"dtype": "F32", "shape": {[1] * 65}, "data_offsets": [0, 4]}}') + bytes(4),
        _header('{"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}') + bytes(4),
        _header('{"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}') + bytes(4),
        _header("[" * 10**6),
        (10**6).to_bytes(8, "little") + b"[" * 10**6,
    ],
)
def test_headers_that_would_break_their_readers_are_refused(header: bytes, root: Path) -> None:
    (root / "model" / "model.safetensors").write_bytes(header)
    with pytest.raises(ff.FeatCalError, match=r"model.safetensors is not a complete safetensors file"):
        _read("model", root)


def test_an_index_that_is_a_link_out_of_the_folder_is_refused(root: Path) -> None:
    index = root / "sharded" / "model.safetensors.index.json"
    index.rename(root / "index.json")
    index.symlink_to("../index.json")
    with pytest.raises(ff.FeatCalError, match=r"index.json is a link to .*, outside of the model folder"):
        _read("sharded", root)
