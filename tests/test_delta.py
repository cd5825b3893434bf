"""A calibration as a LoRA adapter of the merged model: what PEFT and we make of it, and what becomes of folders."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import torch
from file_operations import CHANGES, READS, failing, operations
from runs import EXHAUSTIVE, Cases, Layers, stopped
from safetensors.torch import load_file, save_file
from torch import Tensor

import featcal_fast as ff
from featcal_fast.checkpoints import Checkpoint, LoraExpert, find_expert, work_path
from featcal_fast.errors import FeatCalError, ModelMismatchError, OutputError, RecipeError
from featcal_fast.layer.low_rank import EXACT, energies, low_rank
from featcal_fast.reporting.progress import Progress

# Of each kind, as many rows or columns as the smaller side of its largest weight has.
FULL = {"gpt2": 48, "llama tied": 64, "t5": 48, "clip whole": 48, "vit classifier": 48, "bert": 48, "qwen2-moe": 64}
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A folder of models of a kind, with `out`, their calibration; made once, and only read."""
    made: dict[str, Path] = {}

    def make(kind: str, dtype: torch.dtype = torch.float32) -> Path:
        if f"{kind} {dtype}" not in made:
            folder = made[f"{kind} {dtype}"] = tmp_path_factory.mktemp("models")
            job = pico.job(kind, 1)
            for model in (job.base, job.merged, *job.experts.values()):
                model.to(dtype)
            job.batches = {task: batches[:2] for task, batches in job.batches.items()}
            recipe = pico.save(job, folder)
            ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)
            job.merged.save_pretrained(folder / "out")  # as a run writes it, in a tenth of the time
            (folder / "out" / "report.json").write_text(json.dumps({"recipe": {**recipe, "root": str(folder)}}))
            (folder / "recipe.json").write_text(json.dumps(recipe))
        return made[f"{kind} {dtype}"]

    return make


@pytest.fixture(scope="module")
def deltas(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[int, Path]]:
    """Adapters of a kind, by rank: of a small one, and of the full one."""
    made: dict[str, dict[int, Path]] = {}

    def deltas(kind: str) -> dict[int, Path]:
        if kind not in made:
            folder = tmp_path_factory.mktemp("deltas")
            made[kind] = {rank: folder / str(rank) for rank in (8, FULL[kind])}
            for rank, path in made[kind].items():
                ff.delta(make(kind) / "out", out=path, rank=rank)
        return made[kind]

    return deltas


@pytest.fixture
def folder(make: Make) -> Path:
    return make("gpt2")


def weights(path: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(path, "model")
    return checkpoint.read(checkpoint.tensors)


def adapted(folder: Path, adapter: Path) -> dict[str, Tensor]:
    """The merged model with the adapter, as this package reads one."""
    expert = find_expert(str(adapter), folder, "expert", Checkpoint(folder / "merged", "base model"))
    assert isinstance(expert, LoraExpert)
    return expert.read(expert.tensors)


def error(found: dict[str, Tensor], folder: Path) -> float:
    """The largest, of any tensor that calibration changed, relative to the change."""
    before, after = weights(folder / "merged"), weights(folder / "out")
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert changed
    assert all(torch.equal(found[name], after[name]) for name in after.keys() - set(changed))
    return max(
        float((found[name].double() - after[name]).norm() / (after[name].double() - before[name]).norm())
        for name in changed
    )


@pytest.mark.parametrize("kind", FULL)
def test_with_growing_rank_the_adapter_is_the_calibration(kind: str, make: Make, deltas: Any) -> None:
    errors = [error(adapted(make(kind), path), make(kind)) for path in deltas(kind).values()]
    made = [json.loads((path / "delta.json").read_text()) for path in deltas(kind).values()]
    sizes = [(path / "adapter_model.safetensors").stat().st_size for path in deltas(kind).values()]
    assert errors[0] > 100 * errors[1]
    assert errors[1] <= 1e-5
    assert 0 < made[0]["energy"] < made[1]["energy"] == pytest.approx(1, abs=1e-12)
    assert [each["nbytes"] for each in made] == sizes


@pytest.mark.parametrize("kind", FULL)
@torch.no_grad()
def test_peft_loads_it(kind: str, make: Make, deltas: Any) -> None:
    peft = pytest.importorskip("peft")
    folder, cls, batch = make(kind), type(pico.KINDS[kind]()), dict(pico.batches_for(kind, 7)[0])
    if kind == "clip whole":
        batch["input_ids"] = torch.arange(3, 12).expand(8, 9)
    expected, before = (cls.from_pretrained(folder / name).eval() for name in ("out", "merged"))
    outputs, distances = [_output(model(**batch)) for model in (expected, before)], []
    for path in deltas(kind).values():
        model = peft.PeftModel.from_pretrained(cls.from_pretrained(folder / "merged"), path).eval()
        change = (outputs[0] - outputs[1]).norm()
        distances.append(float((_output(model(**batch)) - outputs[0]).norm() / change))
    assert distances[0] > 100 * distances[1]
    assert distances[1] <= 1e-5
    for name, parameter in model.merge_and_unload().named_parameters():
        own, was = expected.get_parameter(name), before.get_parameter(name)
        assert (parameter - own).norm() <= 1e-5 * (own - was).norm(), name


def _output(found: Any) -> Tensor:
    values = (getattr(found, name, None) for name in ("logits", "logits_per_image", "last_hidden_state"))
    return next(value for value in values if value is not None)


@pytest.mark.parametrize("kind", ["gpt2", "llama tied"])
def test_energies_are_those_of_singular_values(kind: str, make: Make, tmp_path: Path) -> None:
    folder = make(kind)
    made = ff.delta(folder / "out", out=tmp_path / "delta", rank=5)
    before, after = weights(folder / "merged"), weights(folder / "out")
    kept, total = 0.0, 0.0
    assert made.modules
    for name, module in made.modules.items():
        change = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        squares = np.linalg.svd(change.numpy(), compute_uv=False) ** 2
        assert module.energy == pytest.approx(squares[:5].sum() / squares.sum(), abs=1e-6)
        assert module.change == pytest.approx(squares.sum() ** 0.5, rel=1e-6)
        assert module.rank == 5
        kept, total = kept + squares[:5].sum(), total + squares.sum()
    assert made.energy == pytest.approx(kept / total, abs=1e-6)
    written = json.loads((tmp_path / "delta" / "delta.json").read_text())
    assert written == json.loads(made.to_json())
    assert made.summary().startswith(f"rank 5 keeps {made.energy:.1%} of the energy of what calibration changed in ")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_full_rank_it_rounds_to_the_calibrated_model(dtype: torch.dtype, make: Make, tmp_path: Path) -> None:
    folder = make("gpt2", dtype)
    made = ff.delta(folder / "out", out=tmp_path / "delta", rank=48)
    found, after = adapted(folder, tmp_path / "delta"), weights(folder / "out")
    assert {value.dtype for value in after.values()} == {dtype}
    assert made.exact
    assert all(torch.equal(found[name], value) for name, value in after.items())
    stored = load_file(tmp_path / "delta" / "adapter_model.safetensors")
    assert {value.dtype for name, value in stored.items() if "lora_" in name} == {torch.float32}
    assert {value.dtype for name, value in stored.items() if "lora_" not in name} == {dtype}


def test_a_large_weight_is_decomposed_almost_as_well_and_always_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, EXACT + 8, generator=generator))[0] for size in (700, 530))
    values = torch.arange(1, EXACT + 9).double() ** -0.7
    change = ((left.double() * values) @ right.double().mT).float()
    state = torch.get_rng_state()
    for rank in (1, 16, 48):
        b, a = low_rank(change, rank)
        assert (b.shape, a.shape, b.dtype, a.dtype) == ((700, rank), (rank, 530), torch.float32, torch.float32)
        total, lost = energies(change, b, a)
        best = float(values[rank:].square().sum())
        assert total == pytest.approx(float(values.square().sum()), rel=1e-5)
        assert best * (1 - 1e-5) <= lost <= best * 1.01
        assert all(torch.equal(one, other) for one, other in zip(low_rank(change, rank), (b, a), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_models_give_the_same_bits(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        ff.delta(folder / "out", out=tmp_path / name / "delta", rank=3)
    assert len(list((tmp_path / "one" / "delta").iterdir())) == 4
    for path in (tmp_path / "one" / "delta").iterdir():
        same = (tmp_path / "two" / "delta" / path.name).read_bytes()
        assert path.read_bytes() == same, path.name


# What it says of itself


def test_what_peft_is_told(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = {}
    for kind in ("gpt2", "llama tied", "t5", "bert", "qwen2-moe"):
        ff.delta(make(kind) / "out", out=tmp_path / kind, rank=20)
        configs[kind] = json.loads((tmp_path / kind / "adapter_config.json").read_text())
        assert configs[kind]["base_model_name_or_path"] == str(make(kind) / "merged")
        assert (configs[kind]["r"], configs[kind]["lora_alpha"], configs[kind]["peft_type"]) == (20, 20, "LORA")
    llama, gpt2, moe = configs["llama tied"], configs["gpt2"], configs["qwen2-moe"]
    assert llama["target_modules"] == sorted(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
    assert (llama["task_type"], llama["bias"], llama["modules_to_save"]) == ("CAUSAL_LM", "none", None)
    assert (gpt2["fan_in_fan_out"], gpt2["bias"], gpt2["modules_to_save"]) == (True, "all", ["ln_1", "ln_2"])
    assert (
        moe["rank_pattern"]
        == moe["alpha_pattern"]
        == {rf"model\.layers\.{layer}\.mlp\.shared_expert_gate": 1 for layer in (0, 1)}
    )
    assert configs["t5"]["task_type"] == "SEQ_2_SEQ_LM"
    assert configs["bert"]["task_type"] is None  # whose head would be added to it
    assert "encoder.layer.0.output.dense" in configs["bert"]["target_modules"]  # a pooler's `dense` is another one
    card = (tmp_path / "gpt2" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\ntags:\n- featcal\n- lora\n---\n")
    assert "vLLM takes no such adapter" in card
    assert str(tmp_path) not in card
    assert str(make("gpt2")) not in card
    pytest.importorskip("peft")
    found: dict[str, Any] = {}
    (tmp_path / "merged").symlink_to(make("gpt2") / "merged")
    monkeypatch.chdir(tmp_path)
    exec(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], found)
    assert found["model"].peft_config["default"].r == 20


def test_a_model_of_the_hub_is_named_as_it_is_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder / "merged"))
    shutil.copytree(folder / "out", tmp_path / "out")
    _edit_recipe(tmp_path / "out", merged_model="org/merged@v1")
    ff.delta(tmp_path / "out", out=tmp_path / "delta", rank=1)
    config = json.loads((tmp_path / "delta" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/merged", "v1")
    card = (tmp_path / "delta" / "README.md").read_text()
    assert "\nbase_model: org/merged\n" in card
    assert '.from_pretrained("org/merged", revision="v1")' in card


@pytest.mark.parametrize("revision", ["", "@abc"])
def test_a_model_of_the_hubs_cache_is_named_by_where_it_can_be_loaded_from(
    revision: str, folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "models--org--merged"
    shutil.copytree(folder / "merged", cache / "snapshots" / "abc")
    shutil.copytree(folder / "out", tmp_path / "out")
    _edit_recipe(tmp_path / "out", merged_model=f"{cache}{revision}")
    assert ff.delta(tmp_path / "out", out=tmp_path / "delta", rank=1).merged == str(cache / "snapshots" / "abc")


def _edit_recipe(out: Path, **values: object) -> None:
    report = json.loads((out / "report.json").read_text())
    report["recipe"] = {key: value for key, value in (report["recipe"] | values).items() if value is not None}
    (out / "report.json").write_text(json.dumps(report))


def test_what_was_merged_on_the_fly_has_one_too(make: Make, tmp_path: Path) -> None:
    recipe = json.loads((make("gpt2") / "recipe.json").read_text())
    del recipe["merged_model"]
    recipe |= {"merge": {"method": "task_arithmetic", "scaling": 0.3}, "out": str(tmp_path / "out")}
    ff.calibrate(recipe, delta=tmp_path / "delta", delta_rank=48)
    ff.merge({**recipe, "out": str(tmp_path / "merged")})
    assert error(adapted(tmp_path, tmp_path / "delta"), tmp_path) <= 1e-5
    assert json.loads((tmp_path / "delta" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert "`featcal-fast merge` writes" in (tmp_path / "delta" / "README.md").read_text()


# With a run


def test_a_run_writes_it_beside_the_model(folder: Path, command: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((folder / "recipe.json").read_text())
    out, delta = str(tmp_path / "out"), str(tmp_path / "delta")
    code, said, _ = command("calibrate", str(recipe), "--out", out, "--delta", delta, "--delta-rank", "7")
    assert code == 0
    assert f"Wrote {delta}: rank 7 keeps " in said
    assert f"Wrote {out}\nWith transformers:\n    from transformers import" in said
    assert said.endswith(f"\n    featcal-fast check {out}\n")
    code, said, _ = command("delta", out, "--out", str(tmp_path / "again"), "--rank", "7")
    assert code == 0
    assert f"Wrote {tmp_path / 'again'}: rank 7 keeps " in said
    for name in ("adapter_model.safetensors", "adapter_config.json", "delta.json"):
        assert (tmp_path / "delta" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert command("calibrate", str(recipe), "--delta-rank", "7")[0] == 2


PLACES: dict[str, tuple[str, str]] = {
    "something there": ("taken", "delta: .*taken already holds something"),
    "in the merged model": ("merged/delta", r"delta: .* lies in the input folder .*merged \(merged model\)"),
    "in an expert": ("task0/delta", r"lies in the input folder .*task0 \(expert task0\)"),
    "in the base": ("base/delta", "lies in the input folder .*base"),
    "the output": ("out/model", "lies in the input folder .*model"),
    "in the output": ("out/model/delta", "lies in the input folder .*model"),
    "around the output": ("out", "delta: .*out holds .*model, the calibrated model"),
    "below a file": ("file/delta", "delta: .*file"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_folder_that_cannot_be_written_is_refused_before_the_first_layer(
    place: str, folder: Path, tmp_path: Path
) -> None:
    for name in ("base", "merged", "task0"):
        shutil.copytree(folder / name, tmp_path / name)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    (tmp_path / "file").touch()
    recipe = json.loads((folder / "recipe.json").read_text().replace(str(folder), str(tmp_path)))
    shutil.copy(folder / "task0.safetensors", tmp_path)
    layers, (where, said) = Layers(), PLACES[place]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=said):
        ff.calibrate(recipe, out=tmp_path / "out" / "model", delta=tmp_path / where, progress=layers)
    assert layers.seen == []
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("rank", [0, -1, 145, True, 2.0, "8", None])
def test_a_rank_that_no_weight_has_is_refused(rank: Any, folder: Path, tmp_path: Path) -> None:
    recipe = json.loads((folder / "recipe.json").read_text())
    for write in (
        lambda: ff.calibrate(recipe, out=tmp_path / "out", delta=tmp_path / "delta", delta_rank=rank),
        lambda: ff.delta(folder / "out", out=tmp_path / "delta", rank=rank),
    ):
        with pytest.raises(RecipeError, match=r"delta: found rank .*, expected a number from 1 to 48"):
            write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [CHANGES, READS])
def test_whatever_fails_it_is_whole_or_not_there(names: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    with operations(names=names) as done:
        ff.delta(folder / "out", out=tmp_path / "whole", rank=2)
    assert len(done) > 15
    numbers = [number for number, name in enumerate(done, 1) if name != "lock"]  # which just says no
    for number in numbers if EXHAUSTIVE else numbers[:: 4 if names is CHANGES else 9]:
        place = tmp_path / f"{number}"
        place.mkdir()
        said = _failure(folder, place / "delta", number, names)
        if not said:  # what failed was not needed
            weights = (each / "adapter_model.safetensors" for each in (place / "delta", tmp_path / "whole"))
            assert len({path.read_bytes() for path in weights}) == 1
            assert len(list((place / "delta").iterdir())) == 4
        else:
            assert "Input/output error" in said
            assert str(place) in said or str(folder) in said
            assert not (place / "delta").exists()
            assert "the finished model is in" in said or list(place.iterdir()) == [], said


def _failure(folder: Path, out: Path, number: int, names: tuple[str, ...]) -> str:
    """What is said when an operation fails; nothing where all is well."""
    try:
        with operations(failing(number, errno.EIO), names):
            ff.delta(folder / "out", out=out, rank=2)
    except FeatCalError as failure:
        return str(failure)
    return ""


class Said(Progress):
    """What is said where a signal ends a run."""

    def interrupted(self, left: str) -> None:
        self.said = left


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory"), torch.linalg.LinAlgError("no"), MemoryError(), KeyboardInterrupt()]
)
def test_where_it_fails_after_a_run_the_model_is_whole(
    error: BaseException, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise error

    recipe, progress = json.loads((folder / "recipe.json").read_text()), Said()
    monkeypatch.setattr("featcal_fast.job.delta.low_rank", failing)
    with pytest.raises((OutputError, KeyboardInterrupt)) as failure:
        ff.calibrate(recipe, out=tmp_path / "out", delta=tmp_path / "my delta", delta_rank=9, progress=progress)
    said = progress.said if isinstance(error, KeyboardInterrupt) else str(failure.value)
    assert f"the calibrated model is whole in {tmp_path / 'out'}: `featcal-fast delta {tmp_path / 'out'} --out" in said
    assert f"'{tmp_path / 'my delta'}' --rank 9` writes its delta" in said
    assert ff.check(tmp_path / "out").whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    assert ff.delta(tmp_path / "out", out=tmp_path / "my delta", rank=9).rank == 9


# Afterwards


def test_another_merged_model_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "out", tmp_path / "out")
    shutil.copytree(folder / "merged", tmp_path / "merged")
    _edit_recipe(tmp_path / "out", merged_model=str(tmp_path / "merged"))
    path = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"transformer.wpe.weight": tensors["transformer.wpe.weight"] + 1}, path)
    with pytest.raises(
        ModelMismatchError, match=r"wpe.weight' is not that of the calibrated model .* never changes it"
    ):
        ff.delta(tmp_path / "out", out=tmp_path / "delta")
    save_file(tensors | {"transformer.wpe.weight": tensors["transformer.wpe.weight"][:9].contiguous()}, path)
    with pytest.raises(ModelMismatchError, match=r"expected torch.float32 of shape \(9, 48\) as in the merged model"):
        ff.delta(tmp_path / "out", out=tmp_path / "delta")
    shutil.rmtree(tmp_path / "merged")
    with pytest.raises(FeatCalError, match=re.escape(str(tmp_path / "merged"))):
        ff.delta(tmp_path / "out", out=tmp_path / "delta")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_where_nothing_changed_there_is_no_adapter(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "merged", tmp_path / "out")
    shutil.copy(folder / "out" / "report.json", tmp_path / "out")
    with pytest.raises(OutputError, match="delta: calibration changed no linear weight"):
        ff.delta(tmp_path / "out", out=tmp_path / "delta")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (None, "report.json cannot be read: No such file or directory$"),
        ("{", "report.json is not valid JSON: "),
        *(
            (text, "report.json holds no recipe$")
            for text in ("[]", "{}", '{"recipe": "7"}', '{"recipe": {"root": 1}}')
        ),
    ],
)
def test_what_no_run_wrote_is_refused(report: str | None, said: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    if report is not None:
        (tmp_path / "out" / "report.json").write_text(report)
    with pytest.raises(RecipeError, match=f"model: .* is no folder that calibrate wrote: {said}"):
        ff.delta(tmp_path / "out", out=tmp_path / "delta")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_left_of_one_is_removed_and_of_a_run_is_not(folder: Path, cases: Cases, tmp_path: Path) -> None:
    left = work_path(tmp_path / "delta") / "model"
    left.mkdir(parents=True)
    (left / "adapter_model.safetensors").write_text("half")
    ff.delta(folder / "out", out=tmp_path / "delta", rank=1)
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]
    case = cases("llama")
    out = stopped(case, tmp_path / "run", after=1)
    with pytest.raises(OutputError, match=r"delta: .* is what a calibration into .* has left; choose another folder"):
        ff.delta(folder / "out", out=out, rank=1)
    case.resume(tmp_path / "run")
