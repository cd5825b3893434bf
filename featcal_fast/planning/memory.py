"""What a job holds in memory at its peak: what is there all the time, and the worst moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from featcal_kernels.configs import PANEL_BYTES, WORKSPACE_BYTES

from featcal_fast.checkpoints import cached_bytes
from featcal_fast.forward.runner import should_compile
from featcal_fast.inputs.task_data import TaskData
from featcal_fast.planning.footprint import StageInputs
from featcal_fast.planning.models import (
    PlannedModels,
    block_bytes,
    block_reads,
    meta_checkpoint,
    pinned_bytes,
    unpacking_bytes,
)
from featcal_fast.planning.plan import Plan
from featcal_fast.planning.stages import Stages, States
from featcal_fast.streaming.drift import PROBE_SAMPLES
from featcal_fast.streaming.hidden_states import HOST, Offload
from featcal_fast.streaming.machine import resident_bytes
from featcal_fast.streaming.malloc import MALLOC_CACHE_BYTES
from featcal_fast.streaming.streams import SCRATCH, TO_RESUME

# Measured by bench/jobs.py: what libraries take once they compute (threads, their buffers, code paged in).
RUNTIME = 40 * 2**20
# What torch.compile takes of this process's memory, measured on a CPU: a Llama's forwards 143 MiB, a T5's 178.
COMPILER = 180 * 2**20


def count_memory(
    plan: Plan,
    models: PlannedModels,
    data: Mapping[str, TaskData],
    stages: Stages,
    outputs: int,
    device: torch.device,
    offload: Offload,
    resumable: bool,
) -> None:
    """Write the items of host, device and disk memory into `plan`, bytes: the sum of what stays and the worst moment.

    Args:
        plan: with its layers.
        models: of the job.
        data: each task's size.
        stages: what enters them.
        outputs: what comparing the models' outputs takes in the end, where samples are held out.
        device: where it would compute.
        offload: where hidden states wait between layers.
        resumable: whether they are kept so that an interrupted job can go on.
    """
    device_items: Counter[str] = Counter()  # or the host's, where that computes
    host: Counter[str] = Counter()
    _count_data(plan, models, data, host)
    entering = _count_hidden_states(plan, data, stages, device, offload, device_items, host)
    if resumable:
        plan.disk[SCRATCH if isinstance(offload, Path) else TO_RESUME] = _kept_bytes(data, stages)
    reading = max(
        unpacking_bytes(meta_checkpoint(source).source, block_reads(source))
        for source in (models.student, *models.experts.values())
    )
    turns = [*stages.turns, *_layers(plan, models, reading), Counter({"outputs of held-out samples": outputs})]
    rest = models.tensors_that_stay(plan.layers)
    tensors = models.models.merged.tensors
    largest = max((tensors[name].nbytes for name in rest), default=0) + unpacking_bytes(models.models.merged, rest)
    if device.type == "cpu":
        host.update(device_items)
        host.update(max([*turns, Counter({"tensors that stay": largest})], key=_total))
    else:
        device_items["a batch"] = round(entering)
        device_items["operands of the kernels"] = PANEL_BYTES + WORKSPACE_BYTES
        device_items["merging"] = models.merging_bytes()
        arriving = max(models.largest_pinned(layer.index) for layer in plan.layers)
        arriving += reading + max(models.largest_block(layer.index) for layer in plan.layers)
        if isinstance(offload, Path):
            arriving += 2 * pinned_bytes(round(entering))
        # What is read and unpacked is so on the host, in whatever turn.
        read = [sum(each.pop(name, 0) for name in ("reading", "calibration data of a task")) for each in turns]
        host["what is on its way"] = max(largest, arriving, *read)
        plan.device_items = {name: size for name, size in (device_items + max(turns, key=_total)).items() if size}
    plan.host = {name: size for name, size in host.items() if size}


def _count_data(plan: Plan, models: PlannedModels, data: Mapping[str, TaskData], host: Counter[str]) -> None:
    """Libraries, data and experts, which stay on the host."""
    recipe = models.recipe
    loaded = round(sum(each.nbytes for each in data.values() if each.loaded))
    host["interpreter and libraries"] = resident_bytes() - loaded + RUNTIME
    host["compiler"] = COMPILER if should_compile(recipe.settings, torch.device(plan.device)) else 0
    host["freed blocks kept for use"] = MALLOC_CACHE_BYTES
    kept = len(models.student.structure.paths) > 1  # an encoder-decoder's inputs are needed again
    host["calibration data"] = round(sum(each.nbytes for each in data.values() if kept or not each.lazy))
    if recipe.expert_storage != "disk":
        host["experts kept"] = sum(
            cached_bytes(source.tensors[name], recipe.expert_storage)
            for source, own in zip(models.models.experts.values(), models.experts.values(), strict=True)
            for name in {*meta_checkpoint(own).reads, *block_reads(own)}
        )


def _count_hidden_states(
    plan: Plan,
    data: Mapping[str, TaskData],
    stages: Stages,
    device: torch.device,
    offload: Offload,
    device_items: Counter[str],
    host: Counter[str],
) -> float:
    """Hidden states and what blocks are called with; bytes of the largest batch of hidden states."""
    between = device_items if offload == device else host  # layers
    room = pinned_bytes if device.type != "cpu" and offload == HOST else int
    hidden = calls = entering = passing = 0.0
    for states in stages.states:
        every = [(data[task], state) for task, pair in states.items() for state in pair]
        hidden = max(hidden, sum(batches * room(state.hidden.nbytes) for batches, state in _chains(data, states)))
        calls = max(calls, sum(batches * state.kept_bytes for batches, state in _chains(data, states)))
        entering = max(entering, *(each.entering * state.hidden.nbytes for each, state in every))
        passing = max(passing, *(state.call_bytes for _, state in every))
    between["masks of batches"] = round(calls)
    device_items["masks and positions"] = round(max(stages.shared) + passing)
    (plan.disk if isinstance(offload, Path) else between)[SCRATCH] = round(hidden)
    # The expert's and the student's next, and one that leaves.
    device_items["hidden states on their way"] = 0 if offload == device else round(3 * entering)
    return entering


def _kept_bytes(data: Mapping[str, TaskData], stages: Stages) -> int:
    """On disk: hidden states that a job can go on from, those that come after them, and those that ended a stage."""
    most = before = 0.0
    for states in stages.states:
        held = sum(batches * state.hidden.nbytes for batches, state in _chains(data, states))
        most, before = max(most, before + 2 * held), before + held
    return round(most)


def _layers(plan: Plan, models: PlannedModels, reading: int) -> list[Counter[str]]:
    """What each layer takes while a task passes."""
    found: list[Counter[str]] = []
    for layer in plan.layers:
        largest = models.largest_block(layer.index)
        blocks = block_bytes(models.student, layer.index) + block_bytes(models.base, layer.index)
        needs = {
            "blocks: student, base, expert": blocks + largest,
            "the next block": largest,
            "ridge systems": layer.system,
            "moments of a task": layer.scratch,
            "features and workspace": layer.working,
            "reading": reading,
        }
        found.append(Counter(needs))
    return found


def _total(items: Mapping[str, int]) -> int:
    return sum(items.values())


def _chains(data: Mapping[str, TaskData], states: States) -> Iterator[tuple[float, StageInputs]]:
    """All hidden states that pass from layer to layer: how many batches of what form, a task and model.

    Those that are fitted to are the student's and the expert's; those that drift is told by, the merged model's too.
    """
    for task, (student, expert) in states.items():
        fitted, followed = data[task].fitted_batches, _followed(data[task])
        yield fitted + 2 * followed, student
        yield fitted + followed, expert


def _followed(data: TaskData) -> float:
    """How many batches drift is told by: those that are held out, or else a few samples of one."""
    return data.held_batches or min(PROBE_SAMPLES, data.batch_size) / data.batch_size
