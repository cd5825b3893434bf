"""How much data a task has, and of what form: as it was loaded, or from headers, file names and the config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featcal_fast.data.held_out import held_out_count
from featcal_fast.data.ready import LONGEST, tensor_forms
from featcal_fast.data.samples import os_errors
from featcal_fast.data.sources import check_exists, data_files, is_hub_id
from featcal_fast.inputs.recipe import Recipe
from featcal_fast.models.configs import image_shape, image_tokens
from featcal_fast.streaming.held_out import HeldOut

CHUNK_TOKENS = {"cpu": 2048, "cuda": 16384}  # of a forward pass: enough for products to run at full speed


@dataclass(frozen=True)
class TaskData:
    """The size of a task's data.

    Attributes:
        example: its largest batch, in form; values do not matter, but padding in a mask does.
        batches: how many of that batch the data amounts to.
        rows: samples.
        held_batches, held_out: of the two, what nothing is fitted to.
        asked: samples that the recipe asks for; a task may have fewer.
        exact: whether this is what will be run; otherwise an upper bound.
        cut: whether it is texts that are cut at a maximal length.
        lazy: whether it is loaded only when its turn comes.
        loaded: whether it is in this process's memory.
        entering: how many times as large the batches are that the model's first forward takes.
        source: where it is from, for errors.
        left_out: samples that were drawn and left out, by the reason.
        max_length: tokens that its texts are cut at; None where it has none.
        notes: what of the source is ignored, in sentences.
    """

    example: dict[str, Tensor]
    batches: float
    rows: int
    asked: int
    exact: bool
    held_batches: float = 0.0
    held_out: int = 0
    cut: bool = False
    lazy: bool = False
    loaded: bool = False
    entering: float = 1.0
    source: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)
    max_length: int | None = None
    notes: Sequence[str] = ()

    @classmethod
    def of(cls, batches: Sequence[Mapping[str, Tensor]], asked: int | None = None) -> TaskData:
        """Of loaded batches, of all samples that the recipe asks for unless it says otherwise."""
        firsts = [next(iter(batch.values())) for batch in batches]
        largest = max(range(len(firsts)), key=lambda i: firsts[i].numel())
        held = [first for first, batch in zip(firsts, batches, strict=True) if isinstance(batch, HeldOut)]
        (all_of_it, rows), (held_of_it, held_rows) = (
            (sum(first.numel() for first in each) / firsts[largest].numel(), sum(map(len, each)))
            for each in (firsts, held)
        )
        example = dict(batches[largest])
        return cls(example, all_of_it, rows, asked or rows, True, held_of_it, held_rows, loaded=True)

    @property
    def batch_size(self) -> int:
        """Samples of the example."""
        return len(next(iter(self.example.values())))

    @property
    def fitted_batches(self) -> float:
        """How many of the example what is fitted to amounts to."""
        return self.batches - self.held_batches

    @property
    def nbytes(self) -> float:
        """Of all batches, in host memory."""
        return self.batches * sum(value.nbytes for value in self.example.values())

    def resized(
        self, *, batch_size: int | None = None, samples: int | None = None, max_length: int | None = None
    ) -> TaskData:
        """The same task run with other settings."""
        example, batches, rows, entering = self.example, self.batches, self.rows, self.entering
        held_batches, held_out = self.held_batches, self.held_out
        if samples is not None and samples < rows:
            batches, held_batches = batches * samples / rows, held_batches * samples / rows
            held_out, rows = round(held_out * samples / rows), samples
            if batches < 1:  # less than one batch as it was
                example = {name: value[:samples] for name, value in example.items()}
                batches, held_batches = 1.0, held_batches / batches
        if batch_size is not None:
            size = len(next(iter(example.values())))
            example = {name: value[:batch_size] for name, value in example.items()}
            share = size / min(size, batch_size)
            batches, held_batches, entering = batches * share, held_batches * share, entering * share
        if max_length is not None and "input_ids" in example:
            example = {name: value[:, :max_length] for name, value in example.items()}
        return replace(
            self,
            example=example,
            batches=batches,
            rows=rows,
            held_batches=held_batches,
            held_out=held_out,
            entering=entering,
        )


def describe(
    source: Path | str,
    config: Any,
    device: torch.device,
    samples: int,
    max_length: int,
    batch_size: int | None,
    held_out: float = 0.0,
) -> TaskData:
    """A task's size without its data: texts and the rows of tables are taken to be as many and as long as they may be.

    Args:
        source: the data.
        config: the merged model's.
        device: where it will run.
        samples: that the recipe asks for.
        max_length: tokens a text is cut at.
        batch_size: samples a forward pass; by default as many as make a chunk.
        held_out: share of the samples that nothing is fitted to.

    Raises:
        DataError: it is missing, or none that can be read.
    """
    check_exists(source)
    forms, found = _forms(source, config, max_length)
    rows = samples if found is None else min(samples, found)
    held = held_out_count(held_out, rows)
    count = max(1, min(max(rows - held, held), batch_size or _full_batch(forms, config, device)))
    example = {name: torch.zeros((), dtype=dtype).expand(count, *shape) for name, (shape, dtype) in forms.items()}
    if "attention_mask" in example and not is_ready(source):  # of which the real one will be there
        example["attention_mask"] = torch.ones_like(example["attention_mask"])
        example["attention_mask"][0, -1:] = 0  # padding, for what it takes to leave it out
    lazy, cut = found is not None, "input_ids" in forms and not is_ready(source)
    sizes = rows / count, rows, samples, lazy, held / count, held
    return TaskData(example, *sizes, cut=cut, lazy=lazy, source=str(source))


Forms = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _forms(source: Path | str, config: Any, max_length: int) -> tuple[Forms, int | None]:
    """A sample's tensors; and how many samples there are, of data that need not be loaded before its turn comes.

    That is of images, and of ready inputs without a mask, by which alone one sample is not like another.
    """
    max_length = min(max_length, LONGEST)
    names = ["input_ids", "attention_mask"] + ["labels"] * bool(getattr(config, "is_encoder_decoder", False))
    text: Forms = dict.fromkeys(names, ((max_length,), torch.int64))
    shape = image_shape(config)
    images: Forms = {} if shape is None else {"pixel_values": (shape, torch.float32)}
    if isinstance(source, str):
        return images or text, None  # a data set of the hub
    if source.is_dir():
        found = data_files(source)
        if found.kind == "images":
            return images or text, len(found.files)
        return (images if found.kind == "tables" else None) or text, None
    if not is_ready(source):
        return text, None
    forms, count = tensor_forms(source)
    if not forms or not all(shape and min(shape) > 0 for shape, _ in forms.values()):
        return text, None  # not to be run as it is, which whoever loads it will say
    return forms, None if any(name.endswith("attention_mask") for name in forms) else count


def is_ready(source: Path | str) -> bool:
    """Whether it holds model inputs as they are."""
    return isinstance(source, Path) and source.suffix.lower() == ".safetensors" and not source.is_dir()


def chunk_tokens(device: torch.device) -> int:
    """Tokens that pass a layer at a time, at most."""
    return CHUNK_TOKENS.get(device.type, CHUNK_TOKENS["cuda"])


def _full_batch(forms: Forms, config: Any, device: torch.device) -> int:
    """Samples that make a chunk of full size."""
    tokens = image_tokens(config) if "pixel_values" in forms else max(shape[0] for shape, _ in forms.values())
    return max(1, chunk_tokens(device) // max(1, tokens))


def local_data(recipe: Recipe, data: str) -> Path | str:
    """A task's data on disk, or, where nothing is there, what may name a data set of the hub."""
    local = recipe.path(data)
    with os_errors(local):
        return data if is_hub_id(data) and not local.exists() else local
