"""How a plan is made: the engine's own first forward and layers, on tensors without storage (see `footprint`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from featcal_fast import files
from featcal_fast.checkpoints import REPORT, Checkpoint, taken, write_errors
from featcal_fast.checkpoints.nested import model_folder
from featcal_fast.data.preprocess import find_tokenizer
from featcal_fast.errors import RecipeError, shown
from featcal_fast.forward.calls import Origin
from featcal_fast.inputs.load import load_data
from featcal_fast.inputs.models import RecipeModels, check_folders, models_to_calibrate
from featcal_fast.inputs.recipe import MOST, Recipe, RecipeLike, with_out
from featcal_fast.inputs.scan import scan as scan_weights
from featcal_fast.inputs.task_data import TaskData
from featcal_fast.layer.choice import ALPHAS, hardest
from featcal_fast.layer.solve import MAX_CONDITION_FLOAT32, max_condition
from featcal_fast.layer.tokens import TokenCounts
from featcal_fast.merging.merged import MergedCheckpoint
from featcal_fast.models.structure import Layer
from featcal_fast.models.tokens import vocabulary_size
from featcal_fast.planning.footprint import Footprint, StageInputs, comparing_bytes, measure_layer
from featcal_fast.planning.heads import find_heads
from featcal_fast.planning.memory import count_memory
from featcal_fast.planning.models import PlannedModels, block_bytes
from featcal_fast.planning.plan import LayerPlan, Plan, TaskWork, folded, memory_bytes
from featcal_fast.planning.remedies import problems
from featcal_fast.planning.sample import LEAST, sample_recipe
from featcal_fast.planning.shared import MOST as MOST_RANKS
from featcal_fast.planning.shared import ON_ONE, Crew, Sharing, local_ranks, rank_plans, samples_by_part
from featcal_fast.planning.stages import States, enter_stages, shapes_of
from featcal_fast.planning.wire import Rows
from featcal_fast.ranks.shares import Shares
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.warnings import (
    about_base,
    about_dequantised,
    about_held_out,
    about_ignored,
    about_left_out,
    about_merged,
    about_not_merged,
    about_same_model,
    about_samples,
    about_settings,
)
from featcal_fast.streaming.hidden_states import HOST, Offload
from featcal_fast.streaming.machine import available_device_bytes, available_host_bytes, find_device, resident_bytes
from featcal_fast.streaming.scratch import Scratch
from featcal_fast.untrusted.documents import parse_json


def plan(
    recipe: RecipeLike,
    *,
    out: str | Path | None = None,
    device: torch.device | str | None = None,
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    scratch: str | Path | None = None,
    checkpoint_every: int | None = None,
    scan: bool = False,
    sample: int | None = None,
    planned: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
    gpus: int | None = None,
) -> Plan:
    """What a recipe will need, from headers, configs and data alone; nothing is computed, unless asked for, or written.

    Args:
        recipe: a `Recipe`, a mapping, or the path of a YAML file.
        out: overrides the recipe's `out`; relative to the working directory. What holds something already is no error
            here, but a warning.
        device: where it would compute; by default the first GPU, or the CPU.
        device_memory: bytes of it that may be used, or a text such as `22GiB`; by default what is free.
        host_memory: bytes of host memory that may be used, likewise.
        scratch: a folder for hidden states; by default they wait in host memory.
        checkpoint_every: as of `calibrate`: with 0, no disk is taken to go on from when the job is interrupted.
        scan: read all weights too, to see that they are finite; counted apart, as `scan`.
        sample: pass so many samples of each task, 3 at least, through all models, to see whether it will help; no job
            that does not fit is sampled.
        planned: given the plan as soon as it is made: before that, which takes longer and may fail.
        progress: told how that goes.
        gpus: that share the job, or processes on CPUs, 1 to 1,024; eight at most are taken to be on a machine.

    Returns:
        The plan, with a word on whether the job fits.

    Raises:
        FeatCalError: the recipe, a model, the data or the output folder is not usable. A job that only does not fit
            is no error: see `Plan.problems`.
    """
    device_memory, host_memory = memory_bytes("device_memory", device_memory), memory_bytes("host_memory", host_memory)
    if sample is not None and (type(sample) is not int or not LEAST <= sample <= MOST):
        raise RecipeError(f"sample: found {shown(sample)}, expected a number of samples from {LEAST} to {MOST:,}")
    ranks = _checked_ranks(gpus)
    device = find_device(device, present=device_memory is None or sample is not None)
    recipe = with_out(recipe, out)
    models = models_to_calibrate(recipe, device)
    check_folders(recipe, models, scratch, may_be_taken=True)
    data = load_data(recipe, models, device, keep=False)[1]
    budgets = device_memory, host_memory, scratch, checkpoint_every, ranks, min(ranks, ON_ONE)
    found = choose_offload(recipe, models, device, data, *budgets)[0]
    with write_errors(recipe.folder or Path()):
        found.warnings += [said] if recipe.folder is not None and (said := taken(recipe.folder)) else []
    if scan:
        found.bytes_read["scan"] = scan_weights(recipe, models, progress or Progress())
    if planned is not None:
        planned(found)
    if sample is not None and not found.problems:
        found.sample = sample_recipe(recipe, models, device, sample, found.chunk, progress or Progress())
    return found


def _checked_ranks(gpus: object) -> int:
    """Raises:
    RecipeError: it is no number of ranks."""
    if gpus is None:
        return 1
    if type(gpus) is not int or not 1 <= gpus <= MOST_RANKS:
        raise RecipeError(f"gpus: found {shown(gpus)}, expected a whole number from 1 to {MOST_RANKS:,}")
    return gpus


def choose_offload(
    recipe: Recipe,
    models: RecipeModels,
    device: torch.device,
    data: Mapping[str, TaskData],
    device_memory: int | None,
    host_memory: int | None,
    scratch: str | Path | None,
    checkpoint_every: int | None,
    ranks: int = 1,
    local: int | None = None,
) -> tuple[Plan, Offload]:
    """The plan, and where hidden states wait: in `scratch` if given, on a GPU if they fit there, or on the host.

    Unless the recipe says how many samples pass a layer at a time, they are halved until the job fits.

    Args:
        recipe: the job.
        models: its models.
        device: where it would compute.
        data: each task's size.
        device_memory: bytes that each rank may use of its device; None for what is free here.
        host_memory: bytes that the ranks of a machine may use together; None likewise.
        scratch: a folder for hidden states.
        checkpoint_every: 0 where nothing is kept for an interrupted job to go on from.
        ranks: how many share the job.
        local: how many of them will be on a machine; None for a run, where they are: as many as torchrun says, or all.

    Raises:
        OutputError: `scratch` cannot be written to.
    """
    if scratch is not None:
        Scratch(Path(scratch))  # can be made
        choices: list[Offload] = [Path(scratch)]
    else:
        choices = [device, HOST] if device.type == "cuda" else [HOST]
    shares = Shares(tuple(data), recipe.settings.sample_shards, ranks)
    running = local_ranks(ranks)
    crew = Crew(shares, samples_by_part(data, shares), *((running, running) if local is None else (local, 1)))
    planners = [Planner(recipe, models, device, offload, checkpoint_every != 0, crew) for offload in choices]
    halves = 1
    while True:
        sizes = {task: each.resized(batch_size=max(1, each.batch_size // halves)) for task, each in data.items()}
        for planner in planners:
            plan = planner.plan(sizes, device_memory, host_memory)
            if plan.fits:
                break
        if plan.fits or recipe.batch_size or all(each.batch_size == 1 for each in sizes.values()):
            plan.problems = problems(plan, sizes, recipe, planner.offload, planner.measure)
            plan.warnings = _warnings(recipe, models, data, plan.largest_matrix[0])
            return plan, planner.offload
        halves *= 2


def _warnings(recipe: Recipe, models: RecipeModels, data: Mapping[str, TaskData], width: int) -> list[str]:
    """What should be known before anything runs."""
    worst = hardest(recipe.settings)
    same = [task for task, expert in models.experts.items() if expert.path.resolve() == models.base.path.resolve()]
    drawn = {task: each.rows + sum(each.left_out.values()) for task, each in data.items()}
    no_base = recipe.merge is None and models.merged.path.resolve() == models.base.path.resolve()
    layout = models.merged if isinstance(models.merged, Checkpoint) else models.base
    if isinstance(models.merged, MergedCheckpoint):
        about = about_not_merged(models.merged.not_merged())
    else:
        about = about_merged(_is_calibrated(models.merged.path), _foreign_rows(models))
    return [
        *about_base(no_base),
        *about,
        *about_dequantised(layout.label, layout.stored_bytes(layout.tensors), models.nbytes),
        *about_settings(worst, max_condition(worst, len(recipe.experts), width), MAX_CONDITION_FLOAT32),
        *about_samples({task: (drawn[task], each.asked) for task, each in data.items()}),
        *about_held_out(recipe.held_out, {task: (each.rows, each.held_out) for task, each in data.items()}),
        *about_ignored(note for each in data.values() for note in each.notes),
        *about_left_out({task: (each.left_out, drawn[task]) for task, each in data.items()}),
        *about_same_model(same),
    ]


def _is_calibrated(folder: Path) -> bool:
    """Whether a report of ours lies in a folder; one that cannot be read is none."""
    with suppress(OSError, ValueError):
        report = parse_json(files.read_bytes(folder / REPORT))
        versions = report.get("versions") if isinstance(report, dict) else None
        return isinstance(versions, dict) and "featcal_fast" in versions
    return False


def _foreign_rows(models: RecipeModels) -> tuple[int, int] | None:
    """Rows of the merged model's embedding and of the base model's, where the tokenizer is the latter's."""
    folders = (models.merged.path, models.base.path)
    if find_tokenizer(folders) in (None, model_folder(models.merged.path)):
        return None
    return vocabulary_size(models.merged.config), vocabulary_size(models.base.config)


class Planner:
    """Plans one job, for any size of data.

    Args:
        recipe: the job.
        models: its models.
        device: where it would compute.
        offload: where hidden states wait between layers.
        resumable: whether they are kept so that an interrupted job can go on.
        crew: the ranks that share it.
    """

    def __init__(
        self,
        recipe: Recipe,
        models: RecipeModels,
        device: torch.device,
        offload: Offload,
        resumable: bool,
        crew: Crew,
    ) -> None:
        self.recipe, self.device, self.offload, self.resumable = recipe, device, offload, resumable
        self.crew = crew
        self.models = PlannedModels(recipe, models)

    def plan(self, data: Mapping[str, TaskData], device_memory: int | None, host_memory: int | None) -> Plan:
        """The plan for data of this size, and what there is; without a word on whether it fits."""
        plan = self.measure(data)
        held = resident_bytes()
        plan.host_budget = self.crew.running * held + available_host_bytes() if host_memory is None else host_memory
        if self.device.type == "cuda":
            free = available_device_bytes(self.device) if device_memory is None else device_memory
            plan.device_budget = free
        return plan

    def measure(self, data: Mapping[str, TaskData]) -> Plan:
        """The plan for data of this size, without budgets."""
        stages, crew = enter_stages(self.models, data), self.crew
        counts, rows = [], []
        for stage in stages.states:
            sizes = {task: pair[0].hidden.shape[:2].numel() for task, pair in stage.items()}
            counts.append({task: round(data[task].fitted_batches * size) for task, size in sizes.items()})
            held_out = {task: round(data[task].held_batches * size) for task, size in sizes.items()}
            rows.append(Rows(crew.rows(counts[-1]), held_out))
        tokens = {task: sum(count[task] for count in counts) for task in self.models.experts}
        plan = Plan(str(self.device), tokens, all(each.exact for each in data.values()))
        plan.chunk = max(
            data[task].batch_size * pair[0].hidden.shape[1] for stage in stages.states for task, pair in stage.items()
        )
        plan.settings, plan.local_ranks = self.recipe.settings, crew.local
        seen: dict[Any, Footprint] = {}
        for layer in self.models.layers:
            plan.layers.append(self._layer(layer, data, stages.states[layer.stage], rows[layer.stage], seen))
        heads = find_heads(self.models, data, stages.states[-1])
        plan.kept = folded(self.models.kept(plan.layers))
        roles = crew.roles({task for task, each in data.items() if each.held_out}, self.recipe.settings.auto)
        plan.bytes_read = self.models.bytes_read(plan.layers, stages.reads, heads.student, roles)
        plan.merges = self.recipe.merge is not None
        plan.dtype = self._dtype()
        plan.bytes_written = {"calibrated model": self.models.models.nbytes}
        plan.disk = {"calibrated model": self.models.models.nbytes}
        plan.ranks = rank_plans(plan.layers, Sharing(plan.settings, crew.shares))
        count_memory(plan, self.models, data, stages, heads.nbytes, self.device, self.offload, self.resumable, roles)
        return plan

    def _dtype(self) -> str:
        """What most of the student's weights in layers are multiplied as."""
        if self.recipe.settings.forward_dtype != "auto":
            return self.recipe.settings.forward_dtype
        sizes: Counter[torch.dtype] = Counter()
        for block in self.models.student.structure.blocks:
            for value in block.state_dict().values():
                sizes[value.dtype] += value.numel()
        return str(sizes.most_common(1)[0][0]).removeprefix("torch.")

    def _layer(
        self, layer: Layer, data: Mapping[str, TaskData], states: States, rows: Rows, seen: dict[Any, Footprint]
    ) -> LayerPlan:
        """Layers that are called alike with weights of one form are measured once."""
        settings = self.recipe.settings
        counts = TokenCounts.of({task: sum(own) for task, own in rows.fitted.items()})
        if settings.auto:
            counts = counts.at_least(TokenCounts.of(rows.held_out))
        found = {task: self._measured(layer, task, states[task], counts, seen) for task in self.models.experts}
        last = layer is self.models.layers[-1]
        work = {task: self._work(each, data[task], last) for task, each in found.items()}
        worst = max(found.values(), key=lambda each: each.working)
        # An expert's block is gone when the layer is solved.
        working = max(worst.working, worst.solving - self.models.largest_block(layer.index))
        comparing = max(comparing_bytes(student.hidden) for student, _ in states.values())
        copy = 0
        if settings.forward_dtype == "bfloat16":  # a copy of a weight at a time
            sizes = (2 * group.in_features * out for group in worst.layout.groups for out in group.out_features)
            copy = max(sizes, default=0)
        own = list(work.values())
        flops = {
            "forward": sum(
                each.fitted["forward"] + each.advance + each.followed["forward"] + each.followed_after for each in own
            ),
            "moments": sum(each.fitted["moments"] + each.followed["moments"] for each in own),
            "fold": sum(each.fold for each in own),
            "solve": worst.solve,
        }
        return LayerPlan(
            index=layer.index,
            layout=worst.layout,
            kept=worst.kept,
            system=worst.system,
            scratch=worst.scratch,
            working=max(working, comparing) + copy,
            flops=flops,
            passing=max(worst.working, comparing) + copy,
            work=work,
            counts=counts,
            rows=rows,
            wire=worst.wire,
            blocks=self.models.blocks(layer.index),
            merged=block_bytes(self.models.student, layer.index) if self.recipe.merge is not None else 0,
            ahead=worst.ahead,
        )

    def _measured(
        self,
        layer: Layer,
        task: str,
        states: tuple[StageInputs, StageInputs],
        counts: TokenCounts,
        seen: dict[Any, Footprint],
    ) -> Footprint:
        """What a batch of a task takes."""
        settings, expert, calls = self.recipe.settings, self.models.experts[task], states[0].calls
        chosen = settings.include is not None or settings.exclude is not None
        key = (
            shapes_of(self.models.student.structure.blocks[layer.index].state_dict()),
            shapes_of(expert.structure.blocks[layer.index].state_dict()),
            shapes_of([states[0].hidden, calls.args[layer.number], calls.kwargs[layer.number]]),
            (layer.token_weights, layer.stage, layer.path if chosen else None),
        )
        if key not in seen:
            for source, each in zip((self.models.student, expert), states, strict=True):
                path, samples = source.structure.paths[layer.stage], slice(0, len(each.hidden))
                each.calls.origin = Origin(source.label, path, task, 0, samples)  # for errors
            seen[key] = measure_layer(self.models.student, expert, layer, states, counts, settings, self.device)
        return seen[key]

    def _work(self, found: Footprint, data: TaskData, last: bool) -> TaskWork:
        """What a task takes in a layer, by that of a batch."""
        settings, fitted, held = self.recipe.settings, data.fitted_batches, data.held_batches
        # Held-out samples pass the expert's, the merged model's and the calibrated one's own; for the gate, the last
        # with both weights; for a choice of alpha, with each one's, which the gate takes its own from. With a choice,
        # they are summed up, too.
        gate = int(settings.keep_better)
        trials = 2 + gate + (len(ALPHAS) if settings.auto else gate)
        judged = held if settings.auto else 0.0
        # The student's second pass, through the calibrated layer, is as the expert's; the last layer needs none.
        return TaskWork(
            {"forward": fitted * (found.student + found.expert), "moments": fitted * found.moments},
            0.0 if last else fitted * found.expert,
            {"forward": held * found.expert + judged * found.student, "moments": judged * found.moments},
            trials * held * found.expert,
            (1 + settings.auto) * found.fold,
        )
