"""Whatever changes a result's bits: what a run that goes on must find as the one before it left it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featcal_fast import files
from featcal_fast.checkpoints import LoraExpert, TensorSource, unwrapped
from featcal_fast.data.held_out import content
from featcal_fast.data.sources import files_below
from featcal_fast.errors import DataError
from featcal_fast.inputs.models import RecipeModels
from featcal_fast.inputs.recipe import Recipe
from featcal_fast.inputs.task_data import local_data
from featcal_fast.reporting.clock import Clock
from featcal_fast.streaming.held_out import HeldOut
from featcal_fast.streaming.machine import processor

PACKAGES = (
    *("featcal_fast", "torch", "triton", "transformers", "tokenizers", "safetensors"),
    *("bitsandbytes", "datasets", "gguf", "numpy", "pillow"),
)
# Environment variables by which libraries choose how to compute; not those that say where they keep what they compile.
SWITCHES = (
    *("ATEN_", "CUBLAS_", "DNNL_", "MKL_", "NVIDIA_TF32", "ONEDNN_", "OPENBLAS_"),
    *("TORCHDYNAMO_", "TORCHINDUCTOR_", "TORCH_ALLOW_TF32", "TORCH_COMPILE", "TRITON_"),
)
PLACES = ("_DIR", "_PATH")
SHOWN = 4  # differences that an error names

Facts = dict[str, Any]


def fingerprint(recipe: Recipe, models: RecipeModels, device: torch.device) -> Facts:
    """Of a job on this machine, as JSON has it: all but the calibration data's content, for which see `Digested`."""
    job = recipe.to_dict()
    for place in ("out", "root"):  # wherever it is
        job.pop(place, None)
    facts = {
        "recipe": job,
        "inputs": input_files(recipe, models),
        "headers": {source.label: _headers(source) for source in (models.merged, *models.files)},
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "python": platform.python_version(),
        "device": _device(device),
        "environment": {name: value for name, value in sorted(os.environ.items()) if _is_switch(name)},
    }
    plain: Facts = json.loads(json.dumps(facts))
    return plain


def input_files(recipe: Recipe, models: RecipeModels) -> dict[str, dict[str, list[int]]]:
    """Bytes and time of modification (in nanoseconds) of every file of the models and of the calibration data.

    Raises:
        DataError: one cannot be looked at.
    """
    found = {source.label: _files(source.path, source.label) for source, _ in read_models(models)}
    for task, expert in recipe.experts.items():
        data = local_data(recipe, expert.data)
        if isinstance(data, Path) and data.exists():  # else whoever loads it will say
            found[data_label(task)] = _files(data, data_label(task))
    return found


def read_models(models: RecipeModels) -> Iterator[tuple[TensorSource, TensorSource]]:
    """Every model with files of its own, and whose it is: an adapter's may be of another base model than the job's."""
    for source in models.files:
        yield source, source
        inner = unwrapped(source)
        if isinstance(inner, LoraExpert) and not inner.adapts(models.base):
            yield inner.base, source


def data_label(task: str) -> str:
    """What a task's data is called among the inputs."""
    return f"data of {task}"


def differences(before: Facts, now: Facts, word: str = "now") -> str:
    """What is not as it was: `torch: 2.12.0, now 2.13.0; ...`; empty if all is. `word` may be another than `now`."""
    old, new = dict(_flat(before)), dict(_flat(now))
    different = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    told = [f"{name}: {_shown(old.get(name))}, {word} {_shown(new.get(name))}" for name in different[:SHOWN]]
    if more := len(different) - len(told):
        told.append(f"and {more} more")
    return "; ".join(told)


class Digested:
    """A task's batches, whose content leaves its SHA-256 when they are gone through.

    Args:
        batches: of tensors; what loads them when they are asked for, loads them all at once.
        clock: told when that is.

    Attributes:
        digest: empty before.
        count: of the batches, likewise.
        samples: in them.
        held_out: of these, those that are.
    """

    def __init__(self, batches: Iterable[Mapping[str, Tensor]], clock: Clock) -> None:
        self._batches, self._clock = batches, clock
        self.digest, self.count, self.samples, self.held_out = "", 0, 0, 0

    @property
    def sizes(self) -> list[int]:
        """Batches, samples, and those that are held out."""
        return [self.count, self.samples, self.held_out]

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        sha, count, samples, held_out = hashlib.sha256(), 0, 0, 0
        with self._clock("data"):
            batches = iter(self._batches)
        for batch in batches:
            with self._clock("data"):
                for part in content(batch):
                    sha.update(part)
            rows = len(next(iter(batch.values())))
            count, samples, held_out = count + 1, samples + rows, held_out + rows * isinstance(batch, HeldOut)
            yield batch
        self.digest, self.count, self.samples, self.held_out = sha.hexdigest(), count, samples, held_out


def _files(path: Path, label: str) -> dict[str, list[int]]:
    try:
        every = list(files_below(path)) if path.is_dir() else [path]
        present = [file for file in every if file.exists() or not file.is_symlink()]  # links to nothing are no data
        stats = {str(file.relative_to(path.parent)): files.stat(file) for file in present}
    except OSError as error:
        raise DataError(f"{label}: {path}: cannot be looked through: {error.strerror} ({error.filename})") from error
    return {name: [found.st_size, found.st_mtime_ns] for name, found in stats.items()}


def _headers(source: TensorSource) -> str:
    return hashlib.sha256(repr(sorted(source.tensors.items())).encode()).hexdigest()


def _is_switch(name: str) -> bool:
    return name.startswith(SWITCHES) and not name.endswith(PLACES)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _device(device: torch.device) -> Facts:
    """The processor counts beside a GPU too: it makes adapters' weights and merges."""
    capability = torch.backends.cpu.get_cpu_capability()
    host = {"processor": processor(), "instructions": capability, "threads": torch.get_num_threads()}
    if device.type != "cuda":
        return host
    found = torch.cuda.get_device_properties(device)
    return {"name": found.name, "multiprocessors": found.multi_processor_count, "cuda": torch.version.cuda} | host


def _shown(value: Any) -> str:
    """A fact for a reader; lists are a file's bytes and time."""
    if isinstance(value, list) and len(value) == 2 and all(isinstance(each, int) for each in value):
        return f"{value[0]:,} bytes of {datetime.fromtimestamp(value[1] / 1e9):%Y-%m-%d %H:%M:%S.%f}"
    return "absent" if value is None else str(value)


def _flat(facts: Facts, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        where = f"{prefix}: {name}" if prefix else name
        if isinstance(value, dict):
            yield from _flat(value, where)
        else:
            yield where, value
