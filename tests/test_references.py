"""What a model is named by: folders, revisions, adapters of other models."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_files import WORDS, save_tokenizer
from forms import factors, write_adapter
from merges import recipe_of
from safetensors.torch import load_file

import featcal_fast as ff
from featcal_fast.checkpoints import CachedExpert, Checkpoint, LoraExpert, find_checkpoint, find_expert
from featcal_fast.checkpoints.find import find_folder, split_reference
from featcal_fast.errors import FeatCalError, OutputError
from featcal_fast.inputs.models import RecipeModels, check_folders
from featcal_fast.inputs.tokens import own_tokens
from featcal_fast.inputs.unchanged import unchanged


@pytest.mark.parametrize(
    ("reference", "there", "expected"),
    [
        ("a", [], ("a", None)),
        ("a+b", ["a", "b"], ("a", "b")),
        ("a+b", ["a"], ("a", "b")),
        ("a+b", ["b"], ("a+b", None)),
        ("a+b", [], ("a+b", None)),
        ("a+b", ["a+b", "a", "b"], ("a+b", None)),
        ("c++/a+b", ["c++/a", "b"], ("c++/a", "b")),
        ("a+c++/b", ["a", "c++/b"], ("a", "c++/b")),
        ("+a", ["a"], ("+a", None)),
        ("a+", ["a"], ("a+", None)),
    ],
)
def test_how_references_are_split(reference: str, there: list[str], expected: tuple[str, str | None]) -> None:
    assert split_reference(reference, lambda part: part in there) == expected


def test_paths_with_signs_are_paths(made: Path, tmp_path: Path) -> None:
    for name in ("a+b", "a@b", "a@b+c@d"):
        (tmp_path / name).symlink_to(made / "src" / "base")
        assert find_checkpoint(name, tmp_path, "base model").path == tmp_path / name
        assert isinstance(find_expert(name, tmp_path, "expert", None), Checkpoint)  # type: ignore[arg-type]


def test_revisions_are_those_of_the_hubs_cache(made: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--x"
    for commit in ("abc", "def"):
        (cache / "snapshots").mkdir(parents=True, exist_ok=True)
        shutil.copytree(made / "src" / "base", cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "v1").write_text("def")
    assert find_folder(f"{cache}@v1", tmp_path, "expert") == cache / "snapshots" / "def"
    assert find_folder(f"{cache.name}@abc", tmp_path, "expert") == cache / "snapshots" / "abc"
    base, adapter = find_checkpoint("src/base", made, "base model"), made / "src" / "lora-math"
    expert = find_expert(f"{cache.name}@v1+{adapter}", tmp_path, "expert", base)
    assert isinstance(expert, LoraExpert)
    assert expert.base.path == cache / "snapshots" / "def"
    for revision in ("v2", "../x", "/etc", "a/../b", ""):
        with pytest.raises(FeatCalError, match=r"expert: .*revision|is not a folder|holds 2 snapshots"):
            find_checkpoint(f"{cache}@{revision}", tmp_path, "expert")
    with pytest.raises(FeatCalError, match=r"names the revision 'main', but .*abc is a folder, which has none"):
        find_folder(f"{cache}/snapshots/abc@main", tmp_path, "expert")


# ---------------------------------------------------------------- adapters of other models


@pytest.fixture(scope="module")
def chat(made: Path) -> str:
    return f"src/Llama-3-8B-chat+{made}/src/lora-math"


def test_an_adapter_changes_the_model_before_the_sign(made: Path, chat: str) -> None:
    base = find_checkpoint("src/base", made, "base model")
    expert = find_expert(chat, made, "expert math", base)
    plain = find_expert("src/lora-math", made, "expert math", base)
    assert isinstance(expert, LoraExpert)
    assert isinstance(plain, LoraExpert)
    name = "model.layers.0.self_attn.q_proj.weight"
    own = load_file(made / "src" / "Llama-3-8B-chat" / "model.safetensors")[name]
    low = load_file(made / "src" / "lora-math" / "adapter_model.safetensors")
    prefix = f"base_model.model.{name[:-7]}"
    change = 2 * low[f"{prefix}.lora_B.weight"] @ low[f"{prefix}.lora_A.weight"]
    assert torch.allclose(expert.read([name])[name], own + change, atol=1e-6)
    assert not torch.allclose(plain.read([name])[name], own + change, atol=1e-3)
    again = find_expert(f"{made}/src/base+src/lora-math", made, "expert math", base)
    assert isinstance(again, LoraExpert)
    assert torch.equal(again.read([name])[name], plain.read([name])[name])
    assert again.base.path == base.path


def test_what_is_read_of_another_model_is_an_input(work: Path, chat: str) -> None:
    values = {**recipe_of(work).to_dict(), "experts": {"math": {"model": chat, "data": str(work / "math.safetensors")}}}
    del values["root"]
    del values["settings"]
    recipe = ff.Recipe.load(values)
    models = RecipeModels(recipe)
    with pytest.raises(OutputError, match=r"lies in the input folder .*chat"):
        check_folders(replace(recipe, out="src/Llama-3-8B-chat/new"), models)
    assert unchanged(models.experts, models.base) == []
    report = ff.calibrate(values, out=work / "new", device="cpu", scan=True)
    assert report.calibrated == 14
    (work / "again").symlink_to(work / "src" / "Llama-3-8B-chat")  # another way to the same files
    values["experts"]["math"]["model"] = chat.replace("src/Llama-3-8B-chat", "again")
    ff.calibrate(values, out=work / "new2", device="cpu", scan=True)
    assert tensors(work / "new") == tensors(work / "new2")


def tensors(out: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((out / "report.json").read_text())["contents"]["tensors"]
    return found


def test_an_adapter_that_changes_nothing_of_another_model(made: Path, tmp_path: Path) -> None:
    """Such an expert has learned what the other model has."""
    weights = factors(load_file(made / "src" / "base" / "model.safetensors"), layers=2)
    zero = {name: torch.zeros_like(value) if "lora_B" in name else value for name, value in weights.items()}
    write_adapter(tmp_path / "zero", zero)
    base = find_checkpoint("src/base", made, "base model")
    experts = {
        "plain": find_expert(str(tmp_path / "zero"), made, "expert", base),
        "chat": find_expert(f"src/Llama-3-8B-chat+{tmp_path / 'zero'}", made, "expert", base),
    }
    assert unchanged(experts, base) == ["plain"]


@pytest.mark.parametrize("storage", ["disk", "host"])
def test_an_adapter_reads_tokens_as_its_model_does(storage: str, made: Path, tmp_path: Path) -> None:
    for name, words in (("base", WORDS), ("Llama-3-8B-chat", [*WORDS[:5], *reversed(WORDS[5:])])):
        shutil.copytree(made / "src" / name, tmp_path / name)
        save_tokenizer(tmp_path / name, words)
    base, lora = find_checkpoint("base", tmp_path, "base model"), made / "src" / "lora-math"
    references = {"plain": str(lora), "chat": f"Llama-3-8B-chat+{lora}"}
    experts = {task: find_expert(reference, tmp_path, task, base) for task, reference in references.items()}
    if storage == "host":
        experts = {task: CachedExpert(each, storage) for task, each in experts.items()}
    found = own_tokens(base, base, experts)
    assert found["plain"].table is None
    assert found["chat"].table is not None


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("src/base+src/Llama-3-8B-chat", "behind the `\\+`, is no LoRA adapter: adapter_config.json is missing"),
        ("src/base+./src/nothing", "src/nothing is not a folder"),
        ("src/lora-math+src/lora-code", "is an adapter, expected a full checkpoint"),
        ("src/base+~nobody-there/x", "names no home"),
    ],
)
def test_adapters_that_are_none(reference: str, message: str, made: Path) -> None:
    base = find_checkpoint("src/base", made, "base model")
    with pytest.raises(FeatCalError, match=f"expert math.*{message}"):
        find_expert(reference, made, "expert math", base)


def test_only_experts_may_have_adapters(made: Path) -> None:
    with pytest.raises(
        FeatCalError, match=r"base model: .* is a model with a LoRA adapter.*merge it into its model first"
    ):
        find_checkpoint("src/base+src/lora-math", made, "base model")
