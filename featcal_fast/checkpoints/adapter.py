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

from featcal_fast.checkpoints.metadata import Metadata
from featcal_fast.checkpoints.reader import ADAPTER_CONFIG, Checkpoint, TensorSource, canonical, read_json
from featcal_fast.checkpoints.renamed import meanings
from featcal_fast.checkpoints.shards import Shards, TensorInfo, is_finite
from featcal_fast.checkpoints.targets import Targets
from featcal_fast.errors import CheckpointError, ModelMismatchError, UnsupportedModelError, named, shown

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
ROWS = 2048  # of a weight that its change is formed for at a time
LARGEST_ALPHA = 1e6  # a thousand times what anyone trains with
MOST_SAVED = 100  # modules
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
        self.targets = Targets(self.values, f"{label}: {path / ADAPTER_CONFIG}")
        factors = self._sort()
        modules = list(factors)
        ranks = self.targets.by_pattern("rank_pattern", modules, self.values.get("r"))
        alphas = self.targets.by_pattern("alpha_pattern", modules, self.values.get("lora_alpha", 8))
        for module, found in factors.items():
            self._adapt(module, found, ranks[module], alphas[module])
        self._check_complete(modules)

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
        """Tensor names by canonical name; the base's."""
        return self.base.names

    @cached_property
    def _renamed(self) -> dict[str, str]:
        """The base's tensors by what transformers calls them, where files have another name."""
        return {meaning: own for name, own in self.base.names.items() for meaning in meanings(name)[1:]}

    def adapts(self, model: TensorSource) -> bool:
        """Whether `model` is what it adapts, whatever way leads to that."""
        return self.base.path.resolve() == model.path.resolve()

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

    def metadata(self) -> Metadata:
        """The base's likewise."""
        return self.base.metadata()

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

    def _sort(self) -> dict[str, dict[str, str]]:
        """The names of factors by module and kind; what else is there takes the place of the base's."""
        factors: dict[str, dict[str, str]] = defaultdict(dict)
        for name in self.shards.tensors:
            inner = name.removeprefix(PREFIX).replace(".base_layer.", ".")
            if match := FACTOR.fullmatch(inner):
                kind = f"{match['embedding'] or ''}{match['factor']}"
                self._check_single(name, factors[match["module"]].get(kind))
                factors[match["module"]][kind] = name
            else:
                self._replace(name, re.sub(r"\.modules_to_save(\.default)?\.", ".", inner))
        return factors

    def _check_single(self, name: str, other: str | None) -> None:
        if other is not None:
            raise CheckpointError(
                f"{self.label}: {self.shards.where(name)} and {other} are for the same tensor; nobody can tell which "
                "of them counts"
            )

    def _adapt(self, module: str, factors: Mapping[str, str], rank: Any, alpha: Any) -> None:
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
        for key in sorted(factors.keys() - set(keys)):
            self._check_single(factors[key], factors[keys[0]])
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
        rank = a[0] if rank is None else rank
        if rank != a[0]:
            raise CheckpointError(
                f"{self.label}: {self.shards.where(factors[keys[0]])} has rank {a[0]}, expected the {shown(rank)} of "
                f"{ADAPTER_CONFIG}; the two files do not belong together"
            )
        self._check_single(some, self.low_rank[own].a if own in self.low_rank else None)
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
        if info.shape != base.shape and not (vocabulary and info.shape[1:] == base.shape[1:] and 0 not in info.shape):
            raise ModelMismatchError(
                f"{self.label}: {self.shards.where(name)} has shape {info.shape}, but {own} of the base model "
                f"({self.base.path}) has {base.shape}; the adapter was made for {self._made_for}"
            )
        if info.dtype.is_floating_point != base.dtype.is_floating_point:
            raise UnsupportedModelError(
                f"{self.label}: {self.shards.where(name)} has dtype {info.dtype}, but {own} of the base model "
                f"({self.base.path}) has {base.dtype}; expected plain floating-point weights"
            )
        self._check_single(name, self.replaced.get(own))
        self.replaced[own] = name
        self.tensors[own] = TensorInfo(info.file, info.shape, base.dtype)

    def _base_name(self, inner: str, name: str) -> str:
        known = canonical(inner)
        own = self.base.names.get(known) or self._renamed.get(known)
        if own is None:
            adapts = f"{self.label}: {self.shards.where(name)} adapts {inner}, which the base model ({self.base.path})"
            if getattr(self.base.config, "tie_word_embeddings", False) and inner.startswith(OUTPUTS):
                raise UnsupportedModelError(
                    f"{adapts} shares with its embedding (tie_word_embeddings); merge this adapter first, into a "
                    "checkpoint with an output layer of its own"
                )
            raise ModelMismatchError(f"{adapts} has not; the adapter was made for {self._made_for}")
        return own

    def _check_kind(self) -> None:
        where = f"{self.label}: {self.path / ADAPTER_CONFIG}"
        kind = self.values.get("peft_type")
        if kind != "LORA":
            raise UnsupportedModelError(
                f"{where}: found peft_type {named(kind)}, expected LORA; merge this adapter first"
            )
        for key, variant in VARIANTS.items():
            if self.values.get(key):
                raise UnsupportedModelError(
                    f"{where}: found {key}, which is {variant}; expected a plain LoRA adapter; merge this one first"
                )
        initialisation = self.values.get("init_lora_weights")
        if initialisation not in INITIALISATIONS:
            raise UnsupportedModelError(
                f"{where}: found init_lora_weights {shown(initialisation)}, which changed the base model's weights, "
                "too; expected a plain LoRA adapter; merge this one first, or convert it "
                "(peft: save_pretrained with path_initial_model_for_weight_conversion)"
            )

    def _check_values(self) -> None:
        """What is used of the config has the type that it should have."""
        for key, (fits, expected) in VALUES.items():
            if key in self.values and not fits(self.values[key]):
                found = self.values[key]
                raise CheckpointError(
                    f"{self.label}: {self.path / ADAPTER_CONFIG}: {key}: found {shown(found)}, expected {expected}"
                )

    def _check_complete(self, modules: Iterable[str]) -> None:
        """Every module that the config tells to adapt has factors, and every one that it tells to save is there."""
        if not self.low_rank and not self.replaced:
            raise CheckpointError(
                f"{self.label}: {self.path / WEIGHTS} holds no lora_A and lora_B; the adapter changes nothing"
            )
        adapted = {canonical(self._base_name(f"{module}.weight", module)) for module in modules}
        kinds, roots = {_any_layer(name) for name in adapted}, {_root(name) for name in adapted}
        # Of another root may be what the adapted model has not: the text tower beside a vision model, say. Experts are
        # matrices of one parameter in a model, each of its own in a checkpoint.
        others = {
            own.removesuffix(".weight"): _any_layer(name) in kinds
            for name, own in self.base.names.items()
            if name not in adapted and own.endswith(".weight") and len(self.base.tensors[own].shape) == 2
            if _root(name) in roots and ".experts." not in own
        }
        named, all_targets = self.targets.named(list(others))
        for module, like_others in others.items():
            if module in named or (like_others and module in all_targets):
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

    @property
    def _made_for(self) -> str:
        found = self.values.get("base_model_name_or_path")
        return f"another base model ({ADAPTER_CONFIG} names {named(found)})" if found else "another base model"


def _any_layer(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _root(name: str) -> str:
    """What comes before a layer's number; the name itself where there is none."""
    return re.split(r"\.\d+\.", name)[0]


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST_ALPHA  # type: ignore[arg-type]


def _is_names(value: object, most: float = math.inf) -> bool:
    return isinstance(value, list) and len(value) <= most and all(isinstance(item, str) for item in value)


def _is_layers(value: object) -> bool:
    return all(type(item) is int for item in (value if isinstance(value, list) else [value]))


def _is_pattern_values(value: object) -> bool:
    return isinstance(value, Mapping) and all(map(_is_number, value.values()))


NAMES = (lambda value: value is None or isinstance(value, str) or _is_names(value), "a regular expression or a list")
FLAG = (lambda value: value is None or isinstance(value, bool), "true or false")
NUMBER = f"a number of at most {LARGEST_ALPHA:,.0f}"
PATTERN_VALUES = (lambda value: value is None or _is_pattern_values(value), f"{NUMBER} by regular expression")
VALUES: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (lambda value: type(value) is int and value > 0, "an integer above 0"),
    "lora_alpha": (_is_number, NUMBER),
    "use_rslora": FLAG,
    "fan_in_fan_out": FLAG,
    "rank_pattern": PATTERN_VALUES,
    "alpha_pattern": PATTERN_VALUES,
    "target_modules": NAMES,
    "exclude_modules": NAMES,
    "layers_pattern": NAMES,
    "layers_to_transform": (lambda value: value is None or _is_layers(value), "a layer's number, or a list of them"),
    "modules_to_save": (
        lambda value: value is None or _is_names(value, MOST_SAVED),
        f"a list of at most {MOST_SAVED} names",
    ),
}
