"""Docstrings of everything public are complete: what is missing is named.

The rule. A docstring begins with a summary, and says about its object:

- `Args:` names every parameter, and none that is not there. They may be left out where the text itself names every
  parameter in backticks. A dataclass's `Attributes:` are held to the same, and with `Args:` the sections below.
- `Returns:` says what comes back. It may be left out, with `Args:`, where the summary is all there is to say; and of
  properties, whose text says nothing else.
- `Raises:` names exceptions that there are, among them each that its module raises on the way.
- Tensors have a shape, `[rows, columns]`, or are said to be scalars; and a dtype, which the text may say for all.
- Sizes, times and rates, which are told by their names, have a unit.
- What is computed by an equation says which, of the paper or of its appendix.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import featcal_kernels
import pytest
from torch import Tensor

import featcal_fast as ff
from featcal_fast import errors
from featcal_fast.planning.plan import LayerPlan
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import GroupReport, LayerReport

SECTIONS = ("Args", "Attributes", "Returns", "Raises")
SHAPE = re.compile(r"`\[[^\]`]+\]`|\bscalars?\b")
DTYPE = re.compile(r"\b(dtypes?|u?int(eger)?s?\d*|b?float\d*|floating|bool|16-bit)\b")
SOURCE = re.compile(r"\beq\. \d+|[Aa]ppendix [A-Z]\b")
UNITS = {  # what a name says that it measures, by the unit that its text must have
    r"bytes|(device|host)_memory|budget": r"\bbytes?\b|GiB",
    r"seconds": r"\bseconds?\b",
    r"rate": r"\ba second\b",
    r"flops": r"\b(floating-point )?operations\b",
    r"max_length|chunk|tokens": r"\btokens?\b|\bpositions\b",
    r"batch_size|samples": r"\b(samples?|images?)\b",
}
ERRORS = {
    name: kind
    for name, kind in {**vars(builtins), **vars(errors)}.items()
    if inspect.isclass(kind) and issubclass(kind, Exception) and kind is not AssertionError
}
# What is computed by an equation of the paper.
EQUATIONS = {"gram_", "cross_", "gram_cross_", "frobenius", "add_scaled_", "addmm_"}
EQUATIONS |= {"Settings", "LinearStats", "NormStats", "LayerStats", "layer_stats", "task_weight"}
EQUATIONS |= {"reference.calibrate_model", "solve_weight", "solve_bias", "solve_layernorm"}


def public() -> Iterator[tuple[str, Any]]:
    """Public functions, classes and their own methods and properties, by name; modules' likewise."""
    exported = [(name, getattr(ff, name)) for name in ff.__all__]
    exported += [(name, getattr(featcal_kernels, name)) for name in featcal_kernels.__all__]
    exported += [(kind.__name__, kind) for kind in (GroupReport, LayerPlan, LayerReport, Progress)]  # that these hold
    exported += [(name, kind) for name, kind in vars(errors).items() if inspect.isclass(kind)]
    for name, value in vars(ff.reference).items():
        if getattr(value, "__module__", None) == ff.reference.__name__ and not name.startswith("_"):
            exported.append((f"reference.{name}", value))
    for name, value in dict(exported).items():
        if inspect.isclass(value) or inspect.isfunction(value):
            yield name, value
        if inspect.isclass(value):
            for member, own in vars(value).items():
                own = getattr(own, "__func__", own)
                if not member.startswith("_") and (inspect.isfunction(own) or hasattr(own, "fget")):
                    yield f"{name}.{member}", own


OBJECTS = dict(public())


@pytest.mark.parametrize("name", OBJECTS)
def test_docstring(name: str) -> None:
    missing = omissions(OBJECTS[name], equation=bool({name, name.rpartition(".")[2]} & EQUATIONS))
    assert not missing, f"{name}: " + "; ".join(missing)


def test_everything_public_is_looked_at() -> None:
    assert {"calibrate", "Plan.summary", "Plan.flops", "Recipe.load", "gram_", "reference.solve_bias"} <= set(OBJECTS)
    assert {name.rpartition(".")[2] for name in EQUATIONS} <= {name.rpartition(".")[2] for name in OBJECTS}


def omissions(found: Any, equation: bool = False) -> list[str]:
    """What the docstring of a function, property or class lacks; nothing if it is complete."""
    found = getattr(found, "fget", found)
    own = found.__dict__.get("__doc__") if inspect.isclass(found) else found.__doc__
    if not own or (dataclasses.is_dataclass(found) and own.startswith(f"{found.__name__}(")):  # made by dataclass
        return ["no docstring"]
    text, sections = parse(own)
    parameters, heading = arguments(found)
    return [
        *_missing_text(text),
        *_missing_entries(text, sections, parameters, heading),
        *_missing_returns(found, text, sections),
        *_missing_errors(found, sections),
        *(["no equation is named"] if equation and not SOURCE.search(inspect.cleandoc(own)) else []),
    ]


def parse(docstring: str) -> tuple[str, dict[str, dict[str, str]]]:
    """The text of a docstring, and its sections: entries by name, or all of it by "" in `Returns`."""
    text: list[str] = []
    sections: dict[str, dict[str, str]] = {}
    section, names = "", [""]
    for line in inspect.cleandoc(docstring).splitlines():
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            section = line[:-1]
            sections[section] = {"": ""} if section == "Returns" else {}
        elif line and not line.startswith(" "):
            section = ""
            text.append(line)
        elif not section:
            text.append(line)
        else:
            entry = re.match(r" {4}(\w[\w, ]*): (.*)", line)
            if entry and section != "Returns":
                names = entry[1].split(", ")
                sections[section] |= dict.fromkeys(names, entry[2])
            else:
                for name in [""] if section == "Returns" else names:
                    sections[section][name] += f" {line.strip()}"
    return "\n".join(text).strip(), sections


def arguments(found: Any) -> tuple[dict[str, str], str]:
    """Parameters or fields, with their annotations, and the section that they belong in."""
    if dataclasses.is_dataclass(found):
        return {item.name: str(item.type) for item in dataclasses.fields(found)}, "Attributes"
    if inspect.isclass(found) and "__init__" not in vars(found):
        return {}, "Args"
    parameters = inspect.signature(found).parameters
    return {name: str(each.annotation) for name, each in parameters.items() if name not in ("self", "cls")}, "Args"


def _missing_text(text: str) -> Iterator[str]:
    if not text:
        yield "no summary before the sections"
    elif not text.splitlines()[0].endswith((".", "?", ":")):
        yield "the summary does not end in a full stop on its line"


def _missing_entries(
    text: str, sections: dict[str, dict[str, str]], parameters: dict[str, str], heading: str
) -> Iterator[str]:
    entries = sections.get(heading)
    if entries is None:
        for name in parameters:
            if f"`{name}`" not in text:
                yield f"{heading}: no {name}, nor is it in the text"
        entries = dict.fromkeys(parameters, text)
    yield from (f"{heading}: no {name}" for name in parameters if name not in entries)
    yield from (f"{heading}: {name} is no parameter" for name in entries if name not in parameters)
    for name, entry in entries.items():
        if "Tensor" in parameters.get(name, ""):
            yield from (f"{heading}: {name}: {lack}" for lack in _missing_form(entry, text))
        yield from (f"{heading}: {name}: {lack}" for lack in _missing_unit(name, entry))


def _missing_unit(name: str, text: str) -> Iterator[str]:
    for measured, unit in UNITS.items():
        if re.search(rf"(^|_)({measured})($|_)", name) and not re.search(unit, text, re.IGNORECASE):
            yield f"no unit ({unit})"


def _missing_form(entry: str, text: str) -> Iterator[str]:
    if not SHAPE.search(entry):
        yield "no shape"
    if not DTYPE.search(entry) and not DTYPE.search(text):
        yield "no dtype"


def _missing_returns(found: Any, text: str, sections: dict[str, dict[str, str]]) -> Iterator[str]:
    returned = "None" if inspect.isclass(found) else str(inspect.signature(found).return_annotation)
    body = sections.get("Returns", {}).get("", text)
    if returned == "None" and "Returns" in sections:
        yield "Returns: nothing is returned"
    if returned != "None" and "Returns" not in sections and "Args" in sections:
        yield "no Returns"
    if returned != "None":
        yield from (f"Returns: {lack}" for lack in _missing_unit(found.__name__, body))
    if "Tensor" in returned:
        yield from (f"Returns: {lack}" for lack in _missing_form(body, text))


def _missing_errors(found: Any, sections: dict[str, dict[str, str]]) -> Iterator[str]:
    listed = sections.get("Raises", {})
    yield from (f"Raises: there is no {name}" for name in listed if name not in ERRORS)
    known = tuple(ERRORS[name] for name in listed if name in ERRORS)
    yield from (f"Raises: no {name}" for name in sorted(raised(found)) if not issubclass(ERRORS[name], known))


def raised(found: Any) -> set[str]:
    """Names of exceptions that a function, or a class as it is made, raises within its own module, at any depth."""
    path = found.__qualname__.split(".")
    scope: dict[str, ast.AST] = _definitions(ast.parse(inspect.getsource(sys.modules[found.__module__])))
    functions, methods = dict(scope), dict[str, ast.AST]()
    for part in path if inspect.isclass(found) else path[:-1]:
        methods = scope = _definitions(scope[part])
    made = [methods[name] for name in ("__init__", "__post_init__") if name in methods]
    todo = made if inspect.isclass(found) else [scope[path[-1]]]
    names: set[str] = set()
    seen: list[ast.AST] = []
    while todo:
        seen.append(todo.pop())
        for node in ast.walk(seen[-1]):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                names.add(node.exc.func.id)
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name):
                todo += [functions[called.id]] if isinstance(functions.get(called.id), ast.FunctionDef) else []
            elif isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                todo += [methods[called.attr]] if called.value.id in ("self", "cls") and called.attr in methods else []
        todo = [node for node in todo if node not in seen]
    return {name for name in names if name in ERRORS}


def _definitions(node: ast.AST) -> dict[str, ast.AST]:
    """Functions and classes that stand in a module or a class, by name."""
    return {each.name: each for each in ast.iter_child_nodes(node) if isinstance(each, (ast.FunctionDef, ast.ClassDef))}


# What the checks find.


def no_docstring(x: int) -> int:
    return x


def poor(x: Tensor, scale: float, max_bytes: int) -> Tensor:
    """Scale it.

    Args:
        x: what to scale.
        factor: how much.
        max_bytes: how much it may take.

    Raises:
        ScaleError: it is too large.
    """
    return _checked(x) * scale


def _checked(x: Tensor) -> Tensor:
    if x.numel() > 10:
        raise ValueError("too large")
    return x


def good(x: Tensor, scale: float, max_bytes: int) -> Tensor:
    """Scale it (eq. 17).

    Args:
        x: `[n, d]`, any
            floating dtype.
        scale: how much.
        max_bytes: bytes that it may take.

    Returns:
        `[n, d]`, of the dtype of `x`.

    Raises:
        ValueError: it is too large.
    """
    return _checked(x) * scale


@dataclasses.dataclass
class Bare:
    x: int


@dataclasses.dataclass
class Poor:
    """A value.

    Attributes:
        seconds: how long.
    """

    seconds: float
    x: int

    @property
    def size_bytes(self) -> int:
        """How large it is."""
        return 2 * self.x

    def times(self, factor: int) -> int:
        """Many times."""
        return factor * self.x


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (no_docstring, ["no docstring"]),
        (
            poor,
            [
                "Args: no scale",
                "Args: factor is no parameter",
                "Args: x: no shape",
                "Args: x: no dtype",
                r"Args: max_bytes: no unit (\bbytes?\b|GiB)",
                "no Returns",
                "Returns: no shape",
                "Returns: no dtype",
                "Raises: there is no ScaleError",
                "Raises: no ValueError",
                "no equation is named",
            ],
        ),
        (good, []),
        (Bare, ["no docstring"]),
        (Poor, ["Attributes: no x", r"Attributes: seconds: no unit (\bseconds?\b)", "no equation is named"]),
        (Poor.size_bytes, [r"Returns: no unit (\bbytes?\b|GiB)", "no equation is named"]),
        (Poor.times, ["Args: no factor, nor is it in the text", "no equation is named"]),
    ],
    ids=["none", "poor", "good", "bare dataclass", "dataclass", "property", "method"],
)
def test_each_omission_is_named(found: Callable[..., Any], expected: list[str]) -> None:
    assert omissions(found, equation=True) == expected
