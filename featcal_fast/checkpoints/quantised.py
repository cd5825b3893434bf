"""Quantised checkpoints: weights made of several tensors of their files, dequantised one at a time when read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from featcal_fast.checkpoints.reader import Checkpoint
from featcal_fast.checkpoints.shards import TensorInfo, is_finite
from featcal_fast.errors import CheckpointError, UnsupportedModelError, shown

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
PIECE = 2**22  # values unpacked at a time, so that what it takes does not grow with the weight
UNPACKING = 64 * 2**20  # bytes that a piece takes at most
FOREIGN = ("hf_quant_config.json",)  # files that say how a folder's weights are quantised, and nothing else


class QuantisedWeight(Protocol):
    """A quantised weight: what it is made of on disk, and what it is."""

    @property
    def name(self) -> str: ...

    @property
    def info(self) -> TensorInfo: ...

    @property
    def parts(self) -> tuple[str, ...]: ...  # tensors of the file

    def unpack(self, parts: dict[str, Tensor]) -> Tensor:
        """The weight, in `info`'s form.

        Raises:
            ValueError: its parts make none.
        """
        ...


class QuantisedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are the dequantised ones; a class of these says how they are packed.

    Attributes:
        packed: quantised weights, by name.
    """

    def __init__(self, path: Path, label: str) -> None:
        super().__init__(path, label)
        self.packed: dict[str, QuantisedWeight] = {}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, dequantised one at a time, on the CPU, checked to be finite.

        Raises:
            CheckpointError: names file and tensor.
        """
        found: dict[str, Tensor] = {}
        for name in names:
            if name not in self.packed:
                found |= self.shards.read([name])
                continue
            packed = self.packed[name]
            try:
                found[name] = packed.unpack(self.shards.read(packed.parts, packed=True))
                if not is_finite(found[name]):
                    raise ValueError("is not finite once dequantised")
            except ValueError as error:
                raise CheckpointError(
                    f"{self.label}: {self.shards.where(name)} {error}; download or quantise this model again"
                ) from None
        return found

    def stored_bytes(self, names: Iterable[str]) -> int:
        """What `read(names)` takes from files."""
        parts = [part for name in names for part in (self.packed[name].parts if name in self.packed else (name,))]
        return sum(self.shards.tensors[part].nbytes for part in parts)

    def side_files(self) -> dict[str, Path]:
        """Everything beside the weights, but what says how they are quantised."""
        own = {str(PurePosixPath(self.module, name)) for name in FOREIGN}
        return {name: path for name, path in super().side_files().items() if name not in own}

    def take(self, packed: Iterable[QuantisedWeight], described: set[str]) -> None:
        """Have these weights among the tensors, in place of what describes them.

        Args:
            packed: the quantised weights.
            described: tensors that are none of the model's.
        """
        self.packed = {each.name: each for each in packed}
        parts = {part for each in self.packed.values() for part in each.parts}
        self.tensors = {
            name: info for name, info in self.shards.tensors.items() if name not in parts and name not in described
        } | {name: each.info for name, each in self.packed.items()}

    def part(self, weight: str, part: str) -> TensorInfo:
        """A tensor that is a part of a quantised weight."""
        stored = self.shards.tensors.get(part)
        if stored is None:
            raise CheckpointError(
                f"{self.label}: {self.path}: tensor {part} is missing, a part of the quantised weight {weight}; the "
                "download is incomplete"
            )
        return stored

    def foreign(self, part: str, found: str, expected: str) -> CheckpointError:
        """What to say of a part that is none of its weight."""
        return CheckpointError(
            f"{self.label}: {self.shards.where(part)} has {found}, expected {expected}; weight and description do not "
            "belong together"
        )

    def plain_dtype(self, default: str | None) -> torch.dtype:
        """The dtype that `config.json` says weights had before they were quantised.

        Args:
            default: that of a config that says nothing.
        """
        text = self.json.get("text_config")
        for values in (self.json, text if isinstance(text, dict) else {}):
            found = values.get("dtype") or values.get("torch_dtype")
            if found is not None:
                break
        else:
            found = default
        if not isinstance(found, str) or found not in DTYPES:
            self.refuse(f"dtype {shown(found)}", f"one of {', '.join(DTYPES)}")
        return DTYPES[found]

    def refuse(self, found: str, expected: str) -> NoReturn:
        """Raises:
        UnsupportedModelError: `config.json` tells of what is not known here."""
        where = f"{self.label}: {self.path / self.module / 'config.json'}"
        raise UnsupportedModelError(f"{where}: found {found}, expected {expected}; dequantise this model first")
