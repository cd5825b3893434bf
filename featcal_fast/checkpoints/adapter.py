"""PEFT LoRA adapters: an expert whose weights are `W_base + scale * B A`, formed a tensor at a time when read.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. In the latter, for a module `m` of the base model,

    base_model.model.m.lora_A.weight             [r, in]          and lora_B.weight [out, r]: a linear module
    base_model.model.m.lora_embedding_A          [r, rows]        and lora_embedding_B [width, r]: an embedding
    base_model.model.m.weight, .bias, ...        a trained tensor (`modules_to_save`, `bias`) in place of the base's
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from featcal_fast.checkpoints.reader import ADAPTER_CONFIG, Checkpoint, canonical, read_json
from featcal_fast.checkpoints.shards import Shards, TensorInfo, is_finite
from featcal_fast.errors import CheckpointError, ModelMismatchError, UnsupportedModelError

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
ROWS = 2048  # of a weight that its change is formed for at a time
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.weight)?")
# What makes an adapter something else than W + scale * B A, by its key in adapter_config.json.
VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "lora_bias": "LoRA with a bias",
    "target_parameters": "LoRA of bare parameters",
    "trainable_token_indices": "trainable tokens",
    "layer_replication": "layer replication",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
}
# Initialisations that leave the base's weights alone; the others train against a base that was changed too.
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one weight: `scale * B A`, transposed where the weight is."""

    a: str
    b: str
    scale: float
    transposed: bool


class LoraExpert:
    """A base model with a LoRA adapter, one tensor at a time; takes the base's layout and dtypes.

    Args:
        path: the adapter's folder.
        label: what to call it in errors.
        base: the model that it adapts.

    Raises:
        CheckpointError: not an adapter, truncated, or a factor is missing.
        UnsupportedModelError: another kind of adapter.
        ModelMismatchError: made for another base model.
    """

    def __init__(self, path: Path, label: str, base: Checkpoint) -> None:
        self.path, self.label = path, label
        self.base = Checkpoint(base.path, f"{label}, base model")  # of its own, so that reads are told apart
        self.values = read_json(path, ADAPTER_CONFIG, label)
        self._check_kind()
        self.shards = Shards(path, label, WEIGHTS, f"{WEIGHTS}.index.json")
        self.tensors = dict(self.base.tensors)
        self.low_rank: dict[str, LowRank] = {}  # by the base's tensor
        self.replaced: dict[str, str] = {}  # the base's tensor -> the adapter's
        factors: dict[str, dict[str, str]] = defaultdict(dict)
        for name in self.shards.tensors:
            inner = name.removeprefix(PREFIX).replace(".base_layer.", ".")
            if match := FACTOR.fullmatch(inner):
                factors[match["module"]][f"{match['embedding'] or ''}{match['factor']}"] = name
            else:
                self._replace(name, re.sub(r"\.modules_to_save(\.default)?\.", ".", inner))
        for module, found in factors.items():
            self._adapt(module, found)
        self._check_every_layer(factors)

    @cached_property
    def config(self) -> Any:
        """The base's transformers config, with the adapter's vocabulary size where it trained an embedding anew."""
        config = self.base.config
        for own in self.replaced:
            rows, vocabulary = self.tensors[own].shape[0], getattr(config, "vocab_size", None)
            if rows != self.base.tensors[own].shape[0] == vocabulary:
                config = copy.deepcopy(config)
                config.vocab_size = rows
                break
        return config

    @cached_property
    def names(self) -> dict[str, str]:
        """Tensor names by canonical name."""
        return {canonical(name): name for name in self.tensors}

    @property
    def bytes_read(self) -> int:
        return self.base.bytes_read + self.shards.bytes_read

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, formed in float32 one at a time, on the CPU, checked to be finite.

        Raises:
            CheckpointError: names file and tensor.
        """
        found = {}
        for name in names:
            if name in self.replaced:
                own = self.replaced[name]
                found[name] = self.shards.read([own])[own].to(self.tensors[name].dtype)
            else:
                found[name] = self.base.read([name])[name]
            if name in self.low_rank:
                found[name] = self._add(name, found[name], self.low_rank[name])
        return found

    def stored_bytes(self, names: Iterable[str]) -> int:
        """What `read(names)` takes from files."""
        total = 0
        for name in names:
            parts = [self.replaced[name]] if name in self.replaced else []
            parts += [self.low_rank[name].a, self.low_rank[name].b] if name in self.low_rank else []
            total += sum(self.shards.tensors[part].nbytes for part in parts)
            total += 0 if name in self.replaced else self.base.stored_bytes([name])
        return total

    def side_files(self) -> list[Path]:
        """The base's: an adapter's folder is not a model's."""
        return self.base.side_files()

    def _add(self, name: str, base: Tensor, low_rank: LowRank) -> Tensor:
        """`base`, changed in place."""
        factors = self.shards.read([low_rank.a, low_rank.b])
        # In float64: a program may have float32 products of other threads rounded (featcal_kernels.cpu).
        b, a, weight = factors[low_rank.b].double(), factors[low_rank.a].double(), base
        left, right = (a.mT, b.mT) if low_rank.transposed else (b, a)
        for part, factor in zip(weight.split(ROWS), left.split(ROWS), strict=True):
            part.copy_(part.float().add_((factor @ right).float(), alpha=low_rank.scale))
        if not is_finite(weight):
            raise CheckpointError(
                f"{self.label}: {self.shards.where(low_rank.b)} makes {name} overflow {base.dtype}; train this adapter "
                "again, or use a base model in bfloat16"
            )
        return weight

    def _adapt(self, module: str, factors: Mapping[str, str]) -> None:
        embedding = any(key.startswith("embedding") for key in factors)
        keys = ("embedding_A", "embedding_B") if embedding else ("A", "B")
        some = next(iter(factors.values()))
        for key in keys:
            if key not in factors:
                raise CheckpointError(
                    f"{self.label}: {self.shards.where(some)} is there, but its factor lora_{key} is missing; the "
                    "download is incomplete"
                )
        own = self._base_name(f"{module}.weight", some)
        a, b = (self.shards.tensors[factors[key]].shape for key in keys)
        transposed = embedding or bool(self.values.get("fan_in_fan_out"))
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise UnsupportedModelError(
                f"{self.label}: {self.shards.where(some)}: found factors of shape {a} and {b}, expected [r, in] and "
                "[out, r]; only linear modules and embeddings can be adapted"
            )
        shape = (a[1], b[0]) if transposed else (b[0], a[1])
        if self.tensors[own].shape != shape:
            raise ModelMismatchError(
                f"{self.label}: {self.shards.where(some)} belongs to a weight of shape {shape}, but {own} of the base "
                f"model ({self.base.path}) has {self.tensors[own].shape}; the adapter was made for another base model"
            )
        rank = self._pattern("rank_pattern", module, self.values.get("r", a[0]))
        if rank != a[0]:
            raise CheckpointError(
                f"{self.label}: {self.shards.where(factors[keys[0]])} has rank {a[0]}, expected the {rank} of "
                f"{ADAPTER_CONFIG}; the two files do not belong together"
            )
        alpha = self._pattern("alpha_pattern", module, self.values.get("lora_alpha", 8))
        scale = alpha / (rank**0.5 if self.values.get("use_rslora") else rank)
        self.low_rank[own] = LowRank(factors[keys[0]], factors[keys[1]], scale, transposed)

    def _replace(self, name: str, inner: str) -> None:
        if ".lora_" in inner:
            raise UnsupportedModelError(
                f"{self.label}: {self.shards.where(name)} is no part of a plain LoRA adapter (lora_A, lora_B)"
            )
        own, info = self._base_name(inner, name), self.shards.tensors[name]
        base = self.base.tensors[own]
        vocabulary = base.shape[:1] == (getattr(self.base.config, "vocab_size", None),)
        if info.shape != base.shape and not (vocabulary and info.shape[1:] == base.shape[1:]):
            raise ModelMismatchError(
                f"{self.label}: {self.shards.where(name)} has shape {info.shape}, but {own} of the base model "
                f"({self.base.path}) has {base.shape}; the adapter was made for another base model"
            )
        self.replaced[own] = name
        self.tensors[own] = TensorInfo(info.file, info.shape, base.dtype)

    def _base_name(self, inner: str, name: str) -> str:
        own = self.base.names.get(canonical(inner))
        if own is None:
            raise ModelMismatchError(
                f"{self.label}: {self.shards.where(name)} adapts {inner}, which the base model ({self.base.path}) has "
                "not; the adapter was made for another base model"
            )
        return own

    def _pattern(self, key: str, module: str, default: Any) -> float:
        """The value of the first pattern that a module's name ends with (regular expressions, as PEFT reads them)."""
        patterns: Mapping[str, Any] = self.values.get(key) or {}
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    def _check_kind(self) -> None:
        where = f"{self.label}: {self.path / ADAPTER_CONFIG}"
        kind = self.values.get("peft_type")
        if kind != "LORA":
            raise UnsupportedModelError(f"{where}: found peft_type {kind}, expected LORA; merge this adapter first")
        for key, variant in VARIANTS.items():
            if self.values.get(key):
                raise UnsupportedModelError(
                    f"{where}: found {key}, which is {variant}; expected a plain LoRA adapter; merge this one first"
                )
        initialisation = self.values.get("init_lora_weights")
        if initialisation not in INITIALISATIONS:
            raise UnsupportedModelError(
                f"{where}: found init_lora_weights {initialisation!r}, which changed the base model's weights too; "
                "expected a plain LoRA adapter; merge this one first, or convert it "
                "(peft: save_pretrained with path_initial_model_for_weight_conversion)"
            )

    def _check_every_layer(self, factors: Mapping[str, Mapping[str, str]]) -> None:
        """A module that is adapted in one layer is adapted in all, unless the config chooses layers."""
        targets = self.values.get("target_modules")
        chosen = any(self.values.get(key) is not None for key in ("layers_to_transform", "exclude_modules"))
        if chosen or not isinstance(targets, list) or re.search(r"\.\d+\.", " ".join(targets)):
            return
        adapted = {canonical(f"{module}.weight") for module in factors}
        kinds = {_any_layer(name) for name in adapted if _any_layer(name) != name}
        for name, own in self.base.names.items():
            if name not in adapted and _any_layer(name) in kinds:
                raise CheckpointError(
                    f"{self.label}: {self.path / WEIGHTS} has no lora_A and lora_B for {own.removesuffix('.weight')}, "
                    "though the same module of another layer is adapted; the download is incomplete"
                )


def _any_layer(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)
