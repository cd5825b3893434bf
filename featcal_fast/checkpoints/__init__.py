"""Model folders on disk: lazy, distrustful readers of every form an expert comes in, and an atomic writer."""

from featcal_fast.checkpoints.adapter import LoraExpert
from featcal_fast.checkpoints.cached import STORAGES, CachedExpert, cached_bytes
from featcal_fast.checkpoints.find import find_checkpoint, find_expert
from featcal_fast.checkpoints.quantised import BitsAndBytesCheckpoint
from featcal_fast.checkpoints.reader import Checkpoint, TensorSource, WrappedSource, canonical
from featcal_fast.checkpoints.shards import TensorInfo, is_finite
from featcal_fast.checkpoints.writer import CheckpointWriter, check_output, nearest_existing

__all__ = [
    "STORAGES",
    "BitsAndBytesCheckpoint",
    "CachedExpert",
    "Checkpoint",
    "CheckpointWriter",
    "LoraExpert",
    "TensorInfo",
    "TensorSource",
    "WrappedSource",
    "cached_bytes",
    "canonical",
    "check_output",
    "find_checkpoint",
    "find_expert",
    "is_finite",
    "nearest_existing",
]
