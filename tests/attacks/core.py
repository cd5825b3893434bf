"""What an attack is: a good job, damaged, and what its error must say. The themes register theirs here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from attacks.good import Job

Damage = Callable[[Job], object]
Needle = str | tuple[str, ...]  # a text that the error must hold, or texts of which it must hold one
Variant = tuple[str, tuple[Needle, ...], Damage]
THEMES = (
    *("recipes", "settings", "paths", "folders", "headers", "indexes", "configs", "experts", "adapters", "quantised"),
    *("jsonl", "forms", "templates", "tokenizers", "ready_inputs", "images", "tables", "processors", "changing"),
    *("leftovers", "mergekit", "cards"),
    "scaled",
    "gguf",
)


@dataclass(frozen=True)
class Attack:
    """A good job, damaged.

    Attributes:
        name: its theme and its own name.
        kind: of job, see `good.KINDS`.
        needles: what the error must hold.
        damage: does it.
        calibrate_only: why `plan` cannot find it; empty where it must.
        during: done to the job's folder while it is being calibrated, at its first layer.
        options: of `calibrate`.
        as_user: whether root, who may read everything, is not stopped by it.
        family: of variants of one thing; nothing, where it stands for itself.
    """

    name: str
    kind: str
    needles: tuple[Needle, ...]
    damage: Damage
    calibrate_only: str = ""
    during: Damage | None = None
    options: dict[str, Any] = field(default_factory=dict)
    as_user: bool = False
    family: str = ""

    def missing(self, message: str) -> list[Needle]:
        """Needles that an error's message does not hold."""
        text = message.lower()
        each = [(needle,) if isinstance(needle, str) else needle for needle in self.needles]
        return [" or ".join(any_of) for any_of in each if not any(one.lower() in text for one in any_of)]


_ALL: dict[str, Attack] = {}


def attack(*needles: Needle, kind: str = "llama", **more: Any) -> Callable[[Damage], Damage]:
    """Register a function that damages a job's folder."""

    def register(damage: Damage) -> Damage:
        _add(Attack(_name(damage, damage.__name__), kind, needles, damage, **more))
        return damage

    return register


def attacks(
    kind: str = "llama", **more: Any
) -> Callable[[Callable[[], Iterable[Variant]]], Callable[[], Iterable[Variant]]]:
    """Register all of a family: what a function gives is names, needles and damages."""

    def register(family: Callable[[], Iterable[Variant]]) -> Callable[[], Iterable[Variant]]:
        for name, needles, damage in family():
            own = _name(family, f"{family.__name__}-{name}")
            _add(Attack(own, kind, needles, damage, family=_name(family, family.__name__), **more))
        return family

    return register


def all_attacks() -> dict[str, Attack]:
    """Every attack by name."""
    for theme in THEMES:
        import_module(f"attacks.{theme}")
    return dict(_ALL)


def valued(file: str, key: str, value: Any) -> Damage:
    """Puts a value into a JSON object."""
    return lambda job: job.json(file, **{key: value})


def set_to(key: str, value: Any) -> Damage:
    """Puts a value into the recipe."""
    return lambda job: job.recipe(**{key: value})


def holding(file: str, data: bytes | str) -> Damage:
    """Makes a file hold something else."""
    return lambda job: job.write(file, data)


def broken_texts(file: str) -> Iterable[tuple[str, Damage]]:
    """A JSON document broken in ways that no reader may forgive: cut off, and with bytes that stand in no document."""

    def cut(share: float) -> Damage:
        return lambda job: job.edit(file, lambda data: data.rstrip()[: int(share * (len(data.rstrip()) - 1))])

    def struck(share: float, byte: bytes) -> Damage:
        def strike(data: bytes) -> bytes:
            at = int(share * (len(data) - 1))
            return data[:at] + byte + data[at + 1 :]

        return lambda job: job.edit(file, strike)

    for percent in (0, 3, 50, 99):
        yield f"cut-at-{percent}", cut(percent / 100)
    for percent in (10, 40, 70):
        yield f"zero-at-{percent}", struck(percent / 100, b"\0")
        yield f"ff-at-{percent}", struck(percent / 100, b"\xff")


def slug(value: object) -> str:
    """A value as a part of a name: short, and the same in every run."""
    if value in ("", [], {}):
        return {"str": "no-text", "list": "no-list", "dict": "no-mapping"}[type(value).__name__]
    text = "".join(each if each.isalnum() or each in "-+." else "_" for each in ascii(value)).strip("_")
    return text if len(text) <= 40 else f"{text[:24]}-of-{len(text)}"


def _name(function: Callable[..., object], own: str) -> str:
    return f"{Path(function.__code__.co_filename).stem}/{own.replace('_', '-')}"


def _add(each: Attack) -> None:
    again = sum(name == each.name or name.startswith(f"{each.name}:") for name in _ALL)  # values that are written alike
    if again:
        each = replace(each, name=f"{each.name}:{again + 1}")
    assert len(each.needles) >= 2, f"{each.name} must say which file and which part of it is wrong"
    _ALL[each.name] = each
