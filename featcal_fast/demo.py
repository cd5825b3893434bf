"""The demo: repair the merge of four small vision transformers, trained here on real scans of digits.

Four experts each read the digits in their own way: upright, rotated, inverted, or with scrambled pixels. Their task
arithmetic reads all four, badly. FeatCal repairs it from unlabelled images, by the code path of
`featcal-fast calibrate` on a recipe that the demo leaves behind. Every model is an ordinary Hugging Face folder.

Each scan belongs to one of three parts: training (which the calibration images are drawn from), validation (by which
the constants here were chosen) and held-out, which is for the printed accuracies and nothing else.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featcal_fast import files
from featcal_fast.errors import FeatCalError, OutputError
from featcal_fast.inputs.recipe import Recipe
from featcal_fast.job.run import calibrate, merge
from featcal_fast.reporting.report import Report

if TYPE_CHECKING:  # transformers' models take seconds to import
    from transformers import CLIPVisionModel

SCRAMBLED = torch.randperm(64, generator=torch.Generator().manual_seed(0))
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {  # what each task makes of images [n, 8, 8] with pixels in [-1, 1]
    "upright": lambda images: images,
    "rotated": lambda images: images.rot90(dims=(1, 2)),
    "inverted": lambda images: -images,
    "scrambled": lambda images: images.flatten(1)[:, SCRAMBLED].view_as(images),
}
MERGED, OWN_EXPERT = "task arithmetic", "own expert"  # rows of the table, as are:
CALIBRATED = {"FeatCal 8": 8, "FeatCal 64": 64, "FeatCal 256": 256}  # samples a task; the last is the recipe's
MODELS = ("base", "experts", "data", "heads.safetensors")  # what training leaves
MADE_BY = "featcal-fast demo"
MANIFEST = "demo.json"  # marks a folder as the demo's; holds the models' Config, training times and file hashes

# As `bench/results/real-*.json` have it, which a test sees to.
REAL_MODELS = (
    "Real models (bench/README.md), of the way from the base up to the experts:\n"
    "SmolLM2-135M 75% merged, 94% calibrated; MiniLM 36% and 62%."
)

# How the settings were chosen: the best of ridge_lambda 0.0003 and 0.001, anchor_rho 2 and 2.5, teacher_alpha 0.2, 0.3
# and 0.5 on the validation part, by the gap closed averaged over 8, 64 and 256 samples. A wider grid, with the scans
# dealt out otherwise, had narrowed it to these.
RECIPE = """\
# Written by `featcal-fast demo`, each time anew: copy it to try other values. To run it yourself:
#
#     featcal-fast calibrate recipe.yaml --out mine
#
# Paths are relative to this file.

base_model: base        # what the experts were fine-tuned from: a model that reads upright digits

# The model to repair: base + 0.3 * sum of (expert - base), made on the fly.
# A merge that you already have would be `merged_model: its-folder` instead.
merge: {method: task_arithmetic, scaling: 0.3}

experts:                # each with images of its own task, without labels
  upright: {model: experts/upright, data: data/upright.safetensors}
  rotated: {model: experts/rotated, data: data/rotated.safetensors}
  inverted: {model: experts/inverted, data: data/inverted.safetensors}
  scrambled: {model: experts/scrambled, data: data/scrambled.safetensors}

settings:
  ridge_lambda: 0.0003  # pull towards the anchor; the smaller, the more the samples count
  anchor_rho: 2.5       # the anchor is base + 2.5 * (merged - base)
  teacher_alpha: 0.2    # the target is 0.2 * the expert's features + 0.8 * the model's own

samples: 256            # images a task
held_out: 0             # all are fitted to; by default a fifth is not, for the result to be judged on
batch_size: 64          # images a forward pass
out: calibrated         # the folder to write
"""


@dataclass(frozen=True)
class Config:
    """What the models are and how they are trained; another value means other models.

    Attributes:
        seed: of initial weights, heads, order of training and the draw of calibration images.
        layers: blocks of a model.
        width: features of a hidden state.
        base_steps: optimizer steps of the base model.
        expert_steps: optimizer steps of each expert.
        batch_size: images a step.
        learning_rate: the highest of the schedule.
    """

    seed: int = 0
    layers: int = 6
    width: int = 96
    base_steps: int = 200
    expert_steps: int = 300
    batch_size: int = 32
    learning_rate: float = 1e-3


def run(
    folder: str | Path,
    *,
    console: Console | None = None,
    device: str | None = None,
    config: Config = Config(),
) -> dict[str, Any]:
    """Run the demo in `folder`; models of an earlier run there are reused.

    Args:
        folder: for models, data, `recipe.yaml`, `drift.png` and `results.json`; new, empty, or an earlier demo's.
        console: where to print.
        device: where to calibrate, as for `calibrate`. Training is always on the CPU.
        config: the models and their training.

    Returns:
        What `results.json` holds: held-out accuracies by model and task, gaps closed, seconds, the config.

    Raises:
        FeatCalError: scikit-learn or matplotlib is not installed, or the folder holds something else.
    """
    for module, package in {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}.items():
        if find_spec(module) is None:
            raise FeatCalError(f"the demo needs {package}: pip install 'featcal-fast[demo]'")
    folder, console = Path(folder), console or Console()
    with _os_errors(folder), _one_thread(), _no_loading_bars():
        _claim(folder)
        digits = Digits()
        seconds = make_models(folder, config, digits, console)
        models = {"base": folder / "base"} | {f"expert {task}": folder / "experts" / task for task in VIEWS}

        # From here on, what `featcal-fast merge recipe.yaml` and `featcal-fast calibrate recipe.yaml` do.
        files.replace_bytes(folder / "recipe.yaml", RECIPE.encode())
        recipe = Recipe.load(folder / "recipe.yaml")
        started = time.perf_counter()
        models[MERGED] = merge(recipe, out=_removed(folder / "merged"))
        seconds[MERGED] = time.perf_counter() - started
        reports: dict[str, Report] = {}
        for name, samples in CALIBRATED.items():
            models[name] = folder / ("calibrated" if samples == recipe.samples else f"calibrated-{samples}")
            with console.status(f"calibrating with {samples} samples a task"):
                reports[name] = calibrate(
                    replace(recipe, samples=samples), out=_removed(models[name]), device=device, fresh=True
                )
            seconds[name] = reports[name].seconds
        reports["FeatCal 256"].plot(folder / "drift.png")

        heads = load_file(folder / "heads.safetensors")
        with console.status("reading held-out digits"):
            accuracy = {name: evaluate(path, heads, digits, "held-out") for name, path in models.items()}
        results = _compare(accuracy) | {"seconds": seconds, "config": asdict(config)}
        files.replace_bytes(folder / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    _print(results, folder, console)
    return results


class Digits:
    """scikit-learn's 1,797 scans of 8x8 pixels, dealt into three parts."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        self.images = torch.tensor(pixels, dtype=torch.float32).view(-1, 8, 8) / 8 - 1
        self.labels = torch.tensor(labels, dtype=torch.int64)
        # One deal for all seeds: what is held out from one run is held out from all.
        deal = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        self.parts = {"held-out": deal[:500], "validation": deal[500:750], "training": deal[750:]}

    def see(self, task: str, part: str) -> tuple[Tensor, Tensor]:
        """A part's images `[n, 1, 8, 8]` as the task sees them, and their labels."""
        rows = self.parts[part]
        return VIEWS[task](self.images[rows]).unsqueeze(1).contiguous(), self.labels[rows]


def _random(config: Config, use: str) -> torch.Generator:
    """A random stream of its own for every use, so that no use shifts another."""
    return torch.Generator().manual_seed(int(sha256(f"{config.seed} {use}".encode()).hexdigest()[:8], 16))


# Models


def make_models(folder: Path, config: Config, digits: Digits, console: Console) -> dict[str, float]:
    """Base, experts, heads and calibration data, unless an earlier run left the same; how long training took."""
    manifest = _read_manifest(folder)
    if manifest.get("config") == asdict(config) and manifest["files"] == _hashes(folder):
        console.print("Models of an earlier run are reused; their times are from then.")
        earlier: dict[str, float] = manifest["seconds"]
        return earlier
    new = _removed(folder / ".training")
    seconds = _train_all(new, config, digits, console)
    _write_manifest(folder)  # until the next one, the models are incomplete
    for name in MODELS:
        files.rename(new / name, _removed(folder / name))
    files.remove_folder(new)
    _write_manifest(folder, asdict(config), seconds, _hashes(folder))
    return seconds


def _train_all(folder: Path, config: Config, digits: Digits, console: Console) -> dict[str, float]:
    # A head is a direction for each class, like CLIP's text embeddings. These are random, and never trained.
    heads = {task: torch.randn(10, config.width, generator=_random(config, f"head {task}")) for task in VIEWS}
    files.make_folder(folder / "data")
    save_file(heads, folder / "heads.safetensors")
    for task in VIEWS:
        images, _ = digits.see(task, "training")
        drawn = torch.randperm(len(images), generator=_random(config, f"calibration {task}"))[:256]
        save_file({"pixel_values": images[drawn]}, folder / "data" / f"{task}.safetensors")

    jobs = [("base", "upright", "base", config.base_steps)]
    jobs += [(f"expert {task}", task, f"experts/{task}", config.expert_steps) for task in VIEWS]
    base, seconds = _new_model(config), {}
    for name, task, path, steps in jobs:
        started = time.perf_counter()
        model = base if name == "base" else deepcopy(base)
        _train(name, model, digits.see(task, "training"), heads[task], steps, config, console)
        model.save_pretrained(folder / path)
        seconds[name] = time.perf_counter() - started
        console.print(f"Trained {name}: {steps} steps, {seconds[name]:.1f} s", highlight=False)
    return seconds


def _new_model(config: Config) -> CLIPVisionModel:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    shape = CLIPVisionConfig(
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=4,
        image_size=8,
        patch_size=2,
        num_channels=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return CLIPVisionModel(shape)


def _train(
    name: str,
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    head: Tensor,
    steps: int,
    config: Config,
    console: Console,
) -> None:
    images, labels = data
    generator = _random(config, name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.05, fused=True)
    model.train()
    for step in track(
        range(steps), f"training {name}", console=console, transient=True, disable=not console.is_terminal
    ):
        for group in optimizer.param_groups:  # 20 steps of warm-up, and half a cosine
            group["lr"] = config.learning_rate * min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        rows = torch.randint(len(labels), (config.batch_size,), generator=generator)
        loss = F.cross_entropy(20 * _cosines(model, images[rows], head), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _cosines(model: nn.Module, images: Tensor, head: Tensor) -> Tensor:
    """How well each image's feature, the normed class token, points in each class's direction."""
    return F.normalize(model(pixel_values=images).pooler_output, dim=-1) @ F.normalize(head, dim=-1).T


# The folder


def _claim(folder: Path) -> None:
    """Make `folder` the demo's; nothing is ever replaced in any other."""
    if _read_manifest(folder).get("made_by") == MADE_BY:
        return
    if folder.exists() and not (folder.is_dir() and not files.list_folder(folder)):
        raise OutputError(
            f"{folder}: found something else, expected a new or empty folder, or an earlier demo's; name another"
        )
    if not folder.exists():
        files.make_folder(folder)
    _write_manifest(folder)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(files.read_text(folder / MANIFEST)))
    except (OSError, ValueError, TypeError):
        return {}


def _write_manifest(
    folder: Path,
    config: dict[str, Any] | None = None,
    seconds: dict[str, float] | None = None,
    hashes: dict[str, str] | None = None,
) -> None:
    values = {"made_by": MADE_BY, "config": config, "seconds": seconds, "files": hashes}
    files.replace_bytes(folder / MANIFEST, (json.dumps(values, indent=2) + "\n").encode())


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that training left."""
    found = [file for name in MODELS for file in files.list_below(folder / name) if file.is_file()]
    return {file.relative_to(folder).as_posix(): sha256(files.read_bytes(file)).hexdigest() for file in sorted(found)}


def _removed(path: Path) -> Path:
    """`path`, free to be written."""
    if path.is_dir() and not path.is_symlink():
        files.remove_tree(path)
    else:
        with suppress(FileNotFoundError):
            files.remove(path)
    return path


# Results


@torch.no_grad()
def evaluate(model_folder: Path, heads: Mapping[str, Tensor], digits: Digits, part: str) -> dict[str, float]:
    """A model's accuracy in percent, by task, on a part of the digits."""
    from transformers import CLIPVisionModel

    model = CLIPVisionModel.from_pretrained(model_folder)
    right = {}
    for task in VIEWS:
        images, labels = digits.see(task, part)
        right[task] = 100 * (_cosines(model, images, heads[task]).argmax(-1) == labels).double().mean().item()
    return right


def _compare(accuracy: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Adds means, a row for each task's own expert, and how much of the gap up to those FeatCal closes."""
    rows = {name: row for name, row in accuracy.items() if name.startswith(("base", "expert"))}
    rows[OWN_EXPERT] = {task: accuracy[f"expert {task}"][task] for task in VIEWS}
    rows = {name: {**row, "mean": sum(row.values()) / len(row)} for name, row in (rows | accuracy).items()}
    low, high = rows[MERGED]["mean"], rows[OWN_EXPERT]["mean"]
    closed = {name: (rows[name]["mean"] - low) / (high - low) for name in CALIBRATED if high > low}
    return {"accuracy": rows, "gap_closed": closed}


def _print(results: dict[str, Any], folder: Path, console: Console) -> None:
    accuracy, closed, seconds = results["accuracy"], results["gap_closed"], results["seconds"]
    table = Table(
        "model", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title="Accuracy on held-out digits, in %"
    )
    for column in (*VIEWS, "mean", "gap\nclosed", "time"):
        table.add_column(column, justify="right")
    for name, row in accuracy.items():
        share = f"{closed[name]:.0%}" if name in closed else ""
        took = f"{seconds[name]:.1f} s" if name in seconds else ""
        table.add_row(
            name, *(f"{value:.1f}" for value in row.values()), share, took, end_section=name in ("base", OWN_EXPERT)
        )
    console.print(table)
    console.print(
        "own expert: each task read by the expert that was trained on it.\n"
        "FeatCal 256: task arithmetic, repaired with 256 unlabelled images of each task.\n"
        "gap closed: of the way from task arithmetic up to the experts.\n"
        f"{REAL_MODELS}\n\n"
        f"Drift from the experts' features, layer by layer: {folder / 'drift.png'}\n"
        f"The job, to read and to run yourself: {folder / 'recipe.yaml'}\n"
        f"    featcal-fast calibrate {folder / 'recipe.yaml'} --out {folder / 'mine'}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@contextmanager
def _os_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{folder} cannot be written or read: {error}; free space, check its rights, or name another folder"
        ) from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """More threads bring such small models little, or harm where cores are busy; one gives the same bits anywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """transformers shows a progress bar for each model it loads or saves; here they would be many."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
