"""What to calibrate, in PEFT's vocabulary: a string is a regular expression, a list holds suffixes of module names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from featcal_fast.errors import RecipeError, UnsupportedModelError, shown
from featcal_fast.models import Structure
from featcal_fast.models.linear import is_linear
from featcal_fast.settings import Patterns, Settings
from featcal_fast.untrusted.patterns import PatternError, full_matches


def matches(name: str, patterns: Patterns) -> bool:
    """Whether a module's full name matches: entirely if `patterns` is a string, by its last parts if it is a list."""
    if isinstance(patterns, str):  # which `check_patterns` has seen to end on such names
        return re.fullmatch(patterns, name) is not None
    return any(end in patterns for end in _ends(name))


def _ends(name: str) -> Iterator[str]:
    """`a.b.c`, `b.c` and `c`."""
    yield name
    while rest := name.partition(".")[2]:
        yield (name := rest)


def reason_to_keep(name: str, settings: Settings) -> str | None:
    """Why the module of this full name is not to be calibrated, or None."""
    if settings.include is not None and not matches(name, settings.include):
        return "not included"
    if settings.exclude is not None and matches(name, settings.exclude):
        return "excluded"
    return None


def check_patterns(names: Iterable[str], settings: Settings) -> None:
    """Refuse patterns that match nothing: a typing error would go unnoticed.

    Raises:
        RecipeError: names the pattern; also one that takes too long on these names.
    """
    names = list(names)
    for key in ("include", "exclude"):
        for pattern in _unmatched(key, getattr(settings, key), names):
            raise RecipeError(
                f"settings.{key}: {shown(pattern)} matches no module inside of the layers; expected a regular "
                f"expression for a module's full name, or a list of suffixes; a name is {names[0]!r}"
            )
    if all(reason_to_keep(name, settings) for name in names):
        raise RecipeError("settings: include and exclude leave no module to calibrate")


def _unmatched(key: str, patterns: Patterns | None, names: Sequence[str]) -> list[str]:
    """Patterns that no name matches."""
    if isinstance(patterns, str):
        try:
            return [] if any(full_matches([patterns], names)[0]) else [patterns]
        except PatternError as error:
            raise RecipeError(f"settings.{key}: {error}; write a simpler one") from error
    ends = {end for name in names for end in _ends(name)}
    return [pattern for pattern in patterns or () if pattern not in ends]


def check_settings(structure: Structure, settings: Settings) -> None:
    """Refuse settings that do not go with a model.

    Raises:
        RecipeError: a pattern of `include` or `exclude` matches nothing.
        UnsupportedModelError: the layers' dtype rules `forward_dtype` out.
    """
    dtypes = {parameter.dtype for block in structure.blocks for parameter in block.parameters()}
    if settings.forward_dtype != "auto" and not dtypes <= {torch.float32, torch.bfloat16}:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise UnsupportedModelError(
            f"settings.forward_dtype: found {settings.forward_dtype} for layers of {found}, expected float32 or "
            "bfloat16 ones; leave it at auto"
        )
    if settings.include is not None or settings.exclude is not None:
        modules = [
            f"{layer.path}.{name}"
            for layer, block in zip(structure.layers, structure.blocks, strict=True)
            for name, module in block.named_modules()
            if is_linear(module) or (settings.calibrate_layernorm and isinstance(module, nn.LayerNorm))
        ]
        check_patterns(modules, settings)
