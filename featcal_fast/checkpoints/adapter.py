"""PEFT LoRA adapters: an expert whose weights are `W_base + scale * B A`, formed a tensor at a time when read.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. In the latter, for a module `m` of the base model,

    base_model.model.m.lora_A.weight             [r, in]          and lora_B.weight [out, r]: a linear module
    base_model.model.m.lora_embedding_A          [r, rows]        and lora_embedding_B [width, r]: an embedding
    base_model.model.m.weight, .bias, ...        a trained tensor (`modules_to_save`, `bias`) in place of the base's
"""

from __future__ import annotations

import copy
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
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
OUTPUTS = ("lm_head.", "embed_out.")  # layers that may share the embedding's weight
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
        CheckpointError: not an adapter, truncated, or something that its config tells of is missing.
        UnsupportedModelError: another kind of adapter.
        ModelMismatchError: made for another base model.
    """

    def __init__(self, path: Path, label: str, base: Checkpoint) -> None:
        self.path, self.label = path, label
        self.base = Checkpoint(base.path, f"{label}, base model")  # of its own, so that reads are told apart
        self.values = read_json(path, ADAPTER_CONFIG, label)
        self._check_kind()
        self._check_values()
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
        self._check_complete(factors)

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

    def side_files(self) -> dict[str, Path]:
        """The base's: an adapter's folder is not a model's."""
        return self.base.side_files()

    def left_out(self) -> list[str]:
        """The base's likewise."""
        return self.base.left_out()

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
            if key in factors and not self.shards.tensors[factors[key]].dtype.is_floating_point:
                raise UnsupportedModelError(
                    f"{self.label}: {self.shards.where(factors[key])} has dtype "
                    f"{self.shards.tensors[factors[key]].dtype}, expected plain floating-point factors"
                )
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
                f"model ({self.base.path}) has {self.tensors[own].shape}; the adapter was made for {self._made_for}"
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
                f"({self.base.path}) has {base.shape}; the adapter was made for {self._made_for}"
            )
        self.replaced[own] = name
        self.tensors[own] = TensorInfo(info.file, info.shape, base.dtype)

    def _base_name(self, inner: str, name: str) -> str:
        own = self.base.names.get(canonical(inner))
        if own is None:
            adapts = f"{self.label}: {self.shards.where(name)} adapts {inner}, which the base model ({self.base.path})"
            if self.base.config.tie_word_embeddings and inner.startswith(OUTPUTS):
                raise UnsupportedModelError(
                    f"{adapts} shares with its embedding (tie_word_embeddings); merge this adapter first, into a "
                    "checkpoint with an output layer of its own"
                )
            raise ModelMismatchError(f"{adapts} has not; the adapter was made for {self._made_for}")
        return own

    def _pattern(self, key: str, module: str, default: float) -> float:
        """The value of the first pattern that a module's name ends with (regular expressions, as PEFT reads them)."""
        patterns: Mapping[str, float] = self.values.get(key) or {}
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

    def _check_values(self) -> None:
        """What is used of the config has the type that it should have."""
        for key, (fits, expected) in VALUES.items():
            if key in self.values and not fits(self.values[key]):
                found = self.values[key]
                raise CheckpointError(
                    f"{self.label}: {self.path / ADAPTER_CONFIG}: {key}: found {found!r}, expected {expected}"
                )

    def _check_complete(self, factors: Iterable[str]) -> None:
        """Every module that the config tells to adapt has factors, and every one that it tells to save is there."""
        if not self.low_rank and not self.replaced:
            raise CheckpointError(
                f"{self.label}: {self.path / WEIGHTS} holds no lora_A and lora_B; the adapter changes nothing"
            )
        adapted = {canonical(f"{module}.weight") for module in factors}
        kinds, roots = {_any_layer(name) for name in adapted}, {_root(name) for name in adapted}
        for name, own in self.base.names.items():
            module = own.removesuffix(".weight")
            # Of another root may be what the adapted model has not: the text tower beside a vision model, say. Experts
            # are matrices of one parameter in a model, each of its own in a checkpoint.
            if name in adapted or module == own or len(self.base.tensors[own].shape) != 2 or _root(name) not in roots:
                continue
            if self._is_target(module, _any_layer(name) in kinds) and ".experts." not in module:
                raise CheckpointError(
                    f"{self.label}: {self.path / WEIGHTS} has no lora_A and lora_B for {module}, which "
                    f"{ADAPTER_CONFIG} says is adapted; the download is incomplete"
                )
        for saved in self.values.get("modules_to_save") or ():
            known = [own for own in self.base.tensors if f".{saved}." in f".{own}"]
            if known and self.replaced.keys().isdisjoint(known):
                raise CheckpointError(
                    f"{self.label}: {self.path / WEIGHTS} has nothing for {known[0]}, though {ADAPTER_CONFIG} has "
                    f"{saved} among its modules_to_save; the download is incomplete"
                )

    def _is_target(self, module: str, adapted: bool) -> bool:
        """Whether a module is adapted, as PEFT reads the config; `adapted`: whether it is in some layer."""
        targets, layers = self.values.get("target_modules"), self.values.get("layers_to_transform")
        excluded = self.values.get("exclude_modules")
        if excluded and _matches(module, excluded):
            return False
        if not targets or targets == "all-linear":
            return adapted and layers in (None, [])
        if isinstance(targets, str) or layers in (None, []):
            return _matches(module, targets)
        patterns = self.values.get("layers_pattern") or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if index := re.match(rf".*\.{pattern}\.(\d+)\.", f"model.{module}"):
                chosen = layers if isinstance(layers, list) else [layers]
                return _matches(module, targets) and int(index[1]) in chosen
        return False

    @property
    def _made_for(self) -> str:
        found = self.values.get("base_model_name_or_path")
        return f"another base model ({ADAPTER_CONFIG} names {found})" if found else "another base model"


def _any_layer(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _root(name: str) -> str:
    """What comes before a layer's number; the name itself where there is none."""
    return re.split(r"\.\d+\.", name)[0]


def _matches(module: str, patterns: str | list[str]) -> bool:
    """As PEFT reads it: a string is a regular expression for a full name, a list holds last parts of names."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, module) is not None
    return any(module == part or module.endswith(f".{part}") for part in patterns)


def _is_expression(value: object) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_layers(value: object) -> bool:
    return all(type(item) is int for item in (value if isinstance(value, list) else [value]))


def _is_pattern_values(value: object) -> bool:
    return isinstance(value, Mapping) and all(_is_expression(key) and _is_number(own) for key, own in value.items())


NAMES = (lambda value: value is None or _is_expression(value) or _is_names(value), "a regular expression or a list")
PATTERN_VALUES = (lambda value: value is None or _is_pattern_values(value), "numbers by regular expression")
VALUES: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (lambda value: type(value) is int and value > 0, "an integer above 0"),
    "lora_alpha": (_is_number, "a number"),
    "rank_pattern": PATTERN_VALUES,
    "alpha_pattern": PATTERN_VALUES,
    "target_modules": NAMES,
    "exclude_modules": NAMES,
    "layers_pattern": NAMES,
    "layers_to_transform": (lambda value: value is None or _is_layers(value), "a layer's number, or a list of them"),
    "modules_to_save": (lambda value: value is None or _is_names(value), "a list of names"),
}
