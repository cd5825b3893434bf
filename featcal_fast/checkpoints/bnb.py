"""bitsandbytes checkpoints (NF4, FP4, LLM.int8), read straight from safetensors and dequantised a tensor at a time.

On disk, a 4-bit weight `w` of `[out, in]` is

    w                                      its codes, two to a byte, the first in the high half; any dtype of storage
    w.quant_map                            [16] float32, what each code stands for
    w.absmax                               [blocks] float32, the scale of each run of `blocksize` values
    w.quant_state.bitsandbytes__nf4        UTF-8 JSON: quant_type, blocksize, dtype, shape, ...

and with double quantisation `absmax` holds uint8 codes, with `w.nested_quant_map` `[256]` and `w.nested_absmax` for
runs of `nested_blocksize` of them, around `nested_offset`. An 8-bit weight is `w` `[out, in]` int8 and `SCB` `[out]`
float32 beside it, each row's largest absolute value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featcal_fast.checkpoints.quantised import DTYPES, PIECE, QuantisedCheckpoint, QuantisedWeight
from featcal_fast.checkpoints.shards import MAX_DIMENSIONS, TensorInfo
from featcal_fast.errors import CheckpointError, UnsupportedModelError, shown
from featcal_fast.untrusted.documents import parse_json

STATE = ".quant_state.bitsandbytes__"
STATE_BYTES = 2**16  # of the description of one weight; they have 200
LARGEST_OFFSET = 1e6  # of scales, which are sizes of weights
BLOCKSIZES = {2**power for power in range(4, 17)}
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def dequantise(
    codes: Tensor,
    bits: int,
    quant_map: Tensor,
    absmax: Tensor,
    blocksize: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """`quant_map[codes] * absmax`, a scale for each run of `blocksize` values.

    Not bitsandbytes' own: its CPU kernel (0.50) is wrong where a run does not end with a row of the matrix.

    Args:
        codes: of any dtype of storage; 4-bit ones two to a byte, the first in the high half.
        bits: of a code, 4 or 8.
        quant_map: float32, what each code stands for.
        absmax: float32, the scales.
        shape, dtype: of the result.
    """
    found = torch.empty(torch.Size(shape).numel(), dtype=dtype)
    codes, step = codes.reshape(-1).view(torch.uint8), 2 * blocksize * max(1, PIECE // (2 * blocksize))
    for start in range(0, len(found), step):
        piece = found[start : start + step]
        part = codes[start * bits // 8 : (start + step) * bits // 8]
        if bits == 4:
            part = torch.stack([part >> 4, part & 15], dim=1).reshape(-1)[: len(piece)]
        scales = absmax[start // blocksize : (start + step) // blocksize].repeat_interleave(blocksize)
        piece.copy_(quant_map[part.int()].mul_(scales[: len(piece)]))
    return found.reshape(shape)


@dataclass(frozen=True)
class FourBit:
    """An NF4 or FP4 weight."""

    name: str
    info: TensorInfo
    parts: tuple[str, ...]
    blocksize: int
    nested_blocksize: int | None
    nested_offset: float

    def unpack(self, parts: dict[str, Tensor]) -> Tensor:
        absmax = parts[f"{self.name}.absmax"]
        if self.nested_blocksize is not None:
            nested = parts[f"{self.name}.nested_quant_map"], parts[f"{self.name}.nested_absmax"]
            absmax = dequantise(absmax, 8, *nested, self.nested_blocksize, tuple(absmax.shape), torch.float32)
            absmax += self.nested_offset
        quant_map = parts[f"{self.name}.quant_map"]
        return dequantise(parts[self.name], 4, quant_map, absmax, self.blocksize, self.info.shape, self.info.dtype)


@dataclass(frozen=True)
class EightBit:
    """An LLM.int8 weight."""

    name: str
    info: TensorInfo
    parts: tuple[str, ...]

    def unpack(self, parts: dict[str, Tensor]) -> Tensor:
        codes, largest = (parts[name] for name in self.parts)
        found, rows = torch.empty(self.info.shape, dtype=self.info.dtype), max(1, PIECE // self.info.shape[1])
        for start in range(0, len(found), rows):
            part = slice(start, start + rows)
            found[part] = codes[part] * (largest[part] / 127)[:, None]
        return found


class BitsAndBytesCheckpoint(QuantisedCheckpoint):
    """A checkpoint quantised by bitsandbytes; its tensors are the dequantised ones.

    4-bit weights take the dtype that they had when they were quantised, 8-bit ones that of `config.json`.

    Raises:
        CheckpointError: besides those of `Checkpoint`, a part of a quantised weight is missing or misshapen.
        UnsupportedModelError: besides those of `Checkpoint`, a layout that is not documented.
    """

    methods = ("bitsandbytes",)

    def __init__(self, path: Path, label: str) -> None:
        super().__init__(path, label)
        packed: list[QuantisedWeight] = []
        described = set()  # tensors that only say how others are to be read
        for name, weight in self._descriptions().items():
            described.add(name if STATE in name else f"{weight}_format")
            packed.append(self._four_bit(name) if STATE in name else self._eight_bit(name))
        self.shards.bytes_read = 0  # what was read is form, not weights
        self.take(packed, described)
        for name, info in self.tensors.items():
            if name.endswith("weight") and not info.dtype.is_floating_point:
                raise CheckpointError(
                    f"{label}: {self.shards.where(name)} has dtype {info.dtype}, but nothing beside it says how it is "
                    f"quantised; expected {name}{STATE}nf4 or {name.removesuffix('weight')}SCB"
                )

    def _descriptions(self) -> dict[str, str]:
        """Tensors that say how a weight is quantised, and that weight."""
        found: dict[str, str] = {}
        weights = set()
        for name in self.shards.headers:
            if STATE in name or name.endswith(".SCB"):
                found[name] = name.partition(STATE)[0] if STATE in name else f"{name.removesuffix('SCB')}weight"
                if found[name] in weights:
                    raise CheckpointError(
                        f"{self.label}: {self.shards.where(found[name])} is described twice; nobody can tell which of "
                        "both counts"
                    )
                weights.add(found[name])
        return found

    def _four_bit(self, state: str) -> FourBit:
        name, _, kind = state.partition(STATE)
        values = self._state(state)
        shape, dtype, blocksize = tuple(values["shape"]), DTYPES.get(values["dtype"]), values["blocksize"]
        nested = values.get("nested_blocksize")
        if kind not in ("nf4", "fp4") or dtype is None or values.get("nested_dtype", "float32") != "float32":
            raise self._unknown(state, f"{kind} of {values['dtype']}")
        blocks, one = -(-math.prod(shape) // blocksize), torch.float32
        scales = torch.uint8 if nested else one
        parts = {f"{name}.quant_map": ((16,), one), f"{name}.absmax": ((blocks,), scales)}
        if nested:
            parts[f"{name}.nested_quant_map"] = (256,), one
            parts[f"{name}.nested_absmax"] = (-(-blocks // nested),), one
        codes, expected = self.part(name, name), -(-math.prod(shape) // 2)
        if codes.nbytes != expected:
            raise self.foreign(name, f"{codes.nbytes} bytes", f"{expected}")
        for part, (own, its) in parts.items():
            self._check_part(name, part, own, {its})
        if values.get("quant_type", kind) != kind:
            raise self.foreign(state, f"the quant_type {shown(values['quant_type'])}", kind)
        quant_map = next(iter(parts))
        found = self.shards.read([quant_map], packed=True)[quant_map]
        if not found.abs().max() <= 1.001:  # nor is NaN; a code stands for a share of its run's scale
            raise self.foreign(quant_map, f"the values {shown(found.tolist())}", "some from -1 to 1")
        info = TensorInfo(codes.file, shape, dtype)
        return FourBit(name, info, (name, *parts), blocksize, nested, values.get("nested_offset", 0.0))

    def _eight_bit(self, scales: str) -> EightBit:
        name = f"{scales.removesuffix('SCB')}weight"
        layout = f"{name}_format"
        if layout in self.shards.headers:
            self._check_part(name, layout, (), set(INTEGERS))
            if self.shards.read([layout], packed=True)[layout].any():
                raise self._unknown(layout, "LLM.int8 in tiles")
        found = self.json.get("dtype", self.json.get("torch_dtype", "float16"))
        dtype, stored = DTYPES.get(found) if isinstance(found, str) else None, self.part(name, name)
        if dtype is None or stored.dtype != torch.int8 or len(stored.shape) != 2 or not stored.nbytes:
            raise self._unknown(name, f"LLM.int8 of {shown(found)}, stored as {stored}")
        self._check_part(name, scales, stored.shape[:1], set(DTYPES.values()))
        return EightBit(name, TensorInfo(stored.file, stored.shape, dtype), (name, scales))

    def _state(self, name: str) -> dict[str, Any]:
        """What describes a 4-bit weight, of the right types."""
        info = self.shards.tensors[name]
        if info.dtype != torch.uint8 or info.nbytes > STATE_BYTES:
            raise self.foreign(name, f"{info.nbytes} bytes of {info.dtype}", f"at most {STATE_BYTES} of torch.uint8")
        try:
            values = parse_json(self.shards.read([name], packed=True)[name].numpy().tobytes())
            shape, nested, offset = values["shape"], values.get("nested_blocksize"), values.get("nested_offset", 0)
            sizes = [values["blocksize"], *([] if nested is None else [nested])]
            if not isinstance(shape, list) or not 0 < len(shape) <= MAX_DIMENSIONS:
                raise ValueError(f"found the shape {shown(shape)}")
            if any(type(size) is not int or size < 1 for size in shape):
                raise ValueError(f"found the shape {shown(shape)}")
            if any(type(size) is not int or size not in BLOCKSIZES for size in sizes):
                raise ValueError(f"found the block sizes {shown(sizes)}, expected powers of two")
            if type(offset) not in (int, float) or abs(offset) > LARGEST_OFFSET:
                raise ValueError(f"found the nested_offset {shown(offset)}")
            if not isinstance(values["dtype"], str):
                raise ValueError(f"found the dtype {shown(values['dtype'])}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.label}: {self.shards.where(name)} does not describe a quantised weight: {error!r}"
            ) from error
        return {**values, "nested_offset": float(offset)}

    def _check_part(self, weight: str, part: str, shape: tuple[int, ...], dtypes: set[torch.dtype]) -> None:
        stored = self.part(weight, part)
        if stored.shape != shape or stored.dtype not in dtypes:
            expected = " or ".join(sorted(map(str, dtypes)))
            raise self.foreign(part, f"shape {stored.shape} and {stored.dtype}", f"{shape} and {expected}")

    def _unknown(self, name: str, found: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.label}: {self.shards.where(name)}: found {found}, expected NF4, FP4 or row-wise LLM.int8 of "
            f"{', '.join(DTYPES)}; dequantise this model first"
        )
