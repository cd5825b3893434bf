"""Folders in, a folder out: the same bits as modules in memory, whole or not at all, errors that name the culprit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pico
import pytest
import torch
import yaml
from data_files import save_image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import featcal_fast as ff
from featcal_fast.data.batches import load_batches
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import LayerReport

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def clip_recipe(tmp_path: Path) -> dict:
    return pico.save(pico.job("clip", 2), tmp_path)


@pytest.fixture
def llama_recipe(tmp_path: Path) -> dict:
    return pico.save(pico.job("llama", 2), tmp_path)


@pytest.mark.parametrize("kind", ["clip", "llama"])
def test_folders_and_modules_give_the_same_bits(kind: str, tmp_path: Path) -> None:
    job = pico.job(kind, 2)
    recipe = pico.save(job, tmp_path)
    report = ff.calibrate(recipe)
    batches = {
        task: load_batches(expert["data"], folders=[], batch_size=recipe["batch_size"])
        for task, expert in recipe["experts"].items()
    }
    ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=batches)

    found, info = type(job.merged).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, parameter in job.merged.named_parameters():
        assert torch.equal(parameter, found.get_parameter(name)), name
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["calibrated_weights"] == written["linear_weights"] - len(report.kept) == report.calibrated
    assert [layer["drift_after"] for layer in written["layers"]] == [layer.drift_after for layer in report.layers]


def test_merging_on_the_fly_is_merging_beforehand(llama_recipe: dict, tmp_path: Path) -> None:
    streamed = {key: value for key, value in llama_recipe.items() if key != "merged_model"}
    streamed |= {"merge": {"method": "task_arithmetic", "scaling": 0.3}, "out": str(tmp_path / "streamed")}
    ff.calibrate(streamed)
    merged = ff.merge(streamed, out=tmp_path / "premerged")
    ff.calibrate({**llama_recipe, "merged_model": str(merged)})
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("streamed", "out"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    base = load_file(tmp_path / "base" / "model.safetensors")
    experts = [load_file(tmp_path / task / "model.safetensors") for task in llama_recipe["experts"]]
    for name, value in load_file(merged / "model.safetensors").items():
        assert torch.allclose(value, base[name] + 0.3 * sum(expert[name] - base[name] for expert in experts), atol=1e-6)


def test_average_is_the_mean_of_the_experts(clip_recipe: dict, tmp_path: Path) -> None:
    del clip_recipe["merged_model"]
    folder = ff.merge({**clip_recipe, "merge": {"method": "average"}})
    experts = [load_file(tmp_path / task / "model.safetensors") for task in clip_recipe["experts"]]
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.allclose(value, sum(expert[name] for expert in experts) / 2, atol=1e-6)


def test_output_takes_the_merged_models_form(llama_recipe: dict, tmp_path: Path) -> None:
    """Shards, names, shapes, dtypes, index and side files; untouched tensors byte for byte."""
    merged, out = tmp_path / "merged", tmp_path / "out"
    pico.job("llama", 2).merged.bfloat16().save_pretrained(merged, max_shard_size="100KB")
    (merged / "model.safetensors").unlink()
    (merged / "chat_template.jinja").write_text("{{ messages }}")
    (merged / "pytorch_model.bin").write_bytes(b"never opened")
    ff.calibrate(llama_recipe)
    shards = sorted(path.name for path in merged.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*shards, "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors.index.json"]
        + ["README.md", "drift.svg", "report.json"]
    )
    index = [json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (merged, out)]
    assert index[0] == index[1]
    changed = set()
    for shard in shards:
        before, after = load_file(merged / shard), load_file(out / shard)
        assert {k: (v.shape, v.dtype) for k, v in before.items()} == {k: (v.shape, v.dtype) for k, v in after.items()}
        changed |= {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in index[0]["weight_map"] if name.endswith("proj.weight")}


def test_old_layout_names_are_read_and_written_as_they_were(clip_recipe: dict, tmp_path: Path) -> None:
    """Checkpoints from before transformers 5.6 put `vision_model.` before every name."""
    ff.calibrate(clip_recipe)
    for folder in ("merged", "task0"):
        path = tmp_path / folder / "model.safetensors"
        weights = {name.removeprefix("vision_model."): value for name, value in load_file(path).items()}
        prefix = "" if folder == "task0" else "vision_model."
        save_file({f"{prefix}{name}": value for name, value in weights.items()}, path, metadata={"format": "pt"})
    ff.calibrate(clip_recipe, out=tmp_path / "old")
    new, old = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "old"))
    assert all(name.startswith("vision_model.") for name in old)
    strip = {name.removeprefix("vision_model."): value for name, value in new.items()}
    assert all(torch.equal(value, strip[name.removeprefix("vision_model.")]) for name, value in old.items())


def test_no_whole_model_is_ever_built(llama_recipe: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are read one at a time, the head and the final norm never."""
    from featcal_fast.checkpoints import Checkpoint

    reads: list[tuple[str, set[str]]] = []
    read = Checkpoint.read

    def counting(self: Checkpoint, names):
        names = list(names)
        reads.append((self.label, set(names)))
        return read(self, names)

    monkeypatch.setattr(Checkpoint, "read", counting)
    ff.calibrate(llama_recipe)
    expert = [names for label, names in reads if label == "expert task0"]
    assert all(len({name.split(".")[2] for name in names}) == 1 for names in expert if len(names) > 1)
    seen = [name for names in expert for name in names]
    assert len(seen) == len(set(seen)), "an expert's tensor is read once"
    assert not {name for name in seen if "lm_head" in name or name == "model.norm.weight"}


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    recipe = pico.save(pico.job("llama", 2, tie_word_embeddings=True), tmp_path)
    ff.calibrate(recipe)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    from transformers import LlamaForCausalLM

    _, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]


def test_the_hub_cache_layout_is_read(llama_recipe: dict, tmp_path: Path) -> None:
    """Files of a hub snapshot are links into `../../blobs`; links to anywhere else are refused."""
    expert, cache = tmp_path / "task0", tmp_path / "cache"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for path in list(expert.iterdir()):
        shutil.move(path, cache / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    llama_recipe["experts"]["task0"]["model"] = str(snapshot)
    ff.calibrate(llama_recipe)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "task1" / "model.safetensors")
    with pytest.raises(ff.FeatCalError, match="outside of the model folder"):
        ff.calibrate(llama_recipe, out=tmp_path / "out2")


# Bad input. Each breaks a good job in one way; the error must name the culprit, and nothing may be left behind.


def _missing_folder(root: Path, recipe: dict) -> str:
    recipe["experts"]["task1"]["model"] = str(root / "nowhere")
    return r"expert task1: .*nowhere is not a folder"


def _missing_hub_model(root: Path, recipe: dict) -> str:
    recipe["base_model"] = "no-such-org/no-such-model"
    return r"base model: 'no-such-org/no-such-model' is neither a folder .* nor a model that could be had from the hub"


def _not_a_checkpoint(root: Path, recipe: dict) -> str:
    (root / "task1" / "config.json").unlink()
    return r"expert task1: .*task1 is not a checkpoint: config.json is missing"


def _adapter(root: Path, recipe: dict) -> str:
    (root / "merged" / "config.json").rename(root / "merged" / "adapter_config.json")
    return r"merged model: .*merged is an adapter, expected a full checkpoint"


def _quantised(root: Path, recipe: dict) -> str:
    path = root / "task1" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    return r"expert task1: .*config.json says the weights are quantised \(gptq\)"


def _broken_config(root: Path, recipe: dict) -> str:
    (root / "task1" / "config.json").write_text("{")
    return r"expert task1: .*config.json is not valid JSON"


def _unknown_architecture(root: Path, recipe: dict) -> str:
    path = root / "merged" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["NoSuchModel"]}))
    return r"merged model: .*config.json names the architectures \['NoSuchModel'\]"


def _missing_tensor(root: Path, recipe: dict) -> str:
    _edit(root / "task1", lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    return r"expert task1: .*task1: tensor model.layers.1.mlp.up_proj.weight is missing"


def _foreign_tensor(root: Path, recipe: dict) -> str:
    _edit(root / "task1", lambda w: w.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)}))
    return r"expert task1: .*task1: tensor model.layers.1.self_attn.q_proj.bias belongs to no module"


def _wrong_shape(root: Path, recipe: dict) -> str:
    _edit(root / "task1", lambda w: w.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(9, 64)}))
    return r"expert task1: .*task1: tensor model.layers.1.mlp.up_proj.weight has shape \(9, 64\), expected \(160, 64\)"


def _other_architecture(root: Path, recipe: dict) -> str:
    pico.llama(layers=2).save_pretrained(root / "task1")
    return r"expert task1: found 2 blocks .* expected 3"


def _nan(root: Path, recipe: dict) -> str:
    def poison(weights: dict) -> None:
        weights["model.layers.2.mlp.down_proj.weight"][1, 2] = float("nan")

    _edit(root / "task1", poison)
    return r"expert task1: .*model.safetensors: tensor model.layers.2.mlp.down_proj.weight holds 1 values that are NaN"


def _nan_in_the_head(root: Path, recipe: dict) -> str:
    _edit(root / "merged", lambda w: w["lm_head.weight"].fill_(float("nan")))
    return r"merged model: .*model.safetensors: tensor lm_head.weight holds 6400 values that are NaN"


def _no_head(root: Path, recipe: dict) -> str:
    _edit(root / "merged", lambda w: w.pop("lm_head.weight"))
    return r"merged model: .*merged: tensor lm_head.weight is missing from the checkpoint"


def _unmatched_pattern(root: Path, recipe: dict) -> str:
    recipe["settings"] = {"include": ["q_prooj"]}
    return r"settings.include: 'q_prooj' matches no module"


def _forward_dtype(root: Path, recipe: dict) -> str:
    _edit(root / "merged", lambda w: w.update({name: value.half() for name, value in w.items()}))
    recipe["settings"] = {"forward_dtype": "bfloat16"}
    return r"settings.forward_dtype: found bfloat16 for layers of float16"


def _no_tokenizer(root: Path, recipe: dict) -> str:
    (root / "texts.jsonl").write_text('{"text": "a"}\n')
    recipe["experts"]["task1"] |= {"data": str(root / "texts.jsonl"), "max_length": 16}
    return r"texts.jsonl: found no tokenizer in .*merged"


def _no_json(root: Path, recipe: dict) -> str:
    (root / "texts.jsonl").write_text("text\n")
    recipe["experts"]["task1"]["data"] = str(root / "texts.jsonl")
    return r"texts.jsonl, line 1: found invalid JSON"


def _out_in_a_file(root: Path, recipe: dict) -> str:
    recipe["out"] = str(root / "task1.safetensors" / "out")
    return r"out: .*task1.safetensors/out lies in the input folder .*task1.safetensors"


def _truncated(root: Path, recipe: dict) -> str:
    path = root / "task1" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return r"expert task1: .*task1/model.safetensors is not a complete safetensors file"


def _pickled(root: Path, recipe: dict) -> str:
    (root / "task1" / "model.safetensors").rename(root / "task1" / "pytorch_model.bin")
    return r"expert task1: .*task1 has only pickled weights \(pytorch_model.bin\)"


def _no_weights(root: Path, recipe: dict) -> str:
    (root / "task1" / "model.safetensors").unlink()
    return r"expert task1: .*task1 has neither model.safetensors nor"


def _index_out_of_folder(root: Path, recipe: dict) -> str:
    (root / "task1" / "model.safetensors").rename(root / "evil.safetensors")
    index = {"weight_map": {"model.norm.weight": "../evil.safetensors"}}
    (root / "task1" / "model.safetensors.index.json").write_text(json.dumps(index))
    return r"expert task1: .* places tensor 'model.norm.weight' in '../evil.safetensors'"


def _stale_index(root: Path, recipe: dict) -> str:
    (root / "task1" / "model.safetensors").rename(root / "task1" / "shard.safetensors")
    index = {"weight_map": {"model.norm.weight": "shard.safetensors", "gone": "shard.safetensors"}}
    (root / "task1" / "model.safetensors.index.json").write_text(json.dumps(index))
    return r"expert task1: .* says that shard.safetensors holds tensor gone, but it does not"


def _missing_shard(root: Path, recipe: dict) -> str:
    (root / "task1" / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (root / "task1" / "model.safetensors.index.json").write_text(json.dumps(index))
    return r"expert task1: .*model-00001-of-00002.safetensors is missing"


def _no_data(root: Path, recipe: dict) -> str:
    recipe["experts"]["task1"]["data"] = str(root / "none.jsonl")
    return r"none.jsonl"


def _empty_data(root: Path, recipe: dict) -> str:
    save_file({"input_ids": torch.zeros(0, 5, dtype=torch.long)}, root / "task1.safetensors")
    return r"task1.safetensors"


def _long_sample(root: Path, recipe: dict) -> str:
    save_file({"input_ids": torch.zeros(2, 65, dtype=torch.long)}, root / "task1.safetensors")
    return r"task1.safetensors.*65.*64"


def _unknown_token(root: Path, recipe: dict) -> str:
    save_file({"input_ids": torch.full((2, 5), 100)}, root / "task1.safetensors")
    return r"task1.safetensors.*100"


def _all_padding(root: Path, recipe: dict) -> str:
    zeros = torch.zeros(2, 5, dtype=torch.long)
    save_file({"input_ids": zeros, "attention_mask": zeros.clone()}, root / "task1.safetensors")
    return r"task1.safetensors"


def _occupied_out(root: Path, recipe: dict) -> str:
    (root / "out").mkdir()
    (root / "out" / "mine.txt").write_text("keep me")
    return r"out: .*out already holds something"


def _out_in_an_input(root: Path, recipe: dict) -> str:
    recipe["out"] = str(root / "merged" / "out")
    return r"out: .*merged/out lies in the input folder"


def _no_out(root: Path, recipe: dict) -> str:
    del recipe["out"]
    return r"out: missing"


def _unknown_key(root: Path, recipe: dict) -> str:
    recipe["experts"]["task1"]["modle"] = "x"
    return r"experts.task1.modle: unknown key; did you mean 'model'\?"


BREAKAGES = [value for name, value in list(globals().items()) if name.startswith("_") and name[1].isalpha()]
BREAKAGES = [
    value for value in BREAKAGES if getattr(value, "__code__", None) and value.__code__.co_varnames[1:2] == ("recipe",)
]


def _edit(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.__name__.strip("_"))
def test_bad_input_is_named_and_leaves_nothing_behind(breakage, llama_recipe: dict, tmp_path: Path) -> None:
    message = breakage(tmp_path, llama_recipe)
    before = _tree(tmp_path)
    calibrate = partial(ff.calibrate, checkpoint_every=0)
    alone = (_nan, _nan_in_the_head, _no_out, _occupied_out)
    for run in [calibrate] if breakage in alone else [calibrate, ff.plan]:  # no plan reads weights, or needs the output
        with pytest.raises(ff.FeatCalError, match=f"(?s){message}"):
            run(llama_recipe)
    assert _tree(tmp_path) == before


def test_a_shape_mismatch_between_experts_stops_a_merge(clip_recipe: dict, tmp_path: Path) -> None:
    weights = load_file(tmp_path / "task1" / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.0.mlp.fc1.weight"))
    _edit(tmp_path / "task1", lambda w: w.update({name: torch.zeros(4, 4)}))
    del clip_recipe["merged_model"]
    with pytest.raises(
        ff.FeatCalError, match=rf"expert task1: tensor {name} .* has shape \(4, 4\), expected the base's"
    ):
        ff.calibrate({**clip_recipe, "merge": {"method": "task_arithmetic"}})
    assert not (tmp_path / "out").exists()


def test_merge_without_a_method_says_so(clip_recipe: dict) -> None:
    with pytest.raises(ff.FeatCalError, match="merge: missing"):
        ff.merge(clip_recipe)


def test_a_recipe_file_is_read_relative_to_itself(
    clip_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = yaml.safe_dump(clip_recipe).replace(f"{tmp_path}/", "")
    (tmp_path / "recipe.yaml").write_text(text)
    monkeypatch.chdir("/")
    report = ff.calibrate(tmp_path / "recipe.yaml")
    assert report.out == str(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def _tree(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_hidden_states_on_disk_change_nothing(llama_recipe: dict, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    ff.calibrate(llama_recipe)
    report = ff.calibrate(llama_recipe, out=tmp_path / "other", scratch=tmp_path / "scratch", checkpoint_every=0)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "other"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert list((tmp_path / "scratch").iterdir()) == []
    # Of the student, and of the experts (the last block's output is stored for these only); and of those that are
    # followed, four samples a task, in three models.
    states, followed = 2 * 20 * 20 * 64 * 4, 2 * 4 * 20 * 64 * 4
    assert report.bytes_written["hidden states"] == (3 + 4) * states + 3 * 4 * followed
    read = report.bytes_read["hidden states"]
    assert (5 + 3) * states + 3 * 2 * 3 * followed <= read <= (6 + 4) * states + 3 * 4 * 3 * followed  # some too early
    with pytest.raises(ff.FeatCalError, match=r"scratch: .*nowhere cannot hold hidden states"):
        ff.calibrate(llama_recipe, out=tmp_path / "third", scratch=tmp_path / "nowhere")


def test_what_is_broken_is_found_before_the_first_layer(llama_recipe: dict, tmp_path: Path) -> None:
    class Layers(Progress):
        def layer(self, report: LayerReport) -> None:
            pytest.fail("a layer was calibrated")

    _nan_in_the_head(tmp_path, llama_recipe)
    with pytest.raises(ff.FeatCalError, match=r"lm_head.weight"):
        ff.calibrate(llama_recipe, progress=Layers())


def test_images_without_a_processor_are_found_before_the_first_task(clip_recipe: dict, tmp_path: Path) -> None:
    save_image(tmp_path / "images" / "a.png", "red")
    clip_recipe["experts"]["task1"]["data"] = str(tmp_path / "images")
    for run in (ff.plan, ff.calibrate):
        with pytest.raises(ff.FeatCalError, match="found no image processor"):
            run(clip_recipe)


def test_a_checkpoint_of_two_dtypes_is_loaded_as_models_are(tmp_path: Path) -> None:
    """Norms in float32 among bfloat16 weights: computed in bfloat16, written as they were."""
    job = pico.job("llama", 2)
    for model in (job.base, job.merged, *job.experts.values()):
        model.to(torch.bfloat16)
    recipe = pico.save(job, tmp_path)
    ff.calibrate(recipe)
    for folder in ("base", "merged", "task0", "task1"):
        _edit(
            tmp_path / folder,
            lambda w: w.update({name: value.float() for name, value in w.items() if "norm" in name}),
        )
    ff.calibrate(recipe, out=tmp_path / "mixed")
    plain, mixed = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "mixed"))
    for name, value in mixed.items():
        assert value.dtype == (torch.float32 if "norm" in name else torch.bfloat16)
        assert torch.equal(value.bfloat16(), plain[name]), name


def test_a_job_that_is_told_to_stop_leaves_nothing(llama_recipe: dict, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(llama_recipe))
    code = (
        "import os, signal, sys; from featcal_fast import cli; loop = sys.modules['featcal_fast.calibrate'];"
        "loop.solve_together = lambda *_: os.kill(os.getpid(), signal.SIGTERM);"
        f"sys.argv = ['featcal-fast', 'calibrate', {str(path)!r}, '--device', 'cpu']; cli.main()"
    )
    before = _tree(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 143, done.stderr
    assert _tree(tmp_path) == before
