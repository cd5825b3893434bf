"""Samples that are set aside before batches are made: which these are, and that nothing is fitted to any of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from featcal_fast.data.samples import Sample

LEAST = 3  # samples of a task, of which one can be spared


def held_out_count(share: float, samples: int) -> int:
    """How many of a task's samples a share of them is."""
    return round(share * samples) if samples >= LEAST else 0


def set_aside(samples: list[Sample], share: float) -> list[Sample]:
    """Take a share of the samples out of the list: the last ones, but for those that are there once more.

    A sample with the same content as one that is fitted to would be no judge of the fit: it stays in the list, so that
    fewer may be taken than were to be, or none.
    """
    count = held_out_count(share, len(samples))
    if not count:
        return []
    last = samples[-count:]
    del samples[-count:]
    fitted = {_digest(sample) for sample in samples}
    aside: list[Sample] = []
    for sample in last:
        (samples if _digest(sample) in fitted else aside).append(sample)
    return aside


def content(values: Mapping[str, Tensor]) -> Iterator[Any]:
    """All that tells tensors apart, to be hashed: names, dtypes, shapes and bytes."""
    for name, value in sorted(values.items()):
        yield f"{name} {value.dtype} {tuple(value.shape)}".encode()
        yield value.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _digest(sample: Sample) -> bytes:
    sha = hashlib.sha256()
    for part in content(sample.values):
        sha.update(part)
    return sha.digest()
