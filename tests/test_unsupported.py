"""What is not supported is an architecture, and that is what the error names, whatever else goes with it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pico
import pytest
import torch
import transformers
from safetensors.torch import save_file

import featcal_fast as ff
from featcal_fast.checkpoints import Checkpoint
from featcal_fast.checkpoints.shards import SINGLE, TensorInfo
from featcal_fast.checkpoints.writer import make_header
from featcal_fast.inputs.task_data import describe
from featcal_fast.models.configs import image_shape, image_tokens
from featcal_fast.models.meta import check_supported

LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 16}
TEXT = {**LAYERS, "intermediate_size": 16, "vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IDS = {"input_ids": torch.ones(2, 8, dtype=torch.long), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
PIXELS = {"pixel_values": torch.zeros(2, 3, 16, 16)}
PER_LAYER = {
    "activation_sparsity_pattern": [0.0],
    "vocab_size_per_layer_input": 32,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "head_dim": 8,
}
BOXES = {"coordinate_size": 2, "shape_size": 4, "max_2d_position_embeddings": 32, "input_size": 16, "patch_size": 8}
# A class, its config and values of that, data: each was blamed for something else.
CASES = {
    "other modules": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT, IDS),
    "a stream for each of four": (
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {
            **TEXT,
            **PER_LAYER,
            "layer_types": ["full_attention"],
            "num_kv_shared_layers": 0,
        },
        IDS,
    ),
    "experts of another kind": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**TEXT, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "layer_types": ["full_attention"]},
        IDS,
    ),
    "a convolution in a block": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {**TEXT, "layer_types": ["linear_attention"], "num_experts": 2, "num_experts_per_tok": 1, "head_dim": 8},
        IDS,
    ),
    "targets asked for": ("BartForConditionalGeneration", "BartConfig", {"d_model": 16, "vocab_size": 32}, IDS),
    "a number that JSON has not": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {"num_hidden_layers": 1, "vocab_size": 32},
        IDS,
    ),
    "weights of modules that are not called": (
        "LayoutLMv3Model",
        "LayoutLMv3Config",
        {**{key: TEXT[key] for key in TEXT if "key_value" not in key}, **BOXES},
        IDS | {"bbox": torch.ones(2, 8, 4, dtype=torch.long)},
    ),
    "stages": ("SwinModel", "SwinConfig", {"depths": [1, 1], "num_heads": [2, 2], "embed_dim": 16}, PIXELS),
}


def write_empty(folder: Path, model: transformers.PreTrainedModel) -> None:
    """A checkpoint of a model on the meta device, whose weights take no room on the disk."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    names = {id(value): name for name, value in reversed(list(model.state_dict(keep_vars=True).items()))}
    state = model.state_dict()
    infos = {name: TensorInfo(SINGLE, tuple(state[name].shape), torch.float32) for name in names.values()}
    data, _, size = make_header(infos, {})
    with (folder / SINGLE).open("wb") as file:
        file.write(data)
        file.truncate(size)


@pytest.mark.parametrize("case", CASES)
def test_the_error_names_the_architecture(case: str, tmp_path: Path) -> None:
    cls, config, values, data = CASES[case]
    if not hasattr(transformers, cls):
        pytest.skip("this version of transformers has no such model")
    with torch.device("meta"):
        model = getattr(transformers, cls)(getattr(transformers, config)(**values))
    for role in ("base", "merged", "expert"):
        write_empty(tmp_path / role, model)
    save_file(data, tmp_path / "data.safetensors")
    recipe = {
        "base_model": str(tmp_path / "base"),
        "merged_model": str(tmp_path / "merged"),
        "experts": {"task": {"model": str(tmp_path / "expert"), "data": str(tmp_path / "data.safetensors")}},
    }
    message = f"merged model: found a {cls}, expected one of the families that can be calibrated: .* is not supported"
    with pytest.raises(ff.FeatCalError, match=message):
        ff.plan(recipe, device="cpu")


def test_a_library_that_no_family_needs_is_not_asked_for(tmp_path: Path) -> None:
    pico.llama(1).save_pretrained(tmp_path)

    def build(*_: object) -> None:
        raise ImportError("TimmWrapperModel requires the timm library")

    with patch.object(transformers.LlamaForCausalLM, "__init__", build):
        message = "found a LlamaForCausalLM, .* is not supported: it needs what is not installed .*timm"
        with pytest.raises(ff.FeatCalError, match=message):
            check_supported(Checkpoint(tmp_path, "model"))


def test_a_config_that_cannot_be_used_is_told_with_its_architecture(tmp_path: Path) -> None:
    pico.llama(1).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for key, value in (("head_dim", 0), ("id2label", {"a": "b"})):
        path.write_text(json.dumps({**config, key: value}))
        with pytest.raises(ff.FeatCalError, match=r"it describes \['LlamaForCausalLM'\]"):
            _ = Checkpoint(tmp_path, "model").config


@pytest.mark.parametrize(
    ("size", "patch", "channels", "shape", "tokens"),
    [
        (16, 4, 3, (3, 16, 16), 17),
        ([16, 24], [4, 2], 1, (1, 16, 24), 49),
        ([16], (4,), None, (3, 16, 16), 17),
        ((16, 24), None, 3, (3, 16, 24), 2),
        (None, 4, 3, None, 0),
        ([], 4, 3, None, 0),
    ],
)
def test_sizes_of_images_are_numbers_or_lists(
    size: object, patch: object, channels: object, shape: object, tokens: int
) -> None:
    config = SimpleNamespace(image_size=size, patch_size=patch, num_channels=channels)
    for each in (config, SimpleNamespace(vision_config=config)):
        assert image_shape(each) == shape
        assert image_tokens(each) == tokens


def test_images_that_are_not_square_are_run_in_batches_of_full_size(tmp_path: Path) -> None:
    config = transformers.ViTConfig(image_size=[16, 24], patch_size=[4, 2], num_channels=1)
    images = pytest.importorskip("PIL.Image")
    images.new("L", (24, 16)).save(tmp_path / "image.png")
    found = describe(tmp_path, config, torch.device("cpu"), 1000, 64, None)
    assert found.example["pixel_values"].shape == (1, 1, 16, 24)
    (form,) = [describe("org/images", config, torch.device("cpu"), 1000, 64, None).example["pixel_values"].shape]
    assert form == (2048 // 49, 1, 16, 24)
