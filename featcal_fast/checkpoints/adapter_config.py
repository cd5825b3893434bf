"""`adapter_config.json`: which kinds of adapters are read, and the types of what is used of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from featcal_fast.checkpoints.reader import ADAPTER_CONFIG, read_json
from featcal_fast.errors import CheckpointError, UnsupportedModelError, named, shown

LARGEST_ALPHA = 1e6  # a thousand times what anyone trains with
MOST_SAVED = 100  # modules
MOST_TOKENS = 1_000_000  # whose rows are trained; no vocabulary has more
MERGE = "merge this one first (peft: merge_and_unload, save_pretrained) and name the merged model"
# What makes an adapter something else than is read here, by its key in adapter_config.json.
VARIANTS = {
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "target_parameters": "LoRA of bare parameters",
    "layer_replication": "layer replication",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
}
SWITCH = re.compile("use_[a-z0-9_]+")  # what variants to come will be called by
SWITCHES = ("use_dora", "use_rslora")  # the ones that are read
# Initialisations that leave the base's weights alone; the others train against a base that was changed too.
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
# Kinds that add something to a model's inputs, and change no weight of it.
PROMPTS = (
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE"),
)


def read_adapter_config(path: Path, label: str) -> dict[str, Any]:
    """What an adapter's folder says of it.

    Args:
        path: the folder.
        label: what to call it in errors.

    Raises:
        CheckpointError: it is missing, no JSON object, or a value is of another type than PEFT gives it.
        UnsupportedModelError: another kind of adapter than LoRA, or a variant of it that is not read.
    """
    values = read_json(path, ADAPTER_CONFIG, label)
    where = f"{label}: {path / ADAPTER_CONFIG}"
    _check_kind(values, where)
    for key, (fits, expected) in VALUES.items():
        if key in values and not fits(values[key]):
            raise CheckpointError(f"{where}: {key}: found {shown(values[key])}, expected {expected}")
    return values


def _check_kind(values: Mapping[str, Any], where: str) -> None:
    kind = values.get("peft_type")
    if kind in PROMPTS:
        raise UnsupportedModelError(
            f"{where}: found peft_type {named(kind)}, which learns inputs and changes no weight, so that there is "
            "nothing to merge; expected LORA"
        )
    if kind != "LORA":
        raise UnsupportedModelError(f"{where}: found peft_type {named(kind)}, expected LORA; {MERGE}")
    for key, value in values.items():
        variant = VARIANTS.get(key)
        if variant is None and SWITCH.fullmatch(key) and key not in SWITCHES:
            variant = "another kind of adapter"
        if variant and value:
            raise UnsupportedModelError(
                f"{where}: found {key}, which is {variant}; expected a LoRA adapter, plain, with DoRA or rsLoRA; "
                f"{MERGE}"
            )
    initialisation = values.get("init_lora_weights")
    if initialisation not in INITIALISATIONS:
        raise UnsupportedModelError(
            f"{where}: found init_lora_weights {shown(initialisation)}, which changed the base model's weights, "
            f"too; expected a plain LoRA adapter; {MERGE}, or convert it "
            "(peft: save_pretrained with path_initial_model_for_weight_conversion)"
        )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST_ALPHA  # type: ignore[arg-type]


def _is_names(value: object, most: float = math.inf) -> bool:
    return isinstance(value, list) and len(value) <= most and all(isinstance(item, str) for item in value)


def _is_layers(value: object) -> bool:
    return all(type(item) is int for item in (value if isinstance(value, list) else [value]))


def _is_pattern_values(value: object) -> bool:
    return isinstance(value, Mapping) and all(map(_is_number, value.values()))


def _is_tokens(value: object) -> bool:
    if not isinstance(value, list) or len(value) > MOST_TOKENS:
        return False
    return all(type(item) is int and item >= 0 for item in value) and len(set(value)) == len(value)


NAMES = (lambda value: value is None or isinstance(value, str) or _is_names(value), "a regular expression or a list")
FLAG = (lambda value: value is None or isinstance(value, bool), "true or false")
NUMBER = f"a number of at most {LARGEST_ALPHA:,.0f}"
PATTERN_VALUES = (lambda value: value is None or _is_pattern_values(value), f"{NUMBER} by regular expression")
VALUES: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (lambda value: type(value) is int and value > 0, "an integer above 0"),
    "lora_alpha": (_is_number, NUMBER),
    "use_rslora": FLAG,
    "use_dora": FLAG,
    "lora_bias": FLAG,
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
    "trainable_token_indices": (
        lambda value: value is None or all(map(_is_tokens, value.values() if isinstance(value, dict) else [value])),
        "a list of ids, each once, or such a list by module",
    ),
}
