"""Every family: stepped block by block it is the model itself, calibrated it is the reference, written it loads."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_engine import calibrated, update_errors
from torch import Tensor, nn

import featcal_fast as ff
from featcal_fast import reference
from featcal_fast.data.batches import load_batches
from featcal_fast.forward.calls import stage_inputs
from featcal_fast.models import FAMILIES, families_table, find_structure

KINDS = list(pico.KINDS)
PADDED = [kind for kind in KINDS if "input_ids" in pico.batches_for(kind, 0)[0]]
GENERATING = [kind for kind in PADDED if "bert" not in kind]
# Linear weights calibrated in each layer, and what must be among those kept.
WEIGHTS = {
    "clip": ([6, 6, 6], ()),
    "clip whole": ([6, 6], ("text_model.encoder.layers.0.mlp.fc1", "visual_projection")),
    "llama tied": ([7, 7], ()),
    "phi3": ([4, 4], ("lm_head",)),
    "mixtral": ([4, 4], ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.gate", "lm_head")),
    "qwen2-moe": ([8, 8], ("model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.gate", "lm_head")),
    "qwen3-moe": ([4, 4], ("model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.gate", "lm_head")),
    "gpt2": ([4, 4], ()),
    "t5": ([6, 6, 10, 10], ()),
    "flan-t5": ([7, 7, 7, 11, 11], ()),
    "vit classifier": ([6, 6], ("classifier",)),
    "bert": ([6, 6], ("pooler.dense",)),
}


def stepped(model: nn.Module, batch: pico.Batch) -> list[Tensor]:
    """The hidden states after each stage's last block, through the block runner."""
    structure, out = find_structure(model, "model"), []
    for stage in range(len(structure.paths)):
        hidden, calls = stage_inputs(structure, batch, stage, out[-1] if out else None)
        for number, block in enumerate(structure.stage(stage)):
            hidden = calls.run(number, block, hidden)
        out.append(hidden)
    return out


def whole(model: nn.Module, batch: pico.Batch) -> list[Tensor]:
    """The same, as they pass in one forward of the model."""
    structure, out = find_structure(model, "model"), []
    hooks = [
        structure.stage(stage)[-1].register_forward_hook(
            lambda _module, _args, result: out.append(result[0] if isinstance(result, tuple) else result)
        )
        for stage in range(len(structure.paths))
    ]
    structure.entry(**batch)
    for hook in hooks:
        hook.remove()
    return out


@pytest.mark.parametrize(("kind", "padding"), [*((k, "right") for k in KINDS), *((k, "left") for k in PADDED)])
@torch.no_grad()
def test_block_by_block_is_the_models_own_forward(kind: str, padding: str) -> None:
    model, batch = pico.job(kind, 1).merged, pico.batches_for(kind, 3, padding)[0]
    for ours, theirs in zip(stepped(model, batch), whole(model, batch), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("clip", "llama")])
def test_engine_matches_the_float64_reference(kind: str) -> None:
    job, settings = pico.job(kind, 2), ff.Settings()
    judge = calibrated(reference.calibrate_model, job.double(), settings)
    plain = calibrated(reference.calibrate_model, job.copy(), settings)
    merged = copy.deepcopy(job.merged)
    report = ff.calibrate_model(merged, base=job.base, experts=job.experts, batches=job.batches, settings=settings)
    errors, plain_errors = update_errors(merged, judge, job.merged), update_errors(plain, judge, job.merged)
    for name, (error, rounding) in errors.items():
        if rounding < 1e-6:  # an update well above the parameter's own rounding
            assert error <= 2e-5, f"{name}: {error:.1e}"
            assert error <= plain_errors[name][0], f"{name}: {error:.1e} > {plain_errors[name][0]:.1e}"
        assert error <= 2e-5 + 2 * rounding, f"{name}: {error:.1e}"

    changed = {name for name, p in merged.named_parameters() if not torch.equal(p, job.merged.get_parameter(name))}
    assert {name for name in changed if merged.get_parameter(name).ndim > 1} == {
        f"{layer.path}.{module}.weight"
        for layer, done in zip(find_structure(merged, "").layers, report.layers, strict=True)
        for group in done.groups
        for module in group.modules
    }


@pytest.mark.parametrize("kind", WEIGHTS)
def test_every_linear_weight_is_calibrated_or_listed(kind: str) -> None:
    job, (per_layer, kept) = pico.job(kind, 1), WEIGHTS[kind]
    report = ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)
    assert [sum(len(group.modules) for group in layer.groups) for layer in report.layers] == list(per_layer)
    assert set(kept) <= report.kept.keys()
    assert all(report.kept.values())
    assert bool(kept) == bool(report.kept)


@pytest.mark.parametrize("kind", KINDS)
def test_folders_give_the_same_bits_and_load(kind: str, tmp_path: Path) -> None:
    job = pico.job(kind, 2)
    recipe = pico.save(job, tmp_path)
    written = ff.calibrate(recipe)
    batches = {
        task: load_batches(expert["data"], folders=[], batch_size=recipe["batch_size"])
        for task, expert in recipe["experts"].items()
    }
    report = ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=batches)
    assert (written.calibrated, written.kept) == (report.calibrated, report.kept)
    found, info = type(job.merged).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, parameter in job.merged.named_parameters():
        assert torch.equal(parameter, found.get_parameter(name)), name
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("merged", "out"))
    assert {name: (value.shape, value.dtype) for name, value in before.items()} == {
        name: (value.shape, value.dtype) for name, value in after.items()
    }
    if kind in GENERATING:
        batch = {key: value for key, value in batches["task0"][0].items() if key != "labels"}
        assert found.generate(**batch, max_new_tokens=3, do_sample=False).shape[0] == 4


def test_a_head_of_its_own_is_read_listed_and_kept(tmp_path: Path) -> None:
    """FLAN-T5's checkpoints hold a head that is not the embedding, whatever their config says of tying."""
    recipe = pico.save(pico.job("flan-t5", 1), tmp_path)
    head = torch.randn(100, 48)
    for folder in ("base", "merged", "task0"):
        path = tmp_path / folder / "model.safetensors"
        save_file({**load_file(path), "lm_head.weight": head}, path, metadata={"format": "pt"})
    report = ff.calibrate(recipe)
    assert report.kept == {"lm_head": "outside of the layers"}
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], head)


@pytest.mark.parametrize(
    ("kind", "padding"),
    [(kind, "right") for kind in ("gemma3", "gpt2", "t5", "bert", "qwen2-moe")] + [("gemma3", "left"), ("t5", "left")],
)
def test_padding_never_counts(kind: str, padding: str) -> None:
    """A padded batch gives what its rows give one by one, unpadded: inputs, targets, and what targets look at."""
    job = pico.job(kind, 2)
    job.batches = {task: pico.batches_for(kind, seed, padding)[:3] for seed, task in enumerate(job.batches)}
    alone = job.copy()
    for task, batches in alone.batches.items():
        alone.batches[task] = [_row(batch, row) for batch in batches for row in range(4)]
    a, b = (calibrated(ff.calibrate_model, each, ff.Settings()) for each in (job, alone))
    for name, (error, rounding) in update_errors(a, copy.deepcopy(b).double(), job.merged).items():
        assert error < 1e-5 + 4 * rounding, f"{name}: {error:.1e}"


def _row(batch: pico.Batch, row: int) -> pico.Batch:
    """One row of a batch, without its padding."""
    out = {"input_ids": batch["input_ids"][row][batch["attention_mask"][row].bool()][None]}
    if "labels" in batch:
        labels = batch["labels"][row]
        out["labels"] = labels[labels != -100][None]
    return out


def test_given_decoder_inputs_are_as_good_as_labels() -> None:
    job = pico.job("flan-t5", 2)
    given = job.copy()
    for batches in given.batches.values():
        for batch in batches:
            labels = batch.pop("labels")
            batch["decoder_attention_mask"] = (labels != -100).long()
            batch["decoder_input_ids"] = job.base._shift_right(labels)
    a, b = (calibrated(ff.calibrate_model, each, ff.Settings()) for each in (job, given))
    for name, (error, rounding) in update_errors(a, copy.deepcopy(b).double(), job.merged).items():
        assert error < 1e-5 + 4 * rounding, f"{name}: {error:.1e}"


def test_cross_attention_reads_the_encoders_final_output() -> None:
    """Keys and values share moments over encoder tokens; the student's come from the calibrated encoder."""
    job, seen = pico.job("t5", 1), []
    report = ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)
    groups = [set(group.modules) for group in report.layers[2].groups]
    assert {"layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"} in groups
    assert {"layer.1.EncDecAttention.q"} in groups
    assert report.tokens == {
        task: sum(int(batch["attention_mask"].sum() + (batch["labels"] != -100).sum()) for batch in batches)
        for task, batches in job.batches.items()
    }
    batch = job.batches["task0"][0]
    for block in job.merged.decoder.block:
        block.layer[1].EncDecAttention.k.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        encoded = job.merged.encoder(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        outputs = stepped(job.merged, batch)
    assert len(seen) == 3  # both blocks, and the first for its position biases
    assert all((x - encoded).abs().max() < 1e-5 for x in seen)
    assert outputs[1].shape[1] == batch["labels"].shape[1]


def test_position_biases_are_handed_on() -> None:
    job = pico.job("t5", 1)
    structure, batch = find_structure(job.merged, "model"), job.batches["task0"][0]
    with torch.no_grad():
        _, calls = stage_inputs(structure, batch)
        hidden, decoding = stage_inputs(structure, batch, 1, torch.zeros(4, 20, 48))
    assert hidden.shape == (4, 11, 48)
    assert calls.args[1][1].shape == (1, 4, 20, 20) or calls.args[1][1].shape == (4, 4, 20, 20)
    assert calls.args[1][1].abs().max() > 0
    assert decoding.args[1][1].abs().max() > 0


def test_targets_are_asked_for_before_anything_runs() -> None:
    job = pico.job("t5", 1)
    del job.batches["task0"][2]["labels"]
    with pytest.raises(ff.FeatCalError, match=r"task task0, batch 2: found input_ids, .* expected labels or dec"):
        ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)


def test_wo_in_float32_inside_of_a_bfloat16_t5(tmp_path: Path) -> None:
    job = pico.job("flan-t5", 2)
    for model in (job.base, job.merged, *job.experts.values()):
        model.bfloat16()
        for name, module in model.named_modules():
            if name.endswith(".wo"):
                module.float()
    recipe = pico.save(job, tmp_path)
    judge = calibrated(reference.calibrate_model, job.double(), ff.Settings())
    found = calibrated(ff.calibrate_model, job, ff.Settings())
    for name, (error, _) in update_errors(found, judge, job.merged).items():
        assert error < 0.15, f"{name}: {error:.1e}"
    ff.calibrate(recipe)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for name, value in written.items() if name.endswith(".wo.weight")} == {torch.float32}
    assert {value.dtype for name, value in written.items() if not name.endswith(".wo.weight")} == {torch.bfloat16}


@pytest.mark.parametrize(("kind", "targets"), [("flan-t5", (".q", ".v", ".wo")), ("gpt2", (".c_attn",))])
def test_lora_experts_are_the_experts_merged_beforehand(kind: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    job, generator = pico.job(kind, 1), torch.Generator().manual_seed(0)
    expert, factors, transposed = copy.deepcopy(job.base), {}, kind == "gpt2"
    for name, weight in expert.named_parameters():
        module = name.removesuffix(".weight")
        if module.endswith(targets) and name != module:
            out, size = reversed(weight.shape) if transposed else weight.shape
            a, b = torch.randn(4, size, generator=generator), 0.1 * torch.randn(out, 4, generator=generator)
            factors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
            weight.data += (2 * b @ a).mT if transposed else 2 * b @ a
    job.experts = {"task0": expert}
    recipe = pico.save(job, tmp_path)
    ff.calibrate({**recipe, "out": str(tmp_path / "whole")})
    shutil.rmtree(tmp_path / "task0")
    (tmp_path / "task0").mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "fan_in_fan_out": transposed}
    (tmp_path / "task0" / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["any"]}))
    save_file(factors, tmp_path / "task0" / "adapter_model.safetensors")
    ff.calibrate(recipe)
    a, b = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "out"))
    assert factors
    assert all((value - b[name]).norm() <= 1e-5 * value.norm() for name, value in a.items())


# Names on disk that are not the model's.


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt2", {"transformer.": ""}),  # as openai-community/gpt2 has them, masks among the weights
        ("bert classifier", {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}),
        ("mixtral", {}),
    ],
)
def test_names_on_disk_are_kept(kind: str, changes: dict[str, str], tmp_path: Path) -> None:
    job = pico.job(kind, 1)
    recipe = pico.save(job, tmp_path)
    ff.calibrate({**recipe, "out": str(tmp_path / "plain")})
    for folder in ("base", "merged", "task0"):
        path = tmp_path / folder / "model.safetensors"
        weights = {_renamed(name, changes): value for name, value in load_file(path).items()}
        if kind == "gpt2":
            weights["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
        save_file(weights, path, metadata={"format": "pt"})
    ff.calibrate(recipe)
    plain, out = (load_file(tmp_path / folder / "model.safetensors") for folder in ("plain", "out"))
    assert all(torch.equal(value, out[_renamed(name, changes)]) for name, value in plain.items())


def test_a_missing_routed_matrix_is_an_error(tmp_path: Path) -> None:
    recipe = pico.save(pico.job("qwen3-moe", 1), tmp_path)
    path = tmp_path / "task0" / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        ff.FeatCalError, match=r"expert task0: .*task0: tensor model.layers.1.mlp.experts.*expected \(4, 96, 64\)"
    ):
        ff.calibrate(recipe)


def _renamed(name: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        name = name.replace(old, new)
    return name


# What to calibrate.


@pytest.mark.parametrize(
    ("settings", "calibrated_names"),
    [
        ({"include": ["q_proj", "mlp.down_proj"]}, r".*\.(q_proj|mlp\.down_proj)"),
        ({"include": r"model\.layers\.[12]\..*", "exclude": ["o_proj"]}, r"model\.layers\.[12]\.(?!.*o_proj).*"),
        ({"exclude": r".*layers\.0\..*|.*down_proj"}, r"model\.layers\.[12]\.(?!.*down_proj).*"),
    ],
)
def test_include_and_exclude(settings: dict, calibrated_names: str) -> None:
    job = pico.job("llama", 2)
    modules = [name for name, module in job.merged.model.named_modules(prefix="model") if isinstance(module, nn.Linear)]
    expected = {name for name in modules if re.fullmatch(calibrated_names, name)}
    judge = calibrated(reference.calibrate_model, job.double(), ff.Settings(**settings))
    merged = copy.deepcopy(job.merged)
    report = ff.calibrate_model(
        merged, base=job.base, experts=job.experts, batches=job.batches, settings=ff.Settings.from_dict(settings)
    )
    changed = {name for name, p in merged.named_parameters() if not torch.equal(p, job.merged.get_parameter(name))}
    assert changed == {f"{name}.weight" for name in expected}
    assert report.kept.keys() == {"lm_head", *modules} - expected
    assert set(report.kept.values()) <= {"excluded", "not included", "outside of the layers"}
    assert report.calibrated == len(expected)
    for name, (error, rounding) in update_errors(merged, judge, job.merged).items():
        assert error <= 2e-5 + 2 * rounding, f"{name}: {error:.1e}"


def test_excluded_layernorms_keep_their_values() -> None:
    job = pico.job("clip", 1)
    found = calibrated(ff.calibrate_model, job, ff.Settings(exclude=["layer_norm1", "fc1"]))
    changed = {name for name, p in found.named_parameters() if not torch.equal(p, job.merged.get_parameter(name))}
    assert changed
    assert not [name for name in changed if "layer_norm1" in name or "fc1" in name]
    assert any("layer_norm2" in name for name in changed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exclude": ["q_prj"]}, r"settings.exclude: 'q_prj' matches no module inside of the layers"),
        ({"include": r".*lm_head"}, r"settings.include: '.*lm_head' matches no module"),
        ({"include": "("}, r"settings.include: '\(' is not a regular expression"),
        ({"exclude": []}, r"settings.exclude: found \[\], expected a regular expression or a list"),
        ({"exclude": r".*"}, r"include and exclude leave no module to calibrate"),
    ],
)
def test_patterns_that_cannot_be_meant(settings: dict, message: str) -> None:
    job = pico.job("llama", 1)
    with pytest.raises(ff.FeatCalError, match=message):
        ff.calibrate_model(
            job.merged,
            base=job.base,
            experts=job.experts,
            batches=job.batches,
            settings=ff.Settings.from_dict(settings),
        )


def test_a_model_that_works_between_its_blocks_is_refused() -> None:
    """The block runner would not be the model."""
    job = pico.job("llama", 1)
    job.merged.model.layers[0].register_forward_hook(lambda _module, _args, out: out * 2)
    with pytest.raises(ff.FeatCalError, match="changes hidden states between its blocks"):
        ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)


def test_the_table_of_families_names_them_all() -> None:
    table = families_table()
    assert table.startswith("| Family | Models | Notes |\n| --- | --- | --- |\n")
    assert len(table.splitlines()) == 2 + len(FAMILIES)
    assert all(f"| {family.name} | {family.models} |" in table for family in FAMILIES)
    assert {find_structure(pico.KINDS[kind](), kind).family.name for kind in KINDS} == {each.name for each in FAMILIES}
