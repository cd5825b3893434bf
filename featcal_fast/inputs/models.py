"""The models that a recipe names, opened and checked by their headers, and the folder to write."""

from __future__ import annotations

from pathlib import Path

from featcal_fast import files
from featcal_fast.checkpoints import (
    CachedExpert,
    Checkpoint,
    TensorSource,
    check_output,
    find_checkpoint,
    find_expert,
    read_errors,
)
from featcal_fast.errors import RecipeError
from featcal_fast.inputs.recipe import Recipe
from featcal_fast.merging.merged import MergedCheckpoint


class RecipeModels:
    """The models that a recipe names.

    Attributes:
        side_bytes: of the files that the calibrated model takes over beside its tensors.

    Raises:
        FeatCalError: one of them is not usable.
    """

    def __init__(self, recipe: Recipe) -> None:
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
            self.merged = MergedCheckpoint(self.base, self.experts, recipe.merge.method, recipe.merge.scaling)
        with read_errors(self.merged.label, self.merged.path):
            self.side_bytes = sum(files.stat(path).st_size for path in self.merged.side_files().values())

    @property
    def folders(self) -> list[Path]:
        return list(dict.fromkeys(model.path for model in (self.merged, self.base, *self.experts.values())))

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


def output_folder(recipe: Recipe, models: RecipeModels) -> Path:
    """The folder to write.

    Raises:
        RecipeError: the recipe names none.
        OutputError: it cannot be written.
    """
    folder = recipe.folder
    if folder is None:
        raise RecipeError("out: missing; expected the folder to write, in the recipe or as --out")
    check_output(folder, models.folders, models.nbytes + models.side_bytes)
    return folder
