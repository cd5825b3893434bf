"""What it takes to see what models make of held-out samples in the end: their heads' own forward, without storage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from featcal_fast.forward.outputs import NoOutputs, Outputs
from featcal_fast.inputs.task_data import TaskData
from featcal_fast.models.tokens import vocabulary_size
from featcal_fast.planning.meter import META
from featcal_fast.planning.models import PlannedModels, meta_checkpoint
from featcal_fast.planning.stages import States, loaded
from featcal_fast.streaming.outcome import LOGITS, PIECE
from featcal_fast.streaming.sources import CheckpointSource


@dataclass
class Heads:
    """What comparing outputs takes.

    Attributes:
        nbytes: of memory, by task with held-out samples.
        student: the tasks of these for which the merged model's own head is read.
    """

    nbytes: dict[str, int] = field(default_factory=dict)
    student: set[str] = field(default_factory=set)


def find_heads(planned: PlannedModels, data: Mapping[str, TaskData], states: States) -> Heads:
    """What comparing outputs takes: weights of the student and an expert, and what they give.

    Args:
        planned: the models.
        data: each task's size.
        states: what enters the last stage.
    """
    before, found = len(meta_checkpoint(planned.student).reads), Heads()
    for task, expert in planned.experts.items():
        if not data[task].held_out:
            continue
        start, final = len(meta_checkpoint(expert).reads), states[task][1].hidden
        made = _outputs(expert, data[task], final)
        if made is None or not _by_classes(expert, made, final):
            _outputs(planned.student, data[task], final)
            found.student.add(task)
        weights = loaded(meta_checkpoint(planned.student), before) + loaded(meta_checkpoint(expert), start)
        found.nbytes[task] = weights + _given_bytes(made, final, vocabulary_size(expert.structure.config))
        expert.release_stage_inputs()
    planned.student.release_stage_inputs()
    return found


def _outputs(source: CheckpointSource, data: TaskData, final: Tensor) -> Outputs | None:
    """What a model would give for a batch; None where it cannot be told beforehand, or gives nothing."""
    batch = {name: value for name, value in data.example.items() if not name.endswith("attention_mask")}
    if "input_ids" in batch:  # models look into masks, which have no values here, but into none as attention has it
        rows, tokens = batch["input_ids"].shape
        batch["attention_mask"] = torch.empty((rows, 1, tokens, tokens), dtype=torch.bool, device=META)
    with _on_meta(source):
        try:
            return source.outputs(batch, final)
        except NoOutputs:
            return None


def _by_classes(expert: CheckpointSource, made: Outputs, final: Tensor) -> bool:
    """Whether an expert is a classifier, whose own head reads the features of all three models."""
    of_tokens = made.values.ndim == 3 and made.values.shape[:2] == final.shape[:2]
    classes, config = made.values.shape[-1], expert.structure.config
    language = of_tokens and classes == vocabulary_size(config)
    regression = getattr(expert.structure.model.config, "problem_type", None) == "regression"
    return made.name == "logits" and classes > 1 and not language and not regression


@contextmanager
def _on_meta(source: CheckpointSource) -> Iterator[None]:
    """A model whose weights have no storage even once they are read: a head is too large for that."""
    before, source.device = source.device, META
    try:
        yield
    finally:
        source.device = before


def _given_bytes(made: Outputs | None, final: Tensor, vocabulary: int | None) -> int:
    """Final hidden states and outputs of three models for some samples, and parts of these while they are compared."""
    rows, tokens = final.shape[:2]
    samples = max(1, min(rows, LOGITS // vocabulary // tokens)) if vocabulary else rows
    features = samples * final[0].numel()
    hidden = 3 * features * final.element_size()
    # In float64, of three models, two differences and a square.
    compared = 6 * 8 * min(features, max(PIECE, final[0].numel()))
    if made is None:
        return hidden + compared
    part = made.values[:samples]
    piece = min(part.numel(), max(PIECE, made.values.shape[-1]))
    # Three in float32, where they are not already, and two logarithms, the expert's probabilities and a product.
    copies = 3 * 4 * piece if part.element_size() < 4 else 0
    return hidden + max(compared, 3 * part.nbytes + copies + 4 * 4 * piece)
