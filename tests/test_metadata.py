"""What index and safetensors files say of themselves goes with the model, as far as it stays true, within bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import featcal_fast as ff
from featcal_fast.checkpoints import Checkpoint
from featcal_fast.job.check import check


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return pico.save(pico.job("llama", 1, layers=1), tmp_path)


def shards_of(folder: Path, weights: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    """As mergekit writes them."""
    (folder / "model.safetensors").unlink()
    file = "model-00001-of-00001.safetensors"
    save_file(weights, folder / file, metadata={"format": "pt", "by": "mergekit", "sshs_model_hash": "0"})
    index = {"metadata": metadata, "weight_map": dict.fromkeys(weights, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_what_files_say_of_themselves_is_kept(recipe: dict[str, Any], tmp_path: Path) -> None:
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    total = sum(value.nbytes for value in weights.values())
    metadata = {"total_size": 7, "mergekit_version": "0.1.5", "a": None, "b": 1.5, "list": [1], "file_sha256": "x"}
    shards_of(tmp_path / "merged", weights, metadata)
    ff.calibrate(recipe)
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"mergekit_version": "0.1.5", "a": None, "b": 1.5, "total_size": total}
    with safe_open(out / "model-00001-of-00001.safetensors", "pt") as opened:
        assert opened.metadata() == {"by": "mergekit", "format": "pt"}
    assert check(out).whole


def test_an_index_beside_one_file_is_kept_too(recipe: dict[str, Any], tmp_path: Path) -> None:
    index = {"metadata": {"mergekit_version": "0.1.5"}, "weight_map": {"stale": "gone.safetensors"}}
    (tmp_path / "merged" / "model.safetensors.index.json").write_text(json.dumps(index))
    ff.calibrate(recipe)
    found = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert found["metadata"]["mergekit_version"] == "0.1.5"
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert found["weight_map"] == dict.fromkeys(sorted(weights), "model.safetensors")


@pytest.mark.parametrize(
    "metadata",
    [7, None, ["a"], {"a": "x" * 2**17}, {str(number): 1 for number in range(200)}, {"half": "\ud800"}],
)
def test_metadata_that_nobody_writes_is_dropped(metadata: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    shards_of(tmp_path / "merged", load_file(tmp_path / "merged" / "model.safetensors"), metadata)
    assert Checkpoint(tmp_path / "merged", "merged model").metadata().index == {}


@pytest.mark.parametrize("text", ["[", "[]", "{}", '{"metadata": {"a": NaN}}'])
def test_an_index_that_is_not_used_may_be_anything(text: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "merged" / "model.safetensors.index.json").write_text(text)
    assert not Checkpoint(tmp_path / "merged", "merged model").metadata().index
