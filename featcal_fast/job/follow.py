"""A recipe carried out by several ranks: what all of them do, where the first one also writes and talks to the user."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from featcal_fast import files
from featcal_fast.calibrate import calibrate_source
from featcal_fast.data.samples import os_errors
from featcal_fast.data.sources import files_below
from featcal_fast.errors import RankError
from featcal_fast.inputs.load import load_data
from featcal_fast.inputs.models import RecipeModels
from featcal_fast.inputs.recipe import Recipe
from featcal_fast.inputs.task_data import local_data
from featcal_fast.job.fingerprint import Digested, Facts, differences
from featcal_fast.job.provenance import sha256
from featcal_fast.job.resume import Member, bytes_of_all, data_of_all
from featcal_fast.merging.merged import MergedCheckpoint
from featcal_fast.ranks.shares import Shares
from featcal_fast.ranks.world import World
from featcal_fast.reporting.clock import Clock
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import Peaks, RankReport, Report
from featcal_fast.streaming.hidden_states import HOST, Offload
from featcal_fast.streaming.sources import CheckpointSource


def follow(recipe: Recipe, models: RecipeModels, device: torch.device, world: World) -> Report:
    """What ranks other than the first do.

    Args:
        recipe, models: of the job, which all ranks have.
        device: this rank's.
        world: all ranks.

    Returns:
        The first rank's report.

    Raises:
        FeatCalError: as `calibrate`; or another rank has failed.
    """
    told = world.tell(None)
    kept = None if told is None else _calibrate(recipe, models, device, world, told)  # else it only lacked its name
    report = Report.from_json(world.tell(None))
    if kept is not None and world.leads_machine and kept.exists():  # on a disk of this machine's own
        with suppress(OSError):
            files.remove_tree(kept)
    return report


def _calibrate(
    recipe: Recipe, models: RecipeModels, device: torch.device, world: World, told: Mapping[str, Any]
) -> Path | None:
    """Everything but the first rank's part; where this rank's hidden states were kept."""
    clock, shares = Clock(), shares_of(recipe, world)
    own = {task: recipe.experts[task] for task in shares.own_tasks}
    loaded = load_data(replace(recipe, experts=own), models, device)[0] if own else {}
    batches = {task: Digested(each, clock) for task, each in loaded.items()}
    student, base, experts = sources(models, device, shares)
    offload = meant_offload(told["offload"], device)
    kept = world.tell(None)
    with Member(kept, batches, models, world) as output:
        report = calibrate_source(
            student,
            base,
            experts,
            batches,
            recipe.settings,
            device,
            output,
            Progress(),
            clock,
            offload,
            told["chunk"],
            shares,
            world,
        )
    tell_of_all(report, models, shares, world)
    bytes_of_all(models, world)
    data_of_all(batches, world)
    return None if kept["folder"] is None else Path(kept["folder"])


def shares_of(recipe: Recipe, world: World) -> Shares:
    """Whose samples are whose."""
    return Shares(tuple(recipe.experts), recipe.settings.sample_shards, world.size, world.rank)


def sources(
    models: RecipeModels, device: torch.device, shares: Shares
) -> tuple[CheckpointSource, CheckpointSource, dict[str, CheckpointSource]]:
    """The merged model, the base model, and the experts of this rank's tasks."""
    experts = {
        task: CheckpointSource(models.experts[task], device, models.tokens[task].table) for task in shares.own_tasks
    }
    student = CheckpointSource(models.merged, device, made_once=isinstance(models.merged, MergedCheckpoint))
    return student, CheckpointSource(models.base, device, models.base_tokens.table), experts


def told_offload(offload: Offload, device: torch.device) -> str | None:
    """Where hidden states wait, for other ranks: a folder, `host`, or each rank's own device, as JSON has it."""
    if isinstance(offload, Path):
        return str(offload)
    return None if offload == device else "host"


def meant_offload(told: str | None, device: torch.device) -> Offload:
    """What `told_offload` tells."""
    if told is None:
        return device
    return HOST if told == "host" else Path(told)


def check_same_job(recipe: Recipe, facts: Facts, world: World) -> Facts:
    """All ranks must have the same recipe, inputs, data, versions and kind of device.

    Returns:
        `facts`.

    Raises:
        RankError: one has not; on all ranks, with what differs.
    """
    if world.size == 1:
        return facts
    inputs = {of: {name: size for name, (size, _) in sizes.items()} for of, sizes in facts["inputs"].items()}
    every = world.gather({**facts, "inputs": inputs, "content": _contents(recipe)})
    for rank, theirs in enumerate(every):
        if found := differences(every[0], theirs, f"on rank {rank}"):
            raise RankError(
                f"ranks 0 and {rank} have not the same job: {found}; give all ranks the same recipe, files, versions "
                "and kind of device"
            )
    return facts


def _contents(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of all calibration data that lies in files."""
    found: dict[str, str] = {}
    for task, expert in recipe.experts.items():
        data = local_data(recipe, expert.data)
        if isinstance(data, Path) and data.exists():  # else whoever loads it will say
            with os_errors(data):
                paths = sorted(files_below(data)) if data.is_dir() else [data]
                for path in (each for each in paths if each.is_file()):
                    with closing(files.open_to_read(path)) as opened:
                        name = f"data of {task}: {path.relative_to(data.parent)}"
                        found[name] = sha256(opened, files.stat(path).st_size)
    return found


def tell_of_all(report: Report, models: RecipeModels, shares: Shares, world: World) -> None:
    """Add to a report what each rank has to tell: its memory, what it sent, and what it read and wrote."""
    shards = "" if shares.shards == 1 else f"/{shares.shards}"
    samples = [part.task + (f" {part.shard + 1}{shards}" if shards else "") for part in shares.parts]
    peaks = report.peaks
    own = [samples, report.device, peaks.host_bytes, peaks.device_bytes, world.sent, world.received, world.waited]
    every = world.gather([own, report.bytes_read, report.bytes_written, models.storage_error])
    if world.size > 1:
        report.ranks = [
            RankReport(parts, device, Peaks(host, on_device), sent, received, waited)
            for (parts, device, host, on_device, sent, received, waited), *_ in every
        ]
        peaks.host_bytes = max(each.peaks.host_bytes or 0 for each in report.ranks) or None
        peaks.device_bytes = max(each.peaks.device_bytes or 0 for each in report.ranks) or None
    for number, values in ((1, report.bytes_read), (2, report.bytes_written)):
        for name in {name for each in every for name in each[number]}:
            values[name] = sum(each[number].get(name, 0) for each in every)
    report.storage_error = {task: error for each in every for task, error in each[3].items()}
