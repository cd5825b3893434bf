"""Every task's calibration data: loaded, or described where it is loaded when its turn comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featcal_fast.data.batches import check_length, load_batches
from featcal_fast.data.checks import Limits
from featcal_fast.data.left_out import LeftOut
from featcal_fast.data.ready import check_names
from featcal_fast.data.samples import import_optional, os_errors
from featcal_fast.inputs.models import RecipeModels
from featcal_fast.inputs.recipe import MAX_LENGTH, Recipe
from featcal_fast.inputs.task_data import TaskData, chunk_tokens, describe, is_ready, local_data
from featcal_fast.inputs.tokens import merged_tokenizer, own_folders
from featcal_fast.models.configs import max_positions, turns_positions
from featcal_fast.streaming.malloc import trim_malloc

Batches = list[dict[str, Tensor]]


class LazyBatches:
    """A task's batches, loaded when they are gone through."""

    def __init__(self, load: Callable[[], Batches]) -> None:
        self._load = load

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self._load())


def load_data(
    recipe: Recipe, models: RecipeModels, device: torch.device, *, keep: bool = True
) -> tuple[dict[str, Iterable[dict[str, Tensor]]], dict[str, TaskData]]:
    """Every task's batches and their size; where samples are all alike, as images are, they load when their turn comes.

    Of those, the first sample is loaded at once, to see what it is.

    Args:
        recipe: the job.
        models: its models.
        device: where it will run.
        keep: the batches; otherwise each task's data is loaded all the same, to see that all of it can be, and is gone
            before the next one's, so that there are only sizes. Of data sets of the hub, which would be fetched, there
            is only the size that they may have at most.

    Raises:
        DataError: a task's data is not usable.
    """
    batches: dict[str, Iterable[dict[str, Tensor]]] = {}
    sizes: dict[str, TaskData] = {}
    for task, expert in recipe.experts.items():
        source = local_data(recipe, expert.data)
        limits = _limits(models, task)
        asked, length = expert.samples or recipe.samples, _length(recipe, task, limits)
        with os_errors(source):
            size = describe(source, models.merged.config, device, asked, length, recipe.batch_size, recipe.held_out)
            if is_ready(source):
                check_names(Path(source), models.merged.config)
        left_out = LeftOut(models.tokens[task], models.merged.config)
        notes: list[str] = []
        load = partial(_load, recipe, models, task, source, device, size.batch_size, limits, left_out, notes)
        if isinstance(source, str) and not keep:
            import_optional("datasets", "datasets", source)
            if size.cut:
                check_length(source, length, limits.max_positions)
        elif size.lazy and not (is_ready(source) and left_out.own.table is not None):  # else some may be left out
            (first,) = load(samples=1) if keep else load()[:1]
            example = {
                name: value[:1].clone().expand(size.batch_size, *value.shape[1:]) for name, value in first.items()
            }
            size = replace(size, example=example)
            batches[task] = LazyBatches(load)
        else:
            loaded = load()
            size = replace(
                TaskData.of(loaded, asked),
                cut=size.cut,
                loaded=keep,
                source=str(source),
                left_out=left_out.by_reason(),
            )
            batches[task] = loaded if keep else []
            del loaded
        if not keep:
            trim_malloc()
        sizes[task] = replace(size, max_length=length if size.cut else None, notes=list(dict.fromkeys(notes)))
    return batches, sizes


def _load(
    recipe: Recipe,
    models: RecipeModels,
    task: str,
    source: Path | str,
    device: torch.device,
    batch_size: int,
    limits: Limits,
    left_out: LeftOut,
    notes: list[str],
    samples: int | None = None,
) -> Batches:
    expert, config, own = recipe.experts[task], models.merged.config, models.experts[task]
    return load_batches(
        source,
        folders=list(dict.fromkeys([models.merged.path, *own_folders(own), models.base.path])),
        samples=samples or expert.samples or recipe.samples,
        max_length=_length(recipe, task, limits),
        batch_size=batch_size,
        batch_tokens=None if recipe.batch_size else chunk_tokens(device),
        seed=recipe.seed,
        held_out=recipe.held_out,
        limits=limits,
        targets=bool(getattr(config, "is_encoder_decoder", False)),
        tokenizer=merged_tokenizer(models.merged, models.base, own),
        left_out=left_out,
        notes=notes,
    )


def _length(recipe: Recipe, task: str, limits: Limits) -> int:
    """Tokens that a task's texts are cut at."""
    return recipe.experts[task].max_length or recipe.max_length or min(MAX_LENGTH, limits.max_positions or MAX_LENGTH)


def _limits(models: RecipeModels, task: str) -> Limits:
    """What the merged model takes; the expert too, where nothing tells which of its tokens are which."""
    config, own, tokens = models.merged.config, models.experts[task], models.tokens[task]
    size, least = _least("vocab_size", config), _least("vocab_size", config, own.config)
    if tokens.known or size == least:
        owner, missing = "the merged model", models.merged.path
        advice = f"ids are the merged model's: see that {missing} has the tokenizer that belongs to it, or use that"
    else:
        owner, size, missing = own.label, least, own.path if tokens.folder is None else models.merged.path
        advice = f"ids of other vocabularies are translated by tokenizers: copy the one that is missing into {missing}"
    choices = {
        "position_ids": _least("max_position_embeddings", config, own.config),
        "token_type_ids": _least("type_vocab_size", config, own.config) or size,  # GPT-2 has one table for both
    }
    positions = max_positions(config)
    if positions is not None and not turns_positions(own.config):  # but looks them up in a table of its own
        positions = min(positions, max_positions(own.config) or positions)
    return Limits(positions, size, {name: count for name, count in choices.items() if count}, owner, advice)


def _least(name: str, *configs: Any) -> int | None:
    """A size that all models have, if they say so."""
    found = [getattr(config, name, None) for config in configs]
    return min((each for each in found if isinstance(each, int) and each > 0), default=None)
