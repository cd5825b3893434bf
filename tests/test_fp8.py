"""Models of eight bits and scales in every role: what their own code makes of them, and what is no such model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from forms import FORMS, expert_at, factors, quantised, write_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor

import featcal_fast as ff
from featcal_fast.checkpoints import Checkpoint, find_checkpoint, find_expert
from featcal_fast.job.check import check
from featcal_fast.streaming.sources import CheckpointSource

Tensors = dict[str, Tensor]
WEIGHTS = "model.safetensors"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Q = "model.layers.0.self_attn.q_proj"
BLOCK = (24, 40)  # divides no side of a pico model


def spread(scales: Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """The scale of each value."""
    rows, columns = (torch.arange(size) // side for size, side in zip(shape[-2:], block, strict=True))
    return scales[..., rows[:, None], columns[None, :]]


def pack(
    weight: Tensor, block: tuple[int, int], codes: torch.dtype = E4M3, stored: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales `[..., rows, columns]` of blocks, and the weight that both are."""
    rows, columns = (-(-size // side) for size, side in zip(weight.shape[-2:], block, strict=True))
    scales = torch.empty(*weight.shape[:-2], rows, columns)
    largest = 127.0 if codes == torch.int8 else torch.finfo(codes).max
    for row in range(rows):
        for column in range(columns):
            part = weight[..., row * block[0] : (row + 1) * block[0], column * block[1] : (column + 1) * block[1]]
            scales[..., row, column] = part.float().abs().amax((-1, -2)) / largest
    scales = scales.to(stored)
    each = spread(scales.float(), block, weight.shape)
    plain = weight.float() / each
    made = plain.round().clamp(-127, 127).to(codes) if codes == torch.int8 else plain.clamp(-largest, largest).to(codes)
    return made, scales, (made.float() * each).to(weight.dtype)


def deepseek(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    codes, scales, plain = pack(weight, BLOCK)
    return {name: codes, f"{name}_scale_inv": scales}, plain


def whole(suffix: str, codes: torch.dtype, shape: tuple[int, ...], stored: torch.dtype = torch.float32) -> Callable:
    def made(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        code, scales, plain = pack(weight, (weight.shape[0], weight.shape[1]), codes, stored)
        found = {name: code, f"{name}{suffix}": scales.reshape(shape), f"{name[:-6]}input_scale": torch.ones(1)}
        return {**found, f"{name[:-6]}k_scale": torch.full((1,), torch.inf)}, plain

    return made


def rows(codes: torch.dtype, stored: torch.dtype, flat: bool = False) -> Callable:
    def made(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        code, scales, plain = pack(weight, (1, weight.shape[1]), codes, stored)
        return {name: code, f"{name}_scale": scales.reshape(-1) if flat else scales}, plain

    return made


def blocks(block: tuple[int, int], codes: torch.dtype = E4M3, stored: torch.dtype = torch.bfloat16) -> Callable:
    def made(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        code, scales, plain = pack(weight, block, codes, stored)
        return {name: code, f"{name}_scale": scales}, plain

    return made


def asymmetric(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    low, high = weight.float().amin(1, keepdim=True), weight.float().amax(1, keepdim=True)
    scales = (high - low) / 255
    zeros = (-128 - low / scales).round().clamp(-128, 127)
    codes = (weight.float() / scales + zeros).round().clamp(-128, 127)
    parts = {name: codes.to(torch.int8), f"{name}_scale": scales, f"{name}_zero_point": zeros.to(torch.int8)}
    return parts, ((codes - zeros) * scales).to(weight.dtype)


def exponents(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    """Scales that are powers of two, a byte each."""
    scales = pack(weight, BLOCK)[1].log2().ceil().exp2()
    each = spread(scales, BLOCK, weight.shape)
    codes = (weight.float() / each).to(E4M3)
    stored = scales.to(torch.float8_e8m0fnu)
    return {name: codes, f"{name}_scale_inv": stored}, (codes.float() * each).to(weight.dtype)


def compressed(kind: str = "float-quantized", **weights: object) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, **weights}}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups, "ignore": ["lm_head"]}


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
LAYOUTS: dict[str, tuple[Callable, dict[str, Any]]] = {
    "deepseek": (deepseek, FP8),
    "deepseek, ue8m0": (exponents, {**FP8, "scale_fmt": "ue8m0"}),
    "per tensor": (whole("_scale_inv", E4M3, ()), {"quant_method": "fp8", "activation_scheme": "static"}),
    "e5m2": (whole("_scale", E5M2, (1,)), {"quant_method": "fp8"}),
    "fbgemm": (rows(E4M3, torch.float32), {"quant_method": "fbgemm_fp8"}),
    "modelopt": (whole("_scale", E4M3, ()), {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "compressed tensor": (whole("_scale", E4M3, (1,), torch.bfloat16), compressed("naive-quantized")),
    "compressed channel": (rows(E4M3, torch.bfloat16), compressed(strategy="channel")),
    "compressed flat channel": (rows(E4M3, torch.float16, flat=True), compressed(strategy="channel")),
    "compressed block": (blocks(BLOCK), compressed(strategy="block", block_structure=list(BLOCK))),
    "compressed group": (blocks((1, 8)), compressed(strategy="group", group_size=8)),
    "compressed mixed": (rows(E4M3, torch.float32), {**compressed(), "format": "mixed-precision"}),
    "int8": (rows(torch.int8, torch.float32), compressed("int-quantized", strategy="channel")),
    "int8 asymmetric": (asymmetric, compressed("int-quantized", symmetric=False)),
}
LAYOUTS["compressed mixed"][1]["config_groups"]["group_0"]["format"] = "float-quantized"


def packed(source: Path, folder: Path, layout: str, before: Path | None = None) -> Path:
    """`source` in a layout in `folder`, and dequantised again in `before`."""
    make, described = LAYOUTS[layout]
    stored: Tensors = {}
    plain: Tensors = {}
    for name, weight in load_file(source / WEIGHTS).items():
        parts, plain[name] = make(name, weight) if name.endswith("proj.weight") else ({name: weight}, weight)
        stored |= parts
    config = json.loads((source / "config.json").read_text())
    save(folder, stored, {**config, "quantization_config": described})
    if before is not None:
        save(before, plain, config)
    return folder


def save(folder: Path, tensors: Tensors, config: dict[str, Any]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def edit(folder: Path, **changes: object) -> None:
    """Keys of a config's `quantization_config`."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_is_its_codes_times_their_scales(layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit; of the original it is as close as eight bits are."""
    pico.llama(layers=1, intermediate_size=76).to(dtype).save_pretrained(tmp_path / "model")
    found = find_checkpoint(str(packed(tmp_path / "model", tmp_path / "packed", layout, tmp_path / "b")), tmp_path, "x")
    original, expected = load_file(tmp_path / "model" / WEIGHTS), load_file(tmp_path / "b" / WEIGHTS)
    assert found.tensors.keys() == expected.keys()
    for name, value in found.read(found.tensors).items():
        assert (tuple(value.shape), value.dtype) == (found.tensors[name].shape, dtype)
        assert torch.equal(value, expected[name]), name
        bits = 3 if layout == "e5m2" else 4  # of a code's significand, the one that is not stored counted
        assert (value.float() - original[name].float()).abs().max() <= 2**-bits * original[name].float().abs().max()
    assert found.bytes_read == found.stored_bytes(found.tensors)


def test_dequantising_is_what_transformers_does(tmp_path: Path) -> None:
    from transformers.integrations import finegrained_fp8

    if not hasattr(finegrained_fp8, "Fp8Dequantize"):
        pytest.skip("this version of transformers dequantises on a GPU only")
    weight = torch.randn(96, 80).bfloat16()
    parts, _ = deepseek("w", weight[:72])
    theirs = finegrained_fp8.Fp8Dequantize(None).convert(
        {"weight": parts["w"], "weight_scale_inv": parts["w_scale_inv"]}
    )
    pico.llama(layers=1).bfloat16().save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    stored = {f"{Q}.weight": parts["w"], f"{Q}.weight_scale_inv": parts["w_scale_inv"]}
    save(tmp_path / "packed", stored, {**config, "quantization_config": FP8})
    found = find_checkpoint("packed", tmp_path, "x").read([f"{Q}.weight"])[f"{Q}.weight"]
    (expected,) = theirs.values()
    assert torch.equal(found, (expected[0] if isinstance(expected, list) else expected).bfloat16())


@pytest.mark.parametrize("shape", [(3, 2, 3), (3, 1, 1), (3, 50, 1), (3,), (3, 50), (1,), (), (3, 1, 100)])
def test_matrices_of_a_stack_have_scales_of_their_own(shape: tuple[int, ...], tmp_path: Path) -> None:
    codes, scales = torch.randn(3, 50, 100).to(E4M3), torch.rand(shape) + 0.5
    config = {"model_type": "llama", "dtype": "float32", "quantization_config": {**FP8, "weight_block_size": [32, 48]}}
    save(tmp_path / "packed", {"experts.gate_up_proj": codes, "experts.gate_up_proj_scale_inv": scales}, config)
    found = find_checkpoint("packed", tmp_path, "x").read(["experts.gate_up_proj"])["experts.gate_up_proj"]
    if shape == (3, 2, 3):
        scales = spread(scales, (32, 48), (50, 100))
    elif shape in ((3,), (3, 50)):
        scales = scales.reshape(*shape, *[1] * (3 - len(shape)))
    assert torch.equal(found, codes.float() * scales)


def test_eight_bits_of_a_stack_are_known_by_their_scales(tmp_path: Path) -> None:
    """Its name says nothing; without scales it is no weight, whatever `config.json` tells of."""
    pico.KINDS["qwen3-moe"]().save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    stack = "model.layers.0.mlp.experts.down_proj"
    tensors = {
        name: each
        for name, each in load_file(tmp_path / "model" / WEIGHTS).items()
        if "layers.0.mlp.experts." not in name
    }
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.randn(4, 96, 64)
    codes, scales, plain = pack(torch.randn(4, 64, 48), (1, 48), torch.int8)
    described = {**config, "quantization_config": compressed("int-quantized", strategy="channel")}
    save(tmp_path / "packed", {**tensors, stack: codes, f"{stack}_scale": scales}, described)
    assert torch.equal(find_checkpoint("packed", tmp_path, "x").read([stack])[stack], plain)
    for name, each in (("bare", described), ("plain", config)):
        save(tmp_path / name, {**tensors, stack: codes}, each)
        with pytest.raises(ff.FeatCalError, match=f"{stack} has dtype torch.int8, expected plain floating-point"):
            CheckpointSource(find_checkpoint(name, tmp_path, "x"), torch.device("cpu"))


# In every role


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return pico.save(pico.job("llama", 2, layers=1), tmp_path)


def calibrated(recipe: dict[str, Any], out: str, **changes: object) -> tuple[Tensors, Path, ff.Report]:
    folder = Path(recipe["out"]).parent / out
    report = ff.calibrate({**recipe, **changes}, out=folder)
    return load_file(folder / WEIGHTS), folder, report


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def in_form(root: Path, source: str, form: str) -> tuple[str, str]:
    """A model in a form, and dequantised beforehand."""
    folder, before = root / f"{source}-packed", root / f"{source}-before"
    if form in LAYOUTS:
        packed(root / source, folder, form, before)
    else:
        quantised(root / source, folder, FORMS[form], before)
    return str(folder), str(before)


def test_an_expert_of_eight_bits_is_the_expert_dequantised_beforehand(recipe: dict, tmp_path: Path) -> None:
    folder, before = in_form(tmp_path, "task0", "int8 asymmetric")
    found = calibrated(recipe, "found", **expert_at(recipe, "task0", Path(folder)))
    assert_equal(found[0], calibrated(recipe, "expected", **expert_at(recipe, "task0", Path(before)))[0])
    assert found[2].inputs.models["expert task0"].form == "fp8"


@pytest.mark.parametrize("form", ["deepseek", "nf4"])
def test_a_base_and_a_merged_model_may_be_quantised(form: str, recipe: dict, tmp_path: Path) -> None:
    """What is written is the model that the dequantised ones make, and says nothing of how they were stored."""
    base, plain_base = in_form(tmp_path, "base", form)
    merged, plain_merged = in_form(tmp_path, "merged", form)
    (Path(merged) / "hf_quant_config.json").write_text("{}")
    found, out, report = calibrated(recipe, "found", base_model=base, merged_model=merged)
    expected, plain, _ = calibrated(recipe, "expected", base_model=plain_base, merged_model=plain_merged)
    assert_equal(found, expected)
    assert json.loads((out / "config.json").read_text()) == json.loads((plain / "config.json").read_text())
    assert not (out / "hf_quant_config.json").exists()
    assert any("the merged model is quantised, and the calibrated model is written" in each for each in report.warnings)
    assert check(out).whole
    delta = ff.delta(out, out=tmp_path / "delta")
    assert delta.energy == ff.delta(plain, out=tmp_path / "plain-delta").energy
    Checkpoint(out, "plain")


def test_compressed_tensors_may_be_described_under_their_older_key(recipe: dict, tmp_path: Path) -> None:
    """vLLM reads it, whatever else is there: none of both may be left in what is written."""
    merged, before = in_form(tmp_path, "merged", "compressed channel")
    config = json.loads((Path(merged) / "config.json").read_text())
    config["compression_config"] = config["quantization_config"]
    (Path(merged) / "config.json").write_text(json.dumps(config))
    _, out, _ = calibrated(recipe, "both", merged_model=merged)
    del config["quantization_config"]
    assert not {"quantization_config", "compression_config"} & json.loads((out / "config.json").read_text()).keys()
    (Path(merged) / "config.json").write_text(json.dumps(config))
    older, plain = (find_checkpoint(name, tmp_path, "x") for name in (merged, before))
    assert_equal(older.read(older.tensors), plain.read(plain.tensors))


def test_a_run_on_quantised_models_goes_on_where_it_stopped(
    recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featcal_fast.checkpoints import CheckpointWriter

    merged, _ = in_form(tmp_path, "merged", "deepseek")
    expected, _, _ = calibrated(recipe, "expected", merged_model=merged)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "copy_rest", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ff.calibrate({**recipe, "merged_model": merged}, out=tmp_path / "found", checkpoint_every=1)
    ff.calibrate({**recipe, "merged_model": merged}, out=tmp_path / "found", resume=True)
    assert_equal(load_file(tmp_path / "found" / WEIGHTS), expected)


def test_a_merge_takes_the_layout_of_a_quantised_base(recipe: dict, tmp_path: Path) -> None:
    base, before = in_form(tmp_path, "base", "deepseek")
    job = {key: value for key, value in recipe.items() if key != "merged_model"} | {"merge": {"method": "average"}}
    outs = [ff.merge({**job, "base_model": each}, out=tmp_path / name) for each, name in ((base, "a"), (before, "b"))]
    assert_equal(*(load_file(out / WEIGHTS) for out in outs))
    assert "quantization_config" not in json.loads((outs[0] / "config.json").read_text())


def test_an_adapter_may_be_one_of_a_quantised_base(recipe: dict, tmp_path: Path) -> None:
    base, before = in_form(tmp_path, "base", "nf4")
    adapter = write_adapter(tmp_path / "adapter", factors(load_file(tmp_path / "base" / WEIGHTS), layers=1))
    changes = expert_at(recipe, "task0", adapter)
    found, _, _ = calibrated(recipe, "found", base_model=base, **changes)
    assert_equal(found, calibrated(recipe, "expected", base_model=before, **changes)[0])
    own = Checkpoint(tmp_path / "base", "base")
    other, plain = (find_expert(f"{each}+{adapter}", tmp_path, "expert", own) for each in (base, before))
    assert_equal(other.read(other.tensors), plain.read(plain.tensors))


def test_a_quantised_model_may_be_in_a_folder_of_its_folder(recipe: dict, tmp_path: Path) -> None:
    """As old sentence-transformers have it: what says how it is stored goes, wherever it is."""
    merged, before = in_form(tmp_path, "merged", "modelopt")
    for folder in (Path(merged), Path(before)):
        inner = folder / "0_Transformer"
        inner.mkdir()
        for name in ("config.json", WEIGHTS):
            (folder / name).rename(inner / name)
        (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "0_Transformer"}]))
    (Path(merged) / "0_Transformer" / "hf_quant_config.json").write_text("{}")
    outs = [tmp_path / name for name in ("found", "expected")]
    for folder, out in zip((merged, before), outs, strict=True):
        ff.calibrate({**recipe, "merged_model": folder}, out=out)
    found, expected = (load_file(out / "0_Transformer" / WEIGHTS) for out in outs)
    assert_equal(found, expected)
    configs = [json.loads((out / "0_Transformer" / "config.json").read_text()) for out in outs]
    assert configs[0] == configs[1]
    assert not (outs[0] / "0_Transformer" / "hf_quant_config.json").exists()


def test_an_expert_that_is_the_quantised_base_is_told_of(recipe: dict, tmp_path: Path) -> None:
    base, _ = in_form(tmp_path, "base", "deepseek")
    shutil.copytree(base, tmp_path / "same")
    _, _, report = calibrated(recipe, "o", base_model=base, **expert_at(recipe, "task0", tmp_path / "same"))
    assert any("nothing was learned by the experts of task0" in each for each in report.warnings)


def test_a_config_beside_the_weights_may_say_how_they_are_quantised(tmp_path: Path) -> None:
    """As modelopt wrote it; beside plain weights it is another model's."""
    pico.llama(layers=1).save_pretrained(tmp_path / "model")
    folder = packed(tmp_path / "model", tmp_path / "packed", "modelopt", tmp_path / "before")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    aside = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(aside))
    (tmp_path / "before" / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    found, plain = (find_checkpoint(name, tmp_path, "x") for name in ("packed", "before"))
    assert_equal(found.read(found.tensors), plain.read(plain.tensors))


# What is no such model

SCALE = f"{Q}.weight_scale_inv"


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return damage


def gone(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        save_file({own: value for own, value in load_file(folder / WEIGHTS).items() if own != name}, folder / WEIGHTS)

    return damage


def added(name: str, value: Tensor) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        save_file({**load_file(folder / WEIGHTS), name: value}, folder / WEIGHTS, {"format": "pt"})

    return damage


def told(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder, **changes)


DAMAGED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "scales gone": ("deepseek", gone(SCALE), rf"tensor {Q}.weight has .*e4m3fn, but no scales: {SCALE} and"),
    "weight gone": ("deepseek", gone(f"{Q}.weight"), rf"tensor {SCALE} is a scale of nothing"),
    "scales twice": (
        "deepseek",
        added(f"{Q}.scale", torch.ones(1)),
        rf"{Q}.weight has scales twice, {SCALE} and {Q}.s",
    ),
    "weight plain": ("deepseek", put(f"{Q}.weight", Tensor.float), rf"tensor {SCALE} is a scale of nothing"),
    "scales short": ("deepseek", put(SCALE, lambda t: t[:1]), rf"tensor {SCALE} has shape \(1, 2\), .*24 x 40"),
    "scales deep": ("deepseek", put(SCALE, lambda t: t[None]), rf"tensor {SCALE} has shape \(1, 3, 2\)"),
    "scales of integers": ("deepseek", put(SCALE, Tensor.long), rf"tensor {SCALE} has dtype torch.int64"),
    "scales of bytes": ("deepseek", put(SCALE, lambda t: t.to(torch.uint8)), rf"tensor {SCALE} has dtype torch.uint8"),
    "flat codes": ("deepseek", put(f"{Q}.weight", lambda t: t.reshape(-1)), rf"tensor {Q}.weight has shape \(4096,\)"),
    "no codes": ("deepseek", put(f"{Q}.weight", lambda t: t[:0]), rf"tensor {Q}.weight has shape \(0, 64\)"),
    "int8 codes": ("deepseek", put(f"{Q}.weight", lambda t: t.view(torch.int8)), rf"{Q}.weight has dtype torch.int8"),
    "zero points": ("deepseek", added(f"{Q}.weight_zero_point", torch.zeros(2, 2)), r"weight_zero_point has shape"),
    "another block": (
        "deepseek",
        told(weight_block_size=[128, 128]),
        r"scale_inv has shape .* or for 128 x 128 values",
    ),
    "no block": ("deepseek", told(weight_block_size=[128]), r"found weight_block_size \[128\], expected two sizes"),
    "block of zero": ("deepseek", told(weight_block_size=[0, 128]), r"found weight_block_size \[0, 128\]"),
    "block of text": ("deepseek", told(weight_block_size="128"), r"found weight_block_size '128'"),
    "huge block": ("deepseek", told(weight_block_size=[10**30, 1]), r"found weight_block_size"),
    "FP4": ("deepseek", told(expert_dtype="fp4"), "found expert_dtype 'fp4', expected fp8"),
    "NVFP4": ("modelopt", told(quant_algo="NVFP4"), "found quant_algo 'NVFP4', expected one of FP8"),
    "second scales": ("modelopt", added(f"{Q}.weight_scale_2", torch.ones(1)), r"weight_scale_2 is of .* \(NVFP4\)"),
    "packed": ("int8", told(format="pack-quantized"), "compressed-tensors format 'pack-quantized', expected one of"),
    "packed within": (
        "compressed mixed",
        told(config_groups={"a": {"format": "nvfp4-pack-quantized"}}),
        "compressed-tensors format 'nvfp4-pack-quantized'",
    ),
    "groups of text": ("int8", told(config_groups={"a": ["Linear"]}), "found config_groups"),
    "sparse": ("int8", told(sparsity_config={"format": "sparse-24-bitmask"}), "found sparsity_config"),
    "rotated": ("int8", told(transform_config={"config_groups": {"u": {}}}), "found a transform_config"),
    "reordered": ("int8", added(f"{Q}.weight_g_idx", torch.zeros(64, dtype=torch.int32)), "columns in another order"),
    "packed weights": ("int8", added(f"{Q}.weight_packed", torch.zeros(4, dtype=torch.int32)), "fewer than eight bits"),
    "zero points short": ("int8 asymmetric", put(f"{Q}.weight_zero_point", lambda t: t[1:]), "zero_point has shape"),
    "another dtype": (
        "deepseek",
        lambda folder: (folder / "config.json").write_text(
            json.dumps({**json.loads((folder / "config.json").read_text()), "dtype": "float64"})
        ),
        "found dtype 'float64', expected one of float16",
    ),
}
VALUES: dict[str, tuple[Callable[[Path], None], str]] = {
    "nan code": (put(f"{Q}.weight", lambda t: (t.view(torch.uint8) | 127).view(E4M3)), "is not finite once"),
    **{
        f"scale {value}": (
            put(SCALE, lambda t, value=value: torch.full_like(t, value)),
            rf"has the scale {number} in {SCALE}, expected some above 0",
        )
        for value, number in ((0.0, "0"), (-1.0, "-1"), (torch.inf, "inf"), (torch.nan, "nan"), (1e30, r"1e\+30"))
    },
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_no_model_of_eight_bits_is_told_so(case: str, tmp_path: Path) -> None:
    layout, damage, message = DAMAGED[case]
    pico.llama(layers=1).save_pretrained(tmp_path / "model")
    damage(packed(tmp_path / "model", tmp_path / "packed", layout))
    with pytest.raises(ff.FeatCalError, match=rf"(?s)the model: {tmp_path}/packed/.*{message}"):
        find_expert("packed", tmp_path, "the model", None)


@pytest.mark.parametrize("case", VALUES)
def test_codes_and_scales_that_are_no_numbers_are_told_of(case: str, tmp_path: Path) -> None:
    damage, message = VALUES[case]
    pico.llama(layers=1).save_pretrained(tmp_path / "model")
    damage(packed(tmp_path / "model", tmp_path / "packed", "deepseek"))
    found = find_checkpoint("packed", tmp_path, "the model")
    with pytest.raises(ff.FeatCalError, match=rf"the model: .*{WEIGHTS}: tensor {Q}.weight {message}"):
        found.read(found.tensors)
