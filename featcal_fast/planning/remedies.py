"""Why a plan does not fit, and the one change with which it would."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from featcal_fast import files
from featcal_fast.checkpoints import held_bytes, nearest_existing, states_path, work_path
from featcal_fast.inputs.recipe import MAX_LENGTH, Recipe
from featcal_fast.inputs.task_data import TaskData
from featcal_fast.planning.plan import Plan, format_bytes
from featcal_fast.streaming.hidden_states import Offload
from featcal_fast.streaming.streams import SCRATCH, TO_RESUME

SMALLEST = {"batch_size": 1, "samples": 16, "max_length": 32}  # that is named
Measure = Callable[[Mapping[str, TaskData]], Plan]


def problems(plan: Plan, data: Mapping[str, TaskData], recipe: Recipe, offload: Offload, measure: Measure) -> list[str]:
    """Each reason why a plan does not fit, with what would.

    Args:
        plan: with budgets.
        data: the size of each task's, as planned.
        recipe: the job.
        offload: where hidden states wait between layers.
        measure: plans the job for data of another size.
    """
    found = []
    for kind, flag in (("host", "--host-memory"), ("device", "--device-memory")):
        need, budget = _need(plan, kind), getattr(plan, f"{kind}_budget")
        if need > budget:
            found.append(
                f"{kind} memory: {_whose(plan, kind)} {format_bytes(need)}, but {format_bytes(budget)} may be used "
                f"({flag}); {_widest(plan, kind)}{_remedy(kind, budget, plan, data, recipe, measure)}"
            )
    return found + _disk_problems(plan, recipe, offload)


def _need(plan: Plan, kind: str) -> int:
    """Bytes of host memory that a machine's ranks need together; of device memory that one does."""
    return plan.machine_bytes if kind == "host" else plan.device_bytes


def _whose(plan: Plan, kind: str) -> str:
    """Who needs it."""
    if not plan.ranks:
        return "the job needs"
    most = max(plan.ranks, key=lambda each: each.device_bytes)
    rank = f"rank {plan.ranks.index(most)} ({', '.join(most.samples) or 'no samples'}) needs"
    return rank if kind == "device" else f"the {plan.local_ranks} ranks of a machine need"


def _widest(plan: Plan, kind: str) -> str:
    """What more ranks do not make less: where each computes, it holds a layer's systems whole, and a task's moments."""
    if not plan.ranks or kind != ("device" if plan.device_items else "host"):
        return ""
    layer = max(plan.layers, key=lambda each: each.system)
    width = max((group.in_features for group in layer.layout.groups), default=0)
    return (
        f"of it each rank holds layer {layer.index}'s systems whole, {format_bytes(layer.system)} (the widest is "
        f"{width:,} x {width:,}), and {format_bytes(layer.scratch)} of moments or more, which no number of ranks makes "
        "less; "
    )


def _disk_problems(plan: Plan, recipe: Recipe, offload: Offload) -> list[str]:
    """Where a disk lacks room for what a job writes there."""
    places = [("scratch", offload, plan.disk[SCRATCH])] if isinstance(offload, Path) else []
    if (out := recipe.folder) is not None:
        places = [(what, folder, size - held_bytes(states_path(out, folder))) for what, folder, size in places]
        kept = plan.disk.get(TO_RESUME, 0) - held_bytes(work_path(out))
        places.append(("out", nearest_existing(out), plan.disk["calibrated model"] + kept))
    disks: dict[int, list[tuple[str, Path, int]]] = {}
    for place in places:
        disks.setdefault(files.stat(place[1]).st_dev, []).append(place)
    found = []
    for same in disks.values():
        what, folder, _ = same[0]
        need, free = sum(size for *_, size in same), files.free_bytes(folder)
        if need > free:
            remedy = "choose a folder on another"
            if need - plan.disk.get(TO_RESUME, 0) <= free:
                remedy += ", or --no-checkpoint, with which an interrupted job starts over"
            found.append(
                f"{what}: the disk of {folder} needs {format_bytes(need)}, but {format_bytes(free)} are free; {remedy}"
            )
    return found


def _remedy(kind: str, budget: int, plan: Plan, data: Mapping[str, TaskData], recipe: Recipe, measure: Measure) -> str:
    """The flag, or else the first single key of the recipe and its largest halving, with which the job fits."""
    if kind == "host":
        over = plan.machine_bytes - budget
        if over <= plan.machine.get(SCRATCH, 0):
            return "--scratch DIR, a folder on a fast disk for hidden states, would fit"
        if over <= plan.machine.get("experts kept", 0):
            return "expert_storage: disk would fit"
    every = list(recipe.experts.values())
    # What only one task has for itself is not for the recipe's key to change.
    starts = {"batch_size": recipe.batch_size or 0}
    starts["samples"] = 0 if any(each.samples for each in every) else recipe.samples
    texts = all(each.cut for each in data.values()) and not any(each.max_length for each in every)
    starts["max_length"] = (recipe.max_length or MAX_LENGTH) if texts else 0
    smallest = None
    for key, start in starts.items():
        value = start // 2
        while value >= SMALLEST[key]:
            smaller = {task: each.resized(**{key: value}) for task, each in data.items()}
            need = _need(measure(smaller), kind)
            if need <= budget:
                return f"{key}: {value} would fit"
            smallest = need if smallest is None else min(smallest, need)
            value //= 2
    if smallest is None:
        return "it takes a larger machine"
    keys = " or ".join(key for key, start in starts.items() if start)
    return f"no smaller {keys} alone would fit (the least is {format_bytes(smallest)}): it takes a larger machine"
