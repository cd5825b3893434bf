"""Upstream mergers in jobs: every method from a recipe, what is read and held, and what a recipe may say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from merge_reference import changes
from merge_reference import ties as ties_reference
from merge_reference import wudi as wudi_reference
from safetensors.torch import load_file, save_file
from torch import Tensor
from unions import BASE, MERGES, SIZES, save_tokenizer, tensors, with_rows

import featcal_fast as ff
from featcal_fast.checkpoints import Checkpoint
from featcal_fast.errors import CheckpointError, RecipeError, UnsupportedModelError
from featcal_fast.inputs.models import RecipeModels
from featcal_fast.merging import merged as merging
from featcal_fast.merging.dare import kept
from featcal_fast.merging.merged import merge_tensor
from featcal_fast.merging.method import Options
from featcal_fast.merging.methods import METHODS
from featcal_fast.models.meta import linear_tensors

CPU = torch.device("cpu")
ELEMENTWISE = [name for name, method in METHODS.items() if method.matrix_bytes is None]
TWICE = ["ties", "slerp", "model_stock"]  # what needs facts of a whole tensor first
COUNTS = {"slerp": 2}  # experts, else 3


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three experts, in bfloat16."""
    folder = tmp_path_factory.mktemp("llama")
    job = pico.job("llama", 3)
    for model in (job.base, job.merged, *job.experts.values()):
        model.to(torch.bfloat16)
    recipe = pico.save(job, folder)
    del recipe["merged_model"]
    return recipe


def with_method(recipe: dict[str, Any], method: str, **options: Any) -> dict[str, Any]:
    """The recipe with as many experts as the method takes."""
    experts = dict(list(recipe["experts"].items())[: COUNTS.get(method, 3)])
    return {**recipe, "experts": experts, "merge": {"method": method, **options}}


def load(folder: Path | str) -> dict[str, Tensor]:
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_a_model(method: str, llama: dict[str, Any], tmp_path: Path) -> None:
    recipe = with_method(llama, method)
    models = RecipeModels(ff.Recipe.load(recipe))
    found, base = models.merged.read(models.merged.tensors), load(recipe["base_model"])
    assert sum(models.bytes_read.values()) == models.merged.stored_bytes(models.merged.tensors)
    written = load(ff.merge(recipe, out=tmp_path / "merged"))
    for name, tensor in written.items():
        assert torch.equal(tensor, found[name]), name
        assert tensor.dtype == torch.bfloat16
    assert sum(not torch.equal(tensor, base[name]) for name, tensor in written.items()) > 5  # of 12


@pytest.mark.parametrize("method", ["slerp", "wudi"])
def test_a_job_begins_with_the_merge(method: str, llama: dict[str, Any], tmp_path: Path) -> None:
    """And a plan knows what is read for it."""
    recipe = with_method(llama, method)
    plan, report = ff.plan(recipe), ff.calibrate({**recipe, "out": str(tmp_path / "out")})
    assert report.bytes_read == plan.bytes_read
    assert "if reading and merging keep up" in plan.summary(1e12)
    assert report.recipe["merge"] == {"method": method, **METHODS[method].defaults}
    found, written = load(tmp_path / "out"), load(ff.merge(recipe, out=tmp_path / "merged"))
    for name in ("model.embed_tokens.weight", "model.norm.weight"):  # which calibration leaves alone
        assert torch.equal(found[name], written[name]), name


@pytest.mark.parametrize("method", TWICE)
def test_what_has_no_room_is_read_again(
    method: str, llama: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ff.Recipe.load(with_method(llama, method))

    def merge(folder: Path) -> tuple[RecipeModels, dict[str, Tensor]]:
        models = RecipeModels(recipe)
        return models, models.merged.read(models.merged.tensors)

    once, found = merge(tmp_path / "once")
    monkeypatch.setattr(merging, "IN_MEMORY", 0)
    again, same = merge(tmp_path / "again")
    assert all(torch.equal(found[name], same[name]) for name in found)
    options = recipe.merge.options(recipe.experts)
    passes = METHODS[method].passes(options)
    for models, times in ((once, 1), (again, passes)):
        expected = dict.fromkeys(models.bytes_read, times * once.nbytes)
        if not METHODS[method].needs_base:
            expected["base model"] = 0
        assert models.bytes_read == expected
    assert sum(again.bytes_read.values()) == again.merged.stored_bytes(again.merged.tensors)


def test_a_gpu_merges_there(llama: dict[str, Any]) -> None:
    """As far as a machine without one can tell: a plan for one counts what merging takes of its memory."""
    matrix = 4 * 64 * 160  # bytes in float32 of the largest, which fits into a part
    taken = {
        method: ff.plan(with_method(llama, method), device="cuda", device_memory="22GiB").device_items["merging"]
        for method in ("average", "ties", "tsv")
    }
    assert taken["average"] == 4 * matrix
    assert taken["ties"] == 10 * matrix
    assert taken["tsv"] > 4 * matrix


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_parts_do_not_matter(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    base, *others = torch.randn(4, 7, 311, generator=generator).bfloat16()
    experts = {f"task{i}": each for i, each in enumerate(others[: COUNTS.get(method, 3)])}
    options = Options((0.5, 1.0, 2.0)[: len(experts)], density=0.3, t=0.3)
    found = [merge_tensor(METHODS[method], options, base, experts, size) for size in (10**6, 2177, 1000, 311, 64, 7)]
    assert all(torch.equal(each, found[0]) for each in found[1:])


PEAK = """
import json, sys
from featcal_fast.inputs.models import RecipeModels
from featcal_fast.inputs.recipe import Recipe
from featcal_fast.merging import merged, stack
from featcal_fast.streaming.malloc import configure_process

def high():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def rise(method, name):
    models = RecipeModels(Recipe.load({**recipe, "merge": {"method": method}}))
    open("/proc/self/clear_refs", "w").write("5")
    before = high()
    models.merged.read([name])
    return high() - before

configure_process()
merged.IN_MEMORY, stack.PART = 0, 2**15
recipe = json.loads(sys.argv[1])
print(json.dumps({method: [rise(method, name) for name in ("small", "large")][1] for method in sys.argv[2:]}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not reset a process's peak")
def test_no_tensor_is_there_but_the_result(llama: dict[str, Any], tmp_path: Path) -> None:
    """Beside the merged tensor, which has 8 MiB, there is room for parts alone: not for another one.

    Of the tensor itself some may find room in memory that was freed before.
    """
    base = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name, change in (("base", 0.0), ("math", 0.1), ("code", 0.2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((Path(llama["base_model"]) / "config.json").read_bytes())
        large = base + change * base.roll(5)
        save_file({"large": large, "small": large[:99].clone()}, tmp_path / name / "model.safetensors")
    experts = {name: {"model": str(tmp_path / name), "data": "none.jsonl"} for name in ("math", "code")}
    recipe = json.dumps({"base_model": str(tmp_path / "base"), "experts": experts})
    methods = ["average", "dare_ties", *TWICE]
    done = subprocess.run([sys.executable, "-c", PEAK, recipe, *methods], capture_output=True, check=True, text=True)
    found = json.loads(done.stdout)
    assert [*found] == methods
    assert all(0.5 * base.nbytes <= peak <= 1.5 * base.nbytes for peak in found.values()), found


def test_what_is_dropped_depends_on_nothing_else() -> None:
    chosen = kept(3, "math", "a.weight", 0, 2**21 + 77, 0.3, CPU)
    assert chosen.float().mean().item() == pytest.approx(0.3, abs=2e-3)
    for start, stop in ((0, 5), (2**20 - 3, 2**20 + 9), (2**20, 2**21), (2**21 - 1, 2**21 + 77)):
        assert torch.equal(kept(3, "math", "a.weight", start, stop, 0.3, CPU), chosen[start:stop])
    for seed, task, name in ((4, "math", "a.weight"), (3, "code", "a.weight"), (3, "math", "b.weight")):
        other = kept(seed, task, name, 0, 2**20, 0.3, CPU)
        assert (other & chosen[: 2**20]).float().mean().item() == pytest.approx(0.09, abs=2e-3)


def test_numbers_that_are_none_are_refused_in_parts_too(llama: dict[str, Any], tmp_path: Path) -> None:
    found = load(Path(llama["experts"]["task1"]["model"]))
    found["model.embed_tokens.weight"][[3, 50]] = float("nan")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((Path(llama["experts"]["task1"]["model"]) / "config.json").read_bytes())
    save_file(found, broken / "model.safetensors", {"format": "pt"})
    experts = {**llama["experts"], "task1": {**llama["experts"]["task1"], "model": str(broken)}}
    with pytest.raises(CheckpointError, match=r"expert task1: .*embed_tokens.weight holds 128 values that are NaN"):
        ff.merge(with_method({**llama, "experts": experts}, "ties"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["ties", "dare_linear", "iso_c"])
def test_rows_that_no_expert_has_are_the_bases(method: str, tmp_path: Path) -> None:
    job = pico.job("llama", 2, **SIZES, vocab_size=len(BASE))
    job.base.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    experts = {}
    for task, model in job.experts.items():
        with_rows(model, [*range(len(BASE) - 1)]).save_pretrained(tmp_path / task)
        save_tokenizer(tmp_path / task, BASE[:-1], merges=MERGES[:-1])
        experts[task] = {"model": str(tmp_path / task), "data": "none.jsonl"}
    recipe = {"base_model": str(tmp_path / "base"), "experts": experts, "merge": {"method": method, "scaling": 1}}
    out, base = (tensors(folder) for folder in (ff.merge(recipe, out=tmp_path / "out"), tmp_path / "base"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        same = [torch.equal(out[name][row], base[name][row]) for row in range(len(BASE))]
        assert same == [False] * (len(BASE) - 1) + [True], name


@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama tied", "qwen2-moe", "bert", "clip"])
def test_linear_weights_are_known(kind: str, tmp_path: Path) -> None:
    model = pico.KINDS[kind]()
    model.save_pretrained(tmp_path / "model")
    found = linear_tensors(Checkpoint(tmp_path / "model", "it"))
    assert found
    assert set(found.values()) == {kind == "gpt2"}
    assert not [name for name in found if any(part in name for part in ("embed", "wte", "wpe", "lm_head", "norm"))]


def test_matrices_that_are_stored_transposed(tmp_path: Path) -> None:
    recipe = {key: value for key, value in pico.save(pico.job("gpt2", 2), tmp_path).items() if key != "merged_model"}
    found = load(ff.merge({**recipe, "merge": {"method": "wudi", "steps": 20}}, out=tmp_path / "new"))
    base, *experts = (load(tmp_path / name) for name in ("base", *recipe["experts"]))
    name = "transformer.h.0.mlp.c_fc.weight"
    expected = wudi_reference(base[name].mT, [each[name].mT for each in experts], 1.0, 20).mT
    update = (expected - base[name].double()).norm()
    assert (found[name].double() - expected).norm() < 1e-5 * update
    name = "transformer.wte.weight"
    mean = base[name].double() + changes(base[name], [each[name] for each in experts]).mean(0)
    assert (found[name].double() - mean).norm() < 1e-6 * mean.norm()


def test_a_model_that_cannot_be_built(llama: dict[str, Any], tmp_path: Path) -> None:
    """Most methods need not know what a tensor is; those of linear weights say what they do not know."""
    recipe = json.loads(json.dumps(with_method(llama, "ties")))
    for each in (recipe, *recipe["experts"].values()):
        key = "base_model" if each is recipe else "model"
        folder = tmp_path / Path(each[key]).name
        folder.mkdir()
        values = json.loads((Path(each[key]) / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "architectures": ["MineForCausalLM"]}))
        (folder / "model.safetensors").symlink_to(Path(each[key]) / "model.safetensors")
        each[key] = str(folder)
        (folder / "model.safetensors").unlink()
        save_file(load(Path(llama["base_model"]).parent / folder.name), folder / "model.safetensors", {"format": "pt"})
    assert load(ff.merge(recipe, out=tmp_path / "out")).keys() == load(recipe["base_model"]).keys()
    with pytest.raises(UnsupportedModelError, match="MineForCausalLM"):
        ff.merge({**recipe, "merge": {"method": "tsv"}}, out=tmp_path / "other")


def test_weights_and_a_small_density(llama: dict[str, Any], tmp_path: Path) -> None:
    weights = {"task2": 0.5, "task0": 2, "task1": 0}
    recipe = with_method(llama, "ties", weights=weights, density=0.25, scaling=0.7)
    found = load(ff.merge(recipe, out=tmp_path / "out"))
    base, *experts = (load(Path(llama["base_model"]).parent / name) for name in ("base", "task0", "task1", "task2"))
    for name, tensor in found.items():
        own = [each[name] for each in experts]
        expected = ties_reference(base[name], own, [2, 0, 0.5], 0.7, 0.25).to(tensor.dtype)
        assert (tensor != expected).float().mean() < 0.01, name  # half a last digit, here and there
        assert torch.allclose(tensor.float(), expected.float(), rtol=0.01), name


EXPERTS = {name: {"model": name, "data": "d"} for name in ("math", "code", "law")}


@pytest.mark.parametrize(
    ("merge", "told"),
    [
        ({"method": "tiez"}, "merge.method: found 'tiez', expected one of .*; did you mean 'ties'"),
        ({"method": "TIES"}, "merge.method: found 'TIES', .*; did you mean 'ties'"),
        ({"method": "linear"}, "merge.method: found 'linear', .*; did you mean 'average'"),
        ({"method": "average", "scaling": 0.3}, "merge.scaling: found 0.3, but average has no .*; it has weights$"),
        ({"method": "ties", "seed": 1}, "merge.seed: .* ties has no .*; it has weights, scaling, density$"),
        ({"method": "model_stock", "t": 0.5}, "merge.t: .* model_stock has no .*; it has none$"),
        ({"method": "ties", "densty": 0.2}, "merge.densty: unknown key; did you mean 'density'"),
        ({"method": "ties", "density": 0}, "merge.density: found 0, expected a number from 1e-06 to 1"),
        ({"method": "ties", "density": 20}, "merge.density: found 20, expected a number from 1e-06 to 1"),
        ({"method": "ties", "density": float("nan")}, "merge.density: found nan"),
        ({"method": "dare_ties", "seed": 1.5}, "merge.seed: found 1.5, expected an integer"),
        ({"method": "dare_ties", "seed": True}, "merge.seed: found True, expected an integer"),
        ({"method": "dare_ties", "seed": -1}, "merge.seed: found -1, expected a number from 0"),
        ({"method": "wudi", "steps": 0}, "merge.steps: found 0, expected a number from 1 to 100,000"),
        ({"method": "slerp"}, "experts: found 3, expected exactly 2, as slerp takes"),
        ({"method": "ties", "weights": 0.5}, "merge.weights: found 0.5, expected a number for each expert"),
        ({"method": "ties", "weights": {}}, "merge.weights: found {}, expected a number for each expert"),
        ({"method": "ties", "weights": {"math": 1, "code": 1}}, "merge.weights.law: missing"),
        (
            {"method": "ties", "weights": {"math": 1, "code": 1, "low": 1, "law": 1}},
            "merge.weights: found 'low', which is no expert's; did you mean 'law'",
        ),
        (
            {"method": "ties", "weights": {"math": "1", "code": 1, "law": 1}},
            "merge.weights.math: found '1', expected a",
        ),
        ({"method": "ties", "weights": {"math": -1, "code": 1, "law": 1}}, "merge.weights.math: .* from 0 to 100"),
        (
            {"method": "average", "weights": {"math": 0, "code": 0, "law": 0}},
            "merge.weights: found a sum of 0, expected",
        ),
        (
            {"method": "task_arithmetic", "weights": {1: 1, "1": 1}},
            "merge.weights: found '1', expected the name of each",
        ),
        ({"method": "task_arithmetic", "weights": {None: 1}}, "merge.weights: found None, expected the name of each"),
        ({"method": "task_arithmetic", "weights": {"math": float("inf")}}, "merge.weights.math: found inf"),
    ],
)
def test_mistakes_are_named(merge: dict[Any, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        ff.Recipe.load({"base_model": "base", "experts": EXPERTS, "merge": merge})


def test_one_expert_is_enough_for_most() -> None:
    for method in METHODS:
        values = {"base_model": "base", "experts": {"math": EXPERTS["math"]}, "merge": {"method": method}}
        if method in ("slerp", "model_stock"):
            with pytest.raises(RecipeError, match=r"experts: found 1, expected (exactly 2|2 or more), as"):
                ff.Recipe.load(values)
        else:
            assert ff.Recipe.load(values).merge == ff.MergeRecipe(method)


def test_a_recipe_is_the_same_once_written_down() -> None:
    merge = {"method": "dare_linear", "weights": {1: 0.5, "code": 2}, "seed": 7}
    experts = {1: EXPERTS["math"], "code": EXPERTS["code"]}
    recipe = ff.Recipe.load({"base_model": "base", "experts": experts, "merge": merge})
    assert recipe.merge == ff.MergeRecipe("dare_linear", 0.3, {"1": 0.5, "code": 2.0}, 0.5, seed=7)
    assert recipe.merge.options(recipe.experts) == Options((0.5, 2.0), 0.3, 0.5, seed=7)
    values = recipe.to_dict()
    del values["root"]
    assert ff.Recipe.load(values).merge == recipe.merge
