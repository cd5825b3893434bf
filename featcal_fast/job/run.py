"""A recipe carried out: model folders and data in, a model folder out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from featcal_fast import files
from featcal_fast.calibrate import calibrate_source
from featcal_fast.checkpoints import REPORT, CheckpointWriter, Lock, WorkFolder, write_errors
from featcal_fast.errors import OutputError, RecipeError, ResumeError, shown
from featcal_fast.inputs.load import load_data
from featcal_fast.inputs.models import RecipeModels, output_folder
from featcal_fast.inputs.paths import checked_path
from featcal_fast.inputs.recipe import Recipe, RecipeLike
from featcal_fast.inputs.scan import scan as scan_weights
from featcal_fast.inputs.unchanged import unchanged
from featcal_fast.job.check import MAX_REPORT
from featcal_fast.job.fingerprint import Digested, Facts, differences, fingerprint, input_files
from featcal_fast.job.interrupts import finish_first
from featcal_fast.job.resume import Past, Resumable, find_past, left_behind, read_past, telling_what_is_kept
from featcal_fast.planning.plan import memory_bytes
from featcal_fast.planning.planner import choose_offload
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import Report
from featcal_fast.reporting.warnings import about_run, about_same_model
from featcal_fast.streaming.hidden_states import Offload
from featcal_fast.streaming.machine import find_device
from featcal_fast.streaming.scratch import scratch_errors
from featcal_fast.streaming.sources import CheckpointSource

Batches = Mapping[str, Iterable[Mapping[str, Tensor]]]


def calibrate(
    recipe: RecipeLike,
    *,
    out: str | Path | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    scratch: str | Path | None = None,
    resume: bool = False,
    fresh: bool = False,
    checkpoint_every: int | None = None,
    scan: bool = False,
) -> Report:
    """Calibrate the model that a recipe describes and write it to a new folder, `report.json` beside the weights.

    Folders are streamed: one layer of one expert is in memory at a time, and no whole model is ever built. What is done
    is kept beside the output, so that a run that is stopped can go on, with the bits of one that was not.

    Args:
        recipe: a `Recipe`, a mapping, or the path of a YAML file.
        out: overrides the recipe's `out`; relative to the working directory.
        device: where to compute; by default the first GPU, or the CPU.
        progress: told how the run goes.
        device_memory: bytes of it that may be used, or a text such as `22GiB`; by default what is free.
        host_memory: bytes of host memory that may be used, likewise.
        scratch: a folder for hidden states between layers; by default they wait on a GPU if they fit there, else in
            host memory.
        resume: go on with what an interrupted run into the same folder has left, if it has.
        fresh: remove that, and start over.
        checkpoint_every: after how many layers all that is done is made durable; 0 for never, by default as often as
            that takes about a thirtieth of the time.
        scan: read all weights before the first layer, to see that they are finite, not only when their layer comes.

    Returns:
        What happened, layer by layer.

    Raises:
        FeatCalError: the recipe, a model, the data or the output folder is not usable, memory will not do (see
            `plan`), features are not finite, an input changed meanwhile, or an interrupted run has left something and
            neither is set. The output folder is not there, then; what can be gone on from stays beside it.
    """
    _check_choices(resume, fresh, checkpoint_every)
    device_memory, host_memory = memory_bytes("device_memory", device_memory), memory_bytes("host_memory", host_memory)
    recipe, device = _with_out(recipe, out), find_device(device)
    models = RecipeModels(recipe)
    with WorkFolder(output_folder(recipe, models, scratch)) as work:
        past = find_past(work, resume=resume, fresh=fresh)
        facts = fingerprint(recipe, models, device)
        past.check(facts)
        job = _Job(recipe, models, device, progress or Progress(), work, past, checkpoint_every, scan)
        with telling_what_is_kept(work, job.progress):
            if work.finished:
                report = Report.from_json(files.read_text(work.model / REPORT, MAX_REPORT))
            else:
                with _scratch_locked(work, scratch):
                    report = job.run(facts, device_memory, host_memory, scratch)
            with finish_first():
                work.publish()
    return report


def _check_choices(resume: bool, fresh: bool, checkpoint_every: object) -> None:
    if resume and fresh:
        raise RecipeError("found both resume and fresh, expected one of them at most")
    if checkpoint_every is not None and (type(checkpoint_every) is not int or checkpoint_every < 0):
        found = shown(checkpoint_every)
        raise RecipeError(f"checkpoint_every: found {found}, expected a number of layers, or 0 for never")


@dataclass(frozen=True)
class _Job:
    """A calibration in its work folder; fields are as `calibrate` has them."""

    recipe: Recipe
    models: RecipeModels
    device: torch.device
    progress: Progress
    work: WorkFolder
    past: Past
    every: int | None
    scan: bool

    def run(
        self, facts: Facts, device_memory: int | None, host_memory: int | None, scratch: str | Path | None
    ) -> Report:
        """All but the output's name."""
        recipe, models, work, past = self.recipe, self.models, self.work, self.past
        batches, sizes = load_data(recipe, models, self.device)
        plan, offload = choose_offload(
            recipe, models, self.device, sizes, device_memory, host_memory, scratch, self.every
        )
        plan.check()
        past.check_chunk(plan.chunk)
        warnings = [*plan.warnings, *about_same_model(unchanged(models.experts, models.base))]
        for warning in warnings:
            self.progress.warning(warning)
        scanned = {"scan": scan_weights(recipe, models, self.progress)} if self.scan else {}
        if past.layers:
            self.progress.resumed(past.layers)
        if not past.layers and self.every != 0:
            with write_errors(work.out):
                work.begin({"fingerprint": facts, "layers": len(plan.layers)}, scratch)
        with CheckpointWriter(work, models.merged, past.hashes) as writer:
            report = self._calibrate(writer, batches, offload, past.chunk or plan.chunk)
            report.flops = sum(plan.flops.values())
            report.bytes_read |= scanned
            report.warnings = [*warnings, *about_run(report)]
            writer.finish(report.to_json())
        _check_unchanged(work, recipe, models, facts)
        with finish_first():
            work.finish({"fingerprint": facts})
        return report

    def _calibrate(self, writer: CheckpointWriter, batches: Batches, offload: Offload, chunk: int) -> Report:
        """From the models' files to the output's."""
        models, device = self.models, self.device
        student, base = CheckpointSource(models.merged, device), CheckpointSource(models.base, device)
        experts = {task: CheckpointSource(expert, device) for task, expert in models.experts.items()}
        layers = {name for layer in student.structure.layers for name in student.block_tensors(layer.index)}
        writer.copy(name for name in models.merged.tensors if name not in layers)  # what is broken is found at once

        digested = {task: Digested(each) for task, each in batches.items()}
        with Resumable(student, writer, self.work, models, self.past, digested, self.every) as output:
            settings, progress = self.recipe.settings, self.progress
            report = calibrate_source(
                student, base, experts, digested, settings, device, output, progress, offload, chunk
            )
            writer.copy_rest()
            report.seconds = output.seconds
            report.bytes_read |= output.bytes_read
        report.recipe, report.out = self.recipe.to_dict(), str(self.work.out)
        report.bytes_written["calibrated model"] = models.nbytes
        report.storage_error = models.storage_error
        report.contents, report.left_out = writer.contents(), models.merged.left_out()
        return report


@contextmanager
def _scratch_locked(work: WorkFolder, scratch: str | Path | None) -> Iterator[None]:
    """Folders for hidden states that are not the work folder's are this run's alone."""
    folders = set() if scratch is None else {Path(scratch).resolve()}
    if work.path not in work.states.parents:
        folders.add(work.states.parent)
        if not work.states.exists():
            raise ResumeError(f"{work.states} is gone, which the interrupted run wrote; --fresh starts over")
    with ExitStack() as stack:
        for folder in sorted(folders):
            with scratch_errors(folder):
                stack.callback(Lock(folder / ".featcal-fast.lock", f"scratch: {folder}").release)
                work.remove_unowned(folder)
        yield


def _check_unchanged(work: WorkFolder, recipe: Recipe, models: RecipeModels, facts: Facts) -> None:
    """Raises:
    OutputError: files that were read are not those that they were at the beginning. Nothing of the result is kept."""
    if different := differences({"inputs": facts["inputs"]}, {"inputs": input_files(recipe, models)}):
        work.keep = False
        raise OutputError(
            f"out: {work.out} was not written, because inputs changed while they were read: {different}; run again"
        )


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
    with WorkFolder(output_folder(recipe, models)) as work:
        if not work.published and (work.finished or read_past(work.manifest).layers):  # of a calibration
            raise ResumeError(left_behind(work.out))
        work.clear()
        before = input_files(recipe, models)
        with CheckpointWriter(work, models.merged) as writer:
            writer.copy_rest()
            writer.finish()
        _check_unchanged(work, recipe, models, {"inputs": before})
        with finish_first():
            work.publish()
    return work.out


def _with_out(recipe: RecipeLike, out: str | Path | None) -> Recipe:
    loaded = Recipe.load(recipe)
    return loaded if out is None else replace(loaded, out=str(checked_path("out", out).absolute()))
