"""Experts in every form users have them: the result is that of the same experts merged or dequantised beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import featcal_fast as ff
from featcal_fast.checkpoints import Checkpoint, HostedExpert, LoraExpert, find_expert, kept_bytes

ADAPTED = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


@pytest.fixture
def recipe(tmp_path: Path) -> dict:
    return pico.save(pico.job("llama", 2), tmp_path)


def calibrated(recipe: dict, **changes: object) -> dict[str, Tensor]:
    """The weights of a run; `changes` go into the recipe."""
    out = Path(recipe["out"]).parent / f"out{len(list(Path(recipe['out']).parent.glob('out*')))}"
    ff.calibrate({**recipe, **changes}, out=out)
    return load_file(out / "model.safetensors")


def expert_at(recipe: dict, task: str, folder: Path) -> dict:
    return {"experts": {**recipe["experts"], task: {**recipe["experts"][task], "model": str(folder)}}}


def assert_same_update(found: dict[str, Tensor], expected: dict[str, Tensor], merged: dict[str, Tensor]) -> None:
    """To 1e-5 of the update, weight by weight."""
    moved = 0
    for name, value in expected.items():
        update = (value.double() - merged[name].double()).norm()
        moved += bool(update > 0)
        assert (found[name].double() - value.double()).norm() <= 1e-5 * update, name
    assert moved > 0


# LoRA adapters


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    folder.mkdir()
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [name[-6:] for name in ADAPTED], **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file({f"base_model.model.{name}": value.contiguous() for name, value in tensors.items()}, _weights(folder))
    return folder


def _weights(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def factors(base: dict[str, Tensor], rank: Callable[[str], int] = lambda name: 4, layers: int = 3) -> dict[str, Tensor]:
    generator, made = torch.Generator().manual_seed(1), {}
    for module in (f"model.layers.{i}.{name}" for i in range(layers) for name in ADAPTED):
        out, width = base[f"{module}.weight"].shape
        made[f"{module}.lora_A.weight"] = 0.1 * torch.randn(rank(module), width, generator=generator)
        made[f"{module}.lora_B.weight"] = 0.1 * torch.randn(out, rank(module), generator=generator)
    return made


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


# bitsandbytes checkpoints


def four_bit(quant_type: str, double: bool) -> Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]:
    def quantise(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        from bitsandbytes import functional

        codes, state = functional.quantize_4bit(weight, quant_type=quant_type, compress_statistics=double)
        parts = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        # As rows of one block each: bitsandbytes' CPU kernel (0.50) is wrong where blocks and rows end apart.
        state.shape = torch.Size([weight.numel() // 64, 64]) if weight.numel() % 64 == 0 else weight.shape
        return {name: codes, **parts}, functional.dequantize_4bit(codes, state).reshape(weight.shape)

    return quantise


def eight_bit(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    from bitsandbytes import functional

    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    layout = torch.zeros((), dtype=torch.uint8)
    parts = {name: codes, f"{name[:-6]}SCB": scales, f"{name}_format": layout}
    return parts, functional.int8_vectorwise_dequant(codes, scales).to(weight.dtype)


def quantised(source: Path, folder: Path, quantise: Callable, before: Path) -> Path:
    """`source` quantised in `folder`, and dequantised again in `before`."""
    stored, plain = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        stored[name] = plain[name] = weight
        if name.endswith("proj.weight"):
            parts, plain[name] = quantise(name, weight)
            del stored[name]
            stored |= parts
    config = json.loads((source / "config.json").read_text())
    for path, tensors, extra in (
        (folder, stored, {"quantization_config": {"quant_method": "bitsandbytes"}}),
        (before, plain, {}),
    ):
        path.mkdir()
        (path / "config.json").write_text(json.dumps({**config, **extra}))
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return folder


FORMS = {
    "nf4": four_bit("nf4", double=False),
    "nf4-double": four_bit("nf4", double=True),
    "fp4": four_bit("fp4", double=False),
    "fp4-double": four_bit("fp4", double=True),
    "int8": eight_bit,
}


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
    pico.llama(hidden_size=52, intermediate_size=77).to(dtype).save_pretrained(tmp_path / "model")
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
        hosted = HostedExpert(Checkpoint(tmp_path / task, task), storage)
        kept = hosted.read(hosted.tensors)
        exact = hosted.read_exactly(hosted.tensors)
        assert hosted.error == pytest.approx(_relative(kept, exact), rel=1e-4)
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
def test_kept_bytes(storage: str, limit: float) -> None:
    info = _info((256, 256))
    assert kept_bytes(info, storage) <= limit * info.nbytes
    assert kept_bytes(_info((4096,)), storage) == 4 * 4096


def _info(shape: tuple[int, ...]):
    from featcal_fast.checkpoints import TensorInfo

    return TensorInfo("model.safetensors", shape, torch.float32)


def test_every_source_counts_what_it_reads(recipe: dict, tmp_path: Path) -> None:
    """An expert's blocks and embedding once each, and nothing else of it."""
    base = load_file(tmp_path / "base" / "model.safetensors")
    adapter = write_adapter(tmp_path / "adapter", factors(base))
    report = ff.calibrate({**recipe, **expert_at(recipe, "task1", adapter)})
    used = sum(value.nbytes for name, value in base.items() if name not in ("lm_head.weight", "model.norm.weight"))
    factor_bytes = sum(value.nbytes for value in factors(base).values())
    assert report.bytes_read["expert task0"] == used
    assert report.bytes_read["expert task1"] == used + factor_bytes
    assert report.bytes_read["base model"] == sum(value.nbytes for name, value in base.items() if ".layers." in name)
    assert report.bytes_written == {"calibrated model": sum(value.nbytes for value in base.values())}


# Bad experts: an error that names file and tensor, before any compute, and nothing is left behind.


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
    "DoRA": (lambda root: _adapter(root, use_dora=True), r"adapter_config.json: found use_dora, which is DoRA"),
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
        rf"config.json says the weights are quantised \(fp8\) .*model.safetensors: tensor {Q0}.weight among them",
    ),
    "undeclared FP8": (
        lambda root: (
            _edit(root / "task1", lambda t: t.update({f"{Q0}.weight": torch.zeros(64, 64).to(torch.float8_e5m2)}))
            or root / "task1"
        ),
        rf"model.safetensors: tensor {Q0}.weight has dtype F8_E5M2, expected plain floating-point weights",
    ),
}


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
    monkeypatch.setattr("featcal_fast.job.calibrate_source", lambda *_, **__: pytest.fail("computed"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ff.FeatCalError, match=f"(?s)expert task1: .*{message}"):
        ff.calibrate({**recipe, **changes})
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("role", ["base_model", "merged_model"])
def test_only_experts_may_be_quantised_or_adapters(role: str, recipe: dict, tmp_path: Path) -> None:
    four = quantised(tmp_path / "task0", tmp_path / "quantised", FORMS["nf4"], tmp_path / "before")
    with pytest.raises(ff.FeatCalError, match=rf"{role.replace('_', ' ')}: .* quantised \(bitsandbytes\)"):
        ff.calibrate({**recipe, role: str(four)})
    adapter = _adapter(tmp_path)
    with pytest.raises(ff.FeatCalError, match=rf"{role.replace('_', ' ')}: .*adapter is an adapter, .* only experts"):
        ff.calibrate({**recipe, role: str(adapter)})


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    pico.llama().save_pretrained(tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model", "model")
    _truncated(tmp_path / "model", "model.safetensors")
    with pytest.raises(ff.FeatCalError, match=r"model.safetensors: tensor \S+ ends early"):
        checkpoint.read(checkpoint.tensors)
