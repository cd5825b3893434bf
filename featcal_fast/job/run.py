"""A recipe carried out: model folders and data in, a model folder out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from featcal_fast.calibrate import calibrate_source
from featcal_fast.checkpoints import CheckpointWriter
from featcal_fast.errors import RecipeError
from featcal_fast.inputs.load import load_data
from featcal_fast.inputs.models import RecipeModels, output_folder
from featcal_fast.inputs.recipe import Recipe, RecipeLike
from featcal_fast.planning.planner import choose_offload
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import Report
from featcal_fast.streaming.hidden_states import Offload
from featcal_fast.streaming.machine import find_device
from featcal_fast.streaming.sources import CheckpointSource

Sources = tuple[CheckpointSource, CheckpointSource, dict[str, CheckpointSource]]  # student, base, experts


def calibrate(
    recipe: RecipeLike,
    *,
    out: str | Path | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    device_memory: int | None = None,
    host_memory: int | None = None,
    scratch: str | Path | None = None,
) -> Report:
    """Calibrate the model that a recipe describes and write it to a new folder, `report.json` beside the weights.

    Folders are streamed: one layer of one expert is in memory at a time, and no whole model is ever built.

    Args:
        recipe: a `Recipe`, a mapping, or the path of a YAML file.
        out: overrides the recipe's `out`; relative to the working directory.
        device: where to compute; by default the first GPU, or the CPU.
        progress: told how the run goes.
        device_memory: bytes of it that may be used; by default what is free.
        host_memory: bytes of host memory that may be used; by default what is free.
        scratch: a folder for hidden states between layers, as unnamed files; by default they wait on a GPU if they
            fit there, else in host memory.

    Returns:
        What happened, layer by layer.

    Raises:
        FeatCalError: the recipe, a model, the data or the output folder is not usable, memory will not do (see
            `plan`), or features are not finite.
            No output folder is left behind.
    """
    recipe = _with_out(recipe, out)
    device = find_device(device)
    models = RecipeModels(recipe)
    folder = output_folder(recipe, models)
    sources = _sources(models, device)
    batches, sizes = load_data(recipe, models, device)
    plan, offload = choose_offload(recipe, models, device, sizes, device_memory, host_memory, scratch)
    plan.check()
    with CheckpointWriter(folder, models.merged) as writer:
        report = _calibrate(
            recipe, models, sources, batches, device, writer, progress or Progress(), offload, plan.chunk
        )
        report.flops = sum(plan.flops.values())
        report.recipe, report.out = recipe.to_dict(), str(folder)
        report.bytes_read |= models.bytes_read
        report.bytes_written["calibrated model"] = models.nbytes
        report.storage_error = models.storage_error
        writer.add_text("report.json", report.to_json())
    return report


def _sources(models: RecipeModels, device: torch.device) -> Sources:
    experts = {task: CheckpointSource(expert, device) for task, expert in models.experts.items()}
    return CheckpointSource(models.merged, device), CheckpointSource(models.base, device), experts


def _calibrate(
    recipe: Recipe,
    models: RecipeModels,
    sources: Sources,
    batches: Mapping[str, Iterable[dict[str, Tensor]]],
    device: torch.device,
    writer: CheckpointWriter,
    progress: Progress,
    offload: Offload,
    chunk: int,
) -> Report:
    """From the models' files to the output's."""
    student, base, experts = sources
    layers = {name for layer in student.structure.layers for name in student.block_tensors(layer.index)}
    writer.copy(name for name in models.merged.tensors if name not in layers)  # what is broken is found at once

    def write(index: int, parameters: dict[str, Tensor]) -> None:
        writer.write({student.tensor_name(index, name): value for name, value in parameters.items()})

    report = calibrate_source(student, base, experts, batches, recipe.settings, device, write, progress, offload, chunk)
    writer.copy_rest()
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
    models = RecipeModels(recipe)
    folder = output_folder(recipe, models)
    with CheckpointWriter(folder, models.merged) as writer:
        writer.copy_rest()
    return folder


def _with_out(recipe: RecipeLike, out: str | Path | None) -> Recipe:
    loaded = Recipe.load(recipe)
    return loaded if out is None else replace(loaded, out=str(Path(out).absolute()))
