"""Checkpoints in layouts that transformers converts as it loads them, by its own mapping."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pico
import pytest
import torch
import transformers
from forms import expert_at, write_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor

import featcal_fast as ff
from featcal_fast.checkpoints import Checkpoint, find_expert
from featcal_fast.job.loads import check_loads
from featcal_fast.models.conversions import Conversion

GIANT = {**pico.IMAGE, "use_swiglu_ffn": True}
MIXTURE = {**pico.DECODER, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
MIXTURE |= {"moe_intermediate_size": 48, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
MIXTURE |= {"mlp_layer_types": ["dense", "sparse"], "n_group": 1, "topk_group": 1, "num_shared_experts": 1}
KINDS = {
    "dino giant": partial(pico._model, "Dinov2Model", "Dinov2Config", GIANT),
    "exaone": partial(pico._model, "ExaoneMoeForCausalLM", "ExaoneMoeConfig", MIXTURE),
}
Tensors = dict[str, Tensor]


def tensors_of(folder: Path | str) -> Tensors:
    return load_file(Path(folder) / "model.safetensors")


def write(folder: Path | str, tensors: Tensors) -> None:
    save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})


def small(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[pico.Job, dict]:
    monkeypatch.setitem(pico.KINDS, kind, KINDS.get(kind) or pico.KINDS[kind])
    job = pico.job(kind, 1)
    job.batches = {task: batches[:1] for task, batches in job.batches.items()}
    return job, pico.save(job, folder)


def as_in_memory(folder: Path, model: torch.nn.Module) -> None:
    """A checkpoint with the names, and the tensors, that a model of this version of transformers has."""
    write(folder, {name: value.contiguous().clone() for name, value in model.state_dict().items()})


def written(recipe: dict, out: Path, **changes: object) -> Tensors:
    ff.calibrate({**recipe, **changes}, out=out, device="cpu")
    return tensors_of(out)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if hasattr(transformers, KINDS[kind].args[0])])
def test_the_result_is_that_of_the_models_in_memory(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the layout of files, of which each model here has another one, and as transformers loads it."""
    job, recipe = small(kind, tmp_path, monkeypatch)
    before = tensors_of(tmp_path / "merged")
    found = written(recipe, tmp_path / "out")
    assert {name: value.shape for name, value in found.items()} == {name: each.shape for name, each in before.items()}
    as_in_memory(tmp_path / "task0", job.experts["task0"])
    again = written(recipe, tmp_path / "again")
    assert all(torch.equal(again[name], value) for name, value in found.items())
    ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches, device="cpu")
    loaded = type(job.merged).from_pretrained(tmp_path / "out")
    merged, changed = type(job.merged).from_pretrained(tmp_path / "merged"), 0
    for (name, value), expected in zip(loaded.named_parameters(), job.merged.parameters(), strict=True):
        assert (value - expected).norm() <= 1e-5 * expected.norm(), name
        changed += not torch.equal(value, merged.get_parameter(name))
    assert changed > 10


def test_the_delta_of_a_model_whose_tensors_hold_several_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter names the modules of the model, whatever tensors they have in files."""
    job, recipe = small("dino giant", tmp_path, monkeypatch)
    ff.calibrate(recipe, out=tmp_path / "out", device="cpu")
    ff.delta(tmp_path / "out", out=tmp_path / "delta", rank=4, device="cpu")
    found = load_file(tmp_path / "delta" / "adapter_model.safetensors")
    expected = {name for name, module in job.base.named_modules() if type(module) is torch.nn.Linear}
    assert {name.removeprefix("base_model.model.").split(".lora_")[0] for name in found if ".lora_" in name} == expected


def test_layouts_that_differ_in_names_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, recipe = small("vit", tmp_path, monkeypatch)
    recipe = {**recipe, "merge": {"method": "average"}}
    del recipe["merged_model"]
    expected = tensors_of(ff.merge(recipe, out=tmp_path / "plain"))
    as_in_memory(tmp_path / "task0", job.experts["task0"])
    found = tensors_of(ff.merge(recipe, out=tmp_path / "merge"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], each) for name, each in expected.items())


def test_tensors_that_are_no_parameters_are_not_asked_of_experts(tmp_path: Path) -> None:
    """As older versions wrote them: GPT-2's masks, and rotary angles."""
    recipe = {**pico.save(pico.job("gpt2", 1), tmp_path), "merge": {"method": "average"}}
    del recipe["merged_model"]
    expected, masks = tensors_of(ff.merge(recipe, out=tmp_path / "plain")), torch.ones(1, 1, 64, 64).tril()
    older = {f"transformer.h.{layer}.attn.bias": masks.clone() for layer in range(2)}
    write(tmp_path / "base", tensors_of(tmp_path / "base") | older)
    found = tensors_of(ff.merge(recipe, out=tmp_path / "merge"))
    assert found.keys() == expected.keys() | older.keys()
    assert all(torch.equal(found[name], each) for name, each in (expected | older).items())


def test_layouts_that_differ_in_more_are_not_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, recipe = small("dino giant", tmp_path, monkeypatch)
    recipe = {**recipe, "merge": {"method": "average"}}
    del recipe["merged_model"]
    if not any("gate_proj" in name for name in job.base.state_dict()):
        pytest.skip("this version of transformers has one layout only")
    as_in_memory(tmp_path / "task0", job.experts["task0"])
    with pytest.raises(
        ff.FeatCalError, match=r"expert task0: .* where the base model .*weights_in.*layouts that differ"
    ):
        ff.merge(recipe, out=tmp_path / "merge")


def test_adapters_name_modules_in_either_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As files have them, and as models in memory have them, which differ from some version of transformers on."""
    job, _ = small("vit", tmp_path, monkeypatch)
    stored = "encoder.layer.0.attention.attention.query"
    in_memory = next(name for name, _ in job.base.named_modules() if name.endswith(("0.attention.q_proj", stored)))
    results = []
    for number, name in enumerate((stored, in_memory)):
        factors = {f"{name}.lora_A.weight": torch.ones(4, 48), f"{name}.lora_B.weight": torch.full((48, 4), 0.01)}
        adapter = write_adapter(tmp_path / f"adapter{number}", factors, target_modules=[name])
        expert = find_expert(str(adapter), tmp_path, "expert", Checkpoint(tmp_path / "base", "base"))
        results.append(expert.read(expert.changed()))
    assert len(results[0]) == 1
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_an_adapter_of_a_part_of_a_tensor_is_refused_for_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, recipe = small("dino giant", tmp_path, monkeypatch)
    name = next((each for each, _ in job.base.named_modules() if each.endswith("0.mlp.gate_proj")), None)
    if name is None:
        pytest.skip("this version of transformers has one layout only")
    factors = {f"{name}.lora_A.weight": torch.ones(4, 48), f"{name}.lora_B.weight": torch.ones(136, 4)}
    adapter = write_adapter(tmp_path / "adapter", factors, target_modules=["gate_proj"])
    with pytest.raises(ff.FeatCalError, match=r"gate_proj.weight, which the base model .* stores in another layout"):
        ff.plan({**recipe, **expert_at(recipe, "task0", adapter)}, device="cpu")


def test_a_layout_that_is_not_supported_is_called_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pico.KINDS["qwen3-moe"]().save_pretrained(tmp_path)

    def convert(self: Conversion, tensors: object) -> None:
        raise NotImplementedError("of values")

    monkeypatch.setattr(Conversion, "convert", convert)
    with pytest.raises(ff.FeatCalError, match=r"experts.*MergeModulelist.*this layout is not supported") as found:
        check_loads(tmp_path)
    assert "download" not in str(found.value)


def test_two_tensors_that_become_one_are_refused(tmp_path: Path) -> None:
    pico.KINDS["bert"]().save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path)
    old = "embeddings.LayerNorm.gamma"
    write(tmp_path, {**tensors, old: tensors["embeddings.LayerNorm.weight"] + 1})
    with pytest.raises(
        ff.FeatCalError, match=f"(LayerNorm.weight and {old}|{old} and).* are both embeddings.LayerNorm"
    ):
        check_loads(tmp_path)


def test_without_a_mapping_names_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a private module of transformers."""
    model = pico.KINDS["vit"]()
    model.save_pretrained(tmp_path)
    as_in_memory(tmp_path, model)
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    check_loads(tmp_path, Checkpoint(tmp_path, "model"))
