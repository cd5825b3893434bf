"""Values of a JSON document made into dataclasses, by what those say of their fields."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from featcal_fast.errors import shown
from featcal_fast.settings import Settings

T = TypeVar("T")
NAMES = {int: "a whole number", str: "a text", float: "a number, or null for none that is finite", dict: "an object"}


class FormError(ValueError):
    """A value has another form; the text says where, what was found and what was expected."""


def build(cls: type[T], values: Any, where: str = "") -> T:
    """A dataclass from a JSON object: keys that it does not know are left out, absent ones have their defaults.

    Args:
        cls: of fields that are numbers, texts, dataclasses, lists and dicts of these, None, `Any`; or `Settings`.
        values: the object.
        where: it is in its document, for errors.

    Returns:
        The dataclass.

    Raises:
        FormError: a value is of another type, or one without a default is missing.
        RecipeError: a setting is out of its range.
    """
    if not isinstance(values, dict):
        raise _found(values, "an object", where)
    hints, found = get_type_hints(cls), {}
    for item in fields(cls):  # type: ignore[arg-type]
        inner = f"{where}.{item.name}" if where else item.name
        if item.name in values:
            found[item.name] = _value(hints[item.name], values[item.name], inner)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise FormError(f"{inner}: missing")
    return cls(**found)


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if kind is Settings:  # which looks at its values itself
        known = {item.name for item in fields(Settings)}
        return Settings.from_dict({key: each for key, each in _checked(dict, value, where).items() if key in known})
    if is_dataclass(kind):
        return build(kind, value, where)  # type: ignore[arg-type]
    if origin is list:
        return [_value(inner[0], each, f"{where}[{i}]") for i, each in enumerate(_checked(list, value, where))]
    if origin is dict:
        return {key: _value(inner[1], each, f"{where}.{key}") for key, each in _checked(dict, value, where).items()}
    if type(None) in inner:
        return None if value is None else _value(inner[0], value, where)
    if kind is float and value is None:
        return math.nan
    if kind is float and type(value) is int:
        return float(value)
    return _checked(kind, value, where)


def _checked(kind: type[T], value: Any, where: str) -> T:
    if type(value) is not kind:
        raise _found(value, NAMES.get(kind, "a list"), where)
    return value


def _found(value: Any, expected: str, where: str) -> FormError:
    return FormError(f"{where + ': ' if where else ''}found {shown(value)}, expected {expected}")
