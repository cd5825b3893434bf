"""`plan` refuses the data that `calibrate` would refuse, before any layer, and says what it is."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch
from data_files import TEMPLATE, save_image, save_tokenizer
from safetensors.torch import load_file, save_file

import featcal_fast as ff
from featcal_fast.inputs.load import load_data
from featcal_fast.inputs.models import RecipeModels
from featcal_fast.inputs.recipe import Recipe

PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 16},
    "crop_size": {"height": 16, "width": 16},
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict]]:
    found = {}
    for kind in ("llama", "clip", "bert", "roberta"):
        folder = tmp_path_factory.mktemp(kind)
        found[kind] = folder, pico.save(pico.job(kind, 1), folder)
        save_tokenizer(folder / "merged", template=TEMPLATE)
        (folder / "merged" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return found


@pytest.fixture
def make(jobs: dict[str, tuple[Path, dict]], tmp_path: Path) -> Callable[[str, Path | str], dict]:
    """A recipe of a kind of model, whose data is another, in a folder where it may be damaged."""

    def make(kind: str, data: Path | str) -> dict:
        folder, recipe = jobs[kind]
        shutil.copytree(folder, tmp_path / "job", dirs_exist_ok=True)
        text = json.dumps(recipe).replace(str(folder), str(tmp_path / "job"))
        job = {**json.loads(text), "max_length": 20, "batch_size": None}
        job["experts"]["task0"]["data"] = str(data)
        return job

    return make


def refused(recipe: dict, message: str) -> None:
    for run in (ff.plan, ff.calibrate):
        with pytest.raises(ff.FeatCalError, match=message):
            run(recipe, device="cpu")
    assert not Path(recipe["out"]).exists()


def pictures(folder: Path, count: int = 6) -> Path:
    for i in range(count):
        save_image(folder / f"{i}.png", (i, 0, 0))
    return folder


def test_an_image_that_is_not_the_first(make, tmp_path: Path) -> None:
    recipe = make("clip", pictures(tmp_path / "pictures"))
    assert ff.plan(recipe, device="cpu").exact
    (tmp_path / "pictures" / "3.png").write_bytes(b"no image")
    refused(recipe, r"3\.png: cannot be read as an image")


def test_a_processor_of_another_size(make, tmp_path: Path) -> None:
    recipe = make("clip", pictures(tmp_path / "pictures"))
    config = {**PROCESSOR, "crop_size": {"height": 8, "width": 8}}
    (tmp_path / "job" / "merged" / "preprocessor_config.json").write_text(json.dumps(config))
    refused(recipe, r"task task0, .*pictures: the merged model cannot take the inputs pixel_values \(6, 3, 8, 8\)")


@pytest.mark.parametrize("names", [(), ("notes.md",), (".hidden/a.png",)])
def test_folders_without_images(make, tmp_path: Path, names: tuple[str, ...]) -> None:
    (tmp_path / "pictures").mkdir()
    for name in names:
        save_image(tmp_path / "pictures" / "a.png", (0, 0, 0))
        (tmp_path / "pictures" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "pictures" / "a.png").rename(tmp_path / "pictures" / name)
    refused(make("clip", tmp_path / "pictures"), r"pictures: found no images, parquet or arrow files")


@pytest.mark.parametrize(("kind", "value"), [("llama", 100), ("bert", 100), ("llama", -1)])
@pytest.mark.parametrize("masked", [True, False])
def test_ids_that_a_model_has_not(make, tmp_path: Path, kind: str, value: int, masked: bool) -> None:
    """Of the last sample, in files that are loaded at once, and when their turn comes."""
    recipe = make(kind, tmp_path / "data.safetensors")
    data = load_file(tmp_path / "job" / "task0.safetensors")
    data["input_ids"][-1, 3] = value
    if not masked:
        del data["attention_mask"]
    save_file(data, tmp_path / "data.safetensors")
    refused(recipe, rf"sample 19, input_ids: found token id {value}, expected 0 to 99")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"token_type_ids": torch.full((4, 6), 2)}, r"token_type_ids: found 2, expected 0 to 1"),
        ({"position_ids": torch.full((4, 6), 64)}, r"position_ids: found 64, expected 0 to 63"),
        ({"attention_masks": torch.ones(4, 6)}, r"attention_masks: .* does not take.*did you mean attention_mask"),
        ({"token_type_ids": torch.zeros(4, 5, dtype=torch.int64)}, r"task task0, .*data.safetensors: .*cannot take"),
    ],
)
def test_other_inputs(make, tmp_path: Path, tensors: dict, message: str) -> None:
    save_file({"input_ids": torch.ones(4, 6, dtype=torch.int64), **tensors}, tmp_path / "data.safetensors")
    refused(make("bert", tmp_path / "data.safetensors"), message)


def test_data_that_are_not_there(make, tmp_path: Path) -> None:
    """Are looked for where the recipe is."""
    job = make("llama", "absent.jsonl")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "recipe.yaml").write_text(json.dumps(job))
    for run in (ff.plan, ff.calibrate):
        with pytest.raises(ff.FeatCalError, match=rf"no such file .*looked for {tmp_path}/elsewhere/absent.jsonl"):
            run(tmp_path / "elsewhere" / "recipe.yaml", device="cpu")


def test_a_template_that_does_not_end(make, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    recipe = make("llama", tmp_path / "data.jsonl")
    save_tokenizer(tmp_path / "job" / "merged", template="{{ 'a ' * 5000000000 }}")
    refused(recipe, r"data.jsonl, line 1: the chat template of .*merged")


def test_tables_on_disk(make, datasets, tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [100]]}).to_parquet(tmp_path / "tables" / "a.parquet")
    refused(make("llama", tmp_path / "tables"), r"tables, row 1, input_ids: found token id 100")


def test_data_sets_without_their_library(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for data in (tmp_path / "tables", "org/name"):
        refused(make("llama", data), rf"{data}: cannot be read without datasets; pip install datasets")


def test_texts_longer_than_a_model_takes_of_the_hub(make) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(ff.FeatCalError, match=r"org/name: found max_length 500, expected at most the model's 64"):
        ff.plan({**make("llama", "org/name"), "max_length": 500}, device="cpu")


def test_a_plan_keeps_no_data_and_knows_its_size(make, tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", 5)
    for kind, data in (("clip", tmp_path / "pictures"), ("llama", "")):
        job = make(kind, data)
        if not data:
            job["experts"]["task0"]["data"] = str(tmp_path / "job" / "task0.safetensors")
        recipe = Recipe.load({**job, "samples": 32})
        models = RecipeModels(recipe)
        kept, (batches, planned) = (load_data(recipe, models, torch.device("cpu"), keep=each) for each in (True, False))
        size, other = planned["task0"], kept[1]["task0"]
        assert [*batches["task0"]] == [] or size.lazy
        assert not size.loaded
        assert other.loaded is not other.lazy
        assert (size.rows, size.asked, size.batches, size.exact) == (other.rows, 32, other.batches, True)
        assert {name: value.shape for name, value in size.example.items()} == {
            name: value.shape for name, value in other.example.items()
        }
        assert sum(len(next(iter(batch.values()))) for batch in kept[0]["task0"]) == size.rows < size.asked
