"""Every weight of every model read once before anything is computed, to see that it is a number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from featcal_fast.checkpoints import LoraExpert, TensorSource, unwrapped
from featcal_fast.inputs.models import RecipeModels
from featcal_fast.inputs.recipe import Recipe
from featcal_fast.reporting.progress import Progress


def scan(recipe: Recipe, models: RecipeModels, progress: Progress) -> int:
    """Read all tensors, one at a time, also those that will only be copied.

    Args:
        recipe: the job.
        models: its models. Their files are opened anew: what a run reads is counted, and kept in memory, without this.
        progress: told after each tensor.

    Returns:
        Bytes that were read.

    Raises:
        CheckpointError: one is not finite; names model, file and tensor, and how many of its values.
    """
    experts = {task: replace(each, model=_found(models.experts[task])) for task, each in recipe.experts.items()}
    merged = None if recipe.merge else str(models.merged.path)
    again = replace(
        recipe, base_model=str(models.base.path), merged_model=merged, experts=experts, expert_storage="disk"
    )
    own = RecipeModels(again)
    total, done = scanned_bytes(own), 0
    for source, name in _tensors(own):
        source.read([name])
        done += source.stored_bytes([name])
        progress.scanned(source.label, done, total)
    return done


def _found(source: TensorSource) -> str:
    """An expert, as a recipe names it once it is known where it lies."""
    own = unwrapped(source)
    return f"{own.base.path}+{own.path}" if isinstance(own, LoraExpert) else str(own.path)


def scanned_bytes(models: RecipeModels) -> int:
    """What a scan of these models reads from files."""
    return sum(source.stored_bytes([name]) for source, name in _tensors(models))


def _tensors(models: RecipeModels) -> Iterator[tuple[TensorSource, str]]:
    """What there is to read. Of an adapter of the base model that is what it changes: the rest is the base's own."""
    for source in map(unwrapped, models.files):
        if isinstance(source, LoraExpert) and source.adapts(models.base):
            names: Iterable[str] = source.changed()
        else:
            names = source.tensors
        for name in sorted(names):
            yield source, name
