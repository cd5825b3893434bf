"""What to calibrate, in PEFT's vocabulary: a string is a regular expression, a list holds suffixes of module names."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn

from featcal_fast.errors import RecipeError, UnsupportedModelError
from featcal_fast.models import Structure
from featcal_fast.models.linear import is_linear
from featcal_fast.settings import Patterns, Settings


def matches(name: str, patterns: Patterns) -> bool:
    """Whether a module's full name matches: entirely if `patterns` is a string, by its last parts if it is a list."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in patterns)


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
        RecipeError: names the pattern.
    """
    names = list(names)
    for key in ("include", "exclude"):
        patterns = getattr(settings, key)
        for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
            if not any(matches(name, pattern if isinstance(patterns, str) else (pattern,)) for name in names):
                raise RecipeError(
                    f"settings.{key}: {pattern!r} matches no module inside of the layers; expected a regular "
                    f"expression for a module's full name, or a list of suffixes; a name is {names[0]!r}"
                )
    if all(reason_to_keep(name, settings) for name in names):
        raise RecipeError("settings: include and exclude leave no module to calibrate")


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
            if is_linear(module) or isinstance(module, nn.LayerNorm)
        ]
        check_patterns(modules, settings)
