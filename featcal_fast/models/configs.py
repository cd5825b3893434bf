"""What the config of a model says of its forward, beside the shapes of its parameters."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from featcal_fast.errors import shown

# Models whose positions are counted from the number of the padding token on.
FROM_PADDING = {
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "xmod"),
    *("longformer", "mpnet", "luke", "ibert", "lilt", "layoutlmv3", "markuplm"),
}
# What may differ between models that compute the same with the same parameters: who made them and with what, how they
# are trained and read out, and sizes: of what is outside of the blocks, and what the shapes of their parameters tell.
IGNORED = re.compile(
    r"_name_or_path|transformers_version|architectures|dtype|torch_dtype|quantization_config|chunk_size_feed_forward"
    r"|.*_token_ids?|.*_token_index|use_cache|output_.*|return_dict|use_return_dict|pretraining_tp"
    r"|.*dropout.*|.*_pdrop|drop_path_rate|layerdrop|router_aux_loss_coef|router_jitter_noise|gradient_checkpointing"
    r"|initializer_.*|.*_init_value|layerscale_value|id2label|label2id|num_labels|problem_type|classifier_.*|summary_.*"
    r"|vocab_size|type_vocab_size|tie_word_embeddings|pooler_.*|projection_dim|encoder_stride|use_mask_token"
    r"|final_logit_softcapping|head_dim|n_inner"
    r"|_?out_(features|indices)|stage_names|reshape_hidden_states|apply_layernorm|max_window_layers|use_sliding_window"
)
POSITIONS = {"max_position_embeddings", "n_positions", "original_max_position_embeddings"}
OLDER = re.compile(r"rope_parameters\..*\btype")  # which older versions write beside `rope_type`
FIXED = ("default", "linear", "llama3")  # kinds of rotary angles that do not depend on these
NAMED = 10  # differences that an error names


def max_positions(config: Any) -> int | None:
    """The longest sequence that a model takes, in tokens; None where its config tells no limit."""
    count = getattr(config, "max_position_embeddings", None)
    if count is not None and (first := first_position(config)) is not None:
        return max(0, int(count) - first)
    return None if count is None else int(count)


def first_position(config: Any) -> int | None:
    """The row of its table of positions that a model's first token has, where the padding token's number decides."""
    return _padding(config) + 1 if getattr(config, "model_type", None) in FROM_PADDING else None


def turns_positions(config: Any) -> bool:
    """Whether a model's positions are rotary angles, which go on behind the number that its config tells."""
    return bool(getattr(config, "rope_parameters", None))


def image_shape(config: Any) -> tuple[int, int, int] | None:
    """Channels, height and width of the images that a model takes, or its vision tower; None where it tells of none."""
    vision = getattr(config, "vision_config", config)
    sides, channels = _sides(vision, "image_size"), getattr(vision, "num_channels", None)
    return None if sides is None else (_length(channels) or 3, *sides)


def image_tokens(config: Any) -> int:
    """Tokens that an image becomes; 0 where the config tells of no images."""
    shape, patch = image_shape(config), _sides(getattr(config, "vision_config", config), "patch_size") or (16, 16)
    return 0 if shape is None else (shape[1] // patch[0]) * (shape[2] // patch[1]) + 1


def differences(found: Any, expected: Any, tokens: Tensor | None = None) -> list[str]:
    """What would have two models compute different things with the same parameters, by key of their configs.

    Args:
        found: a config of transformers.
        expected: another one.
        tokens: for each token id of the second model the first one's own, or -1; None where ids are the same.
    """
    theirs, ours = _forward(found), _forward(expected)
    if tokens is not None:
        for key in token_keys(expected):
            if isinstance(ours.get(key), int) and 0 <= ours[key] < len(tokens):
                ours[key] = int(tokens[ours[key]])
    keys = sorted(key for key in theirs.keys() | ours.keys() if not _same(theirs.get(key), ours.get(key)))
    told = [f"{key} (found {shown(theirs.get(key))}, expected {shown(ours.get(key))})" for key in keys[:NAMED]]
    return told + ([f"{len(keys) - NAMED} more"] if len(keys) > NAMED else [])


def token_keys(config: Any) -> tuple[str, ...]:
    """Which keys of a config name tokens that the forward depends on."""
    if getattr(config, "is_encoder_decoder", False):  # which makes inputs of targets with these
        return ("decoder_start_token_id", "pad_token_id")
    return ("pad_token_id",) if getattr(config, "model_type", None) in FROM_PADDING else ()


def _forward(config: Any) -> dict[str, Any]:
    """What a config says of the forward: of the keys that its class knows, with what is in them by dotted path."""
    values = config.to_dict()
    known = {*inspect.signature(type(config)).parameters, *getattr(type(config), "__dataclass_fields__", ())}
    kept = {key: value for key, value in values.items() if key in known and not IGNORED.fullmatch(key)}
    kept["model_type"] = values.get("model_type")
    if not _scales_positions(kept.get("rope_parameters")):  # then they only say how much is given at once
        kept = {key: value for key, value in kept.items() if key not in POSITIONS}
    for key in token_keys(config):
        kept[key] = _padding(config) if kept["model_type"] in FROM_PADDING else values.get(key)
    return {key: value for key, value in _flat(kept) if not OLDER.fullmatch(key)}


def _sides(config: Any, name: str) -> tuple[int, int] | None:
    """A height and a width, which may be one number for both; whether a model can be built, its builder will say."""
    found = getattr(config, name, None)
    both = [_length(each) for each in found[:2]] if isinstance(found, (list, tuple)) else [_length(found)]
    return (both[0], both[-1]) if both and both[0] and both[-1] else None


def _length(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None


def _padding(config: Any) -> int:
    padding = getattr(config, "pad_token_id", None)
    return 1 if padding is None else int(padding)


def _scales_positions(rope: object) -> bool:
    """Whether rotary angles depend on how long a sequence may be."""
    if not isinstance(rope, Mapping):
        return False
    return rope.get("rope_type", "default") not in FIXED or any(map(_scales_positions, rope.values()))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _same(one: object, other: object) -> bool:
    """Equal, as far as JSON and a float32 can tell."""
    if _is_nothing(one) and _is_nothing(other):
        return True
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def _is_nothing(value: object) -> bool:
    """How versions of transformers write that something is not used."""
    return value is None or value is False or value in ([], {})
