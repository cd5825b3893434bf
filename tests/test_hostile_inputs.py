"""Ready inputs and data sets of strangers: what is no sample is refused, and what is not drawn is not read."""

from __future__ import annotations

import json
import os

import pytest
import torch
from data_files import A, rows, save_image
from safetensors.torch import save_file

from featcal_fast import files
from featcal_fast.data import ready, tables
from featcal_fast.data.batches import load_batches
from featcal_fast.data.checks import Limits
from featcal_fast.errors import DataError

IDS = torch.arange(12).reshape(3, 4)


def raw(path, header, size):
    """A safetensors file whose data are a hole of so many bytes."""
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    return path


def entry(dtype, shape, start, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_only_drawn_rows_are_read(tmp_path, monkeypatch):
    path = raw(tmp_path / "a.safetensors", {"input_ids": entry("U8", [2**20, 2**10], 0, 2**30)}, 2**30)
    inner, read = files.read_into, []

    def read_into(file, memory, position):
        read.append(len(memory) if file.name == path else 0)
        return inner(file, memory, position)

    monkeypatch.setattr(files, "read_into", read_into)
    (batch,) = load_batches(path, folders=[], samples=5)
    assert batch["input_ids"].shape == (5, 1024)
    assert sum(read) < 10_000


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"input_ids": entry("I64", [2**30, 0], 0, 0)}, 0, r"input_ids: found torch.int64 of shape \[0\] a sample"),
        ({"pixel_values": entry("F32", [4, 3, 0, 8], 0, 0)}, 0, r"pixel_values: found torch.float32 of shape \[3, 0"),
        ({"input_ids": entry("I64", [1, 2**37], 0, 2**40)}, 2**40, r"input_ids: found 137438953472 tokens, expected"),
        ({"inputs_embeds": entry("F32", [1, 2**38], 0, 2**40)}, 2**40, r"1 samples of it take 2048.0 GiB of memory"),
        ({"input_ids": entry("C64", [1, 1], 0, 8)}, 8, r"input_ids: found values of the type 'C64', expected integers"),
        ({"input_ids": entry("BOOL", [1, 1], 0, 1)}, 1, r"input_ids: found values of the type 'BOOL', expected int"),
        ({"pixel_values": entry("U8", [1, 1], 0, 1)}, 1, r"pixel_values: found values of the type 'U8', expected f"),
        ({"input_ids": entry("I64", [2, 2], 0, 31)}, 31, r"cannot be read as safetensors"),
        ({"input_ids": entry("I64", [2, 2], 0, 32)}, 31, r"cannot be read as safetensors"),
    ],
)
def test_shapes_that_ask_for_all_memory_or_none_are_refused_by_their_header(tmp_path, header, size, message):
    path = raw(tmp_path / "a.safetensors", header, size)
    with pytest.raises(DataError, match=message):
        load_batches(path, folders=[], samples=2**40 if size == 0 else 256)


def test_a_mask_of_a_sample_that_is_longer_than_a_model_takes_is_not_read(tmp_path):
    header = {"input_ids": entry("I64", [1, 4], 0, 32), "attention_mask": entry("U8", [1, 2**30], 32, 32 + 2**30)}
    path = raw(tmp_path / "a.safetensors", header, 32 + 2**30)
    with pytest.raises(DataError, match=r"attention_mask: found 1073741824 tokens, expected at most 1048576"):
        load_batches(path, folders=[])


def test_masks_count_as_ones_and_zeros_whatever_their_type(tmp_path):
    for mask in (torch.tensor([[1, 0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[True, False]])):
        save_file({"input_ids": torch.tensor([[5, 6]]), "attention_mask": mask}, tmp_path / "a.safetensors")
        (batch,) = load_batches(tmp_path / "a.safetensors", folders=[])
        assert batch["attention_mask"].dtype == torch.int64
        assert batch["attention_mask"].tolist() == [[1, 0]]
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-2] + b"\2\0")  # is no bool
    with pytest.raises(DataError, match=r"attention_mask: found other values than 0 and 1"):
        load_batches(tmp_path / "a.safetensors", folders=[])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"attention_mask": torch.full((3, 4), 0.5)}, "attention_mask: found other values than 0 and 1"),
        ({"attention_mask": torch.ones(3, 1, 4, 4)}, r"attention_mask: found shape \[1, 4, 4\], expected \[4\] as"),
        ({"position_ids": IDS.clone()}, r"sample 2, position_ids: found 11, expected 0 to 9, as the model has them"),
        ({"position_ids": -IDS}, r"position_ids: found -\d+, expected 0 to 9"),
        ({"position_ids": IDS.float()}, r"position_ids: found torch.float32 of shape \[4\], expected integers from 0"),
    ],
)
def test_values_that_no_model_has_are_named(tmp_path, tensors, message):
    save_file({"input_ids": IDS, **tensors}, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=message):
        load_batches(tmp_path / "a.safetensors", folders=[], limits=Limits(choices={"position_ids": 10}))


class Config:
    """What is asked of a model's config."""

    def __init__(self, name, **more):
        self.architectures = [name]
        self.__dict__.update(more)


@pytest.mark.parametrize(
    ("names", "model", "message"),
    [
        (
            ["input_ids", "attention_masks"],
            "LlamaForCausalLM",
            r"attention_masks: .* did you mean attention_mask\?",
        ),
        (["pixel_values"], "LlamaForCausalLM", r"pixel_values: found a tensor that a LlamaForCausalLM does not take"),
        (["input_ids", "use_cache"], "LlamaForCausalLM", r"use_cache: found a tensor that"),
        (["input_ids", "kwargs"], "LlamaForCausalLM", r"kwargs: found a tensor that"),
        (["attention_mask"], "LlamaForCausalLM", r"found attention_mask, expected input_ids or inputs_embeds too"),
        (["input_ids"], "CLIPVisionModel", r"input_ids: found a tensor that a CLIPVisionModel does not take"),
        (["input_ids"], "T5ForConditionalGeneration", r"expected labels or decoder_input_ids too, for the decoder"),
        (["input_ids", "attention_mask", "position_ids"], "LlamaForCausalLM", ""),
        (["input_ids", "token_type_ids"], "BertModel", ""),
        (["pixel_values"], "CLIPVisionModel", ""),
        (["input_ids", "labels"], "T5ForConditionalGeneration", ""),
    ],
)
def test_tensors_that_a_model_does_not_take_are_named(tmp_path, names, model, message):
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "a.safetensors")
    config = Config(model, is_encoder_decoder=model.startswith("T5"))
    if not message:
        return ready.check_names(tmp_path / "a.safetensors", config)
    with pytest.raises(DataError, match=message):
        ready.check_names(tmp_path / "a.safetensors", config)


# ---- data sets


def table_of_images(datasets, folder, *cells):
    features = datasets.Features({"image": datasets.Image()})
    data = datasets.Dataset.from_dict({"image": list(cells)}, features=features)
    data = data.cast_column("image", datasets.Image(decode=False))
    folder.mkdir(exist_ok=True)
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        data.data.table.replace_schema_metadata(features.arrow_schema.metadata), folder / "a.parquet"
    )
    return folder


@pytest.mark.parametrize(
    "path", ["{outside}", "../outside.png", "link.png", "http://localhost/a.png", "/dev/zero", "a\0b"]
)
def test_a_cell_may_not_name_other_files(datasets, tmp_path, vision, path):
    save_image(tmp_path / "outside.png", (255, 255, 255))
    path = path.format(outside=tmp_path / "outside.png")
    folder = table_of_images(datasets, tmp_path / "tables", {"bytes": None, "path": path})
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(DataError, match=r"tables.*(expected an image's bytes, or an image in|cannot be read)"):
        load_batches(folder, folders=[vision])


def test_a_cell_may_name_images_of_its_own_folder(datasets, tmp_path, vision):
    folder = table_of_images(datasets, tmp_path / "tables", {"bytes": None, "path": "a/white.png"})
    save_image(folder / "a" / "white.png", (255, 255, 255))
    (batch,) = load_batches(folder, folders=[vision])
    torch.testing.assert_close(batch["pixel_values"], torch.ones(1, 3, 4, 4))
    folder = table_of_images(datasets, tmp_path / "none", None)
    with pytest.raises(DataError, match=r"none, row 0: found no image"):
        load_batches(folder, folders=[vision])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", {"_data_files": [{"filename": "../data.arrow"}]}),
        ("dataset_dict.json", {"splits": ["../saved"]}),
        ("state.json", {"_data_files": 5}),
        ("state.json", []),
    ],
)
def test_a_saved_data_set_may_not_name_other_files(datasets, tmp_path, bare, file, content):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    assert rows(load_batches(tmp_path / "saved", folders=[bare])) == [[A]]
    (tmp_path / "saved" / file).write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"saved/{file}: (found the part|it does not describe)"):
        load_batches(tmp_path / "saved", folders=[bare])


@pytest.mark.parametrize(
    "file", ["{outside}", "../secret/a.parquet", "https://localhost:1/a.parquet", "[a.parquet, /b]"]
)
def test_a_data_sets_card_may_not_name_other_files(datasets, tmp_path, bare, file):
    datasets.Dataset.from_dict({"text": ["b"]}).to_parquet(tmp_path / "secret" / "a.parquet")
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "tables" / "a.parquet")
    card = "---\nconfigs:\n- config_name: default\n  data_files: {}\n---\nA card.\n"
    (tmp_path / "tables" / "README.md").write_text(card.format(file.format(outside=tmp_path / "secret" / "a.parquet")))
    with pytest.raises(DataError, match=r"tables/README.md: found the file .* expected files in its folder"):
        load_batches(tmp_path / "tables", folders=[bare])
    plain = card.split("---")[1].format(file.format(outside=tmp_path / "secret" / "a.parquet"))
    (tmp_path / "tables" / "README.md").write_text(card.format("a.parquet"))
    (tmp_path / "tables" / ".huggingface.yaml").write_text(plain)
    with pytest.raises(DataError, match=r"tables/.huggingface.yaml: found the file .* expected files in its folder"):
        load_batches(tmp_path / "tables", folders=[bare])
    (tmp_path / "tables" / ".huggingface.yaml").unlink()
    assert rows(load_batches(tmp_path / "tables", folders=[bare])) == [[A]]


def test_tables_that_unpack_to_all_memory_are_not_read(datasets, tmp_path, bare, monkeypatch):
    datasets.Dataset.from_dict({"text": ["a" * 10**6] * 50}).to_parquet(tmp_path / "tables" / "a.parquet")
    monkeypatch.setattr(tables, "available_host_bytes", lambda: 10**6)
    with pytest.raises(DataError, match=r"a.parquet: found a row group of 0.0 GiB, but only"):
        load_batches(tmp_path / "tables", folders=[bare])


def test_tables_that_are_no_files_are_not_waited_for(datasets, tmp_path, bare):
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "tables" / "a.parquet")
    os.mkfifo(tmp_path / "tables" / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet: it is not a regular file"):
        load_batches(tmp_path / "tables", folders=[bare])
