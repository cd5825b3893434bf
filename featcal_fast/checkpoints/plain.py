"""Which tensors of a source are stored as it gives them, so that they can be read in parts."""

from __future__ import annotations

from featcal_fast.checkpoints.adapter import LoraExpert
from featcal_fast.checkpoints.quantised import QuantisedCheckpoint
from featcal_fast.checkpoints.reader import Checkpoint, TensorSource
from featcal_fast.checkpoints.shards import Shards


def plain_files(source: TensorSource, name: str) -> Shards | None:
    """The files that hold a tensor under the name and with the values that `source.read` gives; None where none do."""
    if isinstance(source, LoraExpert):
        return None if name in source.changed() else plain_files(source.base, name)
    if isinstance(source, QuantisedCheckpoint):
        return None if name in source.packed else source.shards
    return source.shards if type(source) is Checkpoint else None
