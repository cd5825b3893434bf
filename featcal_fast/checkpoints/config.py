"""What `config.json` says, once it is known that nobody is hurt by it: from its values to a config of transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from featcal_fast.errors import CheckpointError, UnsupportedModelError, shown, told
from featcal_fast.untrusted.quiet import quiet

# Values that would have transformers look elsewhere: for code, kernels, weights or another config; none of them says
# what a model computes.
ELSEWHERE = {
    *("auto_map", "_name_or_path", "name_or_path", "_commit_hash", "configuration_files"),
    *("quantization_config", "compression_config"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
}
# Where a config says how weights are packed: the second is what compressed-tensors began with, and vLLM reads still.
QUANTISED = ("quantization_config", "compression_config")
LABELS = {"id2label", "label2id", "task_specific_params"}  # whose keys are names of a person's own
LARGEST = 2**40  # of a size
MOST = 2**16  # of what a config's own code counts up to
FLOATS = ("Infinity", "-Infinity", "NaN")
COUNTED = re.compile(r"(?!.*vocab)(.*_)?(layers?|labels|experts|heads?|blocks?|stages?|groups?|depths?)(_.*)?")


def quantisation(values: Mapping[str, Any]) -> object:
    """What a `config.json` says of how weights are packed; None where they are plain."""
    current, older = map(values.get, QUANTISED)
    return current or (older if isinstance(older, Mapping) and older.get("quant_method") else None)


def plain_config(values: Mapping[str, Any]) -> str | None:
    """The `config.json` of the same model with plain weights; None where `values`, which it holds, are of one."""
    if quantisation(values) is None:
        return None
    plain = {key: value for key, value in values.items() if key not in QUANTISED}
    return json.dumps(plain, indent=2, ensure_ascii=False) + "\n"


def transformers_config(values: Mapping[str, Any], path: Path, label: str) -> Any:
    """The transformers config that a model's `config.json` describes.

    Args:
        values: what it holds.
        path: of the file, for errors.
        label: what to call the model in errors.

    Raises:
        CheckpointError: a value is out of its range, or of a wrong type.
        UnsupportedModelError: transformers knows no such model, or makes nothing of its values.
    """
    from transformers import CONFIG_MAPPING, __version__

    where = f"{label}: {path}"
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        own = "; models with code of their own (auto_map) cannot be calibrated" if "auto_map" in values else ""
        raise UnsupportedModelError(
            f"{where}: found model_type {shown(kind)}, expected one that transformers {__version__} has{own}"
        )
    if kind == "mistral" and "layer_types" in values and "ministral" in CONFIG_MAPPING:  # as AutoConfig has it
        kind = "ministral"
    cls, values = CONFIG_MAPPING[kind], _decoded(values)
    described = f"it describes {shown(values.get('architectures') or kind)}"
    for key, value in _entries(values):
        _check(key, value, cls, where, described)
    try:
        with quiet("transformers"):
            return cls.from_dict(_without(values))
    except Exception as error:  # whatever transformers makes of values that are not what they should be
        raise UnsupportedModelError(f"{where} cannot be used: {told(error)}; {described}") from error


def _decoded(value: Any) -> Any:
    """What transformers writes of numbers that JSON has none for: {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        number = value.get("__float__") if len(value) == 1 else None
        return float(number) if number in FLOATS else {key: _decoded(each) for key, each in value.items()}
    return [_decoded(each) for each in value] if isinstance(value, list) else value


def _entries(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All keys and values, those of towers and of other parts too."""
    for key, value in values.items():
        yield key, value
        if isinstance(value, Mapping) and key not in LABELS:
            yield from _entries(value)


def _without(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without(value) if isinstance(value, Mapping) and key not in LABELS else value
        for key, value in values.items()
        if key not in ELSEWHERE
    }


def _check(key: str, value: object, cls: type, where: str, described: str) -> None:
    """Refuse what the config's class would be broken by, and numbers that cannot be meant."""
    if key.startswith("__") or key == "attribute_map" or callable(getattr(cls, key, None)):
        raise CheckpointError(f"{where}: {shown(key)}: found a value in place of what transformers' own code does")
    if COUNTED.fullmatch(key) and isinstance(value, int) and abs(value) > MOST:
        raise CheckpointError(f"{where}: {shown(key)}: found {shown(value)}, expected at most {MOST}; {described}")
    fits, expected = RANGES.get(key, (None, ""))
    if fits is not None and value is not None and not fits(value):
        raise CheckpointError(f"{where}: {key}: found {shown(value)}, expected {expected}; {described}")


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value <= LARGEST


def _are_sizes(value: object) -> bool:
    sizes = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
    return all(map(_is_size, sizes)) and len(sizes) > 0


def _is_small(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1  # type: ignore[operator]


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and value > 0  # type: ignore[operator]


def _are_classes(value: object) -> bool:
    """Whether these may be classes of models; of what else a library has, some is code that runs when asked for."""
    return isinstance(value, list) and all(
        isinstance(each, str) and each.isidentifier() and each[0].isupper() and not each.endswith("PreTrainedModel")
        for each in value
    )


def _is_dtype(value: object) -> bool:
    names = value.values() if isinstance(value, Mapping) else [value]
    return all(isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype) for name in names)


SIZE = (_is_size, "an integer above 0")
SIZES = (_are_sizes, "an integer above 0, or several")
DTYPE = (_is_dtype, "the name of a dtype such as bfloat16")
RANGES: dict[str, tuple[Callable[[object], bool], str]] = {
    "architectures": (_are_classes, "a list of class names of models"),
    **dict.fromkeys(("dtype", "torch_dtype"), DTYPE),
    # Several are of stages, or of layers, one each (Swin, Gemma 3n); a class that knows of one only will say so.
    **dict.fromkeys(("image_size", "patch_size", "intermediate_size", "moe_intermediate_size"), SIZES),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_heads"), SIZES),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "d_ff", "num_layers", "num_decoder_layers", "n_layer"), SIZE),
    **dict.fromkeys(("n_head", "head_dim", "d_kv", "n_inner", "num_channels"), SIZE),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions"), SIZE),
    **dict.fromkeys(("relative_attention_num_buckets", "relative_attention_max_distance"), SIZE),
    "projection_dim": (lambda value: value == 0 or _is_size(value), "an integer from 0 on"),  # 0: none (DPR)
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), (_is_small, "a number from 0 to 1")),
    **dict.fromkeys(
        ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"),
        (_is_positive, "a number above 0"),
    ),
}
