"""Calibration data of one task as batches of model inputs, checked and padded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from featcal_fast.checkpoints import is_finite
from featcal_fast.errors import DataError
from featcal_fast.inputs.preprocess import load_image_processor, load_tokenizer, process_image, tokenize
from featcal_fast.inputs.samples import TEXT_KINDS, Sample, os_errors, read_samples

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
    max_positions: int | None = None,
    vocab_size: int | None = None,
    targets: bool = False,
) -> list[Batch]:
    """Draw `samples` samples of `source` and make batches of model keyword arguments of them.

    Args:
        source: see `samples.read_samples`.
        folders: model folders to take the tokenizer or image processor from; the first that has one.
        samples: how many to draw without replacement; all of them if there are fewer. What is not drawn is
            not read, and so not checked.
        max_length: tokens that a text is truncated to, at its end. Ready inputs are never truncated.
        batch_size: rows of a batch; the last one may be smaller.
        batch_tokens: of texts, in place of `batch_size`: as many rows as have no more positions, padding included.
        seed: of the draw; the same seed and data give the same batches.
        max_positions: the longest sequence that the model takes, if it has a limit.
        vocab_size: rows of the model's embedding, if known.
        targets: the model is an encoder-decoder: texts must be `prompt` and `completion`, the prompt becomes
            `input_ids`, the completion `labels`.

    Returns:
        Batches on the CPU. Texts: `input_ids` and `attention_mask`, `[rows, longest of the batch]`, int64,
        padded on the right, shorter sequences first; `labels` are padded with -100. Images: `pixel_values`,
        `[rows, channels, height, width]`, in the image processor's dtype. Ready inputs: every tensor of the
        file, `[rows, ...]`, rows in drawn order; floating tensors keep their dtype, all others become int64.

    Raises:
        DataError: the source is missing, empty, unreadable or of an unknown kind; a sample is malformed,
            empty, not finite, longer than the model takes or outside its vocabulary; a folder's tokenizer or
            image processor cannot be loaded, or none has one; an optional library is missing.
    """
    with os_errors(source):
        drawn = read_samples(source, samples, seed)
    padding = 0
    if tuple(drawn[0].values) in TEXT_KINDS:
        _check_length(source, max_length, max_positions)
        tokenizer = load_tokenizer(source, folders, chat="messages" in drawn[0].values)
        drawn = [tokenize(sample, tokenizer, max_length, targets) for sample in drawn]
        # Padding is embedded too, so a pad token added beyond the model's vocabulary will not do.
        if tokenizer.pad_token_id is not None and tokenizer.pad_token_id < (vocab_size or float("inf")):
            padding = tokenizer.pad_token_id
    elif "image" in drawn[0].values:
        processor = load_image_processor(source, folders)
        drawn = [process_image(sample, processor) for sample in drawn]
    for sample in drawn:
        _check(sample, max_positions, vocab_size)
    return _batched(drawn, batch_size, batch_tokens, padding)


def _batched(samples: list[Sample], batch_size: int, batch_tokens: int | None, padding: int) -> list[Batch]:
    """Uses `samples` up, or both would be held twice."""
    # Neighbours of similar length need little padding. The sort is stable: equal lengths stay as drawn.
    samples.sort(key=lambda sample: len(sample.values.get("input_ids", ())))
    batches = []
    texts = all(value.ndim == 1 for value in samples[0].values.values())
    while samples:
        rows = _rows_within(samples, batch_tokens) if batch_tokens is not None and texts else batch_size
        batches.append(_collate(samples[:rows], padding))
        del samples[:rows]
    return batches


def _check_length(source: str | Path, max_length: int, max_positions: int | None) -> None:
    if max_positions is not None and max_length > max_positions:
        raise DataError(
            f"{source}: found max_length {max_length}, expected at most the model's {max_positions} positions; "
            f"lower max_length to {max_positions}"
        )


def _check(sample: Sample, max_positions: int | None, vocab_size: int | None) -> None:
    for name, value in sample.values.items():
        where = f"{sample.where}, {name}"
        if name.endswith("input_ids"):
            _check_token_ids(value, where, max_positions, vocab_size)
        elif name == "labels" and value.ndim == 1 and not value.is_floating_point():
            if not (value != -100).any():
                raise DataError(f"{where}: found no target, expected at least one token; remove this sample")
            _check_token_ids(value[value != -100], where, max_positions, vocab_size)
        elif name.endswith("attention_mask"):
            ids = sample.values.get(name.replace("attention_mask", "input_ids"), value)
            if value.shape != ids.shape:
                raise DataError(f"{where}: found shape {[*value.shape]}, expected {[*ids.shape]} as the token ids")
            if not value.any():
                raise DataError(f"{where}: found only zeros, expected 1 for at least one token; remove this sample")
            if not ((value == 0) | (value == 1)).all():
                raise DataError(f"{where}: found other values than 0 and 1; expected 1 for tokens, 0 for padding")
        elif value.is_floating_point() and not is_finite(value):
            raise DataError(f"{where}: found values that are not finite; remove this sample")


def _check_token_ids(ids: torch.Tensor, where: str, max_positions: int | None, vocab_size: int | None) -> None:
    if ids.is_floating_point() or ids.ndim != 1 or not len(ids):
        raise DataError(f"{where}: found {ids.dtype} of shape {[*ids.shape]}, expected one or more integers")
    if max_positions is not None and len(ids) > max_positions:
        raise DataError(f"{where}: found {len(ids)} tokens, expected at most {max_positions}; shorten the samples")
    for token in map(int, ids.aminmax()):
        if token < 0 or (vocab_size is not None and token >= vocab_size):
            limit = "0 or more" if vocab_size is None else f"0 to {vocab_size - 1} (vocabulary of {vocab_size})"
            raise DataError(f"{where}: found token id {token}, expected {limit}; use the model's own tokenizer")


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
