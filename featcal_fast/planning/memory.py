"""What a job holds in memory at its peak: what is there all the time, and the worst moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from featcal_kernels.configs import PANEL_BYTES, WORKSPACE_BYTES

from featcal_fast.checkpoints import cached_bytes
from featcal_fast.forward.runner import should_compile
from featcal_fast.inputs.task_data import TaskData
from featcal_fast.merging.merged import MergedCheckpoint
from featcal_fast.planning.footprint import StageInputs
from featcal_fast.planning.models import (
    PlannedModels,
    block_bytes,
    block_reads,
    meta_checkpoint,
    pinned_bytes,
    unpacking_bytes,
)
from featcal_fast.planning.plan import LayerPlan, Plan
from featcal_fast.planning.shared import UNDER_WAY, Role
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
OTHERS_DATA = "calibration data of other ranks"


def count_memory(
    plan: Plan,
    models: PlannedModels,
    data: Mapping[str, TaskData],
    stages: Stages,
    outputs: Mapping[str, int],
    device: torch.device,
    offload: Offload,
    resumable: bool,
    roles: Sequence[Role],
) -> None:
    """Write the items of host, device and disk memory into `plan`, bytes: the sum of what stays and the worst moment.

    Args:
        plan: with its layers and ranks.
        models: of the job.
        data: each task's size.
        stages: what enters them.
        outputs: by task, what comparing the models' outputs takes in the end, where samples are held out.
        device: where it would compute.
        offload: where hidden states wait between layers.
        resumable: whether they are kept so that an interrupted job can go on.
        roles: of each rank.
    """
    model = _Memory(plan, models, data, stages, outputs, device, offload)
    machines = [roles[start : start + plan.local_ranks] for start in range(0, len(roles), plan.local_ranks)]
    model.count_disk(resumable, machines)
    together = [Counter[str]() for _ in machines]
    for rank, role in enumerate(roles):
        host, device_items = model.of(role)
        sizes = _total(host), _total(device_items)
        together[rank // plan.local_ranks].update(host)
        if plan.ranks:
            plan.ranks[rank].host_bytes, plan.ranks[rank].device_bytes = sizes
        if not rank or sizes[0] > plan.host_bytes:
            plan.host = host
        if not rank or sizes[1] > plan.device_bytes:
            plan.device_items = device_items
    fullest = max(together, key=_total)
    plan.machine = dict(fullest)


class _Memory:
    """What ranks hold; arguments are those of `count_memory`."""

    def __init__(
        self,
        plan: Plan,
        models: PlannedModels,
        data: Mapping[str, TaskData],
        stages: Stages,
        outputs: Mapping[str, int],
        device: torch.device,
        offload: Offload,
    ) -> None:
        self._plan, self._models, self._data, self._stages = plan, models, data, stages
        self._outputs, self._device, self._offload = outputs, device, offload
        self._reading = max(
            unpacking_bytes(meta_checkpoint(source).source, block_reads(source))
            for source in (models.student, *models.experts.values())
        )
        # Layers that are alike take the same.
        self._layers: dict[Any, LayerPlan] = {}
        for layer in plan.layers:
            sizes = tuple(block_bytes(each, layer.index) for each in (models.student, models.base))
            experts = tuple(block_bytes(each, layer.index) for each in models.experts.values())
            key = sizes, experts, layer.system, layer.scratch, layer.working, layer.passing, layer.wire
            self._layers.setdefault(key, layer)
        rest, tensors = models.tensors_that_stay(plan.layers), models.models.merged.tensors
        self._rest = max((tensors[name].nbytes for name in rest), default=0)
        self._rest += unpacking_bytes(models.models.merged, rest)
        arriving = max(models.largest_pinned(layer.index) for layer in self._layers.values())
        self._arriving = arriving + self._reading + max(models.largest_block(each.index) for each in plan.layers)
        self._kept = _cached(models) if models.recipe.expert_storage != "disk" else {}

    def count_disk(self, resumable: bool, machines: Sequence[Sequence[Role]]) -> None:
        """What must be free on disks for hidden states: beside the output, which machines share, those of all ranks."""
        places = machines if isinstance(self._offload, Path) else [[role for roles in machines for role in roles]]
        held = [[self._held(states, roles) for states in self._stages.states] for roles in places]
        if resumable:
            name = SCRATCH if isinstance(self._offload, Path) else TO_RESUME
            self._plan.disk[name] = max(map(_kept_bytes, held))
        elif isinstance(self._offload, Path):
            self._plan.disk[SCRATCH] = round(max(map(max, held)))

    def _held(self, states: States, roles: Sequence[Role]) -> float:
        """Bytes of all hidden states of ranks, in a stage."""
        chains = (each for role in roles for each in _chains(self._data, states, role))
        return sum(batches * state.hidden.nbytes for batches, state in chains)

    def of(self, role: Role) -> tuple[dict[str, int], dict[str, int]]:
        """The host's items and the device's, of a rank; on a CPU all are the host's."""
        device_items: Counter[str] = Counter()  # or the host's, where that computes
        host: Counter[str] = Counter()
        self._count_data(role, host)
        entering = self._count_hidden_states(role, device_items, host)
        outputs = max((self._outputs.get(task, 0) for task in role.owned), default=0)
        turns = [Counter(each) for task, each in self._stages.turns if task in role.tasks]
        turns += [*self._turns(role), Counter({"outputs of held-out samples": outputs})]
        if role.first and not role.alone:  # which loads all of it, and then keeps its own
            others = [each for task, each in self._data.items() if task not in role.tasks and not each.lazy]
            turns.append(Counter({OTHERS_DATA: round(sum(each.nbytes for each in others))}))
        largest = self._rest if role.first else 0
        if self._device.type == "cpu":
            host.update(device_items)
            host.update(max([*turns, Counter({"tensors that stay": largest})], key=_total))
        else:
            device_items["a batch"] = round(entering)
            device_items["operands of the kernels"] = PANEL_BYTES + WORKSPACE_BYTES
            device_items["merging"] = self._models.merging_bytes()
            arriving = self._arriving + (2 * pinned_bytes(round(entering)) if isinstance(self._offload, Path) else 0)
            # What is read and unpacked is so on the host, in whatever turn.
            of_host = ("reading", "calibration data of a task", OTHERS_DATA)
            read = [sum(each.pop(name, 0) for name in of_host) for each in turns]
            host["what is on its way"] = max(largest, arriving, *read)
            device_items = device_items + max(turns, key=_total)
            return _items(host), _items(device_items)
        return _items(host), {}

    def _count_data(self, role: Role, host: Counter[str]) -> None:
        """Libraries, data and experts, which stay on the host."""
        recipe, data = self._models.recipe, self._data
        loaded = round(sum(each.nbytes for each in data.values() if each.loaded))
        host["interpreter and libraries"] = max(0, resident_bytes() - loaded) + RUNTIME
        host["compiler"] = COMPILER if should_compile(recipe.settings, torch.device(self._plan.device)) else 0
        host["freed blocks kept for use"] = MALLOC_CACHE_BYTES
        kept = len(self._models.student.structure.paths) > 1  # an encoder-decoder's inputs are needed again
        own = [data[task] for task in role.tasks]
        host["calibration data"] = round(sum(each.nbytes for each in own if kept or not each.lazy))
        merges = isinstance(self._models.models.merged, MergedCheckpoint)  # of which each rank reads all experts
        host["experts kept"] = sum(size for task, size in self._kept.items() if merges or task in role.tasks)

    def _count_hidden_states(self, role: Role, device_items: Counter[str], host: Counter[str]) -> float:
        """Hidden states and what blocks are called with; bytes of the largest batch of hidden states."""
        device, offload, data = self._device, self._offload, self._data
        between = device_items if offload == device else host  # layers
        room = pinned_bytes if device.type != "cpu" and offload == HOST else int
        hidden = calls = entering = passing = 0.0
        for states in self._stages.states:
            every = [(data[task], state) for task, pair in states.items() if task in role.tasks for state in pair]
            chains = [*_chains(data, states, role)]
            hidden = max(hidden, sum(batches * room(state.hidden.nbytes) for batches, state in chains))
            calls = max(calls, sum(batches * state.kept_bytes for batches, state in chains))
            entering = max(entering, *(each.entering * state.hidden.nbytes for each, state in every), 0)
            passing = max(passing, *(state.call_bytes for _, state in every), 0)
        between["masks of batches"] = round(calls)
        device_items["masks and positions"] = round(max(self._stages.shared) + passing) if role.tasks else 0
        if not isinstance(offload, Path):
            between[SCRATCH] = round(hidden)
        # The expert's and the student's next, and one that leaves.
        device_items["hidden states on their way"] = 0 if offload == device else round(3 * entering)
        return entering

    def _turns(self, role: Role) -> Iterator[Counter[str]]:
        """What each layer takes: while a task passes, and, with several ranks, while it is solved."""
        models = self._models
        for layer in self._layers.values():
            blocks = block_bytes(models.student, layer.index) + block_bytes(models.base, layer.index)
            sizes = [block_bytes(models.experts[task], layer.index) for task in role.tasks]
            largest = models.largest_block(layer.index)
            many = not role.first and len(sizes) > 1
            held = blocks + (largest if role.first else sum(sizes))
            needs = {
                f"blocks: student, base, {'experts' if many else 'expert'}": held,
                "the next block": largest,
                "ridge systems": layer.system,
                f"moments of {'tasks' if role.moments > 1 else 'a task'}": role.moments * layer.scratch,
                "features and workspace": layer.working if role.alone else layer.passing,
                "reading": self._reading,
            }
            if role.alone:
                yield Counter(needs)
                continue
            assert layer.wire is not None
            needs["sums on their way"] = UNDER_WAY * layer.wire.largest
            if role.tasks:  # it looks ahead while it waits
                needs["the layer ahead"] = largest + layer.ahead
            yield Counter(needs)
            solved = {**needs, "moments of a task": layer.scratch, "blocks: student, base, expert": blocks + largest}
            for name in ("moments of tasks", "blocks: student, base, experts"):
                solved.pop(name, None)
            yield Counter({**solved, "features and workspace": layer.working})
            new = sum(sum(panels) for panels in layer.wire.new)
            yield Counter({**solved, "sums on their way": 0, "new weights": new})


def _cached(models: PlannedModels) -> dict[str, int]:
    """Bytes of experts that are kept in host memory, by task."""
    return {
        task: sum(
            cached_bytes(source.tensors[name], models.recipe.expert_storage)
            for name in {*meta_checkpoint(own).reads, *block_reads(own)}
        )
        for (task, source), own in zip(models.models.experts.items(), models.experts.values(), strict=True)
    }


def _kept_bytes(held: Sequence[float]) -> int:
    """On disk: hidden states that a job can go on from, those that come after them, and those that ended a stage.

    Args:
        held: bytes of all hidden states, by stage.
    """
    most = before = 0.0
    for each in held:
        most, before = max(most, before + 2 * each), before + each
    return round(most)


def _items(items: Counter[str]) -> dict[str, int]:
    return {name: size for name, size in items.items() if size}


def _total(items: Mapping[str, int]) -> int:
    return sum(items.values())


def _chains(data: Mapping[str, TaskData], states: States, role: Role) -> Iterator[tuple[float, StageInputs]]:
    """All hidden states that pass from layer to layer: how many batches of what form, a task and model.

    Those that are fitted to are the student's and the expert's; those that drift is told by, the merged model's too.
    """
    for task, share in role.tasks.items():
        student, expert = states[task]
        fitted = share * data[task].fitted_batches
        followed = _followed(data[task]) if task in role.owned else 0
        yield fitted + 2 * followed, student
        yield fitted + followed, expert


def _followed(data: TaskData) -> float:
    """How many batches drift is told by: those that are held out, or else a few samples of one."""
    return data.held_batches or min(PROBE_SAMPLES, data.batch_size) / data.batch_size
