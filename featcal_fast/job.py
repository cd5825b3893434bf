"""A recipe carried out: model folders and data in, a model folder out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featcal_fast.calibrate import calibrate_source
from featcal_fast.checkpoints import Checkpoint, CheckpointWriter, check_output, find_checkpoint
from featcal_fast.data import load_batches
from featcal_fast.errors import RecipeError
from featcal_fast.merge import MergedCheckpoint
from featcal_fast.progress import Progress
from featcal_fast.recipe import Recipe
from featcal_fast.report import Report
from featcal_fast.sources import CheckpointSource

RecipeLike = Recipe | Mapping[str, Any] | str | Path


class _Models:
    """The checkpoints that a recipe names, opened and checked by their headers."""

    def __init__(self, recipe: Recipe) -> None:
        self.base = find_checkpoint(recipe.base_model, recipe.root, "base model")
        self.experts = {
            task: find_checkpoint(expert.model, recipe.root, f"expert {task}")
            for task, expert in recipe.experts.items()
        }
        self.merged: Checkpoint | MergedCheckpoint
        if recipe.merge is None:
            assert recipe.merged_model is not None
            self.merged = find_checkpoint(recipe.merged_model, recipe.root, "merged model")
        else:
            self.merged = MergedCheckpoint(self.base, self.experts, recipe.merge.method, recipe.merge.scaling)

    @property
    def folders(self) -> list[Path]:
        own = [self.merged.path] if isinstance(self.merged, Checkpoint) else []
        return [*own, self.base.path, *(expert.path for expert in self.experts.values())]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.merged.tensors.values())


def calibrate(
    recipe: RecipeLike,
    *,
    out: str | Path | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Calibrate the model that a recipe describes and write it to a new folder, `report.json` beside the weights.

    Folders are streamed: one layer of one expert is in memory at a time, and no whole model is ever built.

    Args:
        recipe: a `Recipe`, a mapping, or the path of a YAML file.
        out: overrides the recipe's `out`; relative to the working directory.
        device: where to compute; by default the first GPU, or the CPU.
        progress: told how the run goes.

    Returns:
        What happened, layer by layer.

    Raises:
        FeatCalError: the recipe, a model, the data or the output folder is not usable, or features are not finite.
            No output folder is left behind.
    """
    recipe = _with_out(recipe, out)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    models = _Models(recipe)
    folder = _output_folder(recipe, models)
    student = CheckpointSource(models.merged, device)
    base = CheckpointSource(models.base, device)
    experts = {task: CheckpointSource(expert, device) for task, expert in models.experts.items()}
    batches = _load_data(recipe, models)
    with CheckpointWriter(folder, models.merged) as writer:

        def write(index: int, parameters: dict[str, Tensor]) -> None:
            writer.write({student.tensor_name(index, name): value for name, value in parameters.items()})

        report = calibrate_source(
            student, base, experts, batches, recipe.settings, device, write, progress or Progress()
        )
        writer.copy_rest()
        report.recipe, report.out = recipe.to_dict(), str(folder)
        writer.add_text("report.json", report.to_json())
    return report


def merge(recipe: RecipeLike, *, out: str | Path | None = None) -> Path:
    """Write the merged model that a recipe's `merge` describes, uncalibrated, to a new folder.

    Args:
        recipe: as for `calibrate`; its data is not read.
        out: overrides the recipe's `out`.

    Returns:
        The folder.

    Raises:
        FeatCalError: the recipe has no `merge`, or models or output folder are not usable.
    """
    recipe = _with_out(recipe, out)
    if recipe.merge is None:
        raise RecipeError(
            "merge: missing; expected `merge: {method: task_arithmetic, scaling: 0.3}` in place of merged_model"
        )
    models = _Models(recipe)
    folder = _output_folder(recipe, models)
    with CheckpointWriter(folder, models.merged) as writer:
        writer.copy_rest()
    return folder


def _with_out(recipe: RecipeLike, out: str | Path | None) -> Recipe:
    loaded = Recipe.load(recipe)
    return loaded if out is None else replace(loaded, out=str(Path(out).absolute()))


def _output_folder(recipe: Recipe, models: _Models) -> Path:
    if recipe.out is None:
        raise RecipeError("out: missing; expected the folder to write, in the recipe or as --out")
    folder = recipe.root / Path(recipe.out).expanduser()
    check_output(folder, models.folders, models.nbytes)
    return folder


def _load_data(recipe: Recipe, models: _Models) -> dict[str, list[dict[str, Tensor]]]:
    batches = {}
    for task, expert in recipe.experts.items():
        config, own = models.merged.config, models.experts[task]
        vocabularies = [c.vocab_size for c in (config, own.config) if getattr(c, "vocab_size", None)]
        local = recipe.root / Path(expert.data).expanduser()
        folders = [getattr(models.merged, "path", models.base.path), own.path, models.base.path]
        batches[task] = load_batches(
            local if local.exists() else expert.data,
            folders=list(dict.fromkeys(folders)),
            samples=expert.samples or recipe.samples,
            max_length=expert.max_length or recipe.max_length,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            max_positions=getattr(config, "max_position_embeddings", None),
            vocab_size=min(vocabularies, default=None),
        )
    return batches
