"""JSON and YAML from strangers: bounded in depth, numbers and aliases, each key once."""

from __future__ import annotations

import gc
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import yaml

from featcal_fast.errors import named, shown

DEPTH = 64  # of lists and mappings in each other
NODES = 20_000  # of a YAML document, with what its aliases stand for; its reader makes 50,000 a second
VALUES = 1_500_000  # of a JSON document; the header of a model of 100,000 tensors holds half of that
DIGITS = 40  # of an integer; tokenizers' "no limit" has 31
YAML_BYTES = 2**17
_TOO_DEEP = f"it is nested more than {DEPTH} levels deep"
_TOO_MANY = f"it holds more than {NODES} values, what its aliases stand for included"


class DocumentError(ValueError):
    """A document is not one, or asks too much of its reader; says where, not in which file."""


def parse_json(data: bytes | str, *, finite: bool = True) -> Any:
    """What a JSON document holds.

    Args:
        data: the document.
        finite: whether NaN and infinities are refused, which JSON has not, but Python writes.

    Raises:
        DocumentError: it is not JSON, nested too deeply, holds a key twice in one object, NaN or an infinity, an
            integer of too many digits, or more than 1,500,000 values.
    """
    marks = (data.count(each) for each in "[{,") if isinstance(data, str) else (data.count(each) for each in b"[{,")
    if sum(marks) > VALUES:  # each of which may take twenty times the memory of its text
        raise DocumentError(f"it may hold more than {VALUES} values")
    try:
        with no_collection():
            value = json.loads(
                data,
                object_pairs_hook=_object,
                parse_constant=_constant if finite else float,
                parse_int=_integer,
                parse_float=_float if finite else float,
            )
    except DocumentError:
        raise
    except RecursionError:
        raise DocumentError(_TOO_DEEP) from None
    except ValueError as error:  # of JSON, and of text that is not UTF-8
        raise DocumentError(str(error)) from None
    _check_depth(value)
    return value


@contextmanager
def no_collection() -> Iterator[None]:
    """Without Python's search for garbage, which takes longer than making many values that are none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DocumentError(f"the key {shown(key)} is there twice in one object; each may be there once")
            seen.add(key)
    return found


def _constant(name: str) -> float:
    raise DocumentError(f"found {name}, expected a finite number")


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise DocumentError(f"found an integer of {len(digits)} digits, expected at most {DIGITS}")
    return int(digits)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise DocumentError(f"found the number {shown(text)}, which is too large")
    return value


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [each for each in level if isinstance(each, (dict, list)) and each]:
        depth += 1
        if depth > DEPTH:
            raise DocumentError(_TOO_DEEP)
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]


def parse_yaml(data: bytes) -> Any:
    """What a YAML document holds, by the core schema of YAML 1.2: `1e-5` is a number; `1:30`, `no` and dates are texts.

    Keys are texts, as they are written: `1` and `'1'` are the same one.

    Raises:
        DocumentError: it is not YAML, larger than 128 KiB, nested too deeply, holds a key twice in one mapping or one
            that is no text, more than 20,000 values (an alias is what it stands for), an alias that stands for itself,
            an integer of too many digits, or a type of YAML's that a recipe has no use for.
    """
    if len(data) > YAML_BYTES:
        raise DocumentError(f"it is {len(data)} bytes long, expected at most {YAML_BYTES}")
    try:
        return yaml.load(data.decode(), _Loader)
    except DocumentError:
        raise
    except RecursionError:
        raise DocumentError(_TOO_DEEP) from None
    except Exception as error:  # PyYAML raises more than its own: ValueError for `%YAML 1.` and 5,000 digits
        raise DocumentError(" ".join(str(error).split())) from None  # of several lines


_TEXT = "tag:yaml.org,2002:str"
_Place = tuple[Any, str] | None  # the place around it, and the key there
_SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float")}


class _Loader(yaml.SafeLoader):
    """PyYAML's, with the types of the core schema only, and bounds."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (as its types say)
    yaml_constructors: ClassVar[dict[str | None, Callable[..., Any]]] = {
        None: yaml.SafeLoader.construct_undefined,
        "tag:yaml.org,2002:map": yaml.SafeLoader.construct_yaml_map,
        "tag:yaml.org,2002:seq": yaml.SafeLoader.construct_yaml_seq,
        _TEXT: yaml.SafeLoader.construct_yaml_str,
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.nodes = self.depth = 0
        self.place: _Place = None
        self.places: dict[int, _Place] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.nodes, self.depth = self.nodes + 1, self.depth + 1
        if self.nodes > NODES:
            raise DocumentError(_TOO_MANY)
        if self.depth > DEPTH:
            raise DocumentError(_TOO_DEEP)
        outer = self.place
        if isinstance(index, yaml.ScalarNode):  # the key of a value
            self.place = outer, index.value
        node = super().compose_node(parent, index)
        self.places[id(node)] = self.place
        self.place, self.depth = outer, self.depth - 1
        return node

    def wrong(self, node: yaml.Node, place: _Place, text: str) -> DocumentError:
        """What is wrong, where."""
        keys = []
        while place:
            place, key = place
            keys.append(named(key))
        return DocumentError(f"line {node.start_mark.line + 1}: {'.'.join(reversed(keys))}{': ' if keys else ''}{text}")

    def get_single_node(self) -> yaml.Node | None:
        root = super().get_single_node()
        if root is not None:
            _measure(root, {})
        return root

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for place, (key, value) in enumerate(node.value):
            if not isinstance(key, yaml.ScalarNode):
                raise self.wrong(key, self.place, "found a list or a mapping as a key, expected a text")
            plain = key.tag in _SCALARS  # of `01` and `+1` one means what the other does
            for name in {key.value, str(self.construct_object(key))} if plain else {key.value}:
                if name in seen:
                    text = f"the key {shown(key.value)} is there twice in one mapping (line {seen[name]} has it, too)"
                    raise self.wrong(key, self.place, f"{text}; each may be there once")
                seen[name] = key.start_mark.line + 1
            if plain:
                node.value[place] = yaml.ScalarNode(_TEXT, key.value, key.start_mark, key.end_mark), value
        return node


def _measure(node: yaml.Node, measured: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many nodes one stands for, and how deep they are in each other."""
    if (found := measured.get(id(node))) is not None:
        if not found[0]:
            raise DocumentError(f"the alias of line {node.start_mark.line + 1} stands for itself")
        return found
    measured[id(node)] = 0, 0
    inner = [_measure(each, measured) for each in _inner(node)]
    nodes, depth = 1 + sum(each[0] for each in inner), 1 + max((each[1] for each in inner), default=-1)
    if nodes > NODES:
        raise DocumentError(_TOO_MANY)
    if depth > DEPTH:
        raise DocumentError(_TOO_DEEP)
    measured[id(node)] = nodes, depth
    return nodes, depth


def _inner(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair


def _scalar(tag: str, pattern: str, first: str, make: Callable[[str], Any]) -> None:
    """A type of the core schema: its texts, the characters that they begin with, and what is made of them."""
    expression = re.compile(pattern)

    def construct(loader: _Loader, node: yaml.ScalarNode) -> Any:
        text = loader.construct_scalar(node)
        try:
            if expression.fullmatch(text):
                return make(text)
            raise DocumentError(f"it is no {tag}")
        except DocumentError as error:
            raise loader.wrong(node, loader.places.get(id(node)), f"{shown(text)}: {error}") from None

    _Loader.add_constructor(f"tag:yaml.org,2002:{tag}", construct)
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})\\Z"), list(first))


_scalar("null", "~|null|Null|NULL|", "~nN", lambda _: None)
_scalar("bool", "true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true")
_scalar("int", r"[-+]?[0-9]+", "-+0123456789", _integer)
_scalar("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789", _float)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"\Z"), [""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<\Z"), ["<"])
