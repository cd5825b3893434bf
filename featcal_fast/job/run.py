"""A recipe carried out: model folders and data in, a model folder out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from featcal_fast.calibrate import calibrate_source
from featcal_fast.checkpoints import CheckpointWriter, Lock, WorkFolder, write_errors
from featcal_fast.errors import FeatCalError, OutputError, RecipeError, ResumeError, shown, told
from featcal_fast.inputs.load import load_data
from featcal_fast.inputs.models import RecipeModels, models_to_calibrate, output_folder
from featcal_fast.inputs.recipe import Recipe, RecipeLike, with_out
from featcal_fast.inputs.scan import scan as scan_weights
from featcal_fast.inputs.unchanged import unchanged
from featcal_fast.job.card import find_origin, write_card
from featcal_fast.job.delta import RANK, check_delta, write_delta
from featcal_fast.job.fingerprint import Digested, Facts, differences, fingerprint, input_files
from featcal_fast.job.follow import check_same_job, follow, shares_of, sources, tell_of_all, told_offload
from featcal_fast.job.interrupts import finish_first
from featcal_fast.job.loads import check_loads
from featcal_fast.job.provenance import describe_inputs
from featcal_fast.job.resume import (
    Past,
    Resumable,
    bytes_of_all,
    data_of_all,
    find_past,
    finished_report,
    left_behind,
    read_past,
    telling_what_is_kept,
)
from featcal_fast.job.throughput import remember
from featcal_fast.merging.merged import MergedCheckpoint
from featcal_fast.planning.plan import Plan, memory_bytes
from featcal_fast.planning.planner import choose_offload
from featcal_fast.ranks.join import join, launched, own_device
from featcal_fast.ranks.shares import Shares
from featcal_fast.ranks.world import World
from featcal_fast.reporting.clock import Clock
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import Report
from featcal_fast.reporting.usage import shell_quoted
from featcal_fast.reporting.warnings import about_not_merged, about_run, about_same_model
from featcal_fast.streaming.hidden_states import Offload
from featcal_fast.streaming.machine import find_device
from featcal_fast.streaming.malloc import trim_malloc
from featcal_fast.streaming.scratch import scratch_errors


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
    delta: str | Path | None = None,
    delta_rank: int = RANK,
) -> Report:
    """Calibrate the model that a recipe describes and write it to a new folder, `report.json` beside the weights.

    Folders are streamed: one layer of one expert is in memory at a time. What is done is kept beside the output, so
    that a run that is stopped can go on, with the bits of one that was not. Processes of torchrun's share the job.

    Args:
        recipe: a `Recipe`, a mapping, or the path of a YAML file.
        out: overrides the recipe's `out`; relative to the working directory.
        device: where to compute; by default the first GPU, or the CPU.
        progress: told how the run goes.
        device_memory, host_memory: bytes that may be used, or a text such as `22GiB`; by default what is free.
        scratch: a folder for hidden states between layers; by default they wait on a GPU, or in host memory.
        resume, fresh: go on with what an interrupted run into the same folder has left, if any; or remove that.
        checkpoint_every: after how many layers what is done is made durable, 0 for never; by default at little cost.
        scan: read all weights before the first layer, to see that they are finite, not only when their layer comes.
        delta, delta_rank: a folder to write the calibration to, too, as an adapter of the merged model, and its rank.

    Returns:
        What happened, layer by layer.

    Raises:
        FeatCalError: the recipe, a model, the data or the output folder is not usable, memory will not do (see `plan`),
            features are not finite, an input changed, another process failed, or an interrupted run has left something
            and neither is set. The output folder is not there, then; what can be gone on from stays beside it.
    """
    _check_choices(resume, fresh, checkpoint_every)
    memory = memory_bytes("device_memory", device_memory), memory_bytes("host_memory", host_memory)
    clock, size = Clock(), launched()
    with join(size) as world:  # first of all: an error of one rank is told to the others from here on
        recipe, device = with_out(recipe, out), own_device(find_device(device), size)
        models = models_to_calibrate(recipe, device)
        facts = check_same_job(recipe, fingerprint(recipe, models, device), world)
        if not world.is_first:
            return follow(recipe, models, device, world)
        made = output_folder(recipe, models, scratch)
        adapter = None if delta is None else check_delta(delta, models.merged, made, recipe, delta_rank, models.nbytes)
        with WorkFolder(made) as work:
            past = find_past(work, facts, resume=resume, fresh=fresh)
            job = _Job(recipe, models, device, progress or Progress(), work, past, checkpoint_every, scan, clock, world)
            report = job.carry_out(facts, *memory, scratch)
        if adapter is not None and report.calibrated:  # else there is none
            _write_delta(job, made, adapter, delta_rank)
        world.tell(report.to_json() if size > 1 else None)
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
    clock: Clock
    world: World

    def carry_out(
        self, facts: Facts, device_memory: int | None, host_memory: int | None, scratch: str | Path | None
    ) -> Report:
        """From what is there already to the output under its name."""
        work, plan = self.work, None
        with telling_what_is_kept(work, self.progress):
            if work.finished:
                self.world.tell(None)
                report = finished_report(work)
            else:
                with _scratch_locked(work, scratch):
                    report, plan = self._run(facts, device_memory, host_memory, scratch)
            with finish_first():
                work.publish()
            if plan is not None and self.world.size == 1:
                remember(plan, self.past.layers, sum(self.clock.seconds.values()))
        return report

    def _run(
        self, facts: Facts, device_memory: int | None, host_memory: int | None, scratch: str | Path | None
    ) -> tuple[Report, Plan]:
        """All but the output's name."""
        recipe, models, work, past, clock = self.recipe, self.models, self.work, self.past, self.clock
        shares = shares_of(recipe, self.world)
        with clock("data"):
            loaded, sizes = load_data(recipe, models, self.device)
        batches = {task: Digested(loaded[task], clock) for task in shares.own_tasks}
        del loaded
        trim_malloc()
        here = {task: replace(size, loaded=size.loaded and task in shares.own_tasks) for task, size in sizes.items()}
        with clock("planning"):
            plan, offload = choose_offload(
                recipe, models, self.device, here, device_memory, host_memory, scratch, self.every, self.world.size
            )
            plan.check()
            past.check_chunk(plan.chunk)
            origin = find_origin(recipe, models, work.out)  # now: at the end it would cost the whole run
            warnings = [*plan.warnings, *about_same_model(unchanged(models.experts, models.base))]
        for warning in warnings:
            self.progress.warning(warning)
        scanned = {}
        if self.scan:
            with clock("scanning"):
                scanned["scan"] = scan_weights(recipe, models, self.progress)
        if past.layers:
            self.progress.resumed(past.layers)
        if not past.layers and self.every != 0:
            with write_errors(work.out):
                work.begin({"fingerprint": facts, "layers": len(plan.layers)}, scratch)
        chunk = past.chunk or plan.chunk
        self.world.tell({"chunk": chunk, "offload": told_offload(offload, self.device)})
        with CheckpointWriter(work, models.merged, past.hashes) as writer:
            report = self._calibrate(writer, batches, offload, chunk, shares)
            report.flops = sum(plan.flops.values())
            report.peaks.planned_host_bytes = plan.host_bytes
            report.peaks.planned_device_bytes = plan.device_bytes or None
            report.bytes_read |= scanned
            report.warnings = [*warnings, *about_run(report)]
            with clock("finishing"):
                data = data_of_all(batches, self.world)
                report.inputs = describe_inputs(recipe, models, facts, sizes, data)
                write_card(writer, origin, report)
                report.contents = writer.contents()
                writer.sync()
            report.phases = past.phases_with(clock)
            report.seconds = sum(report.phases.values())
            writer.finish(report.to_json())
        _check_unchanged(work, recipe, models, facts)
        _check_loads(work, models)
        with finish_first():
            work.finish({"fingerprint": facts})
        return report, plan

    def _calibrate(
        self, writer: CheckpointWriter, batches: Mapping[str, Digested], offload: Offload, chunk: int, shares: Shares
    ) -> Report:
        """From the models' files to the output's."""
        models, device, clock = self.models, self.device, self.clock
        student, base, experts = sources(models, device, shares)
        layers = {name for layer in student.structure.layers for name in student.block_tensors(layer.index)}
        with clock("copying"):
            writer.copy(name for name in models.merged.tensors if name not in layers)  # what is broken is found at once

        past, world = self.past, self.world
        with Resumable(student, writer, self.work, models, past, batches, self.every, clock, world) as output:
            settings, progress = self.recipe.settings, self.progress
            report = calibrate_source(
                student,
                base,
                experts,
                batches,
                settings,
                device,
                output,
                progress,
                clock,
                offload,
                chunk,
                shares,
                world,
            )
            with clock("copying"):
                writer.copy_rest()
        tell_of_all(report, models, shares, world)
        report.bytes_read |= past.bytes_with(bytes_of_all(models, world))
        report.recipe, report.out = self.recipe.to_dict(), str(self.work.out)
        report.bytes_written["calibrated model"] = models.nbytes
        report.left_out = models.merged.left_out()
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


def _check_loads(work: WorkFolder, models: RecipeModels) -> None:
    """Raises:
    OutputError: what was written is not a model that loads, with the merged model's tensors and files."""
    try:
        check_loads(work.model, models.merged)
    except FeatCalError as error:
        raise OutputError(
            f"out: {work.out} was not written, because what is to become it does not load: {error}"
        ) from error


def _write_delta(job: _Job, out: Path, adapter: Path, rank: int) -> None:
    again = f"featcal-fast delta {shell_quoted(str(out))} --out {shell_quoted(str(adapter))} --rank {rank}"
    again = f"the calibrated model is whole in {out}: `{again}` writes its delta"
    try:
        write_delta(job.models.merged, job.recipe, out, adapter, rank, job.device)
    except (FeatCalError, RuntimeError, MemoryError) as error:  # torch's own errors are the second
        what = error if isinstance(error, FeatCalError) else f"delta: {told(error)}"
        raise OutputError(f"{what}; {again}") from error
    except (KeyboardInterrupt, SystemExit):
        job.progress.interrupted(f"interrupted: {again}")
        raise


def merge(
    recipe: RecipeLike,
    *,
    out: str | Path | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the merged model that a recipe's `merge` describes, uncalibrated, to a new folder.

    Args:
        recipe: as for `calibrate`; its data is not read.
        out: overrides the recipe's `out`.
        device: where to merge; by default the first GPU, or the CPU.
        progress: told what should be known of it.

    Returns:
        The folder.

    Raises:
        FeatCalError: the recipe has no `merge`, or models or output folder are not usable.
    """
    recipe, device = with_out(recipe, out), find_device(device)
    if recipe.merge is None:
        raise RecipeError(
            "merge: missing; expected `merge: {method: task_arithmetic, scaling: 0.3}` in place of merged_model"
        )
    models = RecipeModels(recipe, device)
    with WorkFolder(output_folder(recipe, models)) as work:
        if not work.published and (work.finished or read_past(work.manifest).layers):  # of a calibration
            raise ResumeError(left_behind(work.out))
        work.clear()
        assert isinstance(models.merged, MergedCheckpoint)
        for warning in about_not_merged(models.merged.not_merged()):
            (progress or Progress()).warning(warning)
        before, origin = input_files(recipe, models), find_origin(recipe, models, work.out)
        with CheckpointWriter(work, models.merged) as writer:
            writer.copy_rest()
            write_card(writer, origin)
            writer.finish()
        _check_unchanged(work, recipe, models, {"inputs": before})
        with finish_first():
            work.publish()
    return work.out
