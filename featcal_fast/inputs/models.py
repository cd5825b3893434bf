"""The models that a recipe names, opened and checked by their headers, and the folder to write."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch

from featcal_fast import files
from featcal_fast.checkpoints import (
    CachedExpert,
    Checkpoint,
    LoraExpert,
    TensorSource,
    check_output,
    check_scratch,
    find_checkpoint,
    find_expert,
    read_errors,
    unwrapped,
)
from featcal_fast.errors import RecipeError
from featcal_fast.inputs.paths import checked_path
from featcal_fast.inputs.recipe import Recipe
from featcal_fast.inputs.tokens import own_tokens
from featcal_fast.merging.merged import MergedCheckpoint
from featcal_fast.models.configs import token_keys
from featcal_fast.models.meta import check_supported
from featcal_fast.models.tokens import OwnTokens
from featcal_fast.streaming.hidden_states import HOST


class RecipeModels:
    """The models that a recipe names.

    Args:
        recipe: the job.
        device: where models are merged on the fly.

    Attributes:
        side_bytes: of the files that the calibrated model takes over beside its tensors.

    Raises:
        FeatCalError: one of them is not usable.
    """

    def __init__(self, recipe: Recipe, device: torch.device = HOST) -> None:
        self.base = find_checkpoint(recipe.base_model, recipe.root, "base model")
        self.experts: dict[str, TensorSource] = {
            task: find_expert(expert.model, recipe.root, f"expert {task}", self.base)
            for task, expert in recipe.experts.items()
        }
        if recipe.expert_storage != "disk":
            self.experts = {task: CachedExpert(each, recipe.expert_storage) for task, each in self.experts.items()}
        self.merged: Checkpoint | MergedCheckpoint
        if recipe.merge is None:
            assert recipe.merged_model is not None
            self.merged = find_checkpoint(recipe.merged_model, recipe.root, "merged model")
        else:
            tokens = own_tokens(self.base, self.base, self.experts)
            method, options = recipe.merge.method, recipe.merge.options(self.experts)
            self.merged = MergedCheckpoint(self.base, self.experts, method, options, tokens, device)
        with read_errors(self.merged.label, self.merged.path):
            self.side_bytes = sum(files.stat(path).st_size for path in self.merged.side_files().values())

    @cached_property
    def tokens(self) -> Mapping[str, OwnTokens]:
        """What the merged model's token ids are to the experts; nothing is compared where it takes none.

        Raises:
            DataError: a tokenizer that has to be compared cannot be read.
        """
        if isinstance(self.merged, MergedCheckpoint):
            return self.merged.tokens
        if not getattr(self.merged.config, "vocab_size", None):  # of images
            return {task: OwnTokens(each.label) for task, each in self.experts.items()}
        return own_tokens(self.merged, self.base, self.experts)

    @cached_property
    def base_tokens(self) -> OwnTokens:
        """What they are to the base model, which is given none: looked at only where its config names some that count.

        Raises:
            DataError: as `tokens`.
        """
        if isinstance(self.merged, MergedCheckpoint) or not token_keys(self.merged.config):
            return OwnTokens(self.base.label)
        return own_tokens(self.merged, self.base, {"base": self.base})["base"]

    @property
    def nbytes(self) -> int:
        """Of the calibrated model's tensors."""
        return sum(info.nbytes for info in self.merged.tensors.values())

    @property
    def bytes_read(self) -> dict[str, int]:
        """Of tensors, so far, by model."""
        return {source.label: source.bytes_read for source in self.files}

    @property
    def files(self) -> list[TensorSource]:
        """The models that are read from files of their own."""
        own = [] if isinstance(self.merged, MergedCheckpoint) else [self.merged]
        return [*own, self.base, *self.experts.values()]

    @property
    def storage_error(self) -> dict[str, float]:
        """Relative error of what compressed storage gives back, by task."""
        return {task: each.error for task, each in self.experts.items() if isinstance(each, CachedExpert)}


def models_to_calibrate(recipe: Recipe, device: torch.device) -> RecipeModels:
    """The models that a recipe names, of which the merged one is of a family that can be calibrated.

    Args:
        recipe: the job.
        device: where to merge on the fly.

    Raises:
        UnsupportedModelError: it is of none, which is told before anything is blamed for what it does not take.
        FeatCalError: one of them is not usable.
    """
    models = RecipeModels(recipe, device)
    check_supported(models.merged)
    return models


def input_folders(recipe: Recipe, models: RecipeModels) -> dict[str, Path]:
    """Everything that is read and never written to, by what it is: the folders of a recipe's models and data."""
    inputs = {model.label: model.path for model in (models.merged, models.base, *models.experts.values())}
    adapted = [each for each in map(unwrapped, models.experts.values()) if isinstance(each, LoraExpert)]
    inputs |= {expert.base.label: expert.base.path for expert in adapted}
    return inputs | {f"data of task {task}": recipe.path(expert.data) for task, expert in recipe.experts.items()}


def check_folders(
    recipe: Recipe, models: RecipeModels, scratch: str | Path | None = None, *, may_be_taken: bool = False
) -> None:
    """Refuse folders to write before any work is done: the recipe's output, if it names one, and that of hidden states.

    Args:
        recipe: the job.
        models: its models.
        scratch: the folder for hidden states.
        may_be_taken: whether the output may hold something, for a job that is only planned.

    Raises:
        FeatCalError: one of them cannot be written, or lies where nothing may be.
    """
    inputs = input_folders(recipe, models)
    if recipe.folder is not None:
        check_output(recipe.folder, inputs, models.nbytes + models.side_bytes, may_be_taken=may_be_taken)
    if scratch is not None:
        check_scratch(checked_path("scratch", scratch), inputs, recipe.folder)


def output_folder(recipe: Recipe, models: RecipeModels, scratch: str | Path | None = None) -> Path:
    """The folder to write.

    Raises:
        RecipeError: the recipe names none.
        OutputError: it, or that of hidden states, cannot be written.
    """
    if recipe.folder is None:
        raise RecipeError("out: missing; expected the folder to write, in the recipe or as --out")
    check_folders(recipe, models, scratch)
    return recipe.folder
