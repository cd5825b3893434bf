"""What enters each stage of the models, and what that takes: the models' own first forward, without storage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from featcal_fast.errors import DataError
from featcal_fast.inputs.task_data import TaskData
from featcal_fast.planning.footprint import StageInputs
from featcal_fast.planning.models import (
    MetaCheckpoint,
    PlannedModels,
    block_bytes,
    meta_checkpoint,
    unpacking_bytes,
)
from featcal_fast.streaming.sources import CheckpointSource

States = dict[str, tuple[StageInputs, StageInputs]]  # the student's and the expert's, by task


@dataclass
class Stages:
    """Each stage of the models.

    Attributes:
        states: what enters it.
        shared: bytes of what its calls share.
        turns: what memory holds while a task's batches go through the model's own forward, by item, a task and model.
        reads: by task, how many tensors of its expert that reads; and under None, of the merged model.
    """

    states: list[States] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)
    turns: list[tuple[str, Counter[str]]] = field(default_factory=list)
    reads: dict[str | None, int] = field(default_factory=dict)


def enter_stages(planned: PlannedModels, data: Mapping[str, TaskData]) -> Stages:
    """The models' own forward to each stage's first block, as a run begins it."""
    stages = Stages()
    states, shared, turns = stages.states, stages.shared, stages.turns
    entered: dict[Any, StageInputs] = {}
    student = meta_checkpoint(planned.student)
    for source in (planned.student, *planned.experts.values()):
        meta_checkpoint(source).reads.clear()
    for stage in range(len(planned.student.structure.paths)):
        start = len(student.reads)
        first = next(layer.index for layer in planned.layers if layer.stage == stage)
        beside = unpacking_bytes(student.source, planned.student.block_tensors(first))
        states.append({})
        shared.append(0)
        for task, expert in planned.experts.items():
            own = meta_checkpoint(expert)
            before = len(own.reads)
            previous = states[-2][task] if stage else (None, None)
            shapes = shapes_of(data[task].example)
            if stage or "attention_mask" in data[task].example or shapes not in entered:  # images are all alike
                entered[shapes] = _enter(planned.student, task, data[task], stage, previous[0])
            states[-1][task] = entered[shapes], _enter(expert, task, data[task], stage, previous[1])
            shared[-1] += expert.shared.nbytes
            expert.release_stage_inputs()
            batch = data[task].entering * max(state.hidden.nbytes + state.call_bytes for state in states[-1][task])
            items = {
                "a batch": round(4 * batch),
                "calibration data of a task": round(data[task].nbytes) if data[task].lazy else 0,
                "the next block": block_bytes(planned.student, first),
            }
            # The student's embeddings are read before the expert's, both beside the stage's first block.
            held, read = loaded(student, start), unpacking_bytes(student.source, student.reads[start:])
            turns.append((task, Counter({**items, "embeddings": held, "reading": beside + read})))
            held, read = held + loaded(own, before), unpacking_bytes(own.source, own.reads[before:])
            turns.append((task, Counter({**items, "embeddings": held, "reading": beside + read})))
        shared[-1] += planned.student.shared.nbytes
        planned.student.release_stage_inputs()
    stages.reads = {task: len(meta_checkpoint(expert).reads) for task, expert in planned.experts.items()}
    stages.reads[None] = len(student.reads)
    return stages


def _enter(source: CheckpointSource, task: str, data: TaskData, stage: int, before: StageInputs | None) -> StageInputs:
    try:
        return StageInputs.of(source, data.example, stage, before)
    except DataError as error:
        raise DataError(f"task {task}, {data.source}: {error}") from error.__cause__


def loaded(source: MetaCheckpoint, start: int) -> int:
    """Bytes of the parameters that were read since `start`."""
    return sum(source.tensors[name].nbytes for name in source.reads[start:])


def shapes_of(value: Any) -> Any:
    """Shapes and dtypes of whatever holds tensors, to be compared."""
    if isinstance(value, Mapping):
        names = tuple(value)
        return names, shapes_of(list(value.values()))
    return tuple(
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else str(leaf) for leaf in tree_leaves(value)
    )
