"""Folders of sentence-transformers are models in every role, also old ones with their transformer in a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch
from data_files import save_tokenizer
from forms import write_adapter
from safetensors.torch import load_file, save_file
from test_side_files import tree

import featcal_fast as ff
from featcal_fast.checkpoints import Checkpoint, find_checkpoint, find_expert
from featcal_fast.checkpoints.nested import model_folder, module_path
from featcal_fast.job.check import check
from featcal_fast.reporting.usage import usage

OUT = 7  # features of the dense layer
KINDS = ("Transformer", "Pooling", "Dense", "Normalize")
POOLING = {"word_embedding_dimension": 48, "pooling_mode_mean_tokens": True}
DENSE = {
    "in_features": 48,
    "out_features": OUT,
    "bias": False,
    "activation_function": "torch.nn.modules.activation.Tanh",
}
INNER = "0_Transformer"
MODELS = ("base", "merged", "task0", "task1")


def wrap(folder: Path, inner: str = "") -> Path:
    """A model's folder as sentence-transformers has it, its transformer in `inner`."""
    save_tokenizer(folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16, "do_lower_case": False}))
    if inner:
        own = sorted(folder.iterdir())
        (folder / inner).mkdir(parents=True)
        for path in own:
            path.rename(folder / inner / path.name)
    paths = (inner, "1_Pooling", "2_Dense", "3_Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(paths, KINDS, strict=True))
    ]
    for name, values in {
        "modules.json": modules,
        "config_sentence_transformers.json": {"prompts": {"query": "a b"}, "default_prompt_name": None},
        "1_Pooling/config.json": POOLING,
        "2_Dense/config.json": DENSE,
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(values))
    save_file({"linear.weight": torch.eye(OUT, 48)}, folder / "2_Dense" / "model.safetensors")
    (folder / "README.md").write_text("# A model\n")
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What comes of plain folders, beside which they are, and the recipe."""
    folder = tmp_path_factory.mktemp("plain")
    recipe = of_texts(pico.save(pico.job("bert", 2), folder), folder)
    save_tokenizer(folder / "merged")
    (folder / "recipe.json").write_text(json.dumps(recipe))
    ff.calibrate(recipe)
    return folder / "out"


@pytest.fixture
def recipe(plain: Path, tmp_path: Path) -> dict:
    """Of copies of them."""
    shutil.copytree(plain.parent, tmp_path, ignore=shutil.ignore_patterns("out"), dirs_exist_ok=True)
    found: dict = json.loads((tmp_path / "recipe.json").read_text().replace(str(plain.parent), str(tmp_path)))
    return found


def of_texts(recipe: dict, folder: Path) -> dict:
    """Calibrated on texts, which need a tokenizer."""
    lines = [json.dumps({"text": text}) for text in ("a b c d", "e f g", "h i j a", "b b c")]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    experts = {task: {**each, "data": str(folder / "texts.jsonl")} for task, each in recipe["experts"].items()}
    return {**recipe, "experts": experts}


def calibrated(recipe: dict, **changes: object) -> Path:
    out = Path(recipe["out"]).parent / f"out{len(list(Path(recipe['out']).parent.glob('out*')))}"
    ff.calibrate({**recipe, **changes}, out=out)
    return out


def same(one: Path, other: Path) -> bool:
    first, second = (load_file(path / "model.safetensors") for path in (one, other))
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("inner", ["", INNER])
def test_a_folder_is_calibrated_in_its_own_layout(inner: str, recipe: dict, plain: Path, tmp_path: Path) -> None:
    """With the bits of plain folders; nothing is lost, and what is made of it is read again."""
    for name in MODELS:
        wrap(tmp_path / name, inner)
    out = calibrated(recipe)
    assert same(out / inner, plain)
    before, after = tree(tmp_path / "merged"), tree(out)
    assert after.keys() - before.keys() == {"report.json", "drift.svg"}
    weights = f"{inner}/model.safetensors".removeprefix("/")
    assert {name for name in before if before[name] != after.get(name)} == {weights, "README.md"}
    card = (out / "README.md").read_text()
    assert "\nmodel = SentenceTransformer(" in card
    assert ("AutoModel.from_pretrained" in card) == (not inner)
    assert check(out).whole, check(out).problems
    report = json.loads((out / "report.json").read_text())
    assert report["left_out"] == []
    described = report["inputs"]["models"]["merged model"]["files"]
    assert described[f"{inner}/config.json".removeprefix("/")]["sha256"]
    assert described[weights]["header_sha256"]
    assert not any("no tokenizer" in warning for warning in report["warnings"])
    assert find_checkpoint(str(out), tmp_path, "model").module == inner
    (out / weights).write_bytes(b"")
    assert not check(out).whole


def test_layouts_may_differ(recipe: dict, plain: Path, tmp_path: Path) -> None:
    """Each model has its own; the output has the merged model's. A folder in one is a model by itself."""
    for name, inner in (("base", INNER), ("task0", "models/encoder"), ("task1", "models/encoder")):
        wrap(tmp_path / name, inner)
    _modules("./models/encoder/", "1_Pooling")(tmp_path / "task0")
    whole = {**recipe["experts"]["task1"], "model": str(tmp_path / "task1" / "models" / "encoder")}
    assert same(calibrated(recipe, experts={**recipe["experts"], "task1": whole}), plain)
    del recipe["merged_model"]
    out = ff.merge({**recipe, "merge": {"method": "average"}}, out=tmp_path / "average")
    assert (out / INNER / "model.safetensors").is_file()
    assert (out / "2_Dense" / "model.safetensors").is_file()
    assert not (out / "model.safetensors").exists()


def test_shards_are_in_the_folder_of_their_index(tmp_path: Path, recipe: dict, plain: Path) -> None:
    wrap(tmp_path / "merged", INNER)
    folder = tmp_path / "merged" / INNER
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(places.values()):
        save_file({name: weights[name] for name in weights if places[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    out = calibrated(recipe)
    assert json.loads((out / INNER / "model.safetensors.index.json").read_text())["weight_map"] == places
    assert check(out).whole
    found = {name: value for file in set(places.values()) for name, value in load_file(out / INNER / file).items()}
    expected = load_file(plain / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_old_weights_beside_the_transformers_are_left_out(tmp_path: Path, recipe: dict) -> None:
    wrap(tmp_path / "merged", INNER)
    stale = ["0_Transformer/onnx/model.onnx", "0_Transformer/pytorch_model.bin", "onnx/model.onnx"]
    for name in stale:
        (tmp_path / "merged" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "merged" / name).write_bytes(b"old")
    (tmp_path / "merged" / "2_Dense" / "pytorch_model.bin").write_bytes(b"of the layer")
    source = Checkpoint(tmp_path / "merged", "merged model")
    assert sorted(source.left_out()) == stale
    assert "2_Dense/pytorch_model.bin" in source.side_files()
    assert f"{INNER}/tokenizer.json" in source.side_files()


def test_an_adapter_may_be_in_such_a_folder(tmp_path: Path, recipe: dict) -> None:
    wrap(tmp_path / "base", INNER)
    folder = tmp_path / "adapted"
    folder.mkdir()
    name = "encoder.layer.0.attention.self.query"
    factors = {f"{name}.lora_A.weight": torch.ones(4, 48), f"{name}.lora_B.weight": torch.ones(48, 4)}
    write_adapter(folder / INNER, factors, target_modules=[name])
    modules = [{"idx": 0, "path": INNER, "type": "Transformer"}, {"idx": 1, "path": "1_Pooling", "type": "Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    expert = find_expert("adapted", tmp_path, "expert", find_checkpoint("base", tmp_path, "base model"))
    (changed,) = expert.changed()
    base = load_file(tmp_path / "base" / INNER / "model.safetensors")[changed]
    assert torch.allclose(expert.read([changed])[changed], base + 8, atol=1e-5)


def test_the_hubs_cache_may_hold_one(tmp_path: Path, recipe: dict) -> None:
    snapshot = tmp_path / "models--org--st" / "snapshots" / ("a" * 40)
    shutil.copytree(wrap(tmp_path / "merged", INNER), snapshot)
    found = find_checkpoint("models--org--st", tmp_path, "model")
    assert found.module == INNER
    assert found.config.model_type == "bert"


def test_sentence_transformers_loads_what_is_written(tmp_path: Path, recipe: dict) -> None:
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer

    wrap(tmp_path / "merged", INNER)
    out = calibrated(recipe)
    exec(usage({}, str(out), ["modules.json"])[0][1].replace("Hello, world!", "a b"), {})
    found = [SentenceTransformer(str(path), device="cpu") for path in (tmp_path / "merged", out)]
    before, after = (model.encode(["a b c", "j a"], convert_to_tensor=True) for model in found)
    assert after.shape == (2, OUT)
    assert not torch.allclose(before, after, atol=1e-4)
    weights = load_file(out / INNER / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
    assert any(torch.equal(parameter, weights[name]) for parameter in found[1].parameters())


# What is no such folder


def _modules(*paths: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "modules.json").write_text(json.dumps([{"path": path} for path in paths]))


def _link(folder: Path) -> None:
    shutil.copytree(folder / INNER, folder.parent / "elsewhere")
    shutil.rmtree(folder / INNER)
    (folder / INNER).symlink_to(folder.parent / "elsewhere")


def _beside(folder: Path) -> None:
    """Of which others would load one, and others the other."""
    for path in (folder / INNER).iterdir():
        shutil.copy(path, folder)


def _two(folder: Path) -> None:
    shutil.copytree(folder / INNER, folder / "1_Other")
    _modules(INNER, "1_Other")(folder)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "an object": (lambda folder: (folder / "modules.json").write_text("{}"), "expected a list of modules"),
    "no modules": (_modules(), "expected a list of modules"),
    "far too many": (_modules(*["x"] * 200), "expected a list of modules"),
    "no json": (lambda folder: (folder / "modules.json").write_text("["), "modules.json is not valid JSON"),
    "no transformer": (_modules("1_Pooling", "2_Dense"), "found 0 among its modules"),
    "two": (_two, r"found 2 among its modules .*name the folder of the one"),
    **{
        f"path {path!r}": (_modules(path), "expected one of a folder beside it")
        for path in (
            "..",
            "../base",
            "/etc",
            "0_Transformer/../..",
            "a/b/c/d/e/f",
            5,
            None,
            "\x1b[2J",
            "a\\b/../c",
            "x" * 999,
        )
    },
    "a link": (_link, "is a link out of the folder"),
    "another whole model": (_beside, r"found another one beside it among its modules \(\['0_Transformer'\]\)"),
    "another path": (_modules("Transformer"), "found 0 among"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_such_folder_is_named(name: str, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    pico.KINDS["bert"]().save_pretrained(tmp_path / "model")
    folder = wrap(tmp_path / "model", INNER)
    change(folder)
    with pytest.raises(ff.FeatCalError, match=rf"merged model: {folder}.*{message}") as error:
        find_checkpoint("model", tmp_path, "merged model")
    assert len(str(error.value)) < 900
    assert str(error.value).isprintable()


def test_other_folders_are_their_own(tmp_path: Path) -> None:
    """A module's list beside a model says nothing, nor does that of a folder that is not there."""
    pico.KINDS["bert"]().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "modules.json").write_text("what was this for?")
    assert module_path(tmp_path / "model", "model") == ""
    _modules("", "1_Pooling")(tmp_path / "model")
    assert module_path(tmp_path / "model", "model") == ""
    assert model_folder(tmp_path / "nowhere") == tmp_path / "nowhere"
