"""How much data a task has, and of what form, from headers, line counts and file names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from featcal_fast import files
from featcal_fast.errors import DataError
from featcal_fast.inputs.models import RecipeModels
from featcal_fast.inputs.recipe import Recipe
from featcal_fast.inputs.samples import IMAGE_SUFFIXES, SUPPORTED, TABLE_SUFFIXES, check_exists, data_files, os_errors

CHUNK_TOKENS = {"cpu": 2048, "cuda": 16384}  # of a forward pass: enough for products to run at full speed


@dataclass(frozen=True)
class TaskData:
    """The size of a task's data.

    Attributes:
        example: its largest batch, in form; values do not matter, but padding in a mask does.
        batches: how many of that batch the data amounts to.
        rows: samples.
        exact: whether this is what will be run; otherwise an upper bound.
        cut: whether it is texts that are cut at a maximal length.
        loaded: whether it is in this process's memory.
        entering: how many times as large the batches are that the model's first forward takes.
    """

    example: dict[str, Tensor]
    batches: float
    rows: int
    exact: bool
    cut: bool = False
    loaded: bool = False
    entering: float = 1.0

    @classmethod
    def of(cls, batches: Sequence[Mapping[str, Tensor]]) -> TaskData:
        """Of loaded batches."""
        sizes = [next(iter(batch.values())).numel() for batch in batches]
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        rows = [len(next(iter(batch.values()))) for batch in batches]
        batches_of_it = sum(sizes) / sizes[largest]
        return cls(dict(batches[largest]), batches_of_it, sum(rows), exact=True, loaded=True)

    @property
    def batch_size(self) -> int:
        """Samples of the example."""
        return len(next(iter(self.example.values())))

    @property
    def lazy(self) -> bool:
        """Whether it is loaded only when its turn comes."""
        return self.exact and not self.loaded

    @property
    def nbytes(self) -> float:
        """Of all batches, in host memory."""
        return self.batches * sum(value.nbytes for value in self.example.values())

    def resized(
        self, *, batch_size: int | None = None, samples: int | None = None, max_length: int | None = None
    ) -> TaskData:
        """The same task run with other settings."""
        example, batches, rows, entering = self.example, self.batches, self.rows, self.entering
        if samples is not None and samples < rows:
            batches, rows = batches * samples / rows, samples
            if batches < 1:  # less than one batch as it was
                example, batches = {name: value[:samples] for name, value in example.items()}, 1.0
        if batch_size is not None:
            size = len(next(iter(example.values())))
            example = {name: value[:batch_size] for name, value in example.items()}
            share = size / min(size, batch_size)
            batches, entering = batches * share, entering * share
        if max_length is not None and "input_ids" in example:
            example = {name: value[:, :max_length] for name, value in example.items()}
        return replace(self, example=example, batches=batches, rows=rows, entering=entering)


def describe_data(recipe: Recipe, models: RecipeModels, device: torch.device) -> dict[str, TaskData]:
    """Every task's size from headers, masks, line counts and file names; texts are taken to be `max_length` tokens.

    Raises:
        DataError: a task's data is missing or empty.
    """
    described = {}
    for task, expert in recipe.experts.items():
        samples, length = expert.samples or recipe.samples, expert.max_length or recipe.max_length
        path = local_data(recipe, expert.data)
        with os_errors(path):
            check_exists(path)
            forms, found = _forms(path, models.merged.config, length)
            unpadded = found is not None and _unpadded(path)
        if found == 0:
            raise DataError(f"{path}: found zero samples; expected at least one")
        rows = samples if found is None else min(samples, found)
        count = min(rows, recipe.batch_size or _full_batch(forms, models.merged.config, device))
        example = {name: torch.zeros((), dtype=dtype).expand(count, *shape) for name, (shape, dtype) in forms.items()}
        if "attention_mask" in example:
            example["attention_mask"] = torch.ones_like(example["attention_mask"])
            if not unpadded:
                example["attention_mask"][0, -1:] = 0  # padding, for what it takes to leave it out
        exact = found is not None and "attention_mask" not in example
        described[task] = TaskData(example, rows / count, rows, exact, "input_ids" in forms and not _is_ready(path))
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
        suffixes = [file.suffix.lower() for file in data_files(path)]
        if not TABLE_SUFFIXES.isdisjoint(suffixes):
            return images or text, None
        return images or text, sum(suffix in IMAGE_SUFFIXES for suffix in suffixes) or None
    if path.suffix.lower() == ".jsonl":
        with closing(files.open_to_read(path)) as lines:
            return text, sum(bool(line.strip()) for line in files.read_lines(lines))
    if path.suffix.lower() != ".safetensors":
        raise DataError(f"{path}: found the unknown file type {path.suffix!r}; expected {SUPPORTED}")
    try:
        with safe_open(path, framework="pt") as file:
            headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            shapes = {name: tuple(header.get_shape()) for name, header in headers.items()}
            floats = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
            dtypes = {name: floats.get(header.get_dtype(), torch.int64) for name, header in headers.items()}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: cannot be read as calibration data: {error}") from error
    if not all(len(shape) >= 2 and min(shape[1:]) > 0 for shape in shapes.values()):
        return text, None  # not to be run as it is, which whoever loads it will say
    counts = {shape[0] for shape in shapes.values()}
    return {name: (shape[1:], dtypes[name]) for name, shape in shapes.items()}, min(counts, default=0)


def _unpadded(path: Path | str) -> bool:
    """Whether ready inputs have a mask by which every token counts: the one tensor of them whose values matter here."""
    if not _is_ready(path):
        return False
    with safe_open(path, framework="pt") as file:
        return "attention_mask" in file.keys() and bool(file.get_tensor("attention_mask").all())  # noqa: SIM118


def _is_ready(path: Path | str) -> bool:
    """Whether it holds model inputs as they are."""
    return isinstance(path, Path) and path.suffix.lower() == ".safetensors"


def chunk_tokens(device: torch.device) -> int:
    """Tokens that pass a layer at a time, at most."""
    return CHUNK_TOKENS.get(device.type, CHUNK_TOKENS["cuda"])


def _full_batch(forms: Forms, config: Any, device: torch.device) -> int:
    """Samples that make a chunk of full size."""
    if "pixel_values" in forms:
        tokens = (getattr(config, "image_size", 0) // getattr(config, "patch_size", 16)) ** 2 + 1
    else:
        tokens = max(shape[0] for shape, _ in forms.values())
    return max(1, chunk_tokens(device) // tokens)


def local_data(recipe: Recipe, data: str) -> Path | str:
    """A task's data on disk, or, where nothing is there, what the recipe says."""
    local = recipe.root / Path(data).expanduser()
    with os_errors(local):
        return local if local.exists() else data
