"""Values of `config.json` that would hurt whoever trusts them, and those that change what a model computes."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import featcal_fast as ff
from featcal_fast.checkpoints import find_checkpoint
from featcal_fast.data.batches import load_batches
from featcal_fast.data.checks import Limits
from featcal_fast.models.configs import differences, max_positions
from featcal_fast.models.meta import meta_model

KINDS = ("llama", "gpt2", "clip", "bert")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("saved")
    for kind in KINDS:
        pico.KINDS[kind]().save_pretrained(root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture
def open_with(saved: dict[str, Path], tmp_path: Path) -> Callable[..., object]:
    """Builds a model whose `config.json` has other values."""

    def build(kind: str, **changes: object) -> object:
        folder = tmp_path / kind
        folder.mkdir()
        os.link(saved[kind] / "model.safetensors", folder / "model.safetensors")
        values = json.loads((saved[kind] / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **changes}))
        return meta_model(find_checkpoint(str(folder), tmp_path, "expert math"), torch.device("cpu"))

    return build


CODE = "models with code of their own .*cannot be calibrated"
HUGE = 10**12
REFUSED: list[tuple[str, dict[str, object], str]] = [
    ("llama", {"architectures": 5}, "architectures: found 5, expected a list of class names"),
    ("llama", {"architectures": {"a": 1}}, "architectures: found {'a': 1}, expected"),
    ("llama", {"architectures": ["pipeline"]}, r"architectures: found \['pipeline'\], expected a list of class"),
    ("llama", {"architectures": ["__init__"]}, r"architectures: found \['__init__'\], expected a list of class"),
    ("llama", {"architectures": ["AutoModel"]}, r"names the architectures \['AutoModel'\], expected one"),
    ("llama", {"architectures": ["PreTrainedModel"]}, r"architectures: found \['PreTrainedModel'\], expected"),
    ("llama", {"architectures": ["os.system"]}, "architectures: found"),
    ("llama", {"architectures": ["Llama\x1b[2J"]}, "architectures: found"),
    ("llama", {"architectures": []}, r"names the architectures \[\], expected one"),
    ("llama", {"architectures": ["T5ForConditionalGeneration"]}, "describes no T5ForConditionalGeneration"),
    ("llama", {"model_type": 5}, "found model_type 5, expected one that transformers"),
    ("llama", {"model_type": ["llama"]}, "found model_type"),
    ("llama", {"model_type": "\x1b[31mx"}, "found model_type"),
    ("llama", {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, CODE),
    ("llama", {"architectures": ["OwnModel"], "auto_map": {"AutoModel": "own.Model"}}, CODE),
    ("llama", {"num_hidden_layers": 10**6}, "num_hidden_layers.*: found 1000000, expected at most"),
    ("llama", {"num_hidden_layers": 60_000}, "it has more than 1120 parameters, but the weights hold 30 tensors"),
    ("llama", {"num_hidden_layers": -1}, "num_hidden_layers: found -1, expected an integer above 0"),
    ("llama", {"num_hidden_layers": 3.5}, "num_hidden_layers: found 3.5, expected an integer above 0"),
    ("llama", {"hidden_size": HUGE}, r"describes (a|no) LlamaForCausalLM that can(not)? be built"),
    ("llama", {"hidden_size": 10**6}, "cannot be built: it takes more than .* GiB of memory"),
    ("llama", {"hidden_size": 16_384}, "it has .* values or more, but the weights hold"),
    ("llama", {"hidden_size": "64"}, "hidden_size: found '64', expected an integer above 0"),
    ("llama", {"hidden_size": True}, "hidden_size: found True, expected an integer above 0"),
    ("llama", {"hidden_size": 10**30}, "hidden_size: found 1000000000000000000000000000000, expected"),
    ("llama", {"intermediate_size": [1]}, "(cannot be used: .*intermediate_size|describes no LlamaForCausalLM)"),
    ("llama", {"vocab_size": HUGE}, r"describes (a|no) LlamaForCausalLM that can(not)? be built"),
    ("llama", {"num_attention_heads": 0}, "num_attention_heads: found 0, expected an integer above 0"),
    ("llama", {"num_attention_heads": HUGE}, "num_attention_heads.*: found 1000000000000, expected at most"),
    ("llama", {"num_key_value_heads": 0}, "num_key_value_heads: found 0, expected an integer above 0"),
    ("llama", {"max_position_embeddings": -5}, "max_position_embeddings: found -5, expected an integer above 0"),
    ("llama", {"max_position_embeddings": "many"}, "max_position_embeddings: found 'many', expected"),
    ("llama", {"rms_norm_eps": -1e-5}, "rms_norm_eps: found -1e-05, expected a number from 0 to 1"),
    ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps: found 'small', expected a number from 0 to 1"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
        "(inv_freq is not finite|cannot be used)",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": -1.5}},
        "(inv_freq is not fini|cannot be used)",
    ),
    ("llama", {"hidden_act": "none"}, "describes no LlamaForCausalLM that can be built: KeyError"),
    ("llama", {"dtype": "load"}, "dtype: found 'load', expected the name of a dtype"),
    ("llama", {"torch_dtype": 5}, "dtype: found 5, expected the name of a dtype"),
    ("llama", {"num_labels": 10**9}, "num_labels.*: found 1000000000, expected at most"),
    ("llama", {"id2label": {"a": "b"}}, "cannot be used: ValueError"),
    ("llama", {"to_json_string": 5}, "'to_json_string': found a value in place of what transformers' own code does"),
    ("llama", {"from_dict": 5}, "'from_dict': found a value in place"),
    ("llama", {"attribute_map": {"hidden_size": "x"}}, "'attribute_map': found a value in place"),
    ("llama", {"__class__": "x"}, "'__class__': found a value in place"),
    ("gpt2", {"n_positions": 10**6}, r"describes (a|no) GPT2LMHeadModel that can(not)? be built"),
    ("gpt2", {"n_layer": 10**9}, "n_layer.*: found 1000000000, expected at most"),
    ("gpt2", {"n_head": 0}, "n_head: found 0, expected an integer above 0"),
    ("clip", {"image_size": HUGE}, r"describes (a|no) CLIPVisionModel that can(not)? be built"),
    ("clip", {"image_size": -16}, "image_size: found -16, expected an integer above 0"),
    ("clip", {"patch_size": 0}, "patch_size: found 0, expected an integer above 0"),
    ("clip", {"num_channels": 10**9}, r"describes (a|no) CLIPVisionModel that can(not)? be built"),
    ("bert", {"max_position_embeddings": 10**9}, r"describes (a|no) BertModel that can(not)? be built"),
    ("bert", {"layer_norm_eps": 2}, "layer_norm_eps: found 2, expected a number from 0 to 1"),
    ("bert", {"hidden_dropout_prob": 5}, r"describes (a|no) BertModel that can(not)? be built"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_value_that_no_model_has_is_refused_at_once(
    kind: str, changes: dict, message: str, open_with: Callable[..., object]
) -> None:
    """Without memory or time that the weights do not account for."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    started, before = time.process_time(), _peak()
    with pytest.raises(ff.FeatCalError, match=rf"expert math: .*config.json.*{message}") as error:
        open_with(kind, **changes)
    assert time.process_time() - started < 5  # seconds of this process, and its imports
    assert _peak() - before < 300 * 2**20
    assert len(str(error.value)) < 900
    assert "trust_remote_code" not in str(error.value)


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def test_a_model_that_counts_without_an_end_is_given_up(
    open_with: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is that a model's code counts up to."""
    from transformers import LlamaForCausalLM

    def counting(self, config: object) -> None:
        while True:
            pass

    monkeypatch.setattr(LlamaForCausalLM, "__init__", counting)
    with pytest.raises(
        ff.FeatCalError, match="describes a LlamaForCausalLM that cannot be built: it takes longer than"
    ):
        open_with("llama", rms_norm_eps=0.5)  # a model that was not built before


def test_values_that_lead_elsewhere_are_not_followed(open_with: Callable[..., object], tmp_path: Path) -> None:
    """Neither to files, nor to the hub, nor to code; they do not change a model."""
    (tmp_path / "config.4.0.0.json").write_text("{}")
    elsewhere = {
        "_name_or_path": "/etc/passwd",
        "configuration_files": ["../config.4.0.0.json"],
        "auto_map": {"AutoConfig": "org/code--own.Config", "AutoModelForCausalLM": "own.Model"},
        "attn_implementation": "org/kernel",
        "_attn_implementation": "flash_attention_2",
        "experts_implementation": "org/kernel:own",
    }
    model, _ = open_with("llama", **elsewhere)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config._attn_implementation == pico.llama().config._attn_implementation
    assert model.config._name_or_path == ""


@pytest.mark.parametrize("kind", sorted(pico.KINDS))
def test_a_config_is_as_transformers_reads_it(kind: str, tmp_path: Path) -> None:
    pico.KINDS[kind]().save_pretrained(tmp_path / "model")
    found = find_checkpoint("model", tmp_path, "model").config
    expected = AutoConfig.from_pretrained(tmp_path / "model")
    expected._name_or_path = found._name_or_path
    assert type(found) is type(expected)
    assert found.to_dict() == expected.to_dict()


# What changes a forward


CHANGES: dict[str, list[dict[str, object]]] = {
    "llama": [
        {"num_attention_heads": 8, "head_dim": 8, "num_key_value_heads": 4},
        {"hidden_act": "gelu"},
        {"rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ],
    "mistral": [{"sliding_window": 5}],
    "qwen3": [
        {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True, "sliding_window": 4}
    ],
    "gemma2": [{"attn_logit_softcapping": 5.0}, {"query_pre_attn_scalar": 4}, {"hidden_activation": "relu"}],
    "qwen2-moe": [{"norm_topk_prob": True}, {"num_experts_per_tok": 1}],
    "gpt2": [{"scale_attn_by_inverse_layer_idx": True}, {"activation_function": "relu"}, {"n_head": 2}],
    "t5": [{"relative_attention_max_distance": 7}, {"decoder_start_token_id": 3}, {"feed_forward_proj": "gelu"}],
    "clip": [{"hidden_act": "gelu"}, {"layer_norm_eps": 1e-3}],
    "bert": [{"is_decoder": True}],
    "roberta": [{"pad_token_id": 2}],
}


@pytest.mark.parametrize(
    ("kind", "change"), [(kind, change) for kind, changes in CHANGES.items() for change in changes], ids=str
)
def test_what_changes_a_forward_is_told(kind: str, change: dict, tmp_path: Path) -> None:
    plain = pico.KINDS[kind]().config
    other = type(plain)(**{**plain.to_dict(), **change})
    told = differences(other, plain)
    keys = {"rope_parameters.rope_theta" if "rope" in key else key for key in change if key != "use_sliding_window"}
    assert any(text.startswith(tuple(keys | {"rope_parameters"})) for text in told)
    assert all("found" in text and "expected" in text for text in told)


@pytest.mark.parametrize("kind", sorted(pico.KINDS))
def test_what_changes_no_forward_may_differ(kind: str) -> None:
    plain = pico.KINDS[kind]().config
    other = copy.deepcopy(plain)
    harmless: dict[str, object] = {
        "dtype": torch.bfloat16,
        "architectures": ["Own"],
        "use_cache": False,
        "hidden_dropout_prob": 0.3,
        "attention_dropout": 0.2,
        "initializer_range": 0.5,
        "id2label": {0: "a", 1: "b", 2: "c"},
        "problem_type": "regression",
        "eos_token_id": 9,
        "vocab_size": 128,
        "max_position_embeddings": 90,
        "quantization_config": {"quant_method": "bitsandbytes"},
        "unsloth_version": "1.2.3",
        "transformers_version": "5.0.0",
        "_name_or_path": "org/expert",
    }
    for key, value in harmless.items():
        setattr(other, key, value)
    assert differences(other, plain) == []


def test_older_versions_write_other_keys(tmp_path: Path) -> None:
    """The same model as transformers 4 wrote it."""
    pico.llama().save_pretrained(tmp_path / "new")
    values = json.loads((tmp_path / "new" / "config.json").read_text())
    for key in ("rope_parameters", "head_dim", "dtype", "mlp_bias", "pretraining_tp", "attention_bias"):
        values.pop(key, None)
    values |= {
        "torch_dtype": "float32",
        "rope_scaling": None,
        "rope_theta": 10000,
        "rms_norm_eps": 9.999999974752427e-07,
    }
    (tmp_path / "old").mkdir()
    os.link(tmp_path / "new" / "model.safetensors", tmp_path / "old" / "model.safetensors")
    (tmp_path / "old" / "config.json").write_text(json.dumps(values))
    found, expected = (find_checkpoint(name, tmp_path, name).config for name in ("old", "new"))
    assert differences(found, expected) == []


def test_all_models_of_a_job_must_compute_alike(tmp_path: Path) -> None:
    """`plan` says so as `calibrate` does, on disk and in memory."""
    job = pico.job("llama", 2)
    recipe = pico.save(job, tmp_path)
    path = tmp_path / "task1" / "config.json"
    changes = {"hidden_act": "gelu", "num_key_value_heads": 2, "rms_norm_eps": 0.25}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    message = (
        r"expert task1: .*task1/config.json differs from that of the merged model: hidden_act "
        r"\(found 'gelu', expected 'silu'\), rms_norm_eps \(found 0.25, expected 1e-06\); they would"
    )
    for run in (ff.plan, ff.calibrate):
        with pytest.raises(ff.FeatCalError, match=message):
            run(recipe)
    job.base.config.hidden_act = "gelu"
    with pytest.raises(ff.FeatCalError, match=r"base model: its config differs .*hidden_act \(found 'gelu'"):
        ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)


def test_models_in_memory_may_have_no_config() -> None:
    job = pico.job("clip", 1)
    job.base.config.hidden_act = "gelu"
    del job.base.config
    ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)


def test_positions_of_roberta_start_after_its_padding(tmp_path: Path) -> None:
    model = pico.KINDS["roberta"]()
    assert max_positions(model.config) == 64
    ids = torch.randint(3, 100, (1, 65))
    model(input_ids=ids[:, :64])
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(input_ids=ids)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    with pytest.raises(ff.FeatCalError, match="found 65 tokens, expected at most 64"):
        load_batches(tmp_path / "ids.safetensors", folders=[], limits=Limits(max_positions(model.config)))
    assert max_positions(pico.KINDS["bert"]().config) == 64
    assert max_positions(pico.KINDS["t5"]().config) is None


def test_nothing_of_a_strangers_reaches_the_terminal(open_with: Callable[..., object], capfd) -> None:
    """As transformers would have it, which warns of such a value."""
    with pytest.raises(ff.FeatCalError, match=r"config.json"):
        open_with("llama", rope_parameters={"rope_type": "\x1b[2Jx" * 99, "rope_theta": 10000.0})
    told = capfd.readouterr()
    assert "\x1b[2J" not in told.out + told.err


def test_weights_of_far_more_than_the_model_are_refused(open_with: Callable[..., object], tmp_path: Path) -> None:
    open_with("llama")
    tensors = load_file(tmp_path / "llama" / "model.safetensors")
    tensors |= {f"model.extra.{number}": torch.zeros(0) for number in range(1200)}
    (tmp_path / "llama" / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "llama" / "model.safetensors")
    with pytest.raises(ff.FeatCalError, match=r"1200 of 1230 tensors \(model.extra.0 among them\) belong to no module"):
        meta_model(find_checkpoint("llama", tmp_path, "expert math"), torch.device("cpu"))
