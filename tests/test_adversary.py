"""What an adversary found: messages of libraries, tokenizers that blow a text up, links to nothing, odd tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from data_files import save_image, save_tokenizer
from safetensors.torch import load_file, save_file

import featcal_fast as ff
from featcal_fast.data.batches import load_batches
from featcal_fast.errors import DataError, FeatCalError, told

TALL = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def llama(tmp_path: Path) -> dict[str, Any]:
    """A job on disk, of one layer."""
    job = pico.job("llama", 1, layers=1)
    job.batches = {task: batches[:1] for task, batches in job.batches.items()}
    return pico.save(job, tmp_path)


def refused(recipe: dict[str, Any], *needles: str) -> str:
    """By plan and calibrate alike, in one line that has all of them."""
    found = []
    for call in (ff.plan, ff.calibrate):
        with pytest.raises(FeatCalError) as error:
            call(recipe, device="cpu")
        found.append(str(error.value))
    assert found[0] == found[1]
    assert "\n" not in found[0]
    assert all(needle in found[0] for needle in needles), found[0]
    return found[0]


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_message_is_one_line() -> None:
    assert str(FeatCalError("a name\nwith a line feed")) == r"a name\nwith a line feed"
    assert told(ValueError("several\n  lines\n")) == "ValueError: several lines"
    assert told(KeyError()) == "KeyError"
    assert len(told(ValueError("word " * 1000))) < 450


@pytest.mark.parametrize(
    ("key", "value"), [("rms_norm_eps", None), ("initializer_range", "x"), ("num_attention_heads", 3)]
)
def test_what_transformers_says_in_several_lines(
    llama: dict[str, Any], tmp_path: Path, key: str, value: object
) -> None:
    edit(tmp_path / "merged" / "config.json", **{key: value})
    assert r"\n" not in refused(llama, "merged/config.json", "rror for ")


def test_what_yaml_says_in_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: !!python/name:os.system\n")
    with pytest.raises(FeatCalError, match=r"is not valid YAML: could not determine a constructor.*line 1") as error:
        ff.plan(path)
    assert r"\n" not in str(error.value)


def test_a_tensor_that_is_missing_is_told_with_its_folder(llama: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "task0" / "model.safetensors"
    tensors = load_file(path)
    del tensors[TALL]
    save_file(tensors, path)
    refused(llama, f"expert task0: {tmp_path / 'task0'}: tensor {TALL} is missing")


def test_an_operation_that_fails_while_a_plan_is_made_is_the_models(llama: dict[str, Any], tmp_path: Path) -> None:
    """The meter that a plan runs a layer under is no one else's fault."""
    save_file({"inputs_embeds": torch.ones(4, 5, 63)}, tmp_path / "task0.safetensors")
    refused(llama, "merged model, model.layers.0: running its layer on batch 0, samples 0 to 3 of task task0", "63")


def test_weights_whose_squares_leave_float32(llama: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors[TALL] *= 1e19
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        FeatCalError, match=r"model.layers.0: .*change of the weights, leaves float32's range.*base model"
    ):
        ff.calibrate(llama, device="cpu")


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Prepend", "prepend": "a " * 10**6},
        {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40,
        },
    ],
    ids=["prepend", "double"],
)
def test_tokenizers_that_blow_a_text_up(tmp_path: Path, normalizer: dict[str, Any]) -> None:
    folder = save_tokenizer(tmp_path / "evil")
    edit(folder / "tokenizer.json", normalizer=normalizer)
    (tmp_path / "data.jsonl").write_text('{"text": "a b"}\n')
    with pytest.raises(
        DataError, match=r"evil: its tokenizer cannot be used: 64 characters of text: it takes|it makes"
    ):
        load_batches(tmp_path / "data.jsonl", folders=[folder], max_length=16)


def test_links_to_nothing_are_no_data(vision: Path, tmp_path: Path) -> None:
    recipe = pico.save(pico.job("clip", 1, layers=1), tmp_path)
    config = json.loads((vision / "preprocessor_config.json").read_text())
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    (tmp_path / "merged" / "preprocessor_config.json").write_text(json.dumps({**config, **sizes}))
    save_image(tmp_path / "images" / "a.png", "red")
    (tmp_path / "images" / "b.png").symlink_to("nowhere")
    recipe["experts"]["task0"]["data"] = str(tmp_path / "images")
    ff.plan(recipe, device="cpu")
    assert ff.calibrate(recipe, device="cpu").tokens == {"task0": 17}


def test_what_is_no_image_is_told_without_an_object_of_ours(vision: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"GIF99")
    with pytest.raises(DataError, match=r"a.png: cannot be read as an image .*\(it is none of them\)$"):
        load_batches(tmp_path / "images", folders=[vision])


def test_a_broken_table_is_named_and_nothing_else_said(tmp_path: Path, plain: Path, caplog: Any) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "a.parquet").write_bytes(b"PAR1 \x1b[2J PAR1")
    with pytest.raises(DataError, match=r"tables/a.parquet: cannot be read as a parquet file"):
        load_batches(tmp_path / "tables", folders=[plain])
    assert not caplog.records


ODD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "meta": lambda ids: ids.to("meta"),
    "sparse": torch.Tensor.to_sparse,
    "nested": lambda ids: torch.nested.as_nested_tensor(list(ids), layout=torch.jagged),
}


@pytest.mark.parametrize("kind", ODD)
def test_batches_that_hold_no_values(kind: str) -> None:
    job = pico.job("llama", 1, layers=1)
    batches = {"task0": [{"input_ids": ODD[kind](job.batches["task0"][0]["input_ids"])}]}
    with pytest.raises(
        DataError, match=r"task task0, batch 0, input_ids: found a tensor that is nested, sparse or meta"
    ):
        ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=batches)


def test_models_that_hold_no_values() -> None:
    job = pico.job("llama", 1, layers=1)
    job.experts["task0"].to("meta")
    with pytest.raises(FeatCalError, match=r"expert task0: block 0, \S+ is on the meta device, without values"):
        ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)
