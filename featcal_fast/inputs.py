"""What a recipe names: its models, opened and checked by their headers, and its data, loaded or only described."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from featcal_fast.checkpoints import (
    Checkpoint,
    HostedExpert,
    TensorSource,
    check_output,
    find_checkpoint,
    find_expert,
)
from featcal_fast.data import IMAGE_SUFFIXES, load_batches
from featcal_fast.errors import DataError, RecipeError
from featcal_fast.merge import MergedCheckpoint
from featcal_fast.recipe import Recipe

Batches = list[dict[str, Tensor]]


class Models:
    """The models that a recipe names.

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
            self.experts = {task: HostedExpert(each, recipe.expert_storage) for task, each in self.experts.items()}
        self.merged: Checkpoint | MergedCheckpoint
        if recipe.merge is None:
            assert recipe.merged_model is not None
            self.merged = find_checkpoint(recipe.merged_model, recipe.root, "merged model")
        else:
            self.merged = MergedCheckpoint(self.base, self.experts, recipe.merge.method, recipe.merge.scaling)

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
        return {task: each.error for task, each in self.experts.items() if isinstance(each, HostedExpert)}


def output_folder(recipe: Recipe, models: Models) -> Path:
    """The folder to write.

    Raises:
        RecipeError: the recipe names none.
        OutputError: it cannot be written.
    """
    if recipe.out is None:
        raise RecipeError("out: missing; expected the folder to write, in the recipe or as --out")
    folder = recipe.root / Path(recipe.out).expanduser()
    check_output(folder, models.folders, models.nbytes)
    return folder


def load_data(recipe: Recipe, models: Models) -> dict[str, Batches]:
    """Every task's batches.

    Raises:
        DataError: a task's data is not usable.
    """
    batches = {}
    for task, expert in recipe.experts.items():
        config, own = models.merged.config, models.experts[task]
        vocabularies = [c.vocab_size for c in (config, own.config) if getattr(c, "vocab_size", None)]
        folders = [models.merged.path, own.path, models.base.path]
        batches[task] = load_batches(
            _local(recipe, expert.data),
            folders=list(dict.fromkeys(folders)),
            samples=expert.samples or recipe.samples,
            max_length=expert.max_length or recipe.max_length,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            max_positions=getattr(config, "max_position_embeddings", None),
            vocab_size=min(vocabularies, default=None),
            targets=bool(getattr(config, "is_encoder_decoder", False)),
        )
    return batches


@dataclass(frozen=True)
class TaskData:
    """The size of a task's data.

    Attributes:
        example: its largest batch, in form; values do not matter, but padding in a mask does.
        batches: how many of that batch the data amounts to.
        rows: samples.
        exact: whether this is what will be run; otherwise an upper bound.
        loaded: whether it is in this process's memory.
    """

    example: dict[str, Tensor]
    batches: float
    rows: int
    exact: bool
    loaded: bool = False

    @classmethod
    def of(cls, batches: Sequence[Mapping[str, Tensor]]) -> TaskData:
        """Of loaded batches."""
        sizes = [next(iter(batch.values())).numel() for batch in batches]
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        rows = sum(len(next(iter(batch.values()))) for batch in batches)
        return cls(dict(batches[largest]), sum(sizes) / sizes[largest], rows, exact=True, loaded=True)

    @property
    def nbytes(self) -> float:
        """Of all batches, in host memory."""
        return self.batches * sum(value.nbytes for value in self.example.values())

    def resized(
        self, *, batch_size: int | None = None, samples: int | None = None, max_length: int | None = None
    ) -> TaskData:
        """The same task run with other settings."""
        example, batches, rows = self.example, self.batches, self.rows
        if samples is not None and samples < rows:
            batches, rows = batches * samples / rows, samples
        if batch_size is not None:
            count = len(next(iter(example.values())))
            example = {name: value[:batch_size] for name, value in example.items()}
            batches *= count / len(next(iter(example.values())))
        if max_length is not None and "input_ids" in example:
            example = {name: value[:, :max_length] for name, value in example.items()}
        return replace(self, example=example, batches=batches, rows=rows)


def describe_data(recipe: Recipe, models: Models) -> dict[str, TaskData]:
    """Every task's size from headers, line counts and file names; texts are taken to be `max_length` tokens long.

    Raises:
        DataError: a task's data is missing or empty.
    """
    described = {}
    for task, expert in recipe.experts.items():
        samples, length = expert.samples or recipe.samples, expert.max_length or recipe.max_length
        path = _local(recipe, expert.data)
        forms, found = _forms(path, models.merged.config, length)
        if found == 0:
            raise DataError(f"{path}: found zero samples; expected at least one")
        rows = samples if found is None else min(samples, found)
        count = min(rows, recipe.batch_size)
        example = {name: torch.zeros(count, *shape, dtype=dtype) for name, (shape, dtype) in forms.items()}
        if "attention_mask" in example:
            example["attention_mask"].fill_(1)[0, -1:] = 0  # padding, for what it takes to leave it out
        exact = found is not None and "attention_mask" not in example
        described[task] = TaskData(example, rows / count, rows, exact)
    return described


Forms = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _forms(path: Path | str, config: Any, max_length: int) -> tuple[Forms, int | None]:
    """A sample's tensors, and how many samples there are, where that can be had cheaply."""
    names = ["input_ids", "attention_mask"] + ["labels"] * bool(getattr(config, "is_encoder_decoder", False))
    text: Forms = dict.fromkeys(names, ((max_length,), torch.int64))
    side = getattr(config, "image_size", None)
    images: Forms = {} if side is None else {"pixel_values": ((3, side, side), torch.float32)}
    if isinstance(path, str):
        return images or text, None  # a data set of the hub
    if path.is_dir():
        count = sum(file.suffix.lower() in IMAGE_SUFFIXES for file in path.rglob("*"))
        return images or text, count or None
    if path.suffix.lower() == ".jsonl":
        with path.open("rb") as file:
            return text, sum(bool(line.strip()) for line in file)
    try:
        with safe_open(path, framework="pt") as file:
            headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            shapes = {name: tuple(header.get_shape()) for name, header in headers.items()}
            floats = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
            dtypes = {name: floats.get(header.get_dtype(), torch.int64) for name, header in headers.items()}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: cannot be read as calibration data: {error}") from error
    counts = {shape[0] if shape else 0 for shape in shapes.values()}
    return {name: (shape[1:], dtypes[name]) for name, shape in shapes.items()}, min(counts, default=0)


def _local(recipe: Recipe, data: str) -> Path | str:
    """A task's data on disk, or, where nothing is there, what the recipe says."""
    local = recipe.root / Path(data).expanduser()
    if local.exists():
        return local
    return data
