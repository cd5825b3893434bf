"""Names of tensors that transformers changes as it loads a checkpoint, by its own mapping, whichever version it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

PARTS = ("text_config", "vision_config")  # of a config: configs of models in a model


class Renamings:
    """A mapping of transformers.

    Args:
        transforms: `WeightRenaming`s, and `WeightConverter`s, which make other tensors of some.
    """

    def __init__(self, transforms: Iterable[Any]) -> None:
        found = list(transforms)
        self._renamings = [each for each in found if not hasattr(each, "operations")]
        self._converters = [each for each in found if hasattr(each, "operations")]

    def apply(self, name: str) -> tuple[str, tuple[Any, str] | None]:
        """What a checkpoint's tensor is called in a model, if it is that model's; the first of several parameters.

        Returns:
            The name; and the converter that makes a parameter of it, with the converter's pattern that it has, or
            None where it is one as it is.
        """
        for renaming in self._renamings:
            name, _ = renaming.rename_source_key(name)
        for converter in self._converters:
            name, pattern = converter.rename_source_key(name)
            if pattern is not None:
                return name, (converter, pattern)
        return name, None

    def made_of(self, name: str) -> list[str]:
        """What a model has that such a tensor is a part of, or that are parts of it; empty where it is one as it is."""
        renamed, match = self.apply(name)
        patterns = [] if match is None else match[0].target_patterns
        return [renamed.replace(patterns[0], pattern, 1) for pattern in patterns]


def renamings_of(config: Any) -> Renamings:
    """What transformers may rename in checkpoints of a config's models, whichever class loads them."""
    found: dict[str, list[Any]] = {}
    for part in [config, *(getattr(config, name, None) for name in PARTS)]:
        kind = getattr(part, "model_type", None)
        for key in [*(getattr(part, "architectures", None) or ()), _base_class(kind), kind]:
            if isinstance(key, str) and key not in found:
                found[key] = _mapping(key)
    return Renamings([each for transforms in [*found.values(), _mapping("legacy")] for each in transforms])


def tied_names(config: Any) -> frozenset[str]:
    """Names of weights that a config's model shares with others, as transformers declares them."""
    import transformers

    names = getattr(config, "architectures", None) or (None,)
    keys = getattr(getattr(transformers, str(names[0]), None), "_tied_weights_keys", None) or ()
    if not getattr(config, "tie_word_embeddings", False):
        return frozenset()
    return frozenset([*keys, *(keys.values() if isinstance(keys, Mapping) else ())])


def in_order(name: str) -> list[tuple[int, int, str]]:
    """A key to sort names by, numbers by their values: stacks are in this order, and some renamings need it."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def _mapping(key: str) -> list[Any]:
    """Of a class or a `model_type`; transformers' module for it is private, and without it names stay as they are."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:
        return []
    mapping: Callable[[str], list[Any] | None] = get_checkpoint_conversion_mapping
    return mapping(key) or []


@cache
def _base_class(kind: str | None) -> object:
    """The class of a `model_type`'s models without a head."""
    from transformers.models.auto import modeling_auto

    return modeling_auto.MODEL_MAPPING_NAMES.get(kind or "")
