"""What real models and data hold is taken, however odd: bounds are for what hurts, and warnings for what is wrong."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pico
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from data_files import rows, save_image
from PIL import Image
from safetensors.torch import save_file

import featcal_fast as ff
from featcal_fast.checkpoints.config import transformers_config
from featcal_fast.data import texts
from featcal_fast.data.batches import load_batches
from featcal_fast.data.checks import Limits
from featcal_fast.models.configs import differences

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA = {"max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "rope_type": "llama3"}}
SAME: dict[str, tuple[str, dict[str, object], dict[str, object]]] = {
    "the kind of angles under both names": (
        "llama",
        LLAMA,
        {**LLAMA, "rope_scaling": {**LLAMA3, "rope_type": "llama3", "type": "llama3"}},
    ),
    "angles of Llama 3, shorter": ("llama", LLAMA, {**LLAMA, "max_position_embeddings": 8192}),
    "stretched angles, shorter": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "max_position_embeddings": 16384},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "max_position_embeddings": 4096},
    ),
    "angles that are not stretched": ("llama", {}, {"rope_scaling": {"type": "default"}}),
    "a head's width written out": ("mixtral", {}, {"head_dim": 128}),
    "a layer's width written out": ("gpt2", {}, {"n_inner": 3072}),
    "a head that is trained without its cap": ("gemma2", {}, {"final_logit_softcapping": None}),
    "more kinds of token": ("roberta", {"type_vocab_size": 1}, {"type_vocab_size": 2}),
}


@pytest.mark.parametrize(("kind", "one", "other"), SAME.values(), ids=SAME.keys())
def test_what_fine_tuning_leaves_in_a_config_is_no_difference(kind: str, one: dict, other: dict) -> None:
    found, expected = (
        transformers_config({"model_type": kind, **values}, Path("config.json"), "expert") for values in (one, other)
    )
    assert differences(found, expected) == []
    assert differences(expected, found) == []


def test_angles_that_depend_on_the_longest_sequence_are_still_compared() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
    one, other, third = (
        transformers_config({"model_type": "llama", **LLAMA, **change}, Path("config.json"), "expert")
        for change in (
            {"rope_scaling": yarn},
            {"rope_scaling": yarn, "max_position_embeddings": 8192},
            {"rope_scaling": {**LLAMA3, "rope_type": "llama3", "original_max_position_embeddings": 4096}},
        )
    )
    plain = transformers_config({"model_type": "llama", **LLAMA}, Path("config.json"), "expert")
    for found, expected in ((one, other), (one, plain), (third, plain)):
        assert differences(found, expected)


@pytest.mark.parametrize("kind", ["swin", "segformer", "dpr", "gemma3n_text", "gemma4_text", "lxmert", "blt"])
def test_sizes_that_a_class_has_itself_are_in_range(kind: str) -> None:
    """Of stages or layers, one each; none at all; of a vocabulary for each layer."""
    values = json.loads(transformers.CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
    assert transformers_config(values, Path("config.json"), "expert").model_type == kind


def test_pictures_are_what_a_camera_or_a_data_set_has(tmp_path: Path, vision: Path) -> None:
    """50 million pixels, as telephones take; a GIF that is called .jpg, as some of Oxford-IIIT Pet are."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("1", (8160, 6144), 1).save(folder / "a.png")
    Image.new("P", (8, 8)).save(folder / "b.jpg", "GIF")
    save_image(folder / "c.png", (1, 2, 3))
    (batch,) = load_batches(folder, folders=[vision])
    assert batch["pixel_values"].shape == (3, 3, 4, 4)


def test_of_a_book_the_beginning_counts(tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "LONGEST_TEXT", 100)
    found = []
    for count in (20, 5000):
        (tmp_path / "data.jsonl").write_text(json.dumps({"text": " b a" * count}) + "\n")
        found.append(rows(load_batches(tmp_path / "data.jsonl", folders=[plain], max_length=12)))
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.int32], ids=str)
def test_token_ids_may_be_unsigned(tmp_path: Path, dtype: torch.dtype) -> None:
    """As they are kept where a vocabulary has less than 65,536."""
    save_file({"input_ids": torch.tensor([[3, 2**15 + 1]]).to(dtype)}, tmp_path / "ids.safetensors")
    (batch,) = load_batches(tmp_path / "ids.safetensors", folders=[], limits=Limits(vocab_size=2**16))
    assert batch["input_ids"].tolist() == [[3, 2**15 + 1]]


def test_a_column_of_few_long_values_is_small(tmp_path: Path, plain: Path) -> None:
    """Its dictionary comes with every part of the table, and counts once."""
    topics = pyarrow.array([f"{number % 4000} " + "topic " * 40 for number in range(10_000)]).dictionary_encode()
    table = pyarrow.table({"text": ["a b"] * len(topics), "topic": topics})
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "data" / "a.parquet")
    assert len(rows(load_batches(tmp_path / "data", folders=[plain], samples=8))) == 8


def test_a_card_may_describe_its_data(tmp_path: Path, plain: Path) -> None:
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a b"]}), tmp_path / "data" / "train-0.parquet")
    (tmp_path / "data" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  description: See https://example.org, and more ...\n"
        "  data_files:\n  - split: train\n    path: train-*\n---\nA card.\n"
    )
    assert len(rows(load_batches(tmp_path / "data", folders=[plain]))) == 1


def test_a_whole_clip_model_is_nothing_to_warn_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text tower, as large as what is calibrated, keeps its values: that is what the family is."""
    towers = {**pico.TOWERS, "text_config": {**pico.TOWERS["text_config"], "num_hidden_layers": 2}}
    monkeypatch.setitem(pico.KINDS, "clip whole", partial(pico._model, "CLIPModel", "CLIPConfig", towers))
    job = pico.job("clip whole", 1)
    report = ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)
    assert report.calibrated < len(report.kept)
    assert report.warnings == []
