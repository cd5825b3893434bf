"""A model folder in Hugging Face format, read one tensor at a time; nothing in it is trusted, or ever written to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from featcal_fast.errors import CheckpointError, UnsupportedModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
OPTIONAL_PREFIXES = ("vision_model.", "model.")  # what one layout of a checkpoint has and another has not
WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".index.json",
)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's place and form, from its file's header."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class TensorSource(Protocol):
    """What can be calibrated, merged or written: named tensors behind a config, read on demand."""

    label: str
    tensors: dict[str, TensorInfo]

    @property
    def config(self) -> Any: ...

    def read(self, names: Iterable[str]) -> dict[str, Tensor]: ...

    def side_files(self) -> list[Path]: ...


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or Inf: one pass, where `isfinite` makes three."""
    low, high = torch.aminmax(tensor) if tensor.numel() else (torch.zeros(()), torch.zeros(()))
    return bool(low.isfinite() & high.isfinite())


def canonical(name: str) -> str:
    """`name` without the prefixes that some layouts of a checkpoint have and others have not."""
    for prefix in OPTIONAL_PREFIXES:
        while name.startswith(prefix):
            name = name[len(prefix) :]
    return name


class Checkpoint:
    """A folder with `config.json` and safetensors weights, sharded or not.

    Args:
        path: the folder.
        label: what to call it in errors, for example `expert math`.

    Raises:
        CheckpointError: missing, not a checkpoint, pickled only, truncated, incomplete, or with unsafe file names.
        UnsupportedModelError: an adapter or a quantised checkpoint.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.path, self.label = path, label
        if not path.is_dir():
            raise CheckpointError(f"{label}: {path} is not a folder; expected a model folder with config.json")
        if not (path / "config.json").is_file():
            if (path / "adapter_config.json").is_file():
                raise UnsupportedModelError(
                    f"{label}: {path} is an adapter, expected a full checkpoint; merge the adapter into "
                    "its base model first "
                    "(peft: merge_and_unload, save_pretrained)"
                )
            raise CheckpointError(f"{label}: {path} is not a checkpoint: config.json is missing")
        self._refuse_quantised()
        self.tensors = self._read_headers()

    @cached_property
    def config(self) -> Any:
        """The transformers config."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        except (ValueError, OSError, KeyError) as error:
            raise UnsupportedModelError(f"{self.label}: {self.path / 'config.json'} cannot be used: {error}") from error

    @cached_property
    def names(self) -> dict[str, str]:
        """Tensor names by canonical name."""
        return {canonical(name): name for name in self.tensors}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, in memory of their own on the CPU, checked to be finite.

        Raises:
            CheckpointError: names file and tensor.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        found = {}
        for file, members in by_file.items():
            with self._open(file) as shard:
                for name in members:
                    # A copy: bits must not depend on how the file happens to be aligned in memory.
                    tensor = shard.get_tensor(name).clone()
                    if tensor.is_floating_point() and not is_finite(tensor):
                        bad = int((~tensor.isfinite()).sum())
                        raise CheckpointError(
                            f"{self.label}: {self.path / file}: tensor {name} holds {bad} values that are "
                            "NaN or Inf; expected "
                            "finite weights; download or train this model again"
                        )
                    found[name] = tensor
        return found

    def side_files(self) -> list[Path]:
        """Everything beside the weights: config, tokenizer, generation config, chat template, ..."""
        files = [file for file in sorted(self.path.iterdir()) if file.is_file() and not file.name.startswith(".")]
        return [self._inside(file.name) for file in files if not file.name.endswith(WEIGHT_SUFFIXES)]

    def _read_headers(self) -> dict[str, TensorInfo]:
        if (self.path / SINGLE).is_file():
            listed: dict[str, str] | None = None
            files = [SINGLE]
        elif (self.path / INDEX).is_file():
            listed = self._read_index()
            files = sorted(set(listed.values()))
        else:
            pickled = sorted(file.name for file in self.path.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
            if pickled:
                raise CheckpointError(
                    f"{self.label}: {self.path} has only pickled weights ({pickled[0]}), which are never "
                    "opened because they "
                    "can run code; convert them to safetensors first (load in transformers and save_pretrained)"
                )
            raise CheckpointError(f"{self.label}: {self.path} has neither {SINGLE} nor {INDEX}")
        tensors = {}
        for file in files:
            with self._open(file) as shard:
                for name in shard.keys():  # noqa: SIM118 (not a mapping)
                    header = shard.get_slice(name)
                    dtype = header.get_dtype()
                    if dtype not in DTYPES:
                        raise UnsupportedModelError(
                            f"{self.label}: {self.path / file}: tensor {name} has dtype {dtype}, expected "
                            f"one of {', '.join(DTYPES)}"
                        )
                    tensors[name] = TensorInfo(file, tuple(header.get_shape()), DTYPES[dtype])
        for name, file in (listed or {}).items():
            if name not in tensors or tensors[name].file != file:
                raise CheckpointError(
                    f"{self.label}: {self.path / INDEX} says that {file} holds tensor {name}, but it does "
                    "not; the download is "
                    "incomplete or the index is stale"
                )
        return tensors

    def _read_index(self) -> dict[str, str]:
        path = self.path / INDEX
        try:
            listed = json.loads(path.read_text())["weight_map"]
            items = {str(name): str(file) for name, file in listed.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.label}: {path} is not a weight index: {error!r}") from error
        for name, file in items.items():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{self.label}: {path} places tensor {name} in {file!r}; expected the name of a "
                    ".safetensors file in the folder"
                )
        return items

    def _inside(self, name: str) -> Path:
        """The file `name`, refused where it is a link out of the folder (the hub cache's own links are fine)."""
        path, root = self.path / name, self.path.resolve()
        target = path.resolve()
        if target.parent != root and target.parent != root.parent.parent / "blobs":
            raise CheckpointError(
                f"{self.label}: {path} is a link to {target}, outside of the model folder; expected a file"
            )
        return path

    def _open(self, file: str) -> Any:
        path = self._inside(file)
        if not path.is_file():
            raise CheckpointError(
                f"{self.label}: {path} is missing, though {INDEX} names it; the download is incomplete"
            )
        try:
            return safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.label}: {path} is not a complete safetensors file ({error}); download or copy it again"
            ) from error

    def _refuse_quantised(self) -> None:
        path = self.path / "config.json"
        try:
            config = json.loads(path.read_text())
        except ValueError as error:
            raise CheckpointError(f"{self.label}: {path} is not valid JSON: {error}") from error
        quantised = config.get("quantization_config") if isinstance(config, dict) else None
        if quantised:
            method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
            raise UnsupportedModelError(
                f"{self.label}: {path} says the weights are quantised ({method}); expected plain floating-point weights"
            )


def find_checkpoint(reference: str, root: Path, label: str) -> Checkpoint:
    """The checkpoint that a recipe names: a folder, relative to `root`, or a hub id `org/name` or `org/name@revision`.

    Raises:
        CheckpointError: no such folder, and no such model in the hub or its local cache.
    """
    path = root / Path(reference).expanduser()
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", reference):
        return Checkpoint(path, label)
    from huggingface_hub import snapshot_download

    repo, _, revision = reference.partition("@")
    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        folder = snapshot_download(repo, revision=revision or None, allow_patterns=patterns)
    except Exception as error:  # the hub client has many ways to fail, all of them final here
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{label}: {reference!r} is neither a folder ({path}) nor a model that could be had from the hub: {reason}"
        ) from error
    return Checkpoint(Path(folder), label)
