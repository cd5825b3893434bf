"""Adapters of every kind that people have are what PEFT makes of them: rounded once, and nothing else."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_formats import assert_same_update, calibrated
from torch import Tensor, nn

import featcal_fast as ff
from featcal_fast.checkpoints import Checkpoint, LoraExpert, find_expert
from featcal_fast.checkpoints.low_rank import ROWS, LowRank, NoDirectionError, form
from featcal_fast.inputs.unchanged import unchanged

peft = pytest.importorskip("peft")
DORA = {"target_modules": ["q_proj", "down_proj"], "use_dora": True}
# By name: the kind of model, and what PEFT is told.
WRITTEN: dict[str, tuple[str, dict]] = {
    "dora": ("llama", DORA),
    "dora-rslora-patterns": (
        "llama",
        {
            **DORA,
            "use_rslora": True,
            "rank_pattern": {"down_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
        },
    ),
    "dora-embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True}),
    "dora-saved": ("llama", {**DORA, "modules_to_save": ["embed_tokens"], "bias": "all"}),
    "dora-conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True}),
    "rslora-embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True}),
    "lora-bias": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True, "use_rslora": True}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 99]}),
    "tokens-by-module": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [4, 1], "lm_head": [2]}},
    ),
}


def written(
    root: Path, kind: str, options: dict, dtype: torch.dtype = torch.float32, model: nn.Module | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A base and an adapter of it, as PEFT writes them, and what it merges them to: in their dtype, and in float64."""
    model = pico.perturbed(pico.KINDS[kind](), 1.0, seed=5).to(dtype) if model is None else copy.deepcopy(model)
    model.save_pretrained(root / "base")
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **options))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        adapted.save_pretrained(root / "adapter")
        exact = copy.deepcopy(adapted).double().merge_and_unload().state_dict()
        return adapted.merge_and_unload().state_dict(), exact


def opened(root: Path, folder: str = "adapter") -> LoraExpert:
    expert = find_expert(folder, root, "expert", Checkpoint(root / "base", "base model"))
    assert isinstance(expert, LoraExpert)
    return expert


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", WRITTEN)
def test_an_adapter_is_what_peft_merges(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """As close to what it merges in float64 as what it merges in the weights' dtype; and reads what it says."""
    kind, options = WRITTEN[name]
    expected, exact = written(tmp_path, kind, options, dtype)
    expert, base = opened(tmp_path), load_file(tmp_path / "base" / "model.safetensors")
    found = expert.read(expert.tensors)
    changed = {own for own, value in found.items() if not torch.equal(value, base[own])}
    assert changed == expert.changed()
    for own, value in found.items():
        assert value.dtype == dtype
        errors = [(each.double() - exact[own]).norm() for each in (value, expected[own])]
        assert errors[0] <= 1.1 * errors[1], own
        assert errors[0] <= 2 * torch.finfo(dtype).eps * exact[own].norm(), own
    assert expert.bytes_read == expert.stored_bytes(expert.tensors)


def test_calibration_with_adapters_is_that_with_the_merged_experts(tmp_path: Path) -> None:
    job = pico.job("qwen2", 3)
    recipe = pico.save(job, tmp_path)
    adapters, plain = {}, {}
    for task, name in zip(recipe["experts"], ("dora-rslora-patterns", "lora-bias", "tokens"), strict=True):
        root = tmp_path / name
        merged, _ = written(root, "qwen2", WRITTEN[name][1], model=job.base)
        adapters |= {task: {**recipe["experts"][task], "model": str(root / "adapter")}}
        plain |= {task: {**recipe["experts"][task], "model": str(root / "base")}}
        names = load_file(root / "base" / "model.safetensors")
        save_file({own: merged[own].clone() for own in names}, root / "base" / "model.safetensors", {"format": "pt"})
    found, expected = (calibrated(recipe, experts=experts) for experts in (adapters, plain))
    assert_same_update(found, expected, load_file(tmp_path / "merged" / "model.safetensors"))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_of_whole_outputs(transposed: bool, dtype: torch.dtype) -> None:
    """Of weights that are formed in several parts, by the formula in float64."""
    generator = torch.Generator().manual_seed(0)
    out, width, rank = ROWS + 300, 24, 3
    weight = torch.randn(out, width, generator=generator).to(dtype)
    a, b = torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)
    if transposed:
        a, b = b.mT.contiguous(), a.mT.contiguous()
    magnitude = torch.randn(len(b), generator=generator)
    change = 0.5 * b.double() @ a.double()
    full = weight.double() + (change.mT if transposed else change)
    norms = full.norm(dim=0 if transposed else 1, keepdim=True)
    expected = full / norms * (magnitude.double() if transposed else magnitude.double()[:, None])
    form(weight, {"a": a, "b": b, "m": magnitude}, LowRank("a", "b", 0.5, transposed, "m"))
    assert weight.dtype == dtype
    assert (weight.double() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("transposed", [False, True])
def test_an_output_of_zeros_has_no_direction(transposed: bool) -> None:
    weight = torch.ones(6, 6)
    (weight.T if transposed else weight)[4] = 0
    factors = {"a": torch.zeros(2, 6), "b": torch.zeros(6, 2), "m": torch.ones(6)}
    with pytest.raises(NoDirectionError, match="output 4 of the weight is zero"):
        form(weight, factors, LowRank("a", "b", 1.0, transposed, "m"))


# Names that other trainers write


def _raw(name: str) -> str:
    """As a model's own state has it."""
    return name.replace(".weight", ".default.weight") if ".lora_" in name and ".weight" in name else f"{name}.default"


RENAMED: dict[str, Callable[[str], str]] = {
    "an adapter's name": _raw,
    "another name": lambda name: _raw(name).replace("default", "sft_v2"),
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "no weight": lambda name: name.removesuffix(".weight"),
    "a magnitude's weight": lambda name: name.replace("magnitude_vector", "magnitude_vector.weight"),
    "compiled": lambda name: f"_orig_mod.{name}",
    "wrapped": lambda name: f"module.{name}".replace("self_attn.", "_fsdp_wrapped_module.self_attn."),
    "checkpointed": lambda name: name.replace("mlp.", "mlp._checkpoint_wrapped_module."),
}


def _renamed(root: Path, rename: Callable[[str], str]) -> None:
    path = root / "adapter" / "adapter_model.safetensors"
    save_file({rename(name): value for name, value in load_file(path).items()}, path)


def test_names_that_trainers_write_are_read(tmp_path: Path) -> None:
    written(tmp_path, "llama", DORA)
    expert = opened(tmp_path)
    expected = expert.read(sorted(expert.changed()))
    shutil.copytree(tmp_path / "adapter", tmp_path / "kept")
    for how, rename in RENAMED.items():
        shutil.rmtree(tmp_path / "adapter")
        shutil.copytree(tmp_path / "kept", tmp_path / "adapter")
        _renamed(tmp_path, rename)
        expert = opened(tmp_path)
        found = expert.read(sorted(expert.changed()))
        assert found.keys() == expected.keys(), how
        assert all(torch.equal(value, expected[name]) for name, value in found.items()), how


def test_tensors_that_a_trained_one_took_the_place_of_do_not_count(tmp_path: Path) -> None:
    written(tmp_path, "llama", {**DORA, "modules_to_save": ["embed_tokens"]})
    own, trained = "base_model.model.model.embed_tokens.weight", opened(tmp_path).read(["model.embed_tokens.weight"])
    _tensors(
        tmp_path,
        lambda t: t.update(
            {
                own.replace(".weight", ".modules_to_save.default.weight"): t.pop(own),
                own.replace(".weight", ".original_module.weight"): torch.zeros(100, 64),
            }
        ),
    )
    assert torch.equal(*(each["model.embed_tokens.weight"] for each in (trained, opened(tmp_path).read(trained))))


def test_a_tied_embedding_may_be_saved_under_both_of_its_names(tmp_path: Path) -> None:
    """As PEFT does after a vocabulary was resized."""
    written(tmp_path, "llama tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]})
    own, expected = "model.embed_tokens.weight", opened(tmp_path).read(["model.embed_tokens.weight"])
    _tensors(tmp_path, lambda t: t.update({"base_model.model.lm_head.weight": t[f"base_model.model.{own}"].clone()}))
    expert = opened(tmp_path)
    assert torch.equal(expert.read([own])[own], expected[own])
    assert expert.bytes_read == expert.stored_bytes([own])
    _tensors(tmp_path, lambda t: t["base_model.model.lm_head.weight"][-1, -1].add_(0.1))
    with pytest.raises(ff.FeatCalError, match=r"adapts lm_head.weight, which .* does not change both alike"):
        opened(tmp_path)


def test_one_adapter_of_several_is_not_guessed(tmp_path: Path) -> None:
    written(tmp_path, "llama", DORA)
    _renamed(tmp_path, lambda name: name.replace("lora_A", "lora_A.sft") if "layers.1" in name else name)
    with pytest.raises(ff.FeatCalError, match=r"adapter_model.safetensors holds several adapters .*sft"):
        opened(tmp_path)


# What is refused


def _config(root: Path, **changes: object) -> None:
    path = root / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _tensors(root: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = root / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def _add_biases(tensors: dict[str, Tensor]) -> None:
    factors = [name for name in tensors if name.endswith("lora_B.weight")]
    tensors.update({name.replace("B.weight", "B.bias"): torch.ones(len(tensors[name])) for name in factors})


Q = "base_model.model.model.layers.0.self_attn.q_proj"
M, ROWS_OF = f"{Q}.lora_magnitude_vector", "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
KINDS = ["ADALORA", "BOFT", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "TRAINABLE_TOKENS", "VERA", "NEW"]
REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    **{
        f"a switch: {key}": (
            "dora",
            lambda root, key=key, value=value: _config(root, **{key: value}),
            rf"found {key}, .*peft",
        )
        for key, value in {
            "use_qalora": True,
            "use_something_new": True,
            "target_parameters": ["experts.down_proj"],
            "layer_replication": [[0, 1]],
            "alora_invocation_tokens": [1],
            "kasa_config": {"beta": 1},
        }.items()
    },
    **{
        f"a kind: {kind}": (
            "dora",
            lambda root, kind=kind: _config(root, peft_type=kind),
            rf"adapter_config.json: found peft_type {kind}, expected LORA; merge this one .*merge_and_unload",
        )
        for kind in KINDS
    },
    "prompts": ("dora", lambda root: _config(root, peft_type="PREFIX_TUNING"), "PREFIX_TUNING, .*nothing to merge"),
    "no magnitude": ("dora", lambda root: _tensors(root, lambda t: t.pop(M)), "lora_magnitude_vector is missing"),
    "a magnitude alone": ("dora", lambda root: _config(root, use_dora=False), "config.json does not set use_dora"),
    "a magnitude twice": (
        "dora",
        lambda root: _tensors(root, lambda t: t.update({f"{M}.weight": torch.ones(64)})),
        "are for the same tensor",
    ),
    "magnitudes of another weight": (
        "dora",
        lambda root: _tensors(root, lambda t: t.update({M: torch.ones(63)})),
        r"lora_magnitude_vector has shape \(63,\), expected \(64,\)",
    ),
    "magnitudes of two dimensions": (
        "dora",
        lambda root: _tensors(root, lambda t: t.update({M: torch.ones(64, 1)})),
        r"lora_magnitude_vector has shape \(64, 1\), expected \(64,\)",
    ),
    "magnitudes of integers": (
        "dora",
        lambda root: _tensors(root, lambda t: t.update({M: torch.ones(64).long()})),
        "lora_magnitude_vector has dtype torch.int64, expected plain floating-point",
    ),
    "a bias without": (
        "dora",
        lambda root: _tensors(root, lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(64)})),
        "lora_B.bias is no part of a plain LoRA adapter, and adapter_config.json does not set lora_bias",
    ),
    "a bias of a layer that has none": (
        "dora",
        lambda root: (_config(root, lora_bias=True), _tensors(root, _add_biases)),
        "lora_B.bias adds to the bias of .*_proj, which has none",
    ),
    "a bias that is missing": (
        "dora",
        lambda root: _config(root, lora_bias=True),
        "its factor lora_B.bias is missing, though adapter_config.json sets lora_bias; the download is incomplete",
    ),
    "fewer tokens": (
        "tokens",
        lambda root: _config(root, trainable_token_indices=[7, 3]),
        r"trainable_tokens_delta has shape \(3, 64\) .*expected \(2, 64\), for the 2 trainable_token_indices",
    ),
    "tokens of another module": (
        "tokens",
        lambda root: _config(root, trainable_token_indices={"tokens": [7, 3, 99]}),
        r"trainable_tokens_delta has shape \(3, 64\) .*expected \(0, 64\)",
    ),
    "tokens beyond": (
        "tokens",
        lambda root: _config(root, trainable_token_indices=[7, 3, 100]),
        r"names token 100, but .* has 100 rows",
    ),
    **{
        f"tokens {value}": (
            "tokens",
            lambda root, value=value: _config(root, trainable_token_indices=value),
            "trainable_token_indices: found .*, expected a list of ids",
        )
        for value in ([7, 7, 3], [7, 3, -1], [7, 3, True], "734", {"embed_tokens": 7}, 5)
    },
    "no rows": ("tokens", lambda root: _tensors(root, lambda t: t.pop(ROWS_OF)), "no trainable_tokens_delta, though"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for name in ("dora", "tokens"):
        written(root / name, *WRITTEN[name])
    return root


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_adapter_is_named(name: str, saved: Path, tmp_path: Path) -> None:
    kind, change, message = REFUSED[name]
    shutil.copytree(saved / kind, tmp_path / "it")
    change(tmp_path / "it")
    with pytest.raises(ff.FeatCalError, match=rf"expert: .*{message}") as error:
        opened(tmp_path / "it")
    assert str(tmp_path / "it" / "adapter") in str(error.value)


def test_zero_outputs_of_an_adapter_are_named_on_read(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "dora", tmp_path / "it")
    path = tmp_path / "it" / "base" / "model.safetensors"
    weights, name = load_file(path), "model.layers.0.self_attn.q_proj.weight"
    weights[name][5] = 0
    save_file(weights, path, metadata={"format": "pt"})
    _tensors(tmp_path / "it", lambda t: t[f"{Q}.lora_B.weight"].index_fill_(0, torch.tensor(5), 0))
    with pytest.raises(ff.FeatCalError, match=rf"{M}: {name}: output 5 of the weight is zero.*use_dora"):
        opened(tmp_path / "it").read([name])


def test_magnitudes_may_have_changed_where_factors_are_zero(saved: Path, tmp_path: Path) -> None:
    """An adapter whose `lora_B` are zero learned nothing, but with DoRA nobody can tell by that."""
    shutil.copytree(saved / "dora", tmp_path / "it")
    _tensors(tmp_path / "it", lambda t: [value.zero_() for key, value in t.items() if "lora_B" in key])
    expert = opened(tmp_path / "it")
    assert unchanged({"it": expert}, Checkpoint(tmp_path / "it" / "base", "base model")) == []
