"""The writer: whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pico
import pytest
import torch

import featcal_fast as ff
from featcal_fast import files
from featcal_fast.checkpoints import Checkpoint, CheckpointWriter, WorkFolder, check_output


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    pico.llama().save_pretrained(tmp_path / "model")
    return Checkpoint(tmp_path / "model", "model")


@contextmanager
def writing(out: Path, layout: Checkpoint) -> Iterator[CheckpointWriter]:
    """As those do who merge: what is written within becomes a folder."""
    with WorkFolder(out) as work:
        with CheckpointWriter(work, layout) as writer:
            yield writer
            writer.finish()
        work.publish()


def test_a_copy_is_byte_for_byte_the_same_tensors(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with writing(tmp_path / "copy", checkpoint) as writer:
        writer.copy_rest()
    copy = Checkpoint(tmp_path / "copy", "copy")
    assert {name: (i.shape, i.dtype) for name, i in copy.tensors.items()} == {
        name: (i.shape, i.dtype) for name, i in checkpoint.tensors.items()
    }
    before, after = checkpoint.read(checkpoint.tensors), copy.read(copy.tensors)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_exception_leaves_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def interrupted() -> None:
        with writing(tmp_path / "copy", checkpoint) as writer:
            writer.write(checkpoint.read(["model.norm.weight"]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_incomplete_model_is_not_published(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ff.FeatCalError, match="29 tensors were never written"):  # noqa: SIM117
        with writing(tmp_path / "copy", checkpoint) as writer:
            writer.write(checkpoint.read(["model.norm.weight"]))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_values_that_overflow_the_layouts_dtype_are_refused(tmp_path: Path) -> None:
    pico.llama().half().save_pretrained(tmp_path / "model")
    half = Checkpoint(tmp_path / "model", "model")
    with pytest.raises(ff.FeatCalError, match=r"model.norm.weight: the new values do not fit torch.float16"):  # noqa: SIM117
        with writing(tmp_path / "copy", half) as writer:
            writer.write({"model.norm.weight": torch.full((64,), 1e6)})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_noticed_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ff.FeatCalError, match=r"needs 1000000.0 GB, but .* GB free"):
        check_output(tmp_path / "out", {}, nbytes=10**15)


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ff.FeatCalError, match="already holds something"):
        check_output(tmp_path / "out", {}, nbytes=1)
    assert (tmp_path / "out").read_text() == "a file"


def _header(change) -> bytes:
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}
    header |= {"b": {"dtype": "F16", "shape": [2, 2], "data_offsets": [8, 16]}}
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        (10**12).to_bytes(8, "little") + bytes(100),
        (4).to_bytes(8, "little") + b"null",
        _header(lambda h: h.pop("b")),
        _header(lambda h: h["b"].update(data_offsets=[0, 8])),
        _header(lambda h: h["b"].update(data_offsets=[9, 17])),
        _header(lambda h: h["b"].update(data_offsets=[16, 8])),
        _header(lambda h: h["b"].update(shape=[2, 3])),
        _header(lambda h: h["b"].update(shape=[-2, -2])),
        _header(lambda h: h["b"].update(shape="22")),
        _header(lambda h: h["b"].pop("dtype")),
        _header(lambda h: None) + b"more",
        _header(lambda h: None)[:-1],
    ],
)
def test_broken_files_are_refused_when_they_are_opened(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(_header(lambda h: None))
    assert set(Checkpoint(tmp_path, "model").tensors) == {"a", "b"}
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ff.FeatCalError, match=r"model: .*model.safetensors is not a complete safetensors file"):
        Checkpoint(tmp_path, "model")


def test_an_output_that_is_a_link_is_written_where_it_points(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for name, there in (("empty", True), ("absent", False)):
        target, link = tmp_path / "elsewhere" / name, tmp_path / name
        target.parent.mkdir(exist_ok=True)
        if there:
            target.mkdir()
        link.symlink_to(target)
        check_output(link, {}, nbytes=1)
        with writing(link, checkpoint) as writer:
            writer.copy_rest()
        assert link.is_symlink()
        assert set(Checkpoint(target, "copy").tensors) == set(checkpoint.tensors)
    assert sorted(path.name for path in target.parent.iterdir()) == ["absent", "empty"]


def test_a_mount_point_cannot_be_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "disk")
    with pytest.raises(ff.FeatCalError, match="disk is a mount point; name a folder in it"):
        check_output(tmp_path / "disk", {}, nbytes=1)


def test_a_finished_model_is_not_lost_when_its_place_is_taken(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def overtaken() -> None:
        with writing(tmp_path / "copy", checkpoint) as writer:
            writer.copy_rest()
            (tmp_path / "copy").mkdir()
            (tmp_path / "copy" / "mine.txt").write_text("keep me")

    with pytest.raises(ff.FeatCalError, match="the finished model is in ") as error:
        overtaken()
    assert (tmp_path / "copy" / "mine.txt").read_text() == "keep me"
    left = tmp_path / ".copy.partial" / "model"
    assert str(left) in str(error.value)
    assert set(Checkpoint(left, "left").tensors) == set(checkpoint.tensors)


@pytest.mark.parametrize("call", ["reserve", "write_at", "sync", "sync_folder"])
def test_a_disk_that_fills_up_leaves_nothing(
    call: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, call, full)
    with pytest.raises(ff.FeatCalError, match="copy cannot be written: No space left on device"):  # noqa: SIM117
        with writing(tmp_path / "copy", checkpoint) as writer:
            writer.copy_rest()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
