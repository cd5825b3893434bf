"""The paper's experiment on stand-ins: a pico CLIP with tokenizer and image processor, small data sets on disk."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from bench import paper
from featcal_fast.errors import DataError, OutputError

datasets = pytest.importorskip("datasets")
PIL = pytest.importorskip("PIL.Image")

CLASSES = {"colours": ["dark red", "leaf_green", "sky blue"], "greys": ["black", "grey", "pale", "white"]}
TEMPLATES = {"colours": ("a photo of {} .", "the {} thing ."), "greys": ("a {} wall .",)}
MODES = {"colours": "RGB", "greys": "L"}
TRAIN, TEST = 6, 5  # images a class
NAMES = ("black", "blue", "dark", "green", "grey", "leaf", "pale", "red", "sky", "white")
WORDS = ("<pad>", "<s>", ".", "a", "of", "photo", "the", "thing", "wall", *NAMES, "</s>")


def pixels(task: str, label: int, generator: np.random.Generator) -> np.ndarray:
    """Stripes and a tone of the class's own, with a little noise."""
    image = np.zeros((16, 16, 3) if MODES[task] == "RGB" else (16, 16))
    image += 40 + 50 * label
    image[:: label + 2] = 220 - 60 * label
    if image.ndim == 3:
        image[..., label] = 250
    return (image + generator.integers(-5, 6, image.shape)).clip(0, 255).astype("uint8")


def make_dataset(task: str, folder: Path) -> Path:
    generator = np.random.default_rng(len(task))
    features = datasets.Features(
        image=datasets.Image(), note=datasets.Value("string"), label=datasets.ClassLabel(names=CLASSES[task])
    )
    splits = {}
    for split, count in {"train": TRAIN, "test": TEST}.items():
        labels = [label for label in range(len(CLASSES[task])) for _ in range(count)]
        images = [PIL.fromarray(pixels(task, label, generator)) for label in labels]
        columns = {"image": images, "note": [split] * len(labels), "label": labels}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(splits).save_to_disk(folder)
    return folder


def make_clip(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    text = {**pico.TEXT, "num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": WORDS.index("</s>")}
    config = transformers.CLIPConfig(vision_config=pico.IMAGE, text_config=text, projection_dim=32)
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(word, WORDS.index(word)) for word in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 16},
        "crop_size": {"height": 16, "width": 16},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(base: Path) -> Any:
    return transformers.CLIPModel.from_pretrained(base).eval()


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(base)


@pytest.fixture(scope="module")
def tasks(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, paper.Task]:
    root = tmp_path_factory.mktemp("tasks")
    made = {}
    for seed, name in enumerate(CLASSES):
        pico.perturbed(paper.load_tower(base), 0.3, seed).save_pretrained(root / f"expert-{name}")
        data = make_dataset(name, root / name)
        made[name] = paper.Task(str(root / f"expert-{name}"), str(data), TEMPLATES[name], (10.0, 20.0))
    return made


@pytest.fixture(scope="module")
def finished(
    base: Path, tasks: dict[str, paper.Task], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("run") / "new"
    with redirect_stdout(io.StringIO()) as printed:
        results = paper.run(folder, tasks, base=str(base), samples=8)
    return folder, results, printed.getvalue()


def decoded(images: Any) -> list[bytes]:
    return [np.asarray(image).tobytes() for image in images[images.column_names[0]]]


def rows(images: Any) -> set[bytes]:
    return set(decoded(images))


# The whole protocol


def test_the_merge_is_task_arithmetic_of_vision_towers(
    finished: tuple[Path, dict[str, Any], str], tasks: dict[str, paper.Task], clip: Any
) -> None:
    folder, _, _ = finished
    weights = load_file(folder / "merged" / "model.safetensors")
    experts = [load_file(Path(task.expert) / "model.safetensors") for task in tasks.values()]
    start = load_file(folder / "base" / "model.safetensors")
    assert weights.keys() == start.keys() == experts[0].keys()
    own = {name.removeprefix("vision_model."): value for name, value in start.items()}
    tower = {name.removeprefix("vision_model."): value for name, value in clip.vision_model.state_dict().items()}
    for name, value in own.items():
        assert value.equal(tower[name])
    for name, value in weights.items():
        expected = start[name] + 0.3 * sum(expert[name] - start[name] for expert in experts)
        torch.testing.assert_close(value, expected)


def test_the_calibrated_model_is_nearer_to_the_experts(finished: tuple[Path, dict[str, Any], str]) -> None:
    folder, _, _ = finished
    report = json.loads((folder / "calibrated" / "report.json").read_text())
    assert report["settings"] | {"ridge_lambda": 0.05, "anchor_rho": 2.2, "teacher_alpha": 0.25} == report["settings"]
    assert report["layers"][-1]["drift_after"] < report["layers"][-1]["drift_before"]


def test_reported_accuracies_are_those_of_the_models_on_the_test_split(
    finished: tuple[Path, dict[str, Any], str], tasks: dict[str, paper.Task], base: Path, clip: Any, tokenizer: Any
) -> None:
    folder, results, _ = finished
    processor = paper.load_processor(base)
    for model, place in {"task arithmetic": "merged", "FeatCal": "calibrated"}.items():
        tower = transformers.CLIPVisionModel.from_pretrained(folder / place).eval()
        for name, task in tasks.items():
            test = datasets.load_from_disk(task.dataset)["test"]
            names = [each.replace("_", " ") for each in CLASSES[name]]
            head = paper.zero_shot_head(clip, tokenizer, names, task.templates)
            right = 0
            for row in test:
                pixels = processor(images=row["image"].convert("RGB"), return_tensors="pt")["pixel_values"]
                with torch.no_grad():
                    scores = clip.visual_projection(tower(pixel_values=pixels).pooler_output) @ head.T
                right += int(scores.argmax()) == row["label"]
            assert results["accuracy"][model][name] == pytest.approx(100 * right / len(test))
        row = results["accuracy"][model]
        assert row["mean"] == pytest.approx((row["colours"] + row["greys"]) / 2)


def test_calibration_images_are_of_the_training_split_and_without_labels(
    finished: tuple[Path, dict[str, Any], str], tasks: dict[str, paper.Task]
) -> None:
    folder, _, _ = finished
    for name, task in tasks.items():
        saved = datasets.load_from_disk(folder / "data" / name)
        splits = datasets.load_from_disk(task.dataset)
        assert len(saved.column_names) == 1
        assert len(rows(saved)) == 8
        assert rows(saved) <= rows(splits["train"])
        assert not rows(saved) & rows(splits["test"])


def test_what_it_leaves_and_prints(finished: tuple[Path, dict[str, Any], str]) -> None:
    folder, results, printed = finished
    left = {path.name for path in folder.iterdir()}
    assert left == {"base", "data", "merged", "calibrated", "recipe.yaml", "results.json"}
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["merge"] == {"method": "task_arithmetic", "scaling": 0.3}
    assert recipe["settings"] == {"preset": "clip-demo"}
    stored = json.loads((folder / "results.json").read_text())
    assert stored["accuracy"] == results["accuracy"]
    assert stored["recipe"] == recipe
    assert stored["test_images"] == {"colours": 15, "greys": 20}
    assert stored["class_names"] == "data sets"
    assert stored["paper"]["mean"] == [67.55, 85.47]
    for text in ("67.55", "85.47", "not measured here", "paper: FeatCal", "colours", "mean"):
        assert text in printed


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path, tasks: dict[str, paper.Task], base: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(OutputError, match="expected a new or empty folder"):
        paper.run(tmp_path, tasks, base=str(base))
    level = transformers.logging.get_verbosity()
    with pytest.raises(SystemExit, match=r"error: .*expected a new or empty folder"):
        paper.main(["--folder", str(tmp_path), "--device", "cpu"])
    transformers.logging.set_verbosity(level)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_command_runs_all_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(paper, "run", lambda folder, tasks, **options: seen.update(options, folder=folder, tasks=tasks))
    level = transformers.logging.get_verbosity()
    paper.main(["--folder", str(tmp_path), "--device", "cpu"])
    transformers.logging.set_verbosity(level)
    assert seen == {"folder": tmp_path, "tasks": paper.TASKS, "device": "cpu", "workers": 8, "official": None}


def test_offline_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot_download(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    level = transformers.logging.get_verbosity()
    with pytest.raises(SystemExit, match=r"error: no snapshot\n.*cannot be run offline"):
        paper.main(["--folder", str(tmp_path / "new"), "--device", "cpu"])
    transformers.logging.set_verbosity(level)
    assert not (tmp_path / "new").exists()


# Its parts


def test_the_papers_figures_agree_with_their_mean() -> None:
    assert len(paper.TASKS) == 8
    for i, mean in enumerate(paper.PAPER_MEAN):
        assert sum(task.paper[i] for task in paper.TASKS.values()) / 8 == pytest.approx(mean, abs=0.01)
    counts = {name: len(task.templates) for name, task in paper.TASKS.items()}
    assert counts == {
        "sun397": 2, "stanford-cars": 8, "resisc45": 18, "eurosat": 3, "svhn": 1, "gtsrb": 3, "mnist": 1, "dtd": 8
    }  # fmt: skip
    assert all(template.count("{}") == 1 for task in paper.TASKS.values() for template in task.templates)
    assert "satellite imagery of the {}." in paper.TASKS["resisc45"].templates


def test_class_names_are_the_data_sets_own_in_the_order_of_labels(tasks: dict[str, paper.Task]) -> None:
    test = paper.load_split(tasks["colours"], "test")
    assert paper.class_names(test) == ["dark red", "leaf green", "sky blue"]
    bare = test.cast_column("label", datasets.Value("int64"))
    assert paper.columns(bare) == ("image", "label")
    with pytest.raises(DataError, match=r"without class names.*--official"):
        paper.class_names(bare)
    with pytest.raises(DataError, match="found the columns note, label; expected one of images"):
        paper.columns(test.remove_columns("image"))


def test_official_names_and_templates_replace_ours(
    tmp_path: Path, tasks: dict[str, paper.Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "src" / "featcal" / "classification"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text(
        "NAMES = {'colours': ['red', 'green', 'blue'], 'greys': ['black', 'white']}\n"
        "def get_classnames_and_templates(task):\n"
        "    return NAMES[task], [lambda c: f'a \"{c}\".', lambda c: f'the {c}']\n"
    )
    for name in ("featcal", "featcal.classification"):
        monkeypatch.setitem(sys.modules, name, None)  # so that they are forgotten in the end
        del sys.modules[name]
    path = [*sys.path]
    test = paper.load_split(tasks["colours"], "test")
    names, templates = paper.prompts("colours", tasks["colours"], test, tmp_path)
    assert names == ["red", "green", "blue"]
    assert templates == ['a "{}".', "the {}"]
    with pytest.raises(DataError, match=r"greys: found 2 class names in .*, expected the data set's 4"):
        paper.prompts("greys", tasks["greys"], paper.load_split(tasks["greys"], "test"), tmp_path)
    with pytest.raises(DataError, match="found no class names of cars"):
        paper.official_prompts(tmp_path, "cars")
    assert sys.path == path


def test_a_head_has_a_unit_row_a_class_the_mean_of_its_prompts(clip: Any, tokenizer: Any) -> None:
    names, templates = ["red", "dark red", "sky blue"], ["a photo of {} .", "the {} thing ."]
    head = paper.zero_shot_head(clip, tokenizer, names, templates)
    assert head.shape == (3, 32)
    torch.testing.assert_close(head.norm(dim=-1), torch.ones(3))
    one_by_one = []
    for template in templates:  # by itself, and so without padding
        tokens = tokenizer(template.replace("{}", "dark red"), return_tensors="pt")["input_ids"]
        assert tokens[0, -1] == WORDS.index("</s>")
        with torch.no_grad():
            text = clip.text_projection(clip.text_model(input_ids=tokens).pooler_output)[0]
        one_by_one.append(text / text.norm())
    expected = sum(one_by_one) / 2
    torch.testing.assert_close(head[1], expected / expected.norm())
    assert (head[0] - head[1]).norm() > 1e-3


def test_a_head_of_class_means_reads_every_image_and_a_rotated_one_none(
    tasks: dict[str, paper.Task], base: Path, clip: Any
) -> None:
    test, processor = paper.load_split(tasks["colours"], "test"), paper.load_processor(base)
    tower = paper.load_tower(base)
    pixels = processor(images=[row["image"].convert("RGB") for row in test], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        embeddings = paper.embed(tower, clip.visual_projection, pixels)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(len(test)))
    head = embeddings.view(3, TEST, -1).mean(dim=1)
    head /= head.norm(dim=-1, keepdim=True)
    towers = {"one": tower, "two": tower}

    def accuracies(head: torch.Tensor) -> dict[str, dict[str, float]]:
        given = {"a": head, "b": head.roll(1, dims=0)}, dict.fromkeys("ab", test)
        return paper.evaluate(towers, clip.visual_projection, *given, processor, batch_size=4)

    assert accuracies(head) == {name: {"a": 100, "b": 0, "mean": 50} for name in towers}
    with pytest.raises(DataError, match=r"found labels \d to 2, expected 0 to 1"):
        accuracies(head[:2])


def test_worker_processes_give_the_same(tasks: dict[str, paper.Task], base: Path, clip: Any) -> None:
    test, processor, towers = paper.load_split(tasks["greys"], "test"), paper.load_processor(base), {}
    towers = {"base": paper.load_tower(base)}
    head = torch.nn.functional.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    alone, helped = (
        paper.evaluate(
            towers, clip.visual_projection, {"greys": head}, {"greys": test}, processor, batch_size=8, workers=workers
        )
        for workers in (0, 1)
    )
    assert alone == helped


def test_the_draw_follows_its_seed_and_takes_all_where_there_are_few(
    tasks: dict[str, paper.Task], tmp_path: Path
) -> None:
    train = paper.load_split(tasks["greys"], "train")
    drawn = {
        name: decoded(datasets.load_from_disk(paper.calibration_data(train, count, seed, tmp_path / name)))
        for name, count, seed in (("a", 5, 0), ("again", 5, 0), ("b", 5, 1), ("all", 99, 0))
    }
    assert len(set(drawn["a"])) == 5
    assert drawn["a"] == drawn["again"] != drawn["b"]
    assert set(drawn["all"]) == rows(train)


# The hub's part, with the hub replaced


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_models_of_the_hub_come_without_pickles_unless_there_is_nothing_else(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    import huggingface_hub

    asked = []

    def snapshot_download(repo: str, allow_patterns: list[str]) -> str:
        assert repo == "org/clip"
        asked.append(allow_patterns[-1])
        for name in ("config.json", "preprocessor_config.json"):
            (tmp_path / name).write_bytes((base / name).read_bytes())
        weights = base / "model.safetensors"
        if suffix == "safetensors":
            (tmp_path / "model.safetensors").write_bytes(weights.read_bytes())
        elif "pytorch_model.bin" in allow_patterns:
            torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    folder = paper.model_folder("org/clip")
    assert asked == ["*.safetensors"] + ["pytorch_model.bin"] * (suffix == "bin")
    paper.write_vision_tower(folder, tmp_path / "tower")
    found, expected = paper.load_tower(tmp_path / "tower").state_dict(), paper.load_tower(base).state_dict()
    assert found.keys() == expected.keys()
    assert all(value.equal(expected[name]) for name, value in found.items())
    assert paper.load_processor(tmp_path / "tower").crop_size["height"] == 16


def test_data_of_the_hub_is_loaded_by_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *where, split: (*where, split))
    assert paper.load_split(paper.TASKS["svhn"], "test") == ("ufldl-stanford/svhn", "cropped_digits", "test")
    assert paper.load_split(paper.TASKS["dtd"], "train") == ("tanganke/dtd", None, "train")
