"""Experts in every form users have them: the result is that of the same experts merged or dequantised beforehand."""

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
from featcal_fast.checkpoints import CachedExpert, Checkpoint, LoraExpert, cached_bytes, find_expert
from featcal_fast.errors import ModelMismatchError


@pytest.fixture
def recipe(tmp_path: Path) -> dict:
    return pico.save(pico.job("llama", 2), tmp_path)


def calibrated(recipe: dict, **changes: object) -> dict[str, Tensor]:
    """The weights of a run; `changes` go into the recipe."""
    out = Path(recipe["out"]).parent / f"out{len(list(Path(recipe['out']).parent.glob('out*')))}"
    ff.calibrate({**recipe, **changes}, out=out)
    return load_file(out / "model.safetensors")


def assert_same_update(found: dict[str, Tensor], expected: dict[str, Tensor], merged: dict[str, Tensor]) -> None:
    """To 1e-5 of the update, weight by weight."""
    moved = 0
    for name, value in expected.items():
        update = (value.double() - merged[name].double()).norm()
        moved += bool(update > 0)
        assert (found[name].double() - value.double()).norm() <= 1e-5 * update, name
    assert moved > 0


# LoRA adapters


def merge_adapter(
    base: dict[str, Tensor], adapter: dict[str, Tensor], scale: Callable[[str], float]
) -> dict[str, Tensor]:
    merged = {name: value.clone() for name, value in base.items()}
    for name, b in adapter.items():
        if name.endswith("lora_B.weight"):
            module = name.removesuffix(".lora_B.weight")
            merged[f"{module}.weight"] += scale(module) * b @ adapter[f"{module}.lora_A.weight"]
        elif ".lora_" not in name:
            merged[name] = b
    return merged


def merged_expert(root: Path, weights: dict[str, Tensor]) -> Path:
    """The full checkpoint of `weights`, beside the base it came from."""
    folder = root / "merged-expert"
    folder.mkdir()
    (folder / "config.json").write_bytes((root / "base" / "config.json").read_bytes())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_expert_is_the_expert_merged_beforehand(recipe: dict, tmp_path: Path, rslora: bool) -> None:
    """With ranks and alphas by pattern, and a tensor trained whole."""

    def rank(module: str) -> int:
        return 2 if module.endswith("v_proj") else 6 if module.endswith("layers.1.self_attn.q_proj") else 4

    def scale(module: str) -> float:
        alpha = 3.0 if module.endswith("down_proj") else 8.0
        return alpha / (rank(module) ** 0.5 if rslora else rank(module))

    base = load_file(tmp_path / "base" / "model.safetensors")
    adapter = factors(base, rank)
    adapter["model.embed_tokens.weight"] = base["model.embed_tokens.weight"] + 0.1
    folder = write_adapter(
        tmp_path / "adapter",
        adapter,
        rank_pattern={"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 6},
        alpha_pattern={"down_proj": 3},
        use_rslora=rslora,
        modules_to_save=["embed_tokens"],
    )
    before = merged_expert(tmp_path, merge_adapter(base, adapter, scale))
    found = calibrated(recipe, **expert_at(recipe, "task0", folder))
    expected = calibrated(recipe, **expert_at(recipe, "task0", before))
    assert_same_update(found, expected, load_file(tmp_path / "merged" / "model.safetensors"))


def test_a_lora_expert_is_merged_on_the_fly(recipe: dict, tmp_path: Path) -> None:
    base = load_file(tmp_path / "base" / "model.safetensors")
    adapter = factors(base)
    folder = write_adapter(tmp_path / "adapter", adapter)
    before = merged_expert(tmp_path, merge_adapter(base, adapter, lambda _: 2.0))
    del recipe["merged_model"]
    merge = {"merge": {"method": "average"}}
    found, expected = (
        ff.merge({**recipe, **merge, **expert_at(recipe, "task0", path)}, out=tmp_path / f"average{i}")
        for i, path in enumerate((folder, before))
    )
    found, expected = (load_file(path / "model.safetensors") for path in (found, expected))
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


def test_transposed_and_embedding_factors(tmp_path: Path) -> None:
    pico.llama().save_pretrained(tmp_path / "base")
    base = load_file(tmp_path / "base" / "model.safetensors")
    a, b = torch.randn(4, 64), torch.randn(64, 4)
    embedding = {
        "model.embed_tokens.lora_embedding_A": torch.randn(4, 100),
        "model.embed_tokens.lora_embedding_B": torch.randn(64, 4),
    }
    adapter = {"model.layers.0.self_attn.q_proj.lora_A.weight": a, "model.layers.0.self_attn.q_proj.lora_B.weight": b}
    folder = write_adapter(tmp_path / "adapter", {**adapter, **embedding}, fan_in_fan_out=True, target_modules="x")
    expert = find_expert(str(folder), tmp_path, "expert", Checkpoint(tmp_path / "base", "base model"))
    found = expert.read(expert.tensors)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(found[name], base[name] + 2 * (b @ a).mT, atol=1e-5)
    delta = 2 * (embedding["model.embed_tokens.lora_embedding_B"] @ embedding["model.embed_tokens.lora_embedding_A"]).mT
    assert torch.allclose(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"] + delta, atol=1e-5)
    assert expert.bytes_read == expert.stored_bytes(expert.tensors)


@pytest.mark.parametrize("kind", ["llama", "clip"])
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"], "use_rslora": True, "bias": "all"},
        {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "bias": "lora_only"},
        {"r": 4, "target_modules": ["q_proj"], "alpha_pattern": {r"layers.1.self_attn.q_proj": 1}},
        {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embeddings", "embed_tokens"]},
    ],
    ids=["plain", "rslora-bias", "all-linear", "alpha", "one-layer", "modules-to-save"],
)
def test_adapters_that_peft_writes(kind: str, options: dict, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = pico.perturbed(pico.clip() if kind == "clip" else pico.llama(attention_bias=True), 1.0, seed=5)
    model.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()
    expert = find_expert("adapter", tmp_path, "expert", Checkpoint(tmp_path / "base", "base model"))
    assert isinstance(expert, LoraExpert)
    found = expert.read(expert.tensors)
    for name, value in found.items():
        own = name if name in expected else name.removeprefix("vision_model.")
        if options.get("bias") != "lora_only" or not name.endswith("bias"):  # whose biases peft does not save
            assert torch.allclose(value, expected[own], atol=1e-6), name


def test_names_of_modules_on_disk_and_in_the_model_are_both_read(tmp_path: Path) -> None:
    """Of ViT, which transformers 5 renames as it loads; and where there is no such module, that is said."""
    pico.KINDS["vit"]().save_pretrained(tmp_path / "base")
    base = Checkpoint(tmp_path / "base", "base model")
    own = "encoder.layer.1.attention.attention.query"
    a, b = torch.randn(2, 48), torch.randn(48, 2)
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [own, "layers.1.attention.q_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    for module in (own, "layers.1.attention.q_proj", "layers.7.attention.q_proj"):
        factors = {f"base_model.model.{module}.lora_{key}.weight": each for key, each in (("A", a), ("B", b))}
        save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
        if "7" in module:
            with pytest.raises(ModelMismatchError, match=r"adapts layers.7.* which the base model .* has not"):
                find_expert("adapter", tmp_path, "expert", base)
        else:
            expert = find_expert("adapter", tmp_path, "expert", base)
            name = f"{own}.weight"
            assert torch.allclose(expert.read([name])[name], base.read([name])[name] + b @ a, atol=1e-6)


# bitsandbytes checkpoints


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_expert_is_the_expert_dequantised_beforehand(form: str, recipe: dict, tmp_path: Path) -> None:
    folder = quantised(tmp_path / "task0", tmp_path / "quantised", FORMS[form], tmp_path / "before")
    found = calibrated(recipe, **expert_at(recipe, "task0", folder))
    expected = calibrated(recipe, **expert_at(recipe, "task0", tmp_path / "before"))
    assert_same_update(found, expected, load_file(tmp_path / "merged" / "model.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
def test_dequantising_is_what_bitsandbytes_does(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit in 4-bit formats, in every dtype, on sizes that leave a last block and a last nibble over."""
    pico.llama(hidden_size=56, intermediate_size=77).to(dtype).save_pretrained(tmp_path / "model")
    folder = quantised(tmp_path / "model", tmp_path / "quantised", FORMS[form], tmp_path / "before")
    expert = find_expert(str(folder), tmp_path, "expert", None)
    expected = load_file(tmp_path / "before" / "model.safetensors")
    assert expert.tensors.keys() == expected.keys()
    for name, value in expert.read(expert.tensors).items():
        assert (tuple(value.shape), value.dtype) == (expert.tensors[name].shape, dtype)
        if form == "int8":
            assert torch.allclose(value, expected[name], rtol=torch.finfo(dtype).eps, atol=0), name
        else:
            assert torch.equal(value, expected[name]), name
    assert expert.bytes_read == expert.stored_bytes(expert.tensors)


def test_codes_may_be_stored_under_any_dtype(tmp_path: Path) -> None:
    pico.llama().bfloat16().save_pretrained(tmp_path / "model")
    folder = quantised(tmp_path / "model", tmp_path / "quantised", FORMS["nf4"], tmp_path / "before")
    stored = load_file(folder / "model.safetensors")
    for name, value in stored.items():
        if name.endswith("proj.weight"):
            stored[name] = value.reshape(-1).view(torch.bfloat16).reshape(-1, 1)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    expert = find_expert(str(folder), tmp_path, "expert", None)
    expected = load_file(tmp_path / "before" / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in expert.read(expert.tensors).items())


# Other vocabularies, the hub's cache, host memory, counting


def test_an_expert_may_have_a_vocabulary_of_its_own(recipe: dict, tmp_path: Path) -> None:
    """Its own embedding is used, its blocks are the target: rows that no sample names change nothing."""
    expected = calibrated(recipe)
    model = pico.job("llama", 2).experts["task0"]
    model.resize_token_embeddings(108)
    model.save_pretrained(tmp_path / "larger")
    found = calibrated(recipe, **expert_at(recipe, "task0", tmp_path / "larger"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_adapter_may_bring_a_vocabulary_of_its_own(recipe: dict, tmp_path: Path) -> None:
    base = load_file(tmp_path / "base" / "model.safetensors")
    adapter = factors(base)
    small = write_adapter(tmp_path / "small", adapter)
    more = {
        name: torch.cat([base[name], torch.ones(8, 64)]) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    large = write_adapter(tmp_path / "large", {**adapter, **more})
    assert find_expert(str(large), tmp_path, "expert", Checkpoint(tmp_path / "base", "base")).config.vocab_size == 108
    found, expected = (calibrated(recipe, **expert_at(recipe, "task0", path)) for path in (large, small))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("reference", ["org/expert", "org/expert@abc123", "models--org--expert"])
def test_the_hubs_cache_is_used_without_a_network(
    reference: str, recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    commit, cache = "abc123" + "0" * 34, tmp_path / "cache"
    repo = cache / "models--org--expert"
    snapshot = repo / "snapshots" / commit
    for folder in (snapshot, repo / "blobs", repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "refs" / "abc123").write_text(commit)
    for path in list((tmp_path / "task0").iterdir()):
        path.rename(repo / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path = cache / reference if reference.startswith("models") else Path(reference)
    calibrated(recipe, **expert_at(recipe, "task0", path))


def test_host_storage_changes_no_bit(recipe: dict) -> None:
    disk, host = calibrated(recipe), calibrated(recipe, expert_storage="host")
    assert all(torch.equal(disk[name], host[name]) for name in disk)


@pytest.mark.parametrize("storage", ["host-int8", "host-nf4"])
def test_compressed_storage_is_the_expert_compressed_beforehand(storage: str, recipe: dict, tmp_path: Path) -> None:
    """The merged model is made of exact experts; the report states the error."""
    del recipe["merged_model"]
    merge = {"merge": {"method": "task_arithmetic"}, "expert_storage": storage}
    report = ff.calibrate({**recipe, **merge})
    for task in recipe["experts"]:
        assert 0 < report.storage_error[task] < (0.02 if storage == "host-int8" else 0.12)

    merged = ff.merge({**recipe, **merge}, out=tmp_path / "merged-again")
    experts = {}
    for task, expert in recipe["experts"].items():
        cached = CachedExpert(Checkpoint(tmp_path / task, task), storage)
        kept = cached.read(cached.tensors)
        exact = cached.read_exactly(cached.tensors)
        assert cached.error == pytest.approx(_relative(kept, exact), rel=1e-4)
        (tmp_path / f"kept-{task}").mkdir()
        config = (tmp_path / task / "config.json").read_text()
        (tmp_path / f"kept-{task}" / "config.json").write_text(config)
        save_file(kept, tmp_path / f"kept-{task}" / "model.safetensors", metadata={"format": "pt"})
        experts[task] = {**expert, "model": str(tmp_path / f"kept-{task}")}
    expected = calibrated({**recipe, "merged_model": str(merged), "experts": experts})
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def _relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    difference = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return (difference / sum(float(value.square().sum()) for value in expected.values())) ** 0.5


@pytest.mark.parametrize(("storage", "limit"), [("host", 1.0), ("host-int8", 0.26), ("host-nf4", 0.15)])
def test_cached_bytes(storage: str, limit: float) -> None:
    info = _info((256, 256))
    assert cached_bytes(info, storage) <= limit * info.nbytes
    assert cached_bytes(_info((4096,)), storage) == 4 * 4096


def _info(shape: tuple[int, ...]):
    from featcal_fast.checkpoints import TensorInfo

    return TensorInfo("model.safetensors", shape, torch.float32)


def test_every_source_counts_what_it_reads(recipe: dict, tmp_path: Path) -> None:
    """An expert's blocks and embedding once each, and nothing else of it."""
    base = load_file(tmp_path / "base" / "model.safetensors")
    adapter = write_adapter(tmp_path / "adapter", factors(base))
    report = ff.calibrate({**recipe, **expert_at(recipe, "task1", adapter)}, checkpoint_every=0)
    used = sum(value.nbytes for name, value in base.items() if name not in ("lm_head.weight", "model.norm.weight"))
    factor_bytes = sum(value.nbytes for value in factors(base).values())
    assert report.bytes_read["expert task0"] == used
    assert report.bytes_read["expert task1"] == used + factor_bytes
    assert report.bytes_read["base model"] == sum(value.nbytes for name, value in base.items() if ".layers." in name)
    assert report.bytes_written == {"calibrated model": sum(value.nbytes for value in base.values())}
