"""What is beside the weights goes with the model: subfolders too, old weights never, nothing from elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pico
import pytest
import torch
from data_files import save_tokenizer
from safetensors.torch import load_file, save_file

import featcal_fast as ff
from featcal_fast import files
from featcal_fast.checkpoints import Checkpoint, LoraExpert
from featcal_fast.inputs.models import RecipeModels
from featcal_fast.inputs.recipe import Recipe
from featcal_fast.job.check import check

OUT = 7  # features of the dense layer
# By sentence-transformers' documentation, beside a BERT of 48 features.
MODULES = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Normalize", "Normalize")]
POOLING = {"word_embedding_dimension": 48, "pooling_mode_mean_tokens": True}
DENSE = {
    "in_features": 48,
    "out_features": OUT,
    "bias": True,
    "activation_function": "torch.nn.modules.activation.Tanh",
}
PROMPTS = {"prompts": {"query": "a b"}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
LEFT_OUT = [
    "consolidated.safetensors",
    "model.mlpackage",
    "model.onnx",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "openvino/openvino_model.bin",
    "openvino/openvino_model.xml",
    "original/consolidated.00.pth",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
]


@pytest.fixture
def recipe(tmp_path: Path) -> dict:
    return pico.save(pico.job("bert", 2), tmp_path)


@pytest.fixture
def merged(recipe: dict, tmp_path: Path) -> Path:
    """The merged model as sentence-transformers has it: what it makes of tokens is told by files in subfolders."""
    folder = tmp_path / "merged"
    save_tokenizer(folder)
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(MODULES)
    ]
    for name, values in {
        "modules.json": modules,
        "config_sentence_transformers.json": PROMPTS,
        "sentence_bert_config.json": {"max_seq_length": 16, "do_lower_case": False},
        "1_Pooling/config.json": POOLING,
        "2_Dense/config.json": DENSE,
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(values))
    generator = torch.Generator().manual_seed(0)
    dense = {"linear.weight": torch.randn(OUT, 48, generator=generator), "linear.bias": torch.zeros(OUT)}
    save_file(dense, folder / "2_Dense" / "model.safetensors")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("# A model\n")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_subfolders_go_with_the_model(recipe: dict, merged: Path, tmp_path: Path) -> None:
    """All of the folder is in the output, byte for byte, but for the weights and the card, in which the old one is."""
    expected = tree(merged)
    ff.calibrate(recipe)
    found = tree(tmp_path / "out")
    report = json.loads(found.pop("report.json"))
    assert report["left_out"] == []
    assert found.pop("drift.svg").startswith(b"<svg ")
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} == {"model.safetensors", "README.md"}
    assert found["README.md"].endswith(b"\n### A model\n")
    assert check(tmp_path / "out").whole
    (tmp_path / "out" / "1_Pooling" / "config.json").write_text("{}")
    assert check(tmp_path / "out").problems == ["1_Pooling/config.json is not as it was written"]


def test_sentence_transformers_loads_the_output(recipe: dict, merged: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer

    ff.calibrate(recipe)
    texts = ["a b c", "j a", "e e e e e f"]
    found = {name: SentenceTransformer(str(tmp_path / name), device="cpu") for name in ("merged", "out")}
    before, after = (model.encode(texts, convert_to_tensor=True) for model in found.values())
    assert after.shape == (3, OUT)
    assert torch.allclose(after.norm(dim=1), torch.ones(3), atol=1e-5)
    assert not torch.allclose(before, after, atol=1e-3)
    assert found["out"].prompts["query"] == "a b"
    weights = load_file(tmp_path / "out" / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
    assert any(torch.equal(parameter, weights[name]) for parameter in found["out"].parameters())


def test_old_weights_in_other_forms_are_left_out_and_listed(recipe: dict, merged: Path, tmp_path: Path) -> None:
    for name in LEFT_OUT:
        (merged / name).parent.mkdir(exist_ok=True)
        if name.endswith(".mlpackage"):
            (merged / name / "Data").mkdir(parents=True)
            (merged / name / "Data" / "weight.bin").write_bytes(b"old")
        else:
            (merged / name).write_bytes(b"old")
    for name in ("original/params.json", "onnx/config.json"):
        (merged / name).write_text("{}")
    checkpoint = Checkpoint(merged, "merged model")
    assert checkpoint.left_out() == LEFT_OUT
    assert checkpoint.side_files().keys() >= {"original/params.json", "onnx/config.json", "2_Dense/model.safetensors"}
    assert not any(path.read_bytes() == b"old" for path in checkpoint.side_files().values())


def test_hidden_files_and_a_report_of_before_are_no_part_of_the_model(merged: Path) -> None:
    expected = Checkpoint(merged, "merged model").side_files().keys()
    (merged / "report.json").write_text("{}")
    (merged / ".gitattributes").write_text("")
    for folder in (".git", ".cache", "1_Pooling/.ipynb_checkpoints"):
        (merged / folder).mkdir()
        (merged / folder / "config.json").write_text("{}")
    checkpoint = Checkpoint(merged, "merged model")
    assert checkpoint.side_files().keys() == expected
    assert checkpoint.left_out() == []


def test_a_calibrated_model_can_be_calibrated_again(recipe: dict, merged: Path, tmp_path: Path) -> None:
    first = ff.calibrate(recipe)
    second = ff.calibrate({**recipe, "merged_model": first.out}, out=tmp_path / "again")
    assert json.loads((tmp_path / "again" / "report.json").read_text())["out"] == second.out
    before, after = tree(tmp_path / "out"), tree(tmp_path / "again")
    assert after.keys() == {*before, "drift-2.svg"}
    assert after["drift.svg"] == before["drift.svg"]
    assert after["README.md"].decode().count("own card\n") == 2  # the first model's, and in it that of the merge
    assert check(tmp_path / "again").whole


def test_every_source_tells_of_the_files_of_its_layout(recipe: dict, merged: Path, tmp_path: Path) -> None:
    (tmp_path / "base" / "tf_model.h5").write_bytes(b"old")
    (tmp_path / "base" / "extra").mkdir()
    (tmp_path / "base" / "extra" / "notes.txt").write_text("12345")
    del recipe["merged_model"]
    models = RecipeModels(Recipe.load({**recipe, "merge": {"method": "average"}, "expert_storage": "host"}))
    assert models.merged.side_files() == {name: tmp_path / "base" / name for name in ("config.json", "extra/notes.txt")}
    assert models.merged.left_out() == ["tf_model.h5"]
    assert models.side_bytes == 5 + (tmp_path / "base" / "config.json").stat().st_size
    expert = models.experts["task0"]
    assert (list(expert.side_files()), expert.left_out()) == (["config.json"], [])


# Links


def test_the_hubs_cache_may_have_subfolders(merged: Path, tmp_path: Path) -> None:
    """Their links to its blobs have more steps up."""
    expected, repo = tree(merged), tmp_path / "models--org--merged"
    snapshot = repo / "snapshots" / "abc"
    shutil.copytree(merged, snapshot)
    (repo / "blobs").mkdir()
    for number, path in enumerate(path for path in snapshot.rglob("*") if path.is_file()):
        path.rename(repo / "blobs" / str(number))
        path.symlink_to(os.path.relpath(repo / "blobs" / str(number), path.parent))
    found = Checkpoint(snapshot, "merged model").side_files()
    assert {name: path.read_bytes() for name, path in found.items()} == {
        name: data for name, data in expected.items() if name != "model.safetensors"
    }


def test_links_within_the_folder_are_followed(merged: Path) -> None:
    (merged / "vocabulary.json").symlink_to("tokenizer.json")
    (merged / "pooling").symlink_to("1_Pooling")
    found = Checkpoint(merged, "merged model").side_files()
    assert found["pooling/config.json"].read_bytes() == (merged / "1_Pooling" / "config.json").read_bytes()
    assert found["vocabulary.json"].read_bytes() == (merged / "tokenizer.json").read_bytes()


def _file_elsewhere(merged: Path) -> str:
    (merged.parent / "secret").write_text("not yours")
    (merged / "1_Pooling" / "extra.json").symlink_to("../../secret")
    return r"1_Pooling/extra.json is a link to .*/secret, outside of the model folder"


def _file_in_the_root_elsewhere(merged: Path) -> str:
    (merged.parent / "secret").write_text("not yours")
    (merged / "extra.json").symlink_to(merged.parent / "secret")
    return r"merged/extra.json is a link to .*/secret, outside of the model folder"


def _folder_elsewhere(merged: Path) -> str:
    (merged / "3_Normalize").symlink_to("../task0")
    return r"3_Normalize is a link to .*/task0, outside of the model folder"


def _folder_above(merged: Path) -> str:
    (merged / "up").symlink_to("..")
    return r"merged/up is a link to .*, outside of the model folder"


def _loop(merged: Path) -> str:
    (merged / "1_Pooling" / "loop").symlink_to("..")
    return r"1_Pooling/loop is a link to a folder, come to by another one"


def _two_links_in_turn(merged: Path) -> str:
    (merged / "1_Pooling" / "a").symlink_to("../2_Dense")
    (merged / "2_Dense" / "b").symlink_to("../1_Pooling")
    return r"1_Pooling/a/b is a link to a folder, come to by another one"


def _link_to_itself(merged: Path) -> str:
    (merged / "1_Pooling" / "self").symlink_to("self")
    return r"1_Pooling/self cannot be read: Too many levels of symbolic links"


def _dangling(merged: Path) -> str:
    (merged / "2_Dense" / "vocab.txt").symlink_to("../../blobs/gone")
    return r"2_Dense/vocab.txt cannot be read: No such file or directory; check that the download is complete"


def _pipe(merged: Path) -> str:
    os.mkfifo(merged / "1_Pooling" / "pipe.json")
    return r"1_Pooling/pipe.json is neither a file nor a folder"


def _device(merged: Path) -> str:
    (merged / "zero").symlink_to("/dev/zero")
    return r"merged/zero is a link to /dev/zero, outside of the model folder"


@pytest.mark.parametrize(
    "breakage",
    [
        _file_elsewhere,
        _file_in_the_root_elsewhere,
        _folder_elsewhere,
        _folder_above,
        _loop,
        _two_links_in_turn,
        _link_to_itself,
        _dangling,
        _pipe,
        _device,
    ],
    ids=lambda breakage: breakage.__name__.strip("_"),
)
def test_what_cannot_go_with_the_model_is_refused_before_any_work(
    breakage, recipe: dict, merged: Path, tmp_path: Path
) -> None:
    message = breakage(merged)
    for run in (ff.plan, ff.calibrate):
        with pytest.raises(ff.FeatCalError, match=rf"merged model: .*{message}"):
            run(recipe)
    assert not (tmp_path / "out").exists()


def test_a_file_that_may_not_be_read_is_named(recipe: dict, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = files.open_to_read

    def denied(path: Path):
        if path.parent.name == "2_Dense":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(files, "open_to_read", denied)
    with pytest.raises(ff.FeatCalError, match=r"merged model: .*2_Dense/config.json cannot be read: Permission denied"):
        ff.plan(recipe)


def test_folders_may_be_deep(merged: Path) -> None:
    """Deeper than Python's stack."""
    folder = merged
    for _ in range(1200):
        folder = folder / "a"
        folder.mkdir()
    (folder / "notes.txt").write_text("deep")
    found = Checkpoint(merged, "merged model").side_files()
    files.remove_tree(merged / "a")  # pytest's own removal of old folders goes by recursion
    assert "a/" * 1200 + "notes.txt" in found


def test_an_adapters_files_are_its_bases(recipe: dict, tmp_path: Path) -> None:
    from forms import write_adapter

    base = load_file(tmp_path / "base" / "model.safetensors")
    module = next(name for name in base if name.endswith("query.weight")).removesuffix(".weight")
    factors = {f"{module}.lora_A.weight": torch.ones(4, 48), f"{module}.lora_B.weight": torch.ones(48, 4)}
    folder = write_adapter(tmp_path / "adapter", factors, target_modules=["layer.0.attention.self.query"])
    expert = LoraExpert(folder, "expert", Checkpoint(tmp_path / "base", "base model"))
    assert (list(expert.side_files()), expert.left_out()) == (["config.json"], [])
