"""Checkpoints of eight bits and scales: FP8 (DeepSeek's, fbgemm's, modelopt's) and compressed-tensors' FP8 and int8.

On disk, a weight `w` of `[..., out, in]` is codes of its own shape, float8 or int8, and beside it

    w_scale_inv or w_scale      of some float type, a scale for each block of the weight:
                                [], [1] or [..., 1, 1] for a whole matrix, [..., out] or [..., out, 1] for a row,
                                [..., 1, in] for a column, [..., ceil(out / r), ceil(in / c)] for r x c values
    w_zero_point                of the scales' shape, where codes are not symmetric

and it is `(codes - zero points) * scales`, whatever the scale is called. What activations are scaled by (`input_scale`,
`k_scale`, ...) is not read. Which blocks there are, `config.json` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featcal_fast.checkpoints.config import quantisation
from featcal_fast.checkpoints.documents import read_document
from featcal_fast.checkpoints.quantised import FOREIGN, PIECE, QuantisedCheckpoint, QuantisedWeight
from featcal_fast.checkpoints.reader import quant_method
from featcal_fast.checkpoints.shards import DTYPES, FP8, TensorInfo
from featcal_fast.errors import CheckpointError, UnsupportedModelError, named, shown

CODES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 1e6  # of a scale; a weight is a few hundred of them at most
LARGEST_BLOCK = 2**20  # values of a block's side
ZERO_POINT = "_zero_point"
# What a scale is called, in place of a name's end.
ENDS = (("", "_scale_inv"), ("", "_scale"), ("weight", "scale"), ("weight", "qscale_weight"))
LEFT = ("weight_scale", "_scale_inv", "qscale_weight", "weight_zero_point")  # ends of what cannot be a model's own
ACTIVATIONS = (
    *("input_scale", "output_scale", "activation_scale", "input_scale_ub", "prob_output_scale"),
    *("k_scale", "v_scale", "kv_scale", "q_scale", "input_zero_point", "output_zero_point", "input_global_scale"),
)
# Ends of tensors of layouts that are others, and what those are.
OTHERS = {
    "weight_packed": "weights packed to fewer than eight bits",
    "weight_g_idx": "columns in another order",
    "weight_global_scale": "NVFP4",
    "weight_scale_2": "NVFP4",
    "_blocks": "MXFP4",
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "bitmask": "sparse weights",
}
FORMATS = ("float-quantized", "naive-quantized", "int-quantized")  # of compressed-tensors
ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")  # of modelopt
MODELOPT_BLOCK = (128, 128)

Block = tuple[int, int]


@dataclass(frozen=True)
class Scaled:
    """A weight of codes and scales.

    Attributes:
        parts: codes, scales, and zero points, where there are any.
        block: rows and columns that a scale is for.
    """

    name: str
    info: TensorInfo
    parts: tuple[str, ...]
    block: Block

    def unpack(self, parts: dict[str, Tensor]) -> Tensor:
        """The weight, computed in float32 and rounded once.

        Raises:
            ValueError: a scale is none.
        """
        codes, stored, *zeros = (parts[part] for part in self.parts)
        scales = stored.view(torch.float8_e8m0fnu) if stored.dtype == torch.uint8 else stored
        scales = scales.float()
        if not (scales > 0).all() or not (scales <= LARGEST).all():
            worst = scales.reshape(-1)[int((~((scales > 0) & (scales <= LARGEST))).reshape(-1).nonzero()[0])].item()
            raise ValueError(f"has the scale {worst:g} in {self.parts[1]}, expected some above 0, up to {LARGEST:g}")
        rows, columns = self.info.shape[-2:]
        grid = -(-rows // self.block[0]), -(-columns // self.block[1])
        found = torch.empty(self.info.shape, dtype=self.info.dtype)
        matrices = codes.reshape(-1, rows, columns), found.view(-1, rows, columns)
        count = len(matrices[0])
        scales = scales.reshape(-1, *grid).expand(count, *grid)
        zero = zeros[0].float().reshape(-1, *grid).expand(count, *grid) if zeros else None
        for index, (code, out) in enumerate(zip(*matrices, strict=True)):
            self._unpack(code, out, scales[index], None if zero is None else zero[index])
        return found

    def _unpack(self, codes: Tensor, out: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
        """One matrix, a piece at a time."""
        rows, columns = out.shape
        step = max(1, PIECE // max(1, columns))
        for start in range(0, rows, step):
            own = torch.arange(start, min(start + step, rows)) // self.block[0]
            piece = codes[start : start + step].float()
            if zeros is not None:
                piece -= self._spread(zeros[own], columns)
            out[start : start + step] = piece.mul_(self._spread(scales[own], columns))

    def _spread(self, grid: Tensor, columns: int) -> Tensor:
        """Of each row's blocks a value for each column."""
        return grid if grid.shape[1] == 1 else grid.repeat_interleave(self.block[1], dim=1)[:, :columns]


class Fp8Checkpoint(QuantisedCheckpoint):
    """A checkpoint of eight bits and scales; its tensors are the dequantised ones, of the dtype of `config.json`.

    Raises:
        CheckpointError: besides those of `Checkpoint`, scales are missing, misshapen, or of nothing.
        UnsupportedModelError: besides those of `Checkpoint`, another layout.
    """

    methods = ("fp8", "compressed-tensors", "fbgemm_fp8", "modelopt")
    dtypes = DTYPES | FP8

    def __init__(self, path: Path, label: str) -> None:
        super().__init__(path, label)
        names = self.shards.tensors
        activations = {name for name in names if name.endswith(ACTIVATIONS)}
        codes = [name for name in names if name not in activations and self._is_code(name)]
        # A file beside the config may be another model's, of which this one was made.
        told = bool(codes) or quant_method(super().read_config()) is not None
        self.blocks = list(dict.fromkeys(_blocks(self._described, self))) if told else []
        self._check_layout()
        dtype = self.plain_dtype("bfloat16") if codes else torch.bfloat16
        packed: list[QuantisedWeight] = [self._scaled(name, dtype) for name in codes]
        self.take(packed, activations)
        self._check_rest()

    def read_config(self) -> dict[str, Any]:
        """What `config.json` holds, and what stands of its weights in a file of their own."""
        values = super().read_config()
        if quant_method(values) is None:
            described = read_document(self.path / self.module / FOREIGN[0], self.label)
            found = described.get("quantization") if isinstance(described, dict) else None
            own = found if isinstance(found, dict) else {}
            values = {**values, "quantization_config": {**own, "quant_method": "modelopt"}}
        return values

    @property
    def _described(self) -> dict[str, Any]:
        found = quantisation(self.json)
        return found if isinstance(found, dict) else {}

    def _is_code(self, name: str) -> bool:
        dtype, method = self.shards.tensors[name].dtype, quant_method(self.json)
        scaled = name.endswith("weight") or f"{name}_scale" in self.shards.tensors  # of a stack, the latter alone tells
        whole = dtype == torch.int8 and scaled and method == "compressed-tensors"
        return (dtype in CODES or whole) and not name.endswith(ZERO_POINT)

    def _scaled(self, name: str, dtype: torch.dtype) -> Scaled:
        stored = self.shards.tensors[name]
        if len(stored.shape) < 2 or not stored.nbytes:
            raise self.foreign(name, f"shape {stored.shape} and {stored.dtype}", "a matrix, or several")
        candidates = [f"{name.removesuffix(own)}{end}" for own, end in ENDS if name.endswith(own)]
        there = [each for each in candidates if each in self.shards.tensors]
        if len(there) > 1:
            raise CheckpointError(
                f"{self.label}: {self.shards.where(name)} has scales twice, {' and '.join(there)}; nobody can tell "
                "which of them count"
            )
        if not there:
            raise CheckpointError(
                f"{self.label}: {self.shards.where(name)} has dtype {stored.dtype}, but no scales: "
                f"{candidates[0]} and {candidates[1]} are missing; the download is incomplete, or nobody can tell what "
                "its codes stand for"
            )
        scales = there[0]
        block = self._block(scales, stored.shape)
        found = self.shards.tensors[scales]
        small = found.dtype == FP8.get("F8_E8M0") or (found.dtype == torch.uint8 and self._has_exponents())
        if not small and found.dtype not in SCALES:
            raise self.foreign(scales, f"dtype {found.dtype}", f"one of {', '.join(map(str, SCALES))}")
        zeros, parts = f"{name}{ZERO_POINT}", [name, scales]
        if zeros in self.shards.tensors:
            zero = self.shards.tensors[zeros]
            if zero.shape != found.shape or zero.dtype not in (torch.int8, stored.dtype, found.dtype):
                raise self.foreign(zeros, f"shape {zero.shape} and {zero.dtype}", f"{found.shape} and torch.int8")
            parts.append(zeros)
        return Scaled(name, TensorInfo(stored.file, stored.shape, dtype), tuple(parts), block)

    def _has_exponents(self) -> bool:
        return "F8_E8M0" in FP8 and self._described.get("scale_fmt") == "ue8m0"

    def _block(self, scales: str, shape: tuple[int, ...]) -> Block:
        """What part of a weight each of its scales is for."""
        found, (*leading, rows, columns) = self.shards.tensors[scales].shape, shape
        if found in ((), (1,)) or found == (*leading,):
            return rows, columns
        if found == (*leading, rows):
            return 1, columns
        fitting = [
            (high, wide)
            for high, wide in ((rows, columns), (1, columns), (rows, 1), *self.blocks)
            if found == (*leading, -(-rows // high), -(-columns // wide))
        ]
        if not fitting:
            blocks = "".join(f", or for {high} x {wide} values" for high, wide in self.blocks)
            raise self.foreign(scales, f"shape {found}", f"a scale for all, or for each row or column{blocks}")
        same = {(min(high, rows), min(wide, columns)) for high, wide in fitting}
        if len(same) > 1:
            raise self.foreign(scales, f"shape {found}, of blocks of {fitting[0]} or {fitting[1]}", "one of them")
        return fitting[0]

    def _check_layout(self) -> None:
        """Of layouts that this one's description may tell of, only those are read that it is."""
        for name in self.shards.headers:
            kind = next((kind for end, kind in OTHERS.items() if name.endswith(end)), None)
            if kind is not None:
                raise UnsupportedModelError(
                    f"{self.label}: {self.shards.where(name)} is of another layout than FP8 or int8 with scales "
                    f"({kind}); dequantise this model first"
                )

    def _check_rest(self) -> None:
        """Raises:
        FeatCalError: among the model's own tensors one is none."""
        for name, info in self.tensors.items():
            if info.dtype in FP8.values() or (name.endswith("weight") and not info.dtype.is_floating_point):
                method = named(quant_method(self.json))
                raise UnsupportedModelError(
                    f"{self.label}: {self.shards.where(name)} has dtype {info.dtype}, which is no weight of FP8 or "
                    f"int8 with scales as config.json tells of ({method}); dequantise this model first"
                )
        for name in self.tensors:
            if name.endswith(LEFT):
                raise CheckpointError(
                    f"{self.label}: {self.shards.where(name)} is a scale of nothing: the weight that it belongs to is "
                    "missing, or not quantised; the download is incomplete, or its files do not belong together"
                )


def _blocks(values: Mapping[str, Any], model: Fp8Checkpoint) -> Iterator[Block]:
    """The blocks, rows and columns, that a `quantization_config` tells of; refuses all that is another layout."""
    method = quant_method(model.json)
    if method == "fp8":
        if values.get("expert_dtype") not in (None, "fp8"):
            model.refuse(f"expert_dtype {shown(values['expert_dtype'])}", "fp8")
        if values.get("weight_block_size") is not None:
            yield _block(values["weight_block_size"], "weight_block_size", model)
    elif method == "modelopt":
        algorithm = values.get("quant_algo")
        if algorithm not in ALGORITHMS:
            model.refuse(f"quant_algo {shown(algorithm)}", f"one of {', '.join(ALGORITHMS)}")
        yield MODELOPT_BLOCK
    elif method == "compressed-tensors":
        yield from _compressed(values, model)


def _compressed(values: Mapping[str, Any], model: Fp8Checkpoint) -> Iterator[Block]:
    """Likewise, of compressed-tensors."""
    groups = values.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        model.refuse(f"config_groups {shown(groups)}", "schemes by name")
    mixed = values.get("format") == "mixed-precision"
    for found in [group.get("format") for group in groups.values()] if mixed else [values.get("format")]:
        if found not in FORMATS:
            model.refuse(f"the compressed-tensors format {shown(found)}", f"one of {', '.join(FORMATS)}")
    sparse = values.get("sparsity_config") or {}
    if not isinstance(sparse, Mapping) or sparse.get("format", "dense") != "dense":
        model.refuse(f"sparsity_config {shown(sparse)}", "dense weights")
    if values.get("transform_config"):
        model.refuse("a transform_config, by which weights are rotated", "none")
    for group in groups.values():
        weights = group.get("weights") or {}
        if not isinstance(weights, Mapping):
            model.refuse(f"weights {shown(weights)}", "a scheme")
        if weights.get("block_structure") is not None:
            yield _block(weights["block_structure"], "block_structure", model)
        if weights.get("group_size") not in (None, -1):
            yield _block([1, weights["group_size"]], "group_size", model)


def _block(value: object, key: str, model: Fp8Checkpoint) -> Block:
    if isinstance(value, (list, tuple)) and len(value) == 2:
        high, wide = value
        if all(type(each) is int and 0 < each <= LARGEST_BLOCK for each in (high, wide)):
            return high, wide
    model.refuse(f"{key} {shown(value)}", "two sizes of a block")
