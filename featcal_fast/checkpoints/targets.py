"""Which modules an adapter's config speaks of, as PEFT reads it; its regular expressions are a stranger's programs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from featcal_fast.errors import CheckpointError
from featcal_fast.untrusted.patterns import PatternError, full_matches

NUMBER = re.compile(r"\.(\d{1,9})(?=\.)")


class Targets:
    """What `adapter_config.json` says of modules by their names.

    Args:
        values: what it holds, of the right types.
        where: label and path, for errors.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def named(self, modules: Sequence[str]) -> tuple[set[str], set[str]]:
        """Those of `modules` that the config says are adapted; and, where it names none, those that may be."""
        allowed = set(modules) - self._matching("exclude_modules", modules)
        targets, layers = self.values.get("target_modules"), self.values.get("layers_to_transform")
        if not targets or targets == "all-linear":
            return set(), allowed if layers in (None, []) else set()
        found = self._matching("target_modules", modules) & allowed
        if isinstance(targets, list) and layers not in (None, []):
            found &= self._in_layers(modules, layers if isinstance(layers, list) else [layers])
        return found, set()

    def by_pattern(self, key: str, modules: Sequence[str], default: Any) -> dict[str, Any]:
        """For each module the value of the first pattern that its name ends with."""
        patterns: Mapping[str, Any] = self.values.get(key) or {}
        found = dict.fromkeys(modules, default)
        matching = self._ending(key, list(patterns), modules)
        for value, names in reversed(list(zip(patterns.values(), matching, strict=True))):
            found.update(dict.fromkeys(names, value))
        return found

    def _matching(self, key: str, modules: Sequence[str]) -> set[str]:
        """A text is a regular expression for full names, a list holds last parts of names."""
        chosen = self.values.get(key) or []
        if isinstance(chosen, str):
            (matches,) = self._full_matches(key, [chosen], modules)
            return {module for module, match in zip(modules, matches, strict=True) if match}
        ends = set(chosen)
        return {module for module in modules if not ends.isdisjoint(_ends(module))}

    def _in_layers(self, modules: Sequence[str], layers: Sequence[int]) -> set[str]:
        """The modules whose layer is one of these; which number in a name is the layer's, `layers_pattern` says."""
        patterns = self.values.get("layers_pattern")
        numbers = {
            module: {module[: each.start()]: int(each[1]) for each in NUMBER.finditer(module)} for module in modules
        }
        lists = set().union(*numbers.values())
        if patterns:
            texts = [patterns] if isinstance(patterns, str) else patterns
            lists = set().union(*self._ending("layers_pattern", texts, sorted(lists)))
        own = {module: [number for name, number in each.items() if name in lists] for module, each in numbers.items()}
        chosen = set(layers)
        return {module for module, found in own.items() if found and found[0] in chosen}

    def _ending(self, key: str, patterns: Sequence[str], names: Sequence[str]) -> list[set[str]]:
        """For each pattern the names that it matches as a whole, or from one of their dots on."""
        ends = {name: list(_ends(name)) for name in names}
        matches = self._full_matches(key, patterns, distinct := list(dict.fromkeys(chain(*ends.values()))))
        matching = [{end for end, match in zip(distinct, own, strict=True) if match} for own in matches]
        return [{name for name in names if not own.isdisjoint(ends[name])} for own in matching]

    def _full_matches(self, key: str, patterns: Sequence[str], names: Sequence[str]) -> list[list[bool]]:
        try:
            return full_matches(patterns, names)
        except PatternError as error:
            raise CheckpointError(
                f"{self.where}: {key}: found a pattern that cannot be used ({error}), expected regular expressions for "
                "names of modules"
            ) from error


def _ends(module: str) -> Iterator[str]:
    """A name, and what comes after each of its dots."""
    parts = module.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))
