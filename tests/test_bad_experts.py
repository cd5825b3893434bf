"""Bad experts: an error that names file and tensor, before any compute, and nothing is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch
from forms import FORMS, expert_at, factors, quantised, write_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor

import featcal_fast as ff
from featcal_fast.checkpoints import Checkpoint


@pytest.fixture
def recipe(tmp_path: Path) -> dict:
    return pico.save(pico.job("llama", 2), tmp_path)


def _adapter(root: Path, change: Callable[[dict], None] = lambda tensors: None, **config: object) -> Path:
    tensors = factors(load_file(root / "base" / "model.safetensors"))
    change(tensors)
    return write_adapter(root / "adapter", tensors, **config)


def _four_bit(root: Path, change: Callable[[dict], None]) -> Path:
    folder = quantised(root / "task1", root / "quantised", FORMS["nf4-double"], root / "before")
    _edit(folder, change)
    return folder


def _edit(folder: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _declared(root: Path, method: str, name: str, tensor: Tensor) -> Path:
    """An expert that says it is quantised by `method`, with a tensor of that method."""
    folder = root / "task1"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    _edit(folder, lambda weights: weights.update({name: tensor}))
    return folder


Q0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
BROKEN = {
    "missing factor": (
        lambda root: _adapter(root, lambda t: t.pop(f"{Q1}.lora_B.weight")),
        rf"adapter_model.safetensors: tensor base_model.model.{Q1}.lora_A.weight is there, but its factor lora_B",
    ),
    "missing layer": (
        lambda root: _adapter(root, lambda t: [t.pop(f"{Q1}.lora_{f}.weight") for f in "AB"]),
        rf"adapter_model.safetensors has no lora_A and lora_B for {Q1}",
    ),
    "missing target": (
        lambda root: _adapter(root, target_modules=["q_proj", "o_proj"]),
        r"has no lora_A and lora_B for model.layers.0.self_attn.o_proj, which adapter_config.json says is adapted",
    ),
    "missing target of an expression": (
        lambda root: _adapter(root, target_modules=r".*\.[qo]_proj"),
        r"has no lora_A and lora_B for model.layers.0.self_attn.o_proj",
    ),
    "missing layer of some": (
        lambda root: _adapter(root, lambda t: _only(t, layer=1), layers_to_transform=[1, 2]),
        r"has no lora_A and lora_B for model.layers.2.self_attn.q_proj",
    ),
    "missing layer of all": (
        lambda root: _adapter(
            root, lambda t: [t.pop(f"{Q1}.lora_{f}.weight") for f in "AB"], target_modules="all-linear"
        ),
        rf"has no lora_A and lora_B for {Q1}",
    ),
    "missing saved module": (
        lambda root: _adapter(root, modules_to_save=["lm_head"]),
        r"has nothing for lm_head.weight, though adapter_config.json has lm_head among its modules_to_save",
    ),
    "no factors": (
        lambda root: _adapter(root, lambda t: t.clear()),
        r"adapter_model.safetensors holds no lora_A and lora_B; the adapter changes nothing",
    ),
    "integer factors": (
        lambda root: _adapter(root, lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 64, dtype=torch.int8)})),
        rf"tensor base_model.model.{Q0}.lora_A.weight has dtype torch.int8, expected plain floating-point factors",
    ),
    "tied output layer": (lambda root: _tied(root), r"adapts lm_head.weight, which .* shares with its embedding"),
    "another base by name": (
        lambda root: _adapter(
            root, lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 32)}), base_model_name_or_path="org/other"
        ),
        r"another base model \(adapter_config.json names org/other\)",
    ),
    **{
        f"bad {key}": (
            lambda root, key=key, value=value: _adapter(root, **{key: value}),
            rf"adapter_config.json: {key}: found .*, expected",
        )
        for key, value in {
            "lora_alpha": None,
            "r": "4",
            "rank_pattern": ["q_proj"],
            "alpha_pattern": {"(": 1},
            "target_modules": "q_(",
            "modules_to_save": "lm_head",
            "layers_to_transform": "1",
        }.items()
    },
    "another architecture": (
        lambda root: _adapter(
            root, lambda t: t.update({"model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 64)})
        ),
        r"adapter_model.safetensors: tensor \S+layers.7.mlp.up_proj.lora_A.weight is there, but .* lora_B is missing",
    ),
    "another depth": (
        lambda root: _adapter(root, lambda t: t.update({k.replace(".1.", ".7."): v.clone() for k, v in t.items()})),
        r"tensor base_model.model.model.layers.7.\S+ adapts \S+, which the base model .* has not",
    ),
    "another width": (
        lambda root: _adapter(root, lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 32)})),
        rf"tensor base_model.model.{Q0}.lora_\S+ belongs to a weight of shape \(64, 32\), .* another base model",
    ),
    "another vector": (
        lambda root: _adapter(root, lambda t: t.update({"model.norm.weight": torch.ones(32)})),
        r"tensor base_model.model.model.norm.weight has shape \(32,\), but .* another base model",
    ),
    "another rank": (
        lambda root: _adapter(root, r=8),
        r"lora_A.weight has rank 4, expected the 8 of adapter_config.json",
    ),
    "DoRA without": (lambda root: _adapter(root, use_dora=True), r"its factor lora_magnitude_vector is missing"),
    "QA-LoRA": (
        lambda root: _adapter(root, use_qalora=True),
        r"adapter_config.json: found use_qalora, which is QA-LoRA",
    ),
    "a magnitude": (
        lambda root: _adapter(root, lambda t: t.update({f"{Q0}.lora_magnitude_vector": torch.ones(64)})),
        rf"tensor base_model.model.{Q0}.lora_magnitude_vector is no part of a plain LoRA adapter",
    ),
    "IA3": (lambda root: _adapter(root, peft_type="IA3"), r"adapter_config.json: found peft_type IA3, expected LORA"),
    "PiSSA": (
        lambda root: _adapter(root, init_lora_weights="pissa_niter_4"),
        r"adapter_config.json: found init_lora_weights 'pissa_niter_4'",
    ),
    "truncated adapter": (
        lambda root: _truncated(_adapter(root), "adapter_model.safetensors"),
        r"adapter_model.safetensors is not a complete safetensors file",
    ),
    "pickled adapter": (
        lambda root: _renamed(_adapter(root), "adapter_model.safetensors", "adapter_model.bin"),
        r"adapter has only pickled weights \(adapter_model.bin\)",
    ),
    "missing scales": (
        lambda root: _four_bit(root, lambda t: t.pop(f"{Q1}.weight.nested_absmax")),
        rf"quantised: tensor {Q1}.weight.nested_absmax is missing, a part of the quantised weight {Q1}.weight",
    ),
    "missing state": (
        lambda root: _four_bit(root, lambda t: t.pop(f"{Q1}.weight.quant_state.bitsandbytes__nf4")),
        rf"model.safetensors: tensor {Q1}.weight has dtype torch.uint8, but nothing beside it says how",
    ),
    "cut codes": (
        lambda root: _four_bit(root, lambda t: t.update({f"{Q1}.weight": torch.zeros(9, 1, dtype=torch.uint8)})),
        rf"model.safetensors: tensor {Q1}.weight has 9 bytes, expected 2048",
    ),
    "broken state": (
        lambda root: _four_bit(
            root, lambda t: t.update({f"{Q1}.weight.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)})
        ),
        rf"tensor {Q1}.weight.quant_state.bitsandbytes__nf4 does not describe a quantised weight",
    ),
    "truncated shard": (
        lambda root: _truncated(_four_bit(root, lambda t: None), "model.safetensors"),
        r"quantised/model.safetensors is not a complete safetensors file",
    ),
    "GPTQ": (
        lambda root: _declared(root, "gptq", f"{Q0}.qweight", torch.zeros(8, 64, dtype=torch.int32)),
        rf"config.json says the weights are quantised \(gptq\) .*model.safetensors: tensor {Q0}.qweight among them",
    ),
    "AWQ": (
        lambda root: _declared(root, "awq", f"{Q0}.qweight", torch.zeros(64, 8, dtype=torch.int32)),
        rf"config.json says the weights are quantised \(awq\) .*model.safetensors: tensor {Q0}.qweight among them",
    ),
    "FP8": (
        lambda root: _declared(root, "fp8", f"{Q0}.weight", torch.zeros(64, 64).to(torch.float8_e4m3fn)),
        rf"model.safetensors: tensor {Q0}.weight has dtype .*, but no scales: {Q0}.weight_scale_inv",
    ),
    "undeclared FP8": (
        lambda root: (
            _edit(root / "task1", lambda t: t.update({f"{Q0}.weight": torch.zeros(64, 64).to(torch.float8_e5m2)}))
            or root / "task1"
        ),
        rf"model.safetensors: tensor {Q0}.weight has dtype F8_E5M2, expected plain floating-point weights",
    ),
}


def _only(tensors: dict, layer: int) -> None:
    for name in [name for name in tensors if f".{layer}." not in name]:
        del tensors[name]


def _tied(root: Path) -> Path:
    for model in ("base", "merged", "task0"):
        config = json.loads((root / model / "config.json").read_text())
        (root / model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
        _edit(root / model, lambda weights: weights.pop("lm_head.weight"))
    lora = {"lm_head.lora_A.weight": torch.ones(4, 64), "lm_head.lora_B.weight": torch.ones(100, 4)}
    return _adapter(root, lambda t: t.update(lora))


def _truncated(folder: Path, file: str) -> Path:
    (folder / file).write_bytes((folder / file).read_bytes()[:-50])
    return folder


def _renamed(folder: Path, file: str, name: str) -> Path:
    (folder / file).rename(folder / name)
    return folder


@pytest.mark.parametrize("case", BROKEN)
def test_bad_experts_are_named_before_any_compute(
    case: str, recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breakage, message = BROKEN[case]
    changes = expert_at(recipe, "task1", breakage(tmp_path))
    monkeypatch.setattr("featcal_fast.job.run.calibrate_source", lambda *_, **__: pytest.fail("computed"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ff.FeatCalError, match=f"(?s)expert task1: .*{message}"):
        ff.calibrate({**recipe, **changes})
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "change",
    [{"model_type": ["llama"]}, {"num_hidden_layers": "three"}, {"architectures": [7]}, {"hidden_size": -4}],
    ids=str,
)
def test_a_config_that_describes_no_model_is_named(change: dict, recipe: dict, tmp_path: Path) -> None:
    path = tmp_path / "task1" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ff.FeatCalError, match=r"expert task1: .*config.json"):
        ff.plan(recipe)


@pytest.mark.parametrize("role", ["base_model", "merged_model"])
def test_only_experts_may_be_adapters(role: str, recipe: dict, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path)
    with pytest.raises(ff.FeatCalError, match=rf"{role.replace('_', ' ')}: .*adapter is an adapter, .* only experts"):
        ff.calibrate({**recipe, role: str(adapter)})


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    pico.llama().save_pretrained(tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model", "model")
    _truncated(tmp_path / "model", "model.safetensors")
    with pytest.raises(ff.FeatCalError, match=r"model.safetensors: tensor \S+ ends early"):
        checkpoint.read(checkpoint.tensors)
