"""Model folders on disk: a lazy, distrustful reader and an atomic writer."""

from featcal_fast.checkpoints.reader import (
    Checkpoint,
    TensorInfo,
    TensorSource,
    canonical,
    find_checkpoint,
    is_finite,
)
from featcal_fast.checkpoints.writer import CheckpointWriter, check_output

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "TensorInfo",
    "TensorSource",
    "canonical",
    "check_output",
    "find_checkpoint",
    "is_finite",
]
