"""JSON and YAML from strangers: bounded in depth, numbers and aliases, each key once."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import yaml

from featcal_fast.errors import shown

DEPTH = 64  # of lists and mappings in each other
NODES = 100_000  # of a YAML document, with what its aliases stand for
DIGITS = 40  # of an integer; tokenizers' "no limit" has 31
YAML_BYTES = 2**17  # its reader takes up to a second for them


class DocumentError(ValueError):
    """A document is not one, or asks too much of its reader; says where, not in which file."""


def parse_json(data: bytes | str) -> Any:
    """What a JSON document holds.

    Raises:
        DocumentError: it is not JSON, nested too deeply, holds a key twice in one object, NaN or an infinity, or an
            integer of too many digits.
    """
    try:
        value = json.loads(
            data,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_int=_integer,
            parse_float=_float,
        )
    except DocumentError:
        raise
    except RecursionError:
        raise DocumentError(f"it is nested more than {DEPTH} levels deep") from None
    except ValueError as error:  # of JSON, and of text that is not UTF-8
        raise DocumentError(str(error)) from None
    _check_depth(value)
    return value


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
            raise DocumentError(f"it is nested more than {DEPTH} levels deep")
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]


def parse_yaml(data: bytes) -> Any:
    """What a YAML document holds, by the core schema of YAML 1.2: `1e-5` is a number; `1:30`, `no` and dates are texts.

    Raises:
        DocumentError: it is not YAML, larger than 128 KiB, nested too deeply, holds a key twice in one mapping, aliases
            that stand for more than 100,000 values or for themselves, an integer of too many digits, or a type of
            YAML's that a recipe has no use for.
    """
    if len(data) > YAML_BYTES:
        raise DocumentError(f"it is {len(data)} bytes long, expected at most {YAML_BYTES}")
    try:
        return yaml.load(data.decode(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DocumentError(str(error)) from None
    except RecursionError:
        raise DocumentError(f"it is nested more than {DEPTH} levels deep") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's, with the types of the core schema only, and bounds."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (as its types say)
    yaml_constructors: ClassVar[dict[str | None, Callable[..., Any]]] = {
        None: yaml.SafeLoader.construct_undefined,
        "tag:yaml.org,2002:map": yaml.SafeLoader.construct_yaml_map,
        "tag:yaml.org,2002:seq": yaml.SafeLoader.construct_yaml_seq,
        "tag:yaml.org,2002:str": yaml.SafeLoader.construct_yaml_str,
    }
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEPTH:
            raise DocumentError(f"it is nested more than {DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        root = super().get_single_node()
        if root is not None:
            _count(root, {})
        return root

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise DocumentError(
                    f"line {key.start_mark.line + 1}: the key {shown(key.value)} is there twice in one mapping (line "
                    f"{seen[key.value] + 1} has it, too); each may be there once"
                )
            seen[str(key.value)] = key.start_mark.line
        return node


def _count(node: yaml.Node, counted: dict[int, int]) -> int:
    """How many nodes one stands for."""
    if (found := counted.get(id(node))) is not None:
        if not found:
            raise DocumentError(f"the alias of line {node.start_mark.line + 1} stands for itself")
        return found
    counted[id(node)] = 0
    total = 1 + sum(_count(each, counted) for each in _inner(node))
    if total > NODES:
        raise DocumentError(f"its aliases stand for more than {NODES} values")
    counted[id(node)] = total
    return total


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
            raise DocumentError(f"line {node.start_mark.line + 1}: {shown(text)}: {error}") from None

    _Loader.add_constructor(f"tag:yaml.org,2002:{tag}", construct)
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})\\Z"), list(first))


_scalar("null", "~|null|Null|NULL|", "~nN", lambda _: None)
_scalar("bool", "true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true")
_scalar("int", r"[-+]?[0-9]+", "-+0123456789", _integer)
_scalar("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789", _float)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"\Z"), [""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<\Z"), ["<"])
