"""PEFT LoRA adapters: an expert whose weights are `W_base + scale * B A`, formed a tensor at a time when read.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. In the latter, for a module `m` of the base model,

    base_model.model.m.lora_A.weight             [r, in]          and lora_B.weight [out, r]: a linear module
    base_model.model.m.lora_embedding_A          [r, rows]        and lora_embedding_B [width, r]: an embedding
    base_model.model.m.lora_magnitude_vector     [out]            with DoRA, or [width]: the norms of its outputs
    base_model.model.m.lora_B.bias               [out]            what scale * this adds to its bias (`lora_bias`)
    base_model.model.m.token_adapter.trainable_tokens_delta  [n, width]   rows in place of some of an embedding's
    base_model.model.m.weight, .bias, ...        a trained tensor (`modules_to_save`, `bias`) in place of the base's

Files that trainers wrote from a model's own state have an adapter's name too, `lora_A.default.weight`, and those of
what was wrapped around modules.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featcal_fast.checkpoints.adapter_config import read_adapter_config
from featcal_fast.checkpoints.low_rank import LowRank, NoDirectionError, form, forming_bytes
from featcal_fast.checkpoints.metadata import Metadata
from featcal_fast.checkpoints.reader import ADAPTER_CONFIG, Checkpoint, TensorSource, canonical
from featcal_fast.checkpoints.renamed import Renamings, renamings_of, tied_names
from featcal_fast.checkpoints.shards import Shards, TensorInfo, is_finite
from featcal_fast.checkpoints.targets import Targets
from featcal_fast.errors import CheckpointError, ModelMismatchError, UnsupportedModelError, named, shown

WEIGHTS = "adapter_model.safetensors"
PART = 2**22  # values of two tensors that are compared at a time
PREFIX = "base_model.model."
WRAPPERS = re.compile(r"(?:^module|(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module))\.")
OWN = r"(?:\.(?P<adapter>[^.]+))??"  # an adapter's name
BIAS = re.compile(rf"(?P<module>.+)\.lora_B{OWN}\.bias")
FACTOR = re.compile(rf"(?P<module>.+)\.lora_(?P<factor>(?:embedding_)?[AB]|magnitude_vector){OWN}(?:\.weight)?")
TOKENS = re.compile(rf"(?P<module>.+)\.token_adapter\.trainable_tokens_delta{OWN}")


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
        self.base = type(base)(base.path, f"{label}, base model")  # of its own, so that reads are told apart
        self.values = read_adapter_config(path, label)
        self.shards = Shards(path, label, WEIGHTS, f"{WEIGHTS}.index.json")
        self.tensors = dict(self.base.tensors)
        self.low_rank: dict[str, LowRank] = {}  # by the base's tensor
        self.biases: dict[str, tuple[str, float]] = {}  # likewise: the adapter's tensor, and its scale
        self.replaced: dict[str, str] = {}  # the base's tensor -> the adapter's
        self.rows: dict[str, tuple[str, Tensor]] = {}  # likewise, of an embedding: and which of its rows
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
        found = {own: self._renamings.apply(own) for own in self.base.names.values()}
        return {canonical(renamed): own for own, (renamed, converted) in found.items() if converted is None}

    @cached_property
    def _renamings(self) -> Renamings:
        return renamings_of(self.base.config)

    def adapts(self, model: TensorSource) -> bool:
        """Whether `model` is what it adapts, whatever way leads to that."""
        return self.base.path.resolve() == model.path.resolve()

    @property
    def bytes_read(self) -> int:
        return self.base.bytes_read + self.shards.bytes_read

    def changed(self) -> set[str]:
        """The base's tensors that it changes."""
        return {*self.low_rank, *self.biases, *self.replaced, *self.rows}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, formed in float32 one at a time, on the CPU, checked to be finite.

        Raises:
            CheckpointError: names file and tensor.
        """
        found = {}
        for name in names:
            if name in self.replaced:
                own = self.replaced[name]
                tensor = self.shards.read([own])[own].to(self.tensors[name].dtype)
            else:
                tensor = self.base.read([name])[name]
            if name in self.rows:
                own, tokens = self.rows[name]
                tensor[tokens] = self.shards.read([own])[own].to(tensor.dtype)
                self._check_fits(own, name, tensor)
            if name in self.low_rank:
                self._form(name, tensor, self.low_rank[name])
            if name in self.biases:
                own, scale = self.biases[name]
                tensor.copy_(tensor.float().add_(self.shards.read([own])[own].float(), alpha=scale))
                self._check_fits(own, name, tensor)
            found[name] = tensor
        return found

    def stored_bytes(self, names: Iterable[str]) -> int:
        """What `read(names)` takes from files."""
        total = 0
        for name in names:
            total += 0 if name in self.replaced else self.base.stored_bytes([name])
            total += sum(self.shards.tensors[part].nbytes for part in self.parts(name))
        return total

    def parts(self, name: str) -> list[str]:
        """Its own tensors, by its own names, of which and the base's it forms one."""
        parts = [self.replaced[name]] if name in self.replaced else []
        if name in self.low_rank:
            parts += self.low_rank[name].parts
        return parts + [each[name][0] for each in (self.rows, self.biases) if name in each]

    def forming_bytes(self, name: str) -> int:
        """The most memory that reading a tensor takes besides itself."""
        if name in self.low_rank:
            return forming_bytes(self.tensors[name].shape)
        return 4 * sum(torch.Size(self.shards.tensors[part].shape).numel() for part in self.parts(name))

    def side_files(self) -> dict[str, Path]:
        """The base's: an adapter's folder is not a model's."""
        return self.base.side_files()

    def left_out(self) -> list[str]:
        """The base's likewise."""
        return self.base.left_out()

    def metadata(self) -> Metadata:
        """The base's likewise."""
        return self.base.metadata()

    def _form(self, name: str, weight: Tensor, low_rank: LowRank) -> None:
        """A weight changed in place."""
        try:
            form(weight, self.shards.read(low_rank.parts), low_rank)
        except NoDirectionError as error:
            raise CheckpointError(
                f"{self.label}: {self.shards.where(low_rank.parts[-1])}: {name}: {error}; PEFT makes NaN of it; train "
                "this adapter again without DoRA (use_dora), or without this module"
            ) from error
        self._check_fits(low_rank.b, name, weight)

    def _check_fits(self, own: str, name: str, tensor: Tensor) -> None:
        if not is_finite(tensor):
            raise CheckpointError(
                f"{self.label}: {self.shards.where(own)} makes {name} overflow {tensor.dtype}; train this adapter "
                "again, or use a base model in bfloat16"
            )

    def _sort(self) -> dict[str, dict[str, str]]:
        """The names of factors by module and kind; what else is there takes the place of the base's."""
        factors: dict[str, dict[str, str]] = defaultdict(dict)
        tokens: dict[str, str] = {}
        others, adapters = {}, set()
        for name in self.shards.tensors:
            inner = WRAPPERS.sub("", name).removeprefix(PREFIX)
            inner = re.sub(r"\.(token_adapter\.)?base_layer\.", ".", inner)
            if ".original_module." in inner:
                continue  # the base's own, in place of which a trained one is used
            if match := BIAS.fullmatch(inner) or FACTOR.fullmatch(inner):
                kind = match.groupdict().get("factor", "bias")
                self._check_single(name, factors[match["module"]].get(kind))
                factors[match["module"]][kind] = name
            elif match := TOKENS.fullmatch(inner):
                self._check_single(name, tokens.get(match["module"]))
                tokens[match["module"]] = name
            else:
                others[name] = inner
                continue
            adapters.add(match["adapter"])
        if len(adapters) > 1:
            raise CheckpointError(
                f"{self.label}: {self.path / WEIGHTS} holds several adapters ({named(sorted(map(str, adapters)))}); "
                "nobody can tell which of them counts; save one of them alone (peft: save_pretrained with "
                "selected_adapters)"
            )
        own = re.escape(next(iter(adapters), None) or "default")
        others = {
            name: re.sub(rf"\.modules_to_save(\.({own}|default))?\.", ".", inner) for name, inner in others.items()
        }
        shared = self._tied_in(others.values())
        for name in sorted(others, key=lambda name: others[name] in shared):
            if others[name] not in shared or not self._repeats(name):
                self._replace(name, others[name])
        for module, name in tokens.items():
            self._set_rows(module, name)
        return factors

    def _tied_in(self, modules: Iterable[str]) -> set[str]:
        """Those that the base's model has, but that it does not store: they are tied to one that it does."""
        tied = set(map(canonical, tied_names(self.base.config))) - {*self.base.names, *self._renamed}
        return {name for name in modules if canonical(name) in tied}

    def _repeats(self, name: str) -> bool:
        """Whether a tensor is the one that its embedding is replaced by: trainers save a tied one under both names."""
        tied = set(map(canonical, tied_names(self.base.config)))
        other = next((other for own, other in self.replaced.items() if canonical(own) in tied), name)
        info, found = self.shards.tensors[name], self.shards.tensors[other]
        if other == name or (found.shape, found.dtype) != (info.shape, info.dtype):
            return False
        count, before = torch.Size(info.shape).numel(), self.shards.bytes_read
        with self.shards.in_parts(name) as ours, self.shards.in_parts(other) as theirs:
            parts = [(start, min(start + PART, count)) for start in range(0, count, PART)]
            same = all(torch.equal(ours(*part), theirs(*part)) for part in parts)
        self.shards.bytes_read = before  # what was read is form, not weights
        return same

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
        variants = {"magnitude_vector": "use_dora"} | ({} if embedding else {"bias": "lora_bias"})
        self._check_factors(factors, keys, variants)
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
        for other in ([self.low_rank[own].a] if own in self.low_rank else []) + list(self.rows.get(own, ()))[:1]:
            self._check_single(some, str(other))
        scale = alpha / (rank**0.5 if self.values.get("use_rslora") else rank)
        low_rank = LowRank(factors[keys[0]], factors[keys[1]], scale, transposed, factors.get("magnitude_vector"))
        for name in filter(None, (low_rank.magnitude, factors.get("bias"))):
            if self.shards.tensors[name].shape != b[:1]:
                raise CheckpointError(
                    f"{self.label}: {self.shards.where(name)} has shape {self.shards.tensors[name].shape}, expected "
                    f"{b[:1]}, as {factors[keys[1]]} has it; download this adapter again"
                )
        self.low_rank[own] = low_rank
        if "bias" in factors:
            self._add_bias(module, factors["bias"], scale)

    def _check_factors(self, factors: Mapping[str, str], keys: Iterable[str], variants: Mapping[str, str]) -> None:
        """All of `keys` are there, in floating point, and what the config's switches tell of by `variants`; no more."""
        some = next(iter(factors.values()))
        for name in factors.values():
            if not self.shards.tensors[name].dtype.is_floating_point:
                raise UnsupportedModelError(
                    f"{self.label}: {self.shards.where(name)} has dtype {self.shards.tensors[name].dtype}, expected "
                    "plain floating-point factors"
                )
        for key in (*keys, *(key for key, switch in variants.items() if self.values.get(switch))):
            if key not in factors:
                missing = "B.bias" if key == "bias" else key
                told = f", though {ADAPTER_CONFIG} sets {variants[key]}" if key in variants else ""
                raise CheckpointError(
                    f"{self.label}: {self.shards.where(some)} is there, but its factor lora_{missing} is missing{told}"
                    "; the download is incomplete"
                )
        for key, switch in variants.items():
            if key in factors and not self.values.get(switch):
                raise CheckpointError(
                    f"{self.label}: {self.shards.where(factors[key])} is no part of a plain LoRA adapter, and "
                    f"{ADAPTER_CONFIG} does not set {switch}; the two files do not belong together"
                )
        for key in sorted(factors.keys() - {*keys, *variants}):
            self._check_single(factors[key], some)

    def _add_bias(self, module: str, name: str, scale: float) -> None:
        if canonical(f"{module}.bias") not in {*self.base.names, *self._renamed}:
            raise UnsupportedModelError(
                f"{self.label}: {self.shards.where(name)} adds to the bias of {module}, which has none in the base "
                f"model ({self.base.path}); nobody can merge this adapter; train it again without lora_bias"
            )
        self.biases[self._base_name(f"{module}.bias", name)] = (name, scale)

    def _set_rows(self, module: str, name: str) -> None:
        """An embedding's rows that were trained: which ones, the config says."""
        found, own = self.shards.tensors[name], self._base_name(f"{module}.weight", name)
        tokens = self.values.get("trainable_token_indices")
        if isinstance(tokens, dict):
            tokens = next((ids for key, ids in tokens.items() if f".{module}".endswith(f".{key}")), None)
        rows, *width = self.tensors[own].shape
        if not tokens or found.shape != (len(tokens), *width) or not found.dtype.is_floating_point:
            raise CheckpointError(
                f"{self.label}: {self.shards.where(name)} has shape {found.shape} and dtype {found.dtype}, expected "
                f"{(len(tokens or ()), *width)}, for the {len(tokens or ())} trainable_token_indices of "
                f"{ADAPTER_CONFIG}, and floating-point values; the two files do not belong together"
            )
        if max(tokens) >= rows:
            raise ModelMismatchError(
                f"{self.label}: {self.path / ADAPTER_CONFIG}: trainable_token_indices names token {max(tokens)}, but "
                f"{own} of the base model ({self.base.path}) has {rows} rows; the adapter was made for "
                f"{self._made_for}"
            )
        if own in self.rows:
            self._check_single(name, self.rows[own][0])
        self.rows[own] = (name, torch.tensor(tokens))

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
            own = self._renamed.get(canonical(self._renamings.apply(inner)[0]))
        if own is None:
            adapts = f"{self.label}: {self.shards.where(name)} adapts {inner}, which the base model ({self.base.path})"
            if known in map(canonical, tied_names(self.base.config)):
                raise UnsupportedModelError(
                    f"{adapts} shares with its embedding (tie_word_embeddings), and the adapter does not change both "
                    "alike; merge this adapter first, into a checkpoint with an output layer of its own"
                )
            for each in self.base.names.values():
                if known in map(canonical, self._renamings.made_of(each)):
                    raise UnsupportedModelError(
                        f"{adapts} stores in another layout, as a part of {each} or made of it; merge this adapter "
                        "first (peft: merge_and_unload, save_pretrained)"
                    )
            raise ModelMismatchError(f"{adapts} has not; the adapter was made for {self._made_for}")
        return own

    def _check_complete(self, modules: Iterable[str]) -> None:
        """Every module that the config tells to adapt has factors, and every one that it tells to save is there."""
        if not self.changed():
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
        tokens = self.values.get("trainable_token_indices") or ()
        if any(tokens.values() if isinstance(tokens, dict) else [tokens]) and not self.rows:
            raise CheckpointError(
                f"{self.label}: {self.path / WEIGHTS} has no trainable_tokens_delta, though {ADAPTER_CONFIG} has "
                "trainable_token_indices; the download is incomplete"
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
