"""A recipe written down, for people to read and to change."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from featcal_fast import files
from featcal_fast.errors import OutputError, one_line
from featcal_fast.inputs.paths import check_text
from featcal_fast.inputs.recipe import Recipe
from featcal_fast.settings import PRESETS

PLAIN = re.compile(r"[A-Za-z/][\w/.+@-]*", re.ASCII)  # which YAML reads as a text, unless it is one of these words
WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def recipe_text(recipe: Recipe, comment: str) -> str:
    """A recipe of a merged model and a preset as a YAML file, which is the same job in whatever folder it lies.

    Args:
        recipe: all paths in it absolute.
        comment: a line that says where it is from.

    Raises:
        RecipeError: a path holds halves of characters, which no such file can.
    """
    preset = next(name for name, settings in PRESETS.items() if settings == recipe.settings)
    lines = [f"# {one_line(comment)}", f"base_model: {_text('base_model', recipe.base_model)}"]
    lines += [f"merged_model: {_text('merged_model', recipe.merged_model)}", "experts:"]
    for task, expert in recipe.experts.items():
        lines += [
            f"  {_text('experts', task)}:",
            f"    model: {_text(f'experts.{task}.model', expert.model)}",
            f"    data: {_text(f'experts.{task}.data', expert.data)}",
        ]
    lines.append(f"settings: {{preset: {preset}}}")
    if recipe.out is not None:
        lines.append(f"out: {_text('out', recipe.out)}")
    return "\n".join(lines) + "\n"


def write_recipe(path: Path, text: str, inputs: Sequence[Path]) -> None:
    """A new file, whole or not at all; one that holds the same already stays as it is.

    Args:
        path: of the file.
        text: for it.
        inputs: folders that are never written into.

    Raises:
        OutputError: there is a file of that name that holds something else, it lies in an input folder, or cannot be
            written.
    """
    data = text.encode()
    try:
        folder = files.resolve(path).parent
        for each in inputs:
            if files.resolve(each) in (folder, *folder.parents):
                raise OutputError(f"recipe-out: {path} lies in {each}, which is never written to; choose another place")
        if path.is_file() and files.stat(path).st_size == len(data) and files.read_bytes(path) == data:
            return
        files.write_new(path, data)
    except FileExistsError as error:
        raise OutputError(f"recipe-out: {path} is there already; choose another name, or remove it") from error
    except OSError as error:
        raise OutputError(f"recipe-out: {path} cannot be written: {error.strerror or error}") from error


def _text(key: str, value: str | None) -> str:
    """A text as YAML has it, in quotes where it needs them."""
    assert value is not None
    check_text(key, value)
    if PLAIN.fullmatch(value) and value.lower() not in WORDS:
        return value
    quoted: str = yaml.safe_dump(value, default_style='"', allow_unicode=True, width=10**9)
    return quoted.strip()
