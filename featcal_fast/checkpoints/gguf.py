"""An expert in a GGUF file: the base's tensors under llama.cpp's names, and what its converter did to them undone.

A file has neither a config nor a tokenizer that can be split by. So an expert takes the base's layout, dtypes and
config, once what the file says of the architecture is known to be the same; and which tokens its rows are, it tells.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from featcal_fast.checkpoints.gguf_file import (
    TOKEN_TYPES,
    TOKENS,
    Place,
    find_files,
    imported,
    read_header,
    read_values,
)
from featcal_fast.checkpoints.metadata import Metadata
from featcal_fast.checkpoints.reader import Checkpoint, canonical
from featcal_fast.checkpoints.shards import TensorInfo, is_finite
from featcal_fast.errors import CheckpointError, ModelMismatchError, UnsupportedModelError, shown, told

EXPERT = re.compile(r"(?P<before>.+\.experts)\.(?P<index>\d+)\.(?P<after>.+)")  # its matrix of a stack in a file
PREFIXES = ("", "model.", "transformer.")
SUFFIXES = (".weight", ".bias")
UNUSED, USER_DEFINED = 5, 4  # types of tokens
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
CLOSE = 1e-5  # relative; a file has numbers of 32 bits
FACTORS, LONG_FACTORS = "rope_freqs.weight", "rope_factors_"  # what rotary angles are divided by
DERIVED = ("rope_freqs.", LONG_FACTORS)  # what follows from a config; at the beginning, or after a block's number
UNPACKING = 64 * 2**20  # bytes that a piece takes to be dequantised

Undo = Callable[[str, Tensor, Any], Tensor]


def _as_it_is(name: str, value: Tensor, config: Any) -> Tensor:
    return value


def _rows_by_halves(name: str, value: Tensor, config: Any) -> Tensor:
    """Queries' and keys' rows, of which llama.cpp has those of a rotated pair side by side."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": getattr(config, "num_key_value_heads", None)}
    count = heads.get(name.split(".")[-2], 0) or 0
    if not count:
        return value
    rows = value.reshape(count, len(value) // count // 2, 2, *value.shape[1:])
    return rows.transpose(1, 2).reshape(value.shape)


def _norms_from_one(name: str, value: Tensor, config: Any) -> Tensor:
    """Norms, which llama.cpp has as what they multiply by."""
    return value - 1 if name.endswith("norm.weight") else value


def _columns_first(name: str, value: Tensor, config: Any) -> Tensor:
    """Matrices of blocks, which GPT-2 has transposed."""
    return value.mT if name.startswith("blk.") and value.ndim == 2 else value


# By architecture: `model_type`s of the same one, and what undoes the conversion.
ARCHITECTURES: dict[str, tuple[tuple[str, ...], Undo]] = {
    "llama": (("llama", "mistral", "mixtral"), _rows_by_halves),
    "granite": (("granite",), _rows_by_halves),
    "smollm3": (("smollm3",), _rows_by_halves),
    "qwen2": (("qwen2",), _as_it_is),
    "qwen3": (("qwen3",), _as_it_is),
    "qwen2moe": (("qwen2_moe",), _as_it_is),
    "qwen3moe": (("qwen3_moe",), _as_it_is),
    "phi3": (("phi3",), _as_it_is),
    "starcoder2": (("starcoder2",), _as_it_is),
    "gemma": (("gemma",), _norms_from_one),
    "gemma2": (("gemma2",), _norms_from_one),
    "gemma3": (("gemma3_text",), _norms_from_one),
    "gpt2": (("gpt2",), _columns_first),
}
# What a file says of an architecture that no shape tells, and what a config calls it; the first that it has.
SAME = {
    "block_count": ("num_hidden_layers",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"),
    "attention.sliding_window": ("sliding_window",),
    "rope.freq_base": ("rope_theta",),
    "rope.scaling.factor": ("factor",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "attention.scale": ("attention_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_used_count": ("num_experts_per_tok",),
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor of the base's comes from.

    Attributes:
        name: of the file's.
        place: in the file.
        index: of a stack's matrices, the one that it is.
    """

    name: str
    place: Place
    index: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.place.shape if self.index is None else self.place.shape[1:]

    @property
    def nbytes(self) -> int:
        return self.place.nbytes // (1 if self.index is None else self.place.shape[0])


class GgufExpert:
    """A model in a GGUF file, or in a split set of them; takes the base's layout, dtypes and config.

    Args:
        path: the file, or a folder with those of one model.
        label: what to call it in errors.
        base: the base model.

    Attributes:
        path: the file; of several their folder.
        vocabulary: ids of tokens by text; None where the file tells of none.

    Raises:
        CheckpointError: cut off, not whole, or its header contradicts itself.
        UnsupportedModelError: another architecture, or a type of tensors that cannot be dequantised.
        ModelMismatchError: not of the base's architecture.
    """

    def __init__(self, path: Path, label: str, base: Checkpoint) -> None:
        self.label, self.base, self.bytes_read = label, base, 0
        self._files = {each.name: each for each in find_files(path, label)}
        first = next(iter(self._files.values()))
        self.path = first if len(self._files) == 1 else first.parent
        found = read_header([*self._files.values()], label)
        self.values, self.places = found.values, found.places
        self._counting = Lock()  # blocks are read in a thread of their own
        self.architecture, self._undo = self._known()
        self._check_same()
        self.stored = self._find()
        self.tensors = {name: self._info(name, each) for name, each in self.stored.items()}
        self._check_rest()

    @cached_property
    def config(self) -> Any:
        """The base's transformers config, with the vocabulary's size of the file."""
        rows, config = self.places[EMBEDDING].shape[0], self.base.config
        if rows != getattr(config, "vocab_size", rows):
            config = copy.deepcopy(config)
            config.vocab_size = rows
        return config

    @cached_property
    def names(self) -> dict[str, str]:
        """Tensor names by canonical name."""
        return {canonical(name): name for name in self.tensors}

    @cached_property
    def vocabulary(self) -> dict[str, int] | None:
        texts, kinds = self.values.get(TOKENS), self.values.get(TOKEN_TYPES)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return None
        kinds = kinds if isinstance(kinds, list) and len(kinds) == len(texts) else [0] * len(texts)
        found: dict[str, int] = {}
        for row, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
            if kind != UNUSED:  # a row of no token, which is given a text all the same
                found.setdefault(text, row)
        for row, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
            if kind == USER_DEFINED:  # whose spaces the converter writes out
                found.setdefault(text.replace(" ", "\u2581"), row)
        return found

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, dequantised one at a time, on the CPU, checked to be finite.

        Raises:
            CheckpointError: names file and tensor.
        """
        found = {}
        for name in names:
            stored, info = self.stored[name], self.tensors[name]
            place, count = stored.place, torch.Size(stored.shape).numel()
            path = self._files[place.file]
            # Undone in the file's own precision where it is one of plain numbers, as a norm's is.
            dtype = torch.float32 if len(stored.shape) == 1 else info.dtype
            value = read_values(path, place, (stored.index or 0) * count, count, dtype, self.label)
            value = self._undo(stored.name, value.view(stored.shape), self.base.config)
            found[name] = value.to(info.dtype).reshape(info.shape).contiguous()
            if not is_finite(found[name]):
                raise CheckpointError(
                    f"{self.label}: {path}: tensor {stored.name} ({name}) is not finite in {info.dtype}; download or "
                    "convert this model again"
                )
            with self._counting:
                self.bytes_read += stored.nbytes
        return found

    def stored_bytes(self, names: Iterable[str]) -> int:
        """What `read(names)` takes from files."""
        return sum(self.stored[name].nbytes for name in names)

    def unpacking_bytes(self, name: str) -> int:
        """The most memory that reading a tensor takes besides it."""
        return UNPACKING + self.tensors[name].nbytes

    def side_files(self) -> dict[str, Path]:
        """The base's: a file has none."""
        return self.base.side_files()

    def left_out(self) -> list[str]:
        """The base's likewise."""
        return self.base.left_out()

    def metadata(self) -> Metadata:
        """The base's likewise."""
        return self.base.metadata()

    def _known(self) -> tuple[str, Undo]:
        """The architecture, and what undoes its conversion."""
        found, kind = self.values.get("general.architecture"), self.base.json.get("model_type")
        if not isinstance(found, str) or found not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"{self.label}: {self.path}: found a GGUF file of the architecture {shown(found)}, expected one of "
                f"{', '.join(ARCHITECTURES)}; use the same model in safetensors, or convert it"
            )
        kinds, undo = ARCHITECTURES[found]
        if kind not in kinds:
            raise ModelMismatchError(
                f"{self.label}: {self.path} is of the architecture {found}, but the base model ({self.base.path}) is a "
                f"{shown(kind)}; expected a model of the base's architecture"
            )
        return found, undo

    def _check_same(self) -> None:
        """What the file says of the model, the base's config must say: names and shapes do not tell all."""
        config = self.base.config
        rope = getattr(config, "rope_parameters", None) or {}
        rope = rope.get("full_attention", rope)
        for key, names in SAME.items():
            found = self.values.get(f"{self.architecture}.{key}")
            candidates = [rope.get(name) if name in rope else getattr(config, name, None) for name in names]
            expected = next((each for each in candidates if each is not None), None)
            if found is None or expected is None:
                continue
            numbers = found if isinstance(found, list) else [found]
            if not all(_is_close(each, expected) for each in numbers):
                raise self._differs(key, found, expected)
        scaling, expected = self._scaling(), rope.get("rope_type") or "default"
        if scaling != ("default" if expected == "dynamic" else expected):  # of the latter a file says nothing
            raise self._differs("rope.scaling.type", scaling, expected)
        if scaling == "llama3":
            self._check_factors()

    def _check_factors(self) -> None:
        """Rotary angles are divided by the same in the file and by the base's config."""
        try:
            expected = _llama3_factors(self.base.config)
        except Exception as error:  # whatever transformers makes of values that are not what they should be
            raise UnsupportedModelError(
                f"{self.label}: {self.base.path / 'config.json'} describes no rotary angles: {told(error)}"
            ) from error
        place = self.places[FACTORS]
        if place.shape != expected.shape:
            raise self._differs(FACTORS, place.shape, tuple(expected.shape))
        found = read_values(self._files[place.file], place, 0, len(expected), torch.float32, self.label)
        if not torch.allclose(found, expected, rtol=1e-3):
            raise self._differs(FACTORS, found.tolist(), expected.tolist())

    def _scaling(self) -> str:
        """How rotary angles are scaled, in transformers' words: some ways are only told by what the file holds."""
        if FACTORS in self.places:
            return "llama3"
        if any(LONG_FACTORS in name for name in self.places):
            return "longrope"
        found, factor = (self.values.get(f"{self.architecture}.rope.scaling.{key}") for key in ("type", "factor"))
        return "default" if found in (None, "none") or (found == "linear" and factor == 1) else str(found)

    def _differs(self, key: str, found: object, expected: object) -> ModelMismatchError:
        where = key if key in self.places else f"{self.architecture}.{key}"
        return ModelMismatchError(
            f"{self.label}: {self.path}: {where}: found {shown(found)}, expected the {shown(expected)} of the base "
            f"model ({self.base.path / 'config.json'}), whose config a GGUF expert is read by; use the same model in "
            "safetensors"
        )

    def _find(self) -> dict[str, Stored]:
        """The file's tensors by the base's names."""
        with imported():
            import gguf
        kind = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture), None)
        if kind is None:
            raise UnsupportedModelError(
                f"{self.label}: {self.path} is of the architecture {self.architecture}, which the installed package "
                "gguf does not know; install a newer one"
            )
        known = gguf.get_tensor_name_map(kind, self.base.config.num_hidden_layers)
        tied = bool(getattr(self.base.config, "tie_word_embeddings", False))
        found = {}
        for name in self.base.tensors:
            own, index = _own_name(name, known)
            if own == HEAD and HEAD not in self.places and tied:
                own = EMBEDDING
            if own is None:  # a buffer; whoever needs it will say that it is missing
                continue
            if own not in self.places:
                raise ModelMismatchError(
                    f"{self.label}: {self.path} has no tensor {own}, which is {name} of the base model "
                    f"({self.base.path}); expected a model of the base's architecture"
                )
            found[name] = Stored(own, self.places[own], index)
        if EMBEDDING not in self.places:
            raise CheckpointError(f"{self.label}: {self.path} has no tensor {EMBEDDING}; download it again")
        return found

    def _info(self, name: str, stored: Stored) -> TensorInfo:
        base, shape = self.base.tensors[name], stored.shape
        if self._undo is _columns_first and stored.name.startswith("blk."):
            shape = shape[::-1]
        rows = (self.places[EMBEDDING].shape[0], *base.shape[1:])
        vocabulary = base.shape[:1] == (getattr(self.base.config, "vocab_size", None),)
        expected = rows if vocabulary and stored.name in (EMBEDDING, HEAD) else base.shape
        inside = stored.index is None or (len(stored.place.shape) == 3 and stored.index < stored.place.shape[0])
        if [each for each in shape if each != 1] != [each for each in expected if each != 1] or not inside:
            raise ModelMismatchError(
                f"{self.label}: {self.path}: tensor {stored.name} has the shape {stored.place.shape}, but {name} of "
                f"the base model ({self.base.path}) has {base.shape}; expected a model of the base's architecture"
            )
        if not base.dtype.is_floating_point:
            raise UnsupportedModelError(
                f"{self.label}: {self.path}: tensor {stored.name} is {name} of the base model ({self.base.path}), "
                f"which has dtype {base.dtype}; expected floating point"
            )
        return TensorInfo("" if len(self._files) == 1 else stored.place.file, expected, base.dtype)

    def _check_rest(self) -> None:
        """Every tensor of the file is one of the base's, but what follows from others."""
        used = {stored.name for stored in self.stored.values()}
        for name in self.places:
            derived = name.startswith(DERIVED) or name.partition(".")[2].partition(".")[2].startswith(DERIVED)
            if name not in used and not derived and name not in (HEAD, EMBEDDING):
                raise ModelMismatchError(
                    f"{self.label}: {self.path} has a tensor {name}, which is none of the base model "
                    f"({self.base.path}); expected a model of the base's architecture"
                )


def _own_name(name: str, known: Any) -> tuple[str | None, int | None]:
    """A file's name of a tensor of the base's, and which of a stack it is."""
    match, index = EXPERT.fullmatch(name), None
    if match is not None:
        name, index = f"{match['before']}.{match['after']}", int(match["index"])
    for prefix in PREFIXES:
        found = known.get_name(f"{prefix}{canonical(name)}", try_suffixes=SUFFIXES)
        if found is not None and found.endswith(SUFFIXES):
            return found, index
    return None, None


def _llama3_factors(config: Any) -> Tensor:
    """What a config's rotary angles are divided by, `[head width / 2]`, of those that Llama 3.1 scales."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled: Tensor = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(len(scaled), dtype=torch.float64) / len(scaled))
    factors: Tensor = plain / scaled
    return factors.float()


def _is_close(found: object, expected: object) -> bool:
    if isinstance(expected, (list, tuple)):
        return any(_is_close(found, each) for each in expected)
    if not isinstance(found, (int, float)) or not isinstance(expected, (int, float)):
        return False
    return abs(found - expected) <= CLOSE * abs(expected)
