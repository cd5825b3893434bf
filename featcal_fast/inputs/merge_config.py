"""What a mergekit config says of a merge's inputs; how they were merged does not matter, as the result is there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from featcal_fast.errors import RecipeError, named, shown

MOST_MODELS = 256
NAMED = 6  # slices that an error names
FORMS = ("models", "slices", "modules")  # of which a config has exactly one
# Keys that do not change which inputs there are.
OTHERS = ("dtype", "out_dtype", "parameters", "tokenizer", "tokenizer_source", "chat_template")
# What a key that is not known here is called if it may name models.
MODELS = re.compile(r"model|lora|adapter|expert|source|checkpoint|donor|teacher|slice|module|base", re.IGNORECASE)

Layers = tuple[int, int]


@dataclass(frozen=True)
class Reference:
    """A model as a config names it.

    Attributes:
        text: `path[@revision][+lora[@revision]]`.
        where: its key, for errors.
        parts: model and adapter, where keys tell them apart; a text is for others to split.
    """

    text: str
    where: str
    parts: tuple[str, str | None] | None = None


@dataclass(frozen=True)
class MergeConfig:
    """The inputs of a merge.

    Attributes:
        method: how they were merged.
        base: what `base_model` names.
        models: what was merged, in order; some more than once, perhaps.
        layers: of slices, the first layer of each model and the one after the last.
        adds_base: whether mergekit merges `base` too where `models` do not name it.
    """

    method: str
    base: Reference | None
    models: tuple[Reference, ...]
    layers: tuple[tuple[Reference, Layers], ...]
    adds_base: bool


def parse_config(values: object) -> MergeConfig:
    """The inputs that a config names.

    Args:
        values: what its file holds.

    Raises:
        RecipeError: it is none, names models in a way that is not known here, or makes a model whose layers are not
            those of its inputs, each in its place.
    """
    config = _mapping(values, "the document", "merge_method, models, ...")
    if "merge_method" not in config and "experts" in config:
        raise RecipeError(
            "it is one of mergekit-moe, whose experts stand side by side in the model instead of being merged; such a "
            "model cannot be calibrated toward them"
        )
    method = config.get("merge_method")
    if not isinstance(method, str) or not method:
        raise RecipeError(f"merge_method: found {shown(method)}, expected the name of one, such as ties")
    given = [key for key in FORMS if config.get(key)]
    if len(given) != 1:
        raise RecipeError(f"found {' and '.join(given) or 'none'} of {', '.join(FORMS)}, expected exactly one of them")
    form = given[0]
    modules = _modules(config["modules"]) if form == "modules" else {"": config}
    parts = [_Part(part, f"{name}." if name else "") for name, part in modules.items()]
    models = _same_models(parts)
    bases = [*{base.text: base for part in parts for base in part.bases}.values()]
    if len(bases) > 1:
        texts = ", ".join(named(each.text) for each in bases)
        raise RecipeError(f"its modules have base models of their own ({texts}), expected one for the whole model")
    own = None if config.get("base_model") is None else _reference(config["base_model"], "base_model")
    base = bases[0] if bases else own
    # Of several modules nobody says here how many layers each has.
    layers = parts[0].layers if len(parts) == 1 else ()
    known = {each.text for each in (*models, *bases, *([own] if own else []))}
    _check_unknown(config, ("merge_method", "base_model", *FORMS, *OTHERS), "", known)
    for part in parts:
        part.check_unknown(known)
    return MergeConfig(method, base, models, layers, adds_base=any(not part.layers for part in parts))


class _Part:
    """A whole model's merge, or that of one of its modules: a list of models, or one slice.

    Attributes:
        models: what it is made of.
        bases: the base model of the slice, if it has one of its own.
        layers: of a slice, those of each model.
    """

    def __init__(self, values: Mapping[Any, Any], where: str) -> None:
        self.bases: list[Reference] = []
        self.layers: tuple[tuple[Reference, Layers], ...] = ()
        self.where, self.values = where, values
        key = "models" if values.get("models") else "slices"
        if where and bool(values.get("models")) == bool(values.get("slices")):
            raise RecipeError(f"{where.rstrip('.')}: expected one of models and slices")
        if key == "models":
            self.entries = _entries(values[key], f"{where}models")
            self.slice: Mapping[Any, Any] = {}
        else:
            self.slice = self._only_slice(values[key])
            self.entries = _entries(self.slice.get("sources"), f"{where}slices[0].sources")
        self.models = [_reference(entry["model"], f"{place}.model") for place, entry in self.entries]
        if key == "slices":
            self._read_slice()

    def check_unknown(self, known: set[str]) -> None:
        """Of everything in it but a whole config's own keys."""
        if self.where:
            _check_unknown(self.values, ("models", "slices", "parameters"), self.where, known)
        _check_unknown(
            self.slice, ("sources", "base_model", "residual_weight", "parameters"), f"{self.where}slices[0].", known
        )
        for place, entry in self.entries:
            _check_unknown(entry, ("model", "parameters", "layer_range"), f"{place}.", known)

    def _only_slice(self, slices: object) -> Mapping[Any, Any]:
        where = f"{self.where}slices"
        if not isinstance(slices, list):
            raise RecipeError(f"{where}: found {shown(slices)}, expected a list")
        if len(slices) == 1:
            return _mapping(slices[0], f"{where}[0]", "sources: [{model: ..., layer_range: [0, 32]}, ...]")
        told = [f"{where}[{i}] ({_told(each)})" for i, each in enumerate(slices[:NAMED])]
        told += [f"{len(slices) - NAMED} more"] * (len(slices) > NAMED)
        raise RecipeError(
            f"the model is made of {len(slices)} slices, of which each is known to the experts as some of their layers "
            f"only, perhaps in another place: {', '.join(told)}; expected models, or one slice of all their layers. "
            "Where the slices are the same models' layers in their order, list these under `models:` instead: only "
            "the inputs matter here"
        )

    def _read_slice(self) -> None:
        where = f"{self.where}slices[0]"
        if self.slice.get("base_model") is not None:
            self.bases = [_reference(self.slice["base_model"], f"{where}.base_model")]
        ranges = [_layer_range(entry.get("layer_range"), place) for place, entry in self.entries]
        self.layers = tuple(zip(self.models, ranges, strict=True))
        for model, (first, last) in self.layers:
            if first != 0 or last != ranges[0][1]:
                raise RecipeError(
                    f"{where} cannot be mapped: it takes layers {first} to {last} of {named(model.text)}, expected "
                    f"layers 0 to {ranges[0][1]} of every model: layer i of the result must be made of their layers i"
                )


def _told(slice_: object) -> str:
    """What a slice takes, for an error."""
    sources = slice_.get("sources") if isinstance(slice_, Mapping) else None
    found = [each for each in sources if isinstance(each, Mapping)] if isinstance(sources, list) else []
    told = [f"layers {shown(each.get('layer_range'))} of {_name(each.get('model'))}" for each in found[:3]]
    return " with ".join(told) or "no sources"


def _name(value: object) -> str:
    return named(value) if isinstance(value, str) else shown(value)


def _modules(value: object) -> dict[str, Mapping[Any, Any]]:
    modules = _mapping(value, "modules", "a name: {models: [...]}")
    if len(modules) > MOST_MODELS:
        raise RecipeError(f"modules: found {len(modules)}, expected at most {MOST_MODELS}")
    return {
        f"modules.{named(name)}": _mapping(module, f"modules.{named(name)}", "{models: [...]}")
        for name, module in modules.items()
    }


def _same_models(parts: list[_Part]) -> tuple[Reference, ...]:
    """The models of all parts, which must be the same."""
    first = parts[0]
    for part in parts[1:]:
        if {each.text for each in part.models} != {each.text for each in first.models}:
            raise RecipeError(
                f"{part.where.rstrip('.')} is made of other models ({_listed(part)}) than {first.where.rstrip('.')} "
                f"({_listed(first)}); expected the same ones in every module: no expert knows the whole model otherwise"
            )
    return tuple(first.models)


def _listed(part: _Part) -> str:
    return ", ".join(named(each.text) for each in part.models[:NAMED])


def _entries(value: object, where: str) -> list[tuple[str, Mapping[Any, Any]]]:
    """What stands in a list of models, each with its place."""
    if not isinstance(value, list) or not value:
        raise RecipeError(f"{where}: found {shown(value)}, expected a list of {{model: ...}}")
    if len(value) > MOST_MODELS:
        raise RecipeError(f"{where}: found {len(value)} models, expected at most {MOST_MODELS}")
    entries = [(f"{where}[{i}]", _mapping(each, f"{where}[{i}]", "{model: ...}")) for i, each in enumerate(value)]
    for place, entry in entries:
        if "model" not in entry:
            raise RecipeError(f"{place}.model: missing; it is required")
    return entries


def _layer_range(value: object, place: str) -> Layers:
    bounds = [int(each) for each in value if type(each) is int] if isinstance(value, list) else []
    if len(bounds) != 2 or not isinstance(value, list) or len(value) != 2 or not 0 <= bounds[0] < bounds[1] < 10**6:
        raise RecipeError(f"{place}.layer_range: found {shown(value)}, expected two numbers of layers, such as [0, 32]")
    return bounds[0], bounds[1]


def _reference(value: object, where: str) -> Reference:
    """A model: `path[@revision][+lora[@revision]]`, or a mapping of these."""
    if isinstance(value, Mapping):
        _check_keys(value, ("model", "lora", "override_architecture"), where)
        model, lora = _path(value.get("model"), f"{where}.model"), value.get("lora")
        adapter = None if lora is None else _path(lora, f"{where}.lora")
        return Reference(model if adapter is None else f"{model}+{adapter}", where, (model, adapter))
    return Reference(_text(value, where), where)


def _path(value: object, where: str) -> str:
    """`path[@revision]`, or a mapping of both."""
    if not isinstance(value, Mapping):
        return _text(value, where)
    _check_keys(value, ("path", "revision"), where)
    path, revision = _text(value.get("path"), f"{where}.path"), value.get("revision")
    return path if revision is None else f"{path}@{_text(revision, f'{where}.revision')}"


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RecipeError(f"{where}: found {shown(value)}, expected a model: a folder, or a hub id org/name")
    return value


def _check_keys(value: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in value:
        if key not in known:
            raise RecipeError(f"{where}.{named(key)}: unknown key; expected one of {', '.join(known)}")


def _check_unknown(values: Mapping[Any, Any], known: tuple[str, ...], where: str, models: set[str]) -> None:
    """Refuse keys that mergekit may have by now and that may name models which are not `models`."""
    for key, value in values.items():
        if key not in known and (other := next(_named_in(str(key), value, models), None)):
            raise RecipeError(
                f"{where}{named(key)}: unknown key, which may name a model ({named(other)}); which part it has in the "
                "merge is not known here: write a recipe yourself (docs/recipes.md)"
            )


def _named_in(key: str, value: object, models: set[str]) -> Iterator[str]:
    """Texts in a value that may name other models."""
    if isinstance(value, Mapping):
        for inner, each in value.items():
            yield from _named_in(f"{key} {inner}", each, models)
    elif isinstance(value, list):
        for each in value:
            yield from _named_in(key, each, models)
    elif isinstance(value, str) and value not in models and MODELS.search(key):
        yield value


def _mapping(value: object, where: str, expected: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where}: found {shown(value)}, expected {expected}")
    return value
