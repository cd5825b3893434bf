"""A model folder in Hugging Face format, read one tensor at a time; nothing in it is trusted, or ever written to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from torch import Tensor

from featcal_fast.checkpoints.config import quantisation, transformers_config
from featcal_fast.checkpoints.documents import read_document, read_errors
from featcal_fast.checkpoints.metadata import Metadata
from featcal_fast.checkpoints.nested import module_path
from featcal_fast.checkpoints.shards import DTYPES, FP8, INDEX, SINGLE, Shards, TensorInfo
from featcal_fast.checkpoints.side_files import SideFiles, find_side_files
from featcal_fast.errors import CheckpointError, UnsupportedModelError, named

ADAPTER_CONFIG = "adapter_config.json"
FLOATS = {name for name, dtype in DTYPES.items() if dtype.is_floating_point}
# What one layout of a checkpoint has and another has not.
OPTIONAL_PREFIXES = ("vision_model.", "model.", "transformer.", "bert.", "roberta.", "vit.", "deit.", "dinov2.")


class TensorSource(Protocol):
    """What can be calibrated, merged or written: named tensors behind a config, read on demand.

    Attributes:
        label: what to call it in errors, for example `expert math`.
        path: the folder with its tokenizer.
        tensors: by name, in the form in which `read` gives them.
        names: tensor names by canonical name.
        config: of transformers.
        bytes_read: of tensors from files, so far.
    """

    label: str

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> dict[str, TensorInfo]: ...

    @property
    def names(self) -> Mapping[str, str]: ...

    @property
    def config(self) -> Any: ...

    @property
    def bytes_read(self) -> int: ...

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, in memory of their own on the CPU, checked to be finite."""
        ...

    def stored_bytes(self, names: Iterable[str]) -> int:
        """What `read(names)` takes from files."""
        ...

    def side_files(self) -> dict[str, Path]:
        """Everything beside the weights that a model of this form has too, by POSIX path relative to its folder."""
        ...

    def left_out(self) -> list[str]:
        """What else the folder holds: this model's weights in other forms, which would be another model's there."""
        ...

    def metadata(self) -> Metadata:
        """What a model of this form may repeat of what its files say of themselves."""
        ...


class WrappedSource:
    """A source that is as another one, but for what a subclass says.

    Args:
        source: the other one.
    """

    def __init__(self, source: TensorSource) -> None:
        self.source, self.label = source, source.label

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return self.source.tensors

    @property
    def names(self) -> Mapping[str, str]:
        return self.source.names

    @property
    def config(self) -> Any:
        return self.source.config

    @property
    def bytes_read(self) -> int:
        return self.source.bytes_read

    def stored_bytes(self, names: Iterable[str]) -> int:
        return self.source.stored_bytes(names)

    def side_files(self) -> dict[str, Path]:
        return self.source.side_files()

    def left_out(self) -> list[str]:
        return self.source.left_out()

    def metadata(self) -> Metadata:
        return self.source.metadata()


def unwrapped(source: TensorSource) -> TensorSource:
    """What reads the files of a source."""
    while isinstance(source, WrappedSource):
        source = source.source
    return source


def canonical(name: str) -> str:
    """`name` without the prefixes that some layouts of a checkpoint have and others have not."""
    for prefix in OPTIONAL_PREFIXES:
        while name.startswith(prefix):
            name = name[len(prefix) :]
    return name


def canonical_names(names: Iterable[str], where: str) -> dict[str, str]:
    """Names by canonical name.

    Raises:
        CheckpointError: two have one.
    """
    found: dict[str, str] = {}
    for name in names:
        other = found.setdefault(canonical(name), name)
        if other != name:
            raise CheckpointError(
                f"{where} holds tensors {other} and {name}, which are the same one of a model; nobody can tell which "
                "of them counts"
            )
    return found


class Checkpoint:
    """A folder with `config.json` and safetensors weights in floating point, sharded or not.

    Args:
        path: the folder.
        label: what to call it in errors, for example `expert math`.

    Attributes:
        module: where in the folder all of that is, which is empty but for old folders of sentence-transformers.

    Raises:
        CheckpointError: missing, not a checkpoint, pickled only, truncated, incomplete, or with unsafe file names.
        UnsupportedModelError: an adapter or a quantised checkpoint.
    """

    methods: tuple[str | None, ...] = (None,)  # the `quant_method`s that this class reads
    dtypes: Mapping[str, torch.dtype] = DTYPES  # of tensors, by their names in files

    def __init__(self, path: Path, label: str) -> None:
        self.path, self.label = path, label
        self.module = module_path(path, label)
        self.json = self.read_config()
        single, index = (str(PurePosixPath(self.module, name)) for name in (SINGLE, INDEX))
        self.shards = Shards(path, label, single, index, self.dtypes)
        self._check_quantisation()
        self.tensors = self.shards.tensors

    def read_config(self) -> dict[str, Any]:
        """What `config.json` holds."""
        return read_json(self.path / self.module, "config.json", self.label)

    @cached_property
    def config(self) -> Any:
        """The transformers config.

        Raises:
            CheckpointError: a value of `config.json` is out of its range, or of a wrong type.
            UnsupportedModelError: transformers knows no such model, or makes nothing of its values.
        """
        return transformers_config(self.json, self.path / self.module / "config.json", self.label)

    @cached_property
    def names(self) -> dict[str, str]:
        """Tensor names by canonical name.

        Raises:
            CheckpointError: two tensors have one.
        """
        return canonical_names(self.tensors, f"{self.label}: {self.path}")

    @property
    def bytes_read(self) -> int:
        return self.shards.bytes_read

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, in memory of their own on the CPU, checked to be finite.

        Raises:
            CheckpointError: names file and tensor.
        """
        return self.shards.read(names)

    def stored_bytes(self, names: Iterable[str]) -> int:
        """What `read(names)` takes from files."""
        return sum(self.shards.tensors[name].nbytes for name in names)

    def side_files(self) -> dict[str, Path]:
        """Everything beside the weights, subfolders too: config, tokenizer, chat templates, pooling, ...

        Returns:
            Files by POSIX path relative to the folder.

        Raises:
            CheckpointError: one is unreadable, no file, or a link out of the folder.
        """
        return self._beside.files

    def left_out(self) -> list[str]:
        """Paths of the same weights in other forms, such as `pytorch_model.bin` and `onnx/model.onnx`."""
        return self._beside.left_out

    def metadata(self) -> Metadata:
        """What its files say of themselves, within bounds."""
        return self.shards.metadata

    @cached_property
    def _beside(self) -> SideFiles:
        return find_side_files(self.shards)

    def _check_quantisation(self) -> None:
        found = quant_method(self.json)
        packed = [name for name, header in self.shards.headers.items() if header.dtype not in FLOATS]
        weights = [name for name in packed if name.endswith("weight") or self.shards.headers[name].dtype in FP8]
        if found in self.methods and (found is not None or not weights):
            return
        if found is None:
            header = self.shards.headers[weights[0]]
            raise UnsupportedModelError(
                f"{self.label}: {self.shards.where(weights[0])} has dtype {header.dtype}, expected plain "
                "floating-point weights; it is quantised in a way that config.json does not tell of"
            )
        example = f" ({self.shards.where(packed[0])} among them)" if packed else ""
        raise UnsupportedModelError(
            f"{self.label}: {self.path / 'config.json'} says the weights are quantised ({found}){example}; expected "
            "plain floating-point weights, FP8 ones or bitsandbytes ones; dequantise this model first"
        )


def quant_method(config: Mapping[str, Any]) -> str | None:
    """How a `config.json` says that the weights are quantised."""
    quantised = quantisation(config)
    if quantised is None:
        return None
    return named(quantised.get("quant_method", "unknown") if isinstance(quantised, Mapping) else quantised)


def read_json(path: Path, file: str, label: str) -> dict[str, Any]:
    """A model folder's config.

    Raises:
        CheckpointError: no such folder or file, or no JSON object in it.
        UnsupportedModelError: an adapter's folder, where a checkpoint was expected.
    """
    with read_errors(label, path):
        if not path.is_dir():
            raise CheckpointError(f"{label}: {path} is not a folder; expected a model folder with {file}")
        if not (path / file).is_file():
            if (path / ADAPTER_CONFIG).is_file():
                raise UnsupportedModelError(
                    f"{label}: {path} is an adapter, expected a full checkpoint: only experts may be adapters; merge "
                    "it into its base model first (peft: merge_and_unload, save_pretrained)"
                )
            raise CheckpointError(f"{label}: {path} is not a checkpoint: {file} is missing")
        values = read_document(path / file, label)
    if not isinstance(values, dict):
        raise CheckpointError(f"{label}: {path / file}: found a JSON {type(values).__name__}, expected an object")
    return values
