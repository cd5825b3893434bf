"""Calibration data of one task as batches of model inputs, checked and padded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from featcal_fast.data.checks import Limits
from featcal_fast.data.held_out import set_aside
from featcal_fast.data.images import process_images
from featcal_fast.data.kinds import FORMS
from featcal_fast.data.left_out import LeftOut
from featcal_fast.data.samples import Sample, os_errors
from featcal_fast.data.sources import read_samples
from featcal_fast.data.texts import Reader, tokenize
from featcal_fast.errors import DataError
from featcal_fast.streaming.held_out import HeldOut

Batch = dict[str, torch.Tensor]


def load_batches(
    source: str | Path,
    *,
    folders: Sequence[Path],
    samples: int = 256,
    max_length: int = 512,
    batch_size: int = 16,
    batch_tokens: int | None = None,
    seed: int = 0,
    held_out: float = 0.0,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    targets: bool = False,
    tokenizer: Path | None = None,
    left_out: LeftOut | None = None,
    notes: list[str] | None = None,
) -> list[Batch]:
    """Draw `samples` samples of `source` and make batches of model keyword arguments of them.

    Args:
        source: see `samples.read_samples`.
        folders: model folders to take the image processor or chat template from; the first that has one.
        samples: how many to draw without replacement; all of them if there are fewer. What is not drawn is
            not read, and so not checked.
        max_length: tokens that a text is truncated to, at its end. Ready inputs are never truncated.
        batch_size: rows of a batch; the last one may be smaller.
        batch_tokens: of texts, in place of `batch_size`: as many rows as have no more positions, padding included.
        seed: of the draw; the same seed and data give the same batches.
        held_out: the share that is set aside (`set_aside`).
        limits: what the model takes.
        targets: the model is an encoder-decoder: texts must be `prompt` and `completion`, or of another kind that asks
            and answers; what is asked becomes `input_ids`, the answer `labels`.
        tokenizer: the folder to take the tokenizer from; by default the first of `folders` that has one.
        left_out: says which samples the task's expert cannot be given.
        notes: a list for sentences about what of the source is ignored.

    Returns:
        Batches on the CPU. Texts: `input_ids` and `attention_mask`, `[rows, longest of the batch]`, int64,
        padded on the right, shorter sequences first; `labels` are padded with -100. Images: `pixel_values`,
        `[rows, channels, height, width]`, in the image processor's dtype. Ready inputs: every tensor of the
        file, `[rows, ...]`, in drawn order; floating ones keep their dtype, others become int64. `HeldOut` ones last.

    Raises:
        DataError: the source is missing, empty, unreadable or of an unknown kind; a sample is malformed,
            empty, not finite, longer than the model takes or outside its vocabulary; a folder's tokenizer or
            image processor cannot be loaded, or none has one; an optional library is missing; more than half of
            the samples are to be left out.
    """
    with os_errors(source):
        found = read_samples(source, samples, seed, limits.max_positions, notes, targets)
        reader = Reader([*map(Path, folders)], max_length, targets, tokenizer, left_out)
        prepared, padding = _prepared(source, found, reader, limits.max_positions)
        checked = (limits.checked(sample) for sample in prepared)
        drawn = [sample for sample in checked if left_out is None or left_out.keeps(sample)]
    if left_out is not None:
        left_out.check(source)
    # Padding is embedded too, so a pad token added beyond the model's vocabulary will not do.
    if padding is None or padding >= (limits.vocab_size or float("inf")):
        padding = 0
    aside, fitted = set_aside(drawn, held_out), _batched(drawn, batch_size, batch_tokens, padding)
    return fitted + [HeldOut(batch) for batch in _batched(aside, batch_size, batch_tokens, padding)]


def _prepared(
    source: str | Path, samples: Iterator[Sample], reader: Reader, max_positions: int | None
) -> tuple[Iterable[Sample], int | None]:
    """Samples as tensors; those of ready inputs one after the other. The token that pads them, if there is one."""
    first = next(samples)
    samples = chain([first], samples)
    if tuple(first.values) in FORMS:
        check_length(source, reader.max_length, max_positions)
        return tokenize(source, list(samples), reader)
    if "image" in first.values:
        return process_images(source, list(samples), reader.folders), None
    return samples, None


def _batched(samples: list[Sample], batch_size: int, batch_tokens: int | None, padding: int) -> list[Batch]:
    """Uses `samples` up, or both would be held twice."""
    # Neighbours of similar length need little padding. The sort is stable: equal lengths stay as drawn.
    samples.sort(key=lambda sample: len(sample.values.get("input_ids", ())))
    batches = []
    texts = all(value.ndim == 1 for sample in samples[:1] for value in sample.values.values())
    while samples:
        rows = _rows_within(samples, batch_tokens) if batch_tokens is not None and texts else batch_size
        batches.append(_collate(samples[:rows], padding))
        del samples[:rows]
    return batches


def check_length(source: str | Path, max_length: int, max_positions: int | None) -> None:
    """Raises:
    DataError: texts are to be cut at more tokens than the model takes."""
    if max_positions is not None and max_length > max_positions:
        raise DataError(
            f"{source}: found max_length {max_length}, expected at most the model's {max_positions} positions; "
            f"lower max_length to {max_positions}"
        )


def _rows_within(samples: Sequence[Sample], tokens: int) -> int:
    """How many of the first samples have no more than `tokens` positions, all as long as the longest; at least one."""
    longest = 0
    for count, sample in enumerate(samples):
        longest = max(longest, *map(len, sample.values.values()))
        if (count + 1) * longest > tokens:
            return max(1, count)
    return len(samples)


def _collate(samples: Sequence[Sample], padding: int) -> Batch:
    """Stack samples to a batch; token ids are padded with `padding`, masks with 0, both on the right."""
    batch = {}
    for name, first in samples[0].values.items():
        rows = [sample.values[name] for sample in samples]
        odd = next((sample for sample in samples if sample.values[name].shape != first.shape), None)
        if odd is None:
            batch[name] = torch.stack(rows)
        elif name in ("input_ids", "attention_mask", "labels"):
            value = {"input_ids": padding, "attention_mask": 0, "labels": -100}[name]
            batch[name] = pad_sequence(rows, batch_first=True, padding_value=value)
        else:
            found, expected = [*odd.values[name].shape], [*first.shape]
            raise DataError(
                f"{odd.where}, {name}: found shape {found}, expected {expected} as in {samples[0].where}; "
                "give samples of one size, or batches of one"
            )
    return batch
