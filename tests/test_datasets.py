"""Calibration data from the `datasets` library: folders, tables and hub ids."""

import sys

import pytest
import torch
from data_files import BOS, EOS, A, assert_same, ids, rows, save_image, texts

from featcal_fast.data.batches import load_batches
from featcal_fast.data.checks import Limits
from featcal_fast.errors import DataError


@pytest.fixture
def save_dataset(datasets, tmp_path):
    def save_dataset(**columns):
        datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
        return tmp_path / "saved"

    return save_dataset


def test_a_saved_dataset_of_texts(save_dataset, bare):
    path = save_dataset(text=list("abcdefghij"), label=list(range(10)))
    batches = load_batches(path, folders=[bare], samples=4, seed=3)
    drawn = torch.randperm(10, generator=torch.Generator().manual_seed(3))[:4].tolist()
    assert rows(batches) == [[A + i] for i in drawn]
    assert_same(batches, load_batches(str(path), folders=[bare], samples=4, seed=3))


def test_a_saved_dataset_of_prompts_and_of_messages(save_dataset, chat):
    path = save_dataset(prompt=["a "], completion=["b"], extra=[0])
    assert rows(load_batches(path, folders=[chat])) == [[BOS, *ids("a b"), EOS]]
    path = save_dataset(messages=[[{"role": "user", "content": "c"}]], prompt=["a"])
    assert rows(load_batches(path, folders=[chat])) == [[BOS, *ids("user c")]]


def test_a_format_set_on_a_saved_dataset_does_not_matter(datasets, tmp_path, chat):
    dataset = datasets.Dataset.from_dict({"messages": [[{"role": "user", "content": "c"}]]})
    dataset.with_format("numpy").save_to_disk(tmp_path / "saved")
    assert rows(load_batches(tmp_path / "saved", folders=[chat])) == [[BOS, *ids("user c")]]


def test_a_saved_dataset_of_token_ids(save_dataset):
    path = save_dataset(input_ids=[[1, 2, 3], [4]])
    (batch,) = load_batches(path, folders=[], max_length=1)
    assert batch["input_ids"].tolist() == [[4, 0, 0], [1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    with pytest.raises(DataError, match=r"saved, row 0, input_ids: found 3 tokens, expected at most 2"):
        load_batches(path, folders=[], limits=Limits(2))
    path = save_dataset(input_ids=[[1, 2]], attention_mask=[[0, 1]])
    assert texts(load_batches(path, folders=[])) == [[2]]
    with pytest.raises(DataError, match=r"saved, row 1: found no row of token ids"):
        load_batches(save_dataset(input_ids=[[1], None]), folders=[])


@pytest.mark.parametrize("column", ["image", "picture"])
def test_a_saved_dataset_of_images(datasets, tmp_path, vision, column):
    save_image(tmp_path / "white.png", (255, 255, 255))
    png = (tmp_path / "white.png").read_bytes()
    features = datasets.Features({column: datasets.Image(), "label": datasets.Value("int64")})

    def save(*files):
        columns = {column: [{"bytes": file, "path": None} for file in files], "label": [0] * len(files)}
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
        return tmp_path / "saved"

    (batch,) = load_batches(save(png, png), folders=[vision])
    torch.testing.assert_close(batch["pixel_values"], torch.ones(2, 3, 4, 4))
    with pytest.raises(DataError, match=r"saved, row 1: cannot be read as an image"):
        load_batches(save(png, b"broken"), folders=[vision])


def test_a_dataset_of_splits_needs_train(datasets, tmp_path, bare):
    split = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict(train=split).save_to_disk(tmp_path / "one")
    assert rows(load_batches(tmp_path / "one", folders=[bare])) == [[A]]
    datasets.DatasetDict(test=split, dev=split).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match=r"two: found the splits test, dev; name the folder of one of them"):
        load_batches(tmp_path / "two", folders=[bare])
    assert rows(load_batches(tmp_path / "two" / "dev", folders=[bare])) == [[A]]


def test_a_folder_of_parquet_files_is_a_dataset_in_spite_of_a_picture(datasets, tmp_path, bare):
    datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(tmp_path / "tables" / "train.parquet")
    save_image(tmp_path / "tables" / "card.png", (0, 0, 0))
    assert sorted(rows(load_batches(tmp_path / "tables", folders=[bare]))) == [[A], [A + 1]]
    (tmp_path / "tables" / "train.parquet").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"tables/train.parquet: cannot be read as a parquet file"):
        load_batches(tmp_path / "tables", folders=[bare])


def test_a_dataset_without_rows_is_named(datasets, tmp_path, bare):
    datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / "tables" / "train.parquet")
    with pytest.raises(DataError, match=r"tables: cannot be read with the split 'train'.* no data"):
        load_batches(tmp_path / "tables", folders=[bare])


@pytest.mark.parametrize(("suffix", "split"), [("", "train"), (":test", "test")])
def test_a_hub_id_is_loaded_with_its_split(datasets, monkeypatch, bare, suffix, split):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert rows(load_batches(f"org/name-1.5{suffix}", folders=[bare])) == [[A]]
    assert asked == [("org/name-1.5", split)]


def test_what_exists_wins_over_a_hub_id(tmp_path, monkeypatch, bare):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "data.jsonl").write_text('{"text": "a"}')
    assert rows(load_batches("org/data.jsonl", folders=[bare])) == [[A]]


def test_an_unreachable_hub_dataset_says_that_nothing_is_on_disk(datasets, monkeypatch, bare):
    def load_dataset(name, split):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"org/name: no such file or folder, and as a hub id .*no network"):
        load_batches("org/name", folders=[bare])


def test_unusable_columns_and_rows_are_named(save_dataset, bare):
    with pytest.raises(DataError, match=r"saved: found the columns question, prompt; expected text; prompt, comp"):
        load_batches(save_dataset(question=["a"], prompt=["b"]), folders=[bare])
    with pytest.raises(DataError, match=r"saved, row 0, text: found NoneType; expected a string"):
        load_batches(save_dataset(text=[None]), folders=[bare])


def test_missing_datasets_library_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "data.parquet").touch()
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in (tmp_path, "org/name"):
        with pytest.raises(DataError, match=f"{source}: cannot be read without datasets; pip install datasets"):
            load_batches(source, folders=[])
