"""Experts that learned nothing: weights that begin as the base model's do, found without reading them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing

from featcal_fast import files
from featcal_fast.checkpoints import Checkpoint, LoraExpert, TensorSource, canonical, read_errors, unwrapped
from featcal_fast.checkpoints.shards import Shards

BEGINNING = 4096  # bytes of a tensor; training changes some value among as many, in one tensor at least


def unchanged(experts: Mapping[str, TensorSource], base: Checkpoint) -> list[str]:
    """Tasks whose experts look like the base model; those in its very folder are told by their path, and not here.

    Of each tensor only the beginning is compared, and nothing after the first that differs.

    Raises:
        CheckpointError: a file cannot be read.
    """
    return [task for task, each in experts.items() if each.path.resolve() != base.path.resolve() and _alike(each, base)]


def _alike(source: TensorSource, base: Checkpoint) -> bool:
    expert = unwrapped(source)
    if isinstance(expert, LoraExpert):
        if not expert.adapts(base) and not _alike(expert.base, base):
            return False  # it adapts a model that has learned something
        if expert.rows or any(each.magnitude for each in expert.low_rank.values()):
            return False  # what these were before is not told by zeros
        changes = [each.b for each in expert.low_rank.values() if each.scale != 0]
        changes += [name for name, scale in expert.biases.values() if scale != 0]
        zero = all(not any(_beginning(expert.shards, name)) for name in changes)
        return zero and _same(expert.shards, base.shards, ((new, name) for name, new in expert.replaced.items()))
    if not isinstance(expert, Checkpoint) or type(expert) is not type(base):
        return False
    stored = {canonical(name): name for name in expert.shards.headers}  # of quantised weights, all their parts
    pairs = [(stored[name], own) for own in base.shards.headers if (name := canonical(own)) in stored]
    return bool(pairs) and _same(expert.shards, base.shards, pairs)


def _same(shards: Shards, base: Shards, names: Iterable[tuple[str, str]]) -> bool:
    """Whether pairs of tensors begin alike."""
    for name, own in names:
        a, b = shards.headers[name], base.headers[own]
        if (a.dtype, a.shape) != (b.dtype, b.shape) or _beginning(shards, name) != _beginning(base, own):
            return False
    return True


def _beginning(shards: Shards, name: str) -> bytes:
    header = shards.headers[name]
    path = shards.path / header.file
    with read_errors(shards.label, path), closing(files.open_to_read(path)) as file:
        return files.read_at(file, min(BEGINNING, header.end - header.start), header.start)
