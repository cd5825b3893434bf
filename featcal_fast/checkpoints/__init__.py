"""Model folders on disk: lazy, distrustful readers of every form an expert comes in, and an atomic writer."""

from featcal_fast.checkpoints.adapter import LoraExpert
from featcal_fast.checkpoints.bnb import BitsAndBytesCheckpoint
from featcal_fast.checkpoints.cached import STORAGES, CachedExpert, cached_bytes
from featcal_fast.checkpoints.documents import leads_out, read_errors
from featcal_fast.checkpoints.find import find_checkpoint, find_expert
from featcal_fast.checkpoints.fp8 import Fp8Checkpoint
from featcal_fast.checkpoints.gguf import GgufExpert
from featcal_fast.checkpoints.lock import Lock
from featcal_fast.checkpoints.manifest import Manifest
from featcal_fast.checkpoints.metadata import Metadata
from featcal_fast.checkpoints.plain import plain_files
from featcal_fast.checkpoints.quantised import UNPACKING, QuantisedCheckpoint
from featcal_fast.checkpoints.reader import Checkpoint, TensorSource, WrappedSource, canonical, unwrapped
from featcal_fast.checkpoints.shards import TensorInfo, is_finite, parse_header, read_header
from featcal_fast.checkpoints.side_files import CARD, REPORT
from featcal_fast.checkpoints.work import (
    WorkFolder,
    check_output,
    check_scratch,
    held_bytes,
    make_states,
    nearest_existing,
    states_path,
    taken,
    work_path,
    write_errors,
)
from featcal_fast.checkpoints.writer import CheckpointWriter

__all__ = [
    "CARD",
    "REPORT",
    "STORAGES",
    "UNPACKING",
    "BitsAndBytesCheckpoint",
    "CachedExpert",
    "Checkpoint",
    "CheckpointWriter",
    "Fp8Checkpoint",
    "GgufExpert",
    "Lock",
    "LoraExpert",
    "Manifest",
    "Metadata",
    "QuantisedCheckpoint",
    "TensorInfo",
    "TensorSource",
    "WorkFolder",
    "WrappedSource",
    "cached_bytes",
    "canonical",
    "check_output",
    "check_scratch",
    "find_checkpoint",
    "find_expert",
    "held_bytes",
    "is_finite",
    "leads_out",
    "make_states",
    "nearest_existing",
    "parse_header",
    "plain_files",
    "read_errors",
    "read_header",
    "states_path",
    "taken",
    "unwrapped",
    "work_path",
    "write_errors",
]
