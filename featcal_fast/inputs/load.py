"""Every task's calibration data: loaded, or described where it is loaded when its turn comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from featcal_fast.inputs.batches import load_batches
from featcal_fast.inputs.models import RecipeModels
from featcal_fast.inputs.recipe import Recipe
from featcal_fast.inputs.task_data import TaskData, chunk_tokens, describe_data, local_data

Batches = list[dict[str, Tensor]]


class LazyBatches:
    """A task's batches, loaded when they are gone through."""

    def __init__(self, load: Callable[[], Batches]) -> None:
        self._load = load

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self._load())


def load_data(
    recipe: Recipe, models: RecipeModels, device: torch.device, *, tables: bool = True
) -> tuple[dict[str, Iterable[dict[str, Tensor]]], dict[str, TaskData]]:
    """Every task's batches and their size; where headers tell the size, as of images, they load when their turn comes.

    Of those, the first sample is loaded at once, to see that it can be.

    Args:
        recipe: the job.
        models: its models.
        device: where it will run.
        tables: load data sets too; otherwise they have no batches, and the size that they may have at most.

    Raises:
        DataError: a task's data is not usable.
    """
    batches: dict[str, Iterable[dict[str, Tensor]]] = {}
    sizes = describe_data(recipe, models, device)
    for task, expert in recipe.experts.items():
        load = partial(_load, recipe, models, task, device, sizes[task].batch_size)
        if sizes[task].lazy:
            load(samples=1)
            batches[task] = LazyBatches(load)
        elif tables or Path(local_data(recipe, expert.data)).is_file():
            batches[task] = loaded = load()
            sizes[task] = replace(TaskData.of(loaded), cut=sizes[task].cut)
    return batches, sizes


def _load(
    recipe: Recipe, models: RecipeModels, task: str, device: torch.device, batch_size: int, samples: int | None = None
) -> Batches:
    expert, config, own = recipe.experts[task], models.merged.config, models.experts[task]
    vocabularies = [c.vocab_size for c in (config, own.config) if getattr(c, "vocab_size", None)]
    folders = [models.merged.path, own.path, models.base.path]
    return load_batches(
        local_data(recipe, expert.data),
        folders=list(dict.fromkeys(folders)),
        samples=samples or expert.samples or recipe.samples,
        max_length=expert.max_length or recipe.max_length,
        batch_size=batch_size,
        batch_tokens=None if recipe.batch_size else chunk_tokens(device),
        seed=recipe.seed,
        max_positions=getattr(config, "max_position_embeddings", None),
        vocab_size=min(vocabularies, default=None),
        targets=bool(getattr(config, "is_encoder_decoder", False)),
    )
