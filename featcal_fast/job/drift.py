"""Drift of a recipe's models, measured: a report, and a folder to look at it.

The folder holds

    drift.json     everything that was measured
    drift.html     the same to look at, in any browser, without a network
    drift.png      its pictures, where matplotlib is installed
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from featcal_fast import files
from featcal_fast.checkpoints import (
    REPORT,
    Checkpoint,
    WorkFolder,
    check_output,
    find_checkpoint,
    work_path,
    write_errors,
)
from featcal_fast.errors import FeatCalError, OutputError, told
from featcal_fast.inputs.load import load_data
from featcal_fast.inputs.models import RecipeModels, input_folders, models_to_calibrate
from featcal_fast.inputs.paths import checked_path
from featcal_fast.inputs.recipe import Recipe, RecipeLike, working_directory
from featcal_fast.inputs.tokens import own_tokens
from featcal_fast.job.check import MAX_REPORT
from featcal_fast.job.interrupts import finish_first
from featcal_fast.job.resume import read_past
from featcal_fast.measure import measure_source
from featcal_fast.reporting.clock import Clock
from featcal_fast.reporting.drift_report import DriftReport
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import Report
from featcal_fast.reporting.warnings import about_held_out
from featcal_fast.streaming.machine import find_device
from featcal_fast.streaming.sources import CheckpointSource

JSON, PAGE, PICTURE = "drift.json", "drift.html", "drift.png"
ROOM = 2**24  # bytes that must be free
SAMPLING = ("samples", "held_out", "seed", "max_length")  # of a recipe: which samples there are


def drift(
    recipe: RecipeLike,
    *,
    model: str | Path | None = None,
    out: str | Path | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> DriftReport:
    """Measure how far the merged model's features are from its experts', layer by layer, and why.

    Of each task, the samples that the recipe holds out are used, or all where it holds out none. Folders are streamed:
    one layer of each model is in memory at a time.

    Args:
        recipe: a `Recipe`, a mapping, or the path of a YAML file; its `out` does not count.
        model: a model to compare with the merged one: a folder that `calibrate` wrote, or any of its architecture.
        out: a folder to write: the report as JSON, as a page and as a picture.
        device: where to compute; by default the first GPU, or the CPU.
        progress: told how it goes.

    Returns:
        What was measured.

    Raises:
        FeatCalError: the recipe, a model, the data or the folder to write is not usable, or memory will not do. The
            folder is not there, then.
    """
    progress, device = progress or Progress(), find_device(device)
    recipe = Recipe.load(recipe)
    calibrated = None if model is None else _find_model(model)
    models = models_to_calibrate(recipe, device)
    if out is None:
        return _measured(recipe, models, calibrated, device, progress)
    with WorkFolder(_check_out(out, recipe, models, calibrated)) as work:
        if not work.published and (work.finished or read_past(work.manifest).layers):
            raise OutputError(f"out: {work.path} is what a calibration into {work.out} has left; choose another folder")
        with write_errors(work.out):
            work.clear()
        report = _measured(recipe, models, calibrated, device, progress)
        _write(report, work, progress)
    return report


def _measured(
    recipe: Recipe, models: RecipeModels, calibrated: Checkpoint | None, device: torch.device, progress: Progress
) -> DriftReport:
    """All but the folder."""
    clock = Clock()
    past, warnings = (None, []) if calibrated is None else _read_report(calibrated.path)
    warnings += _warnings(recipe, past)
    for warning in warnings:
        progress.warning(warning)
    batches, _ = load_data(recipe, models, device)
    experts = {
        task: CheckpointSource(expert, device, models.tokens[task].table) for task, expert in models.experts.items()
    }
    other = None if calibrated is None else _source(calibrated, models, device)
    merged = CheckpointSource(models.merged, device)
    settings, same = recipe.settings, _same_models(recipe, past)
    report = measure_source(merged, other, experts, batches, settings, device, progress, same_heads=same)
    report.recipe = {key: value for key, value in recipe.to_dict().items() if key != "out"}
    report.model = None if calibrated is None else str(calibrated.path)
    if past is not None and recipe.held_out and not all(report.held_out.values()):
        late = about_held_out(recipe.held_out, {task: (n, report.held_out[task]) for task, n in report.samples.items()})
        for warning in late:
            progress.warning(warning)
        warnings += late
    report.warnings = warnings
    if past is not None and same:
        _take_over(report, past)
    report.seconds = sum(clock.seconds.values())
    return report


def _find_model(model: str | Path) -> Checkpoint:
    return find_checkpoint(str(checked_path("model", model)), working_directory(), "calibrated model")


def _check_out(out: str | Path, recipe: Recipe, models: RecipeModels, calibrated: Checkpoint | None) -> Path:
    """The folder to write.

    Raises:
        OutputError: it cannot be written, holds something, or lies where a model is or will be.
    """
    folder = working_directory() / checked_path("out", out)
    inputs = input_folders(recipe, models) | ({} if calibrated is None else {calibrated.label: calibrated.path})
    check_output(folder, inputs, ROOM)
    around = [files.resolve(folder), *files.resolve(folder).parents]
    with suppress(OSError):  # the recipe's out leads nowhere
        if recipe.folder is not None and {files.resolve(recipe.folder), work_path(recipe.folder)}.intersection(around):
            raise OutputError(
                f"out: {folder} lies in the recipe's own out, {recipe.folder}, where calibrate writes; choose another "
                "folder"
            )
    for each in around:
        if _read_report(each)[0] is not None:
            raise OutputError(f"out: {folder} lies in {each}, a calibrated model; choose another folder")
    return folder


def _source(calibrated: Checkpoint, models: RecipeModels, device: torch.device) -> CheckpointSource:
    table = None
    if getattr(models.merged.config, "vocab_size", None):
        reads = models.base if not isinstance(models.merged, Checkpoint) else models.merged
        table = own_tokens(reads, models.base, {"model": calibrated})["model"].table
    return CheckpointSource(calibrated, device, table)


def _read_report(folder: Path) -> tuple[Report | None, list[str]]:
    """What a calibration has left beside its weights; and a warning where that cannot be read."""
    try:
        return Report.from_json(files.read_text(folder / REPORT, MAX_REPORT)), []
    except (FileNotFoundError, NotADirectoryError):
        return None, []
    except (OSError, UnicodeDecodeError, FeatCalError) as error:
        why = error if isinstance(error, FeatCalError) else told(error)
        return None, [f"{folder / REPORT} cannot be read as what calibrate writes, and does not count: {why}"]


def _same_models(recipe: Recipe, past: Report | None) -> bool:
    """Whether a calibration was of the merged model that a recipe names, which it then is outside of its layers."""
    if past is None or past.recipe is None:
        return False

    def models(values: dict[str, Any]) -> list[Any]:
        names = [values["base_model"], values.get("merged_model")]
        names += [each["model"] for each in values["experts"].values()]
        return [values.get("merge"), *(name and Path(values["root"]) / Path(name).expanduser() for name in names)]

    try:
        return models(past.recipe) == models(recipe.to_dict())
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):  # the report may be anyone's
        return False


def _warnings(recipe: Recipe, past: Report | None) -> list[str]:
    """What should be known of a calibrated model, and of the samples that it is measured on."""
    if past is None or past.recipe is None:
        return []
    found = []
    if not _same_models(recipe, past):
        found.append(
            "the model was calibrated by a recipe with other models, or the same elsewhere: what models give in the "
            "end is not compared; use the recipe in its report.json"
        )
    mine = recipe.to_dict()
    differing = [key for key in SAMPLING if past.recipe.get(key) != mine.get(key)]
    if _numbers(past.recipe) != _numbers(mine):
        differing.append("the number of samples of a task")
    if differing:
        found.append(
            f"the model was calibrated by a recipe that differs in {' and '.join(differing)}: it may have been fitted "
            "to samples that are measured on; use the recipe in its report.json"
        )
    elif not recipe.held_out:
        found.append("no samples are held out: the model is measured on those that it was fitted to (held_out)")
    return found


def _numbers(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """By task, how many samples it has of its own; nothing of a recipe of another form."""
    experts = recipe.get("experts")
    tasks = experts.items() if isinstance(experts, Mapping) else ()
    return {task: each.get("samples") for task, each in tasks if isinstance(each, Mapping)}


def _take_over(report: DriftReport, past: Report) -> None:
    """What the calibration picked and kept, where it is one of a model with these layers."""
    if len(past.layers) != len(report.layers):
        return
    report.settings = past.settings
    for layer, done in zip(report.layers, past.layers, strict=True):
        layer.picked = {module: each.ridge_lambda for module, each in done.chosen.items()}
        layer.alpha = None if done.alpha is None else done.alpha.teacher_alpha
        prefix = f"{layer.path}."
        layer.kept = {
            name.removeprefix(prefix): reason for name, reason in past.kept.items() if name.startswith(prefix)
        }


def _write(report: DriftReport, work: WorkFolder, progress: Progress) -> None:
    """The folder, whole or not at all."""
    from featcal_fast.reporting.drift_page import page
    from featcal_fast.reporting.picture import can_draw

    texts = {JSON: report.to_json(), PAGE: page(report)}
    with write_errors(work.out):
        files.make_folder(work.model)
        for name, text in texts.items():
            files.write_bytes(work.model / name, text.encode(errors="backslashreplace"))
    if can_draw():
        with write_errors(work.out):
            report.plot(work.model / PICTURE)
    else:
        progress.warning(f"{PICTURE} is not written, which needs matplotlib: pip install 'featcal-fast[demo]'")
    with write_errors(work.out):
        files.sync_folder(work.model)
    with finish_first():
        work.publish()
