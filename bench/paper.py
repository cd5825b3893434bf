"""The paper's CLIP ViT-B/32 experiment on the real models and data: eight tasks, task arithmetic, then FeatCal.

    pip install datasets pillow                          # beside this project and the torch build for your GPU
    git clone https://github.com/egangu/featcal          # optional, for --official
    python -m bench.paper --folder paper-run --device cuda --official featcal

It cannot run offline: it downloads the base model, eight fine-tuned vision towers (350 MB each) and eight data sets
from the Hugging Face hub. It has been tested on small stand-ins only. The figures that it prints beside yours are the
paper's (67.55 -> 85.47 for the mean), as the official demo's README states them; they were not measured here.

The protocol is the official demo's (github egangu/featcal at 18c68b6): merge the vision towers by task arithmetic with
0.3, calibrate with 256 unlabelled training images a task and the preset `clip-demo`, and read each task's whole test
split with CLIP's zero-shot head: the mean text embedding of a class's prompts. Text tower and projections are the base
model's.

The official class names are written for CLIP. Without `--official` the names are those that the data sets state; where
these differ, so will the heads, and the accuracies. Which training images are drawn differs from the official run in
any case.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import transformers
import yaml
from torch import Tensor, nn

import featcal_fast as ff
from bench.harness.results import machine, write_whole
from bench.harness.runs import command_line
from bench.harness.tables import table
from featcal_fast.errors import DataError, OutputError

if TYPE_CHECKING:
    from datasets import Dataset

BASE = "openai/clip-vit-base-patch32"
SCALING, PRESET, SAMPLES, BATCH_SIZE, SEED = 0.3, "clip-demo", 256, 16, 42
WORKERS = 8  # processes that read test images
MERGED, CALIBRATED = "task arithmetic", "FeatCal"
NOT_MEASURED = "The paper's figures (official demo's README: eight tasks, 256 samples a task); not measured here."
SIDE_FILES = ["*.json", "*.txt"]
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Task:
    """An expert, its data, the prompts of its head, and the paper's accuracies in percent.

    Attributes:
        expert: hub id or folder of the fine-tuned vision tower.
        dataset: hub id, or the folder of a saved `DatasetDict`, with the splits `train` and `test`.
        templates: prompts, with `{}` in place of the class name.
        paper: accuracy of task arithmetic, and of FeatCal upon it.
        config: of the data set, where it has several.
    """

    expert: str
    dataset: str
    templates: tuple[str, ...]
    paper: tuple[float, float]
    config: str | None = None


EXPERT = "tanganke/clip-vit-base-patch32_"
ARTICLES = ("", "a ", "the ")
SCENES = ("a photo of a {}.", "a photo of the {}.")
CARS = (
    *(f"a photo of {which} {{}}." for which in ("a", "the", "my", "my dirty", "my clean", "my new", "my old")),
    "i love my {}!",
)
ABOVE = tuple(
    f"{by} {kind} of {article}{{}}."
    for by in ("satellite", "aerial")
    for kind in ("imagery", "photo", "view")
    for article in ARTICLES
)
LAND = tuple(f"a centered satellite photo of {article}{{}}." for article in ARTICLES)
NUMBER = ('a photo of the number: "{}".',)
SIGNS = tuple(f'a {shot} photo of a "{{}}" traffic sign.' for shot in ("zoomed in", "centered", "close up"))
TEXTURES = tuple(
    f"a photo of {article} {{}} {what}."
    for article in ("a", "the")
    for what in ("texture", "pattern", "thing", "object")
)
TASKS = {
    "sun397": Task(f"{EXPERT}sun397", "tanganke/sun397", SCENES, (57.01, 70.07)),
    "stanford-cars": Task(f"{EXPERT}stanford-cars", "tanganke/stanford_cars", CARS, (55.70, 72.52)),
    "resisc45": Task(f"{EXPERT}resisc45", "tanganke/resisc45", ABOVE, (64.75, 87.94)),
    "eurosat": Task(f"{EXPERT}eurosat", "tanganke/eurosat", LAND, (73.30, 96.22)),
    "svhn": Task(f"{EXPERT}svhn", "ufldl-stanford/svhn", NUMBER, (77.93, 95.06), config="cropped_digits"),
    "gtsrb": Task(f"{EXPERT}gtsrb", "tanganke/gtsrb", SIGNS, (68.50, 93.21)),
    "mnist": Task(f"{EXPERT}mnist", "ylecun/mnist", NUMBER, (96.07, 98.81)),
    "dtd": Task(f"{EXPERT}dtd", "tanganke/dtd", TEXTURES, (47.13, 69.95)),
}
PAPER_MEAN = (67.55, 85.47)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__, "--device", "--official")
    parser.add_argument("--folder", required=True, type=Path, help="new or empty: for recipe, models and results.json")
    args = parser.parse_args(arguments)
    if not (find_spec("datasets") and find_spec("PIL")):
        parser.error("found no datasets or no pillow; pip install datasets pillow")
    transformers.logging.set_verbosity_error()
    try:
        run(args.folder, TASKS, device=args.device, workers=WORKERS, official=args.official)
    except ff.FeatCalError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # as the hub's clients report what they cannot get
        sys.exit(f"error: {error}\nModels and data come from the Hugging Face hub: this cannot be run offline.")


def run(
    folder: Path,
    tasks: Mapping[str, Task],
    *,
    base: str = BASE,
    device: str = "cpu",
    samples: int = SAMPLES,
    workers: int = 0,
    official: Path | None = None,
) -> dict[str, Any]:
    """The whole protocol; `folder` is left with recipe, data, merged and calibrated model, and `results.json`.

    Returns:
        What `results.json` holds.

    Raises:
        FeatCalError: the folder holds something, or a model or data set is not usable.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputError(f"{folder}: found something there, expected a new or empty folder; name another")
    clip_folder = model_folder(base)
    clip: Any = transformers.CLIPModel.from_pretrained(clip_folder, dtype=torch.float32)
    clip.to(device).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip_folder)

    heads, tests, experts = {}, {}, {}
    for name, task in tasks.items():
        print(f"Reading {name}", flush=True)
        tests[name] = load_split(task, "test")
        heads[name] = zero_shot_head(clip, tokenizer, *prompts(name, task, tests[name], official))
        calibration_data(load_split(task, "train"), samples, SEED, folder / "data" / name)
        experts[name] = model_folder(task.expert)

    write_vision_tower(clip_folder, folder / "base")
    recipe, started = write_recipe(folder, experts, samples), time.perf_counter()
    merged = ff.merge(recipe)
    seconds = {MERGED: time.perf_counter() - started}
    report = ff.calibrate(recipe, out=folder / "calibrated", device=device, resume=True)
    seconds[CALIBRATED], started = report.seconds, time.perf_counter()
    print(report.summary())

    towers = {MERGED: load_tower(merged, device), CALIBRATED: load_tower(folder / "calibrated", device)}
    accuracy = evaluate(towers, clip.visual_projection, heads, tests, load_processor(folder / "base"), workers=workers)
    seconds["evaluation"] = time.perf_counter() - started
    results = {
        "accuracy": accuracy,
        "paper": {name: task.paper for name, task in tasks.items()} | {"mean": PAPER_MEAN, "note": NOT_MEASURED},
        "class_names": "official" if official else "data sets",
        "test_images": {name: len(images) for name, images in tests.items()},
        "recipe": yaml.safe_load(recipe.read_text()),
        "seconds": seconds,
        "device": device,
        "machine": machine(),
    }
    write_whole(folder / "results.json", results)
    print(f"{show(results)}\nWrote {folder / 'results.json'}")
    return results


# Models


def model_folder(source: str) -> Path:
    """A folder as it is; of a hub id the snapshot, with safetensors or, where it has none, with `pytorch_model.bin`."""
    if Path(source).is_dir():
        return Path(source).resolve()
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(source, allow_patterns=[*SIDE_FILES, "*.safetensors"]))
    if not any(folder.glob("*.safetensors")):
        folder = Path(snapshot_download(source, allow_patterns=[*SIDE_FILES, "pytorch_model.bin"]))
    return folder


def load_tower(folder: Path, device: str = "cpu") -> Any:
    """The vision tower of a folder, which may be a whole CLIP model's."""
    tower: Any = transformers.CLIPVisionModel.from_pretrained(folder, dtype=torch.float32)
    return tower.to(device).eval()


def write_vision_tower(source: Path, folder: Path) -> None:
    """The vision tower of a whole CLIP model, with the image processor: a base that has the experts' tensors only."""
    load_tower(source).save_pretrained(folder)
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def load_processor(folder: Path) -> Any:
    """The image processor that the engine takes, too."""
    # Not from transformers itself: what 5.17 exports there demands torchvision, while the class does not.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder)


def write_recipe(folder: Path, experts: Mapping[str, Path], samples: int) -> Path:
    """The job as a recipe, with the base in `base`, images in `data/TASK` and the merge to be written to `merged`."""
    recipe = {
        "base_model": "base",
        "merge": {"method": "task_arithmetic", "scaling": SCALING},
        "experts": {name: {"model": str(path), "data": f"data/{name}"} for name, path in experts.items()},
        "settings": {"preset": PRESET},
        "samples": samples,
        "batch_size": BATCH_SIZE,
        "seed": SEED,
        "held_out": 0,
        "out": "merged",
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


# Data


def load_split(task: Task, split: str) -> Dataset:
    """One split of a task's data set."""
    import datasets

    if Path(task.dataset).is_dir():
        return datasets.load_from_disk(task.dataset)[split]
    return datasets.load_dataset(task.dataset, task.config, split=split)


def columns(images: Dataset) -> tuple[str, str]:
    """The names of the image column and of the label column."""
    from datasets import ClassLabel, Image

    pictures = [name for name, feature in images.features.items() if isinstance(feature, Image)]
    labels = [name for name, feature in images.features.items() if isinstance(feature, ClassLabel)]
    labels += [name for name in ("label",) if name in images.features]
    if not pictures or not labels:
        raise DataError(f"found the columns {', '.join(images.features)}; expected one of images and one of labels")
    return pictures[0], labels[0]


def calibration_data(train: Dataset, samples: int, seed: int, folder: Path) -> Path:
    """Draw images of the training split, all if there are fewer, and save them without their labels."""
    drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:samples]
    train.select(drawn.tolist()).select_columns([columns(train)[0]]).save_to_disk(folder)
    return folder


# The zero-shot head


def prompts(name: str, task: Task, test: Dataset, official: Path | None) -> tuple[list[str], Sequence[str]]:
    """Class names in the order of labels, and templates: the data set's and ours, or those of the official checkout."""
    if official is None:
        return class_names(test), task.templates
    names, templates = official_prompts(official, name)
    expected = getattr(test.features[columns(test)[1]], "num_classes", len(names))
    if len(names) != expected:
        raise DataError(f"{name}: found {len(names)} class names in {official}, expected the data set's {expected}")
    return names, templates


def class_names(images: Dataset) -> list[str]:
    """The class names that the data set states, as words."""
    feature = images.features[columns(images)[1]]
    if not hasattr(feature, "names"):
        raise DataError("found labels without class names; take the official ones, by --official CHECKOUT")
    return [" ".join(name.replace("_", " ").split()) for name in feature.names]


def official_prompts(checkout: Path, name: str) -> tuple[list[str], list[str]]:
    """Class names and templates as a checkout of the official demo has them."""
    sys.path.insert(0, str(checkout / "src"))
    try:
        names, templates = importlib.import_module("featcal.classification").get_classnames_and_templates(name)
    except (ImportError, KeyError) as error:
        raise DataError(f"{checkout}: found no class names of {name}; expected github egangu/featcal") from error
    finally:
        sys.path.remove(str(checkout / "src"))
    return names, [template("{}") for template in templates]


@torch.no_grad()
def zero_shot_head(clip: Any, tokenizer: Any, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """A unit row a class, the mean of its prompts' unit embeddings: `[classes, projected width]`."""
    texts = [template.replace("{}", name) for name in names for template in templates]
    embeddings = []
    for start in range(0, len(texts), 256):
        tokens = tokenizer(texts[start : start + 256], padding=True, return_tensors="pt").to(clip.device)
        pooled = clip.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        embeddings.append(F.normalize(clip.text_projection(pooled), dim=-1))
    return F.normalize(torch.cat(embeddings).view(len(names), len(templates), -1).mean(dim=1), dim=-1)


# Evaluation


@torch.no_grad()
def evaluate(
    towers: Mapping[str, Any],
    projection: nn.Module,
    heads: Mapping[str, Tensor],
    tests: Mapping[str, Dataset],
    processor: Any,
    *,
    batch_size: int = 256,
    workers: int = 0,
) -> dict[str, dict[str, float]]:
    """Top-1 accuracy of each tower in percent, on all images of each task and in the mean; each image is read once."""
    accuracy: dict[str, dict[str, float]] = {name: {} for name in towers}
    for task, images in tests.items():
        print(f"Evaluating {task}: {len(images)} test images", flush=True)
        collate, head = partial(_collate, processor=processor, names=columns(images)), heads[task]
        loader = torch.utils.data.DataLoader(images, batch_size, num_workers=workers, collate_fn=collate)  # type: ignore[arg-type]
        right = dict.fromkeys(towers, 0)
        for pixels, labels in loader:
            if labels.min() < 0 or labels.max() >= len(head):
                raise DataError(f"found labels {labels.min()} to {labels.max()}, expected 0 to {len(head) - 1}")
            for name, tower in towers.items():
                guess = embed(tower, projection, pixels.to(head.device)) @ head.T
                right[name] += int((guess.argmax(dim=-1).cpu() == labels).sum())
        for name, count in right.items():
            accuracy[name][task] = 100 * count / len(images)
    return {name: {**row, "mean": sum(row.values()) / len(row)} for name, row in accuracy.items()}


def embed(tower: Any, projection: nn.Module, pixels: Tensor) -> Tensor:
    """Unit embeddings of images, in the space that texts are in: `[images, projected width]`."""
    return F.normalize(projection(tower(pixel_values=pixels).pooler_output), dim=-1)


def _collate(rows: list[dict[str, Any]], processor: Any, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    image, label = names
    pixels = processor(images=[row[image].convert("RGB") for row in rows], return_tensors="pt")["pixel_values"]
    return pixels, torch.tensor([row[label] for row in rows])


def show(results: Mapping[str, Any]) -> str:
    """Accuracies beside the paper's."""
    rows = []
    for name in results["accuracy"][MERGED]:
        row = {"task": name}
        for model, expected in zip((MERGED, CALIBRATED), results["paper"][name], strict=True):
            row |= {model: f"{results['accuracy'][model][name]:.2f}", f"paper: {model}": f"{expected:.2f}"}
        rows.append(row)
    return table("Top-1 accuracy on the test split, in %", rows, [results["paper"]["note"]])


if __name__ == "__main__":
    main()
