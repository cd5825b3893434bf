"""A job, described and checked: what to calibrate, with what, into what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from featcal_fast import files
from featcal_fast.checkpoints import STORAGES
from featcal_fast.errors import RecipeError
from featcal_fast.merging.merged import METHODS
from featcal_fast.settings import Settings, number


@dataclass(frozen=True)
class MergeRecipe:
    """How to make the merged model on the fly: `method` is `average` or `task_arithmetic`, which `scaling` is for."""

    method: str
    scaling: float = 0.3


@dataclass(frozen=True)
class ExpertRecipe:
    """One expert: its model, its calibration data, and where it departs from the recipe's sampling.

    Attributes:
        model: folder or hub id, of a checkpoint or of a LoRA adapter of the base model.
        data: file, folder or hub id of its calibration data.
        samples: calibration samples, in place of the recipe's number.
        max_length: tokens a text is cut at, likewise.
    """

    model: str
    data: str
    samples: int | None = None
    max_length: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A calibration job. Paths are relative to `root`, the recipe file's folder.

    Attributes:
        base_model: folder or hub id of the model that the experts were fine-tuned from.
        experts: by task.
        merged_model: folder or hub id of the model to repair; or else
        merge: how to make it from base and experts.
        out: the folder to write.
        settings: the method's constants.
        samples: calibration samples a task; all, where a task has fewer.
        max_length: tokens a text is cut at.
        batch_size: samples a forward pass; by default as many as have some 16,000 tokens on a GPU and 2,000 on a CPU,
            padding included, or fewer where memory is short.
        expert_storage: where experts' tensors stay after their first read: `disk`, that is nowhere; `host` memory as
            they are; or there compressed by bitsandbytes, `host-int8` or `host-nf4`, with the error that the report
            states.
        seed: of the sampling.
        root: what relative paths start from.

    Raises:
        RecipeError: a value of the wrong type or out of range.
    """

    base_model: str
    experts: dict[str, ExpertRecipe]
    merged_model: str | None = None
    merge: MergeRecipe | None = None
    out: str | None = None
    settings: Settings = field(default_factory=Settings)
    samples: int = 256
    max_length: int = 512
    batch_size: int | None = None
    expert_storage: str = "disk"
    seed: int = 0
    root: Path = field(default_factory=Path.cwd)

    def __post_init__(self) -> None:
        if (self.merged_model is None) == (self.merge is None):
            found = "neither" if self.merge is None else "both"
            raise RecipeError(f"recipe: found {found} of merged_model and merge, expected exactly one of them")
        if self.merge is not None and self.merge.method not in METHODS:
            near = get_close_matches(str(self.merge.method), METHODS, n=1, cutoff=0)[0]
            raise RecipeError(
                f"merge.method: found {self.merge.method!r}, expected one of {', '.join(METHODS)}; did you "
                f"mean {near!r}?"
            )
        if self.expert_storage not in STORAGES:
            raise RecipeError(f"expert_storage: found {self.expert_storage!r}, expected one of {', '.join(STORAGES)}")
        if not self.experts:
            raise RecipeError("experts: found none, expected at least one `name: {model: ..., data: ...}`")
        counts = {name: getattr(self, name) for name in ("samples", "max_length", "batch_size")}
        for task, expert in self.experts.items():
            counts |= {f"experts.{task}.{name}": getattr(expert, name) for name in ("samples", "max_length")}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise RecipeError(f"{name}: found {value}, expected 1 or more")

    @classmethod
    def load(cls, recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
        """A recipe, read and checked.

        Args:
            recipe: the path of a YAML file; a mapping, with paths relative to the working directory; or a `Recipe`,
                which is returned as it is.

        Returns:
            The recipe.

        Raises:
            RecipeError: no such file, unreadable, not YAML, an unknown key (with the nearest valid one), a missing or
                wrong value.
        """
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Mapping):
            return cls._from_mapping(recipe, Path.cwd())
        path = Path(recipe).expanduser()
        try:
            if not path.is_file():
                raise RecipeError(f"{path} is not a file; expected a recipe in YAML (docs/recipes.md)")
            values = yaml.safe_load(files.read_text(path))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise RecipeError(f"{path} is not valid YAML: {error}") from error
        except OSError as error:
            raise RecipeError(
                f"{path} cannot be read: {error.strerror or error}; check the file and its rights"
            ) from error
        if not isinstance(values, dict):
            raise RecipeError(
                f"{path}: found {type(values).__name__}, expected a mapping with base_model, experts, ..."
            )
        try:
            return cls._from_mapping(values, path.resolve().parent)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None

    @classmethod
    def _from_mapping(cls, values: Mapping[str, Any], root: Path) -> Recipe:
        values = _checked(cls, values, "")
        if "settings" in values:
            values["settings"] = Settings.from_dict(_mapping(values["settings"], "settings"))
        if values.get("merge") is not None:
            values["merge"] = MergeRecipe(**_checked(MergeRecipe, values["merge"], "merge."))
        experts = _mapping(values["experts"], "experts")
        values["experts"] = {
            str(task): ExpertRecipe(**_checked(ExpertRecipe, _mapping(expert, f"experts.{task}"), f"experts.{task}."))
            for task, expert in experts.items()
        }
        return cls(**values, root=root)

    @property
    def folder(self) -> Path | None:
        """The folder to write, where the recipe names one."""
        return None if self.out is None else self.root / Path(self.out).expanduser()

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, as a YAML file would hold it."""
        values = asdict(self)
        root = values.pop("root")
        return {**{key: value for key, value in values.items() if value is not None}, "root": str(root)}


RecipeLike = Recipe | Mapping[str, Any] | str | Path  # what `Recipe.load` takes

# What YAML may hold for a field, by its annotation.
_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}
_NAMES = {"str": "a text", "int": "an integer", "float": "a number"}


def _checked(cls: type, given: Any, where: str) -> dict[str, Any]:
    """`given` with only the keys of dataclass `cls`, the required ones present, scalars of the right type."""
    values = _mapping(given, where.rstrip(".") or "recipe")
    known = {item.name: item for item in fields(cls) if item.name != "root"}
    for key in values:
        if key not in known:
            near = get_close_matches(str(key), known, n=1, cutoff=0)[0]
            raise RecipeError(f"{where}{key}: unknown key; did you mean {near!r}?")
    for name, item in known.items():
        kind, _, optional = str(item.type).partition(" | ")
        value = values.get(name)
        if kind == "float" and name in values:
            values[name] = number(value)
        if name in values and kind in _TYPES and not (value is None and optional):
            if isinstance(value, bool) or not isinstance(values[name], _TYPES[kind]) or value == "":
                raise RecipeError(f"{where}{name}: found {value!r}, expected {_NAMES[kind]}")
        elif name not in values and name in _REQUIRED[cls.__name__]:
            raise RecipeError(f"{where}{name}: missing; it is required")
    return values


_REQUIRED = {"Recipe": ("base_model", "experts"), "ExpertRecipe": ("model", "data"), "MergeRecipe": ("method",)}


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where}: found {value!r}, expected a mapping")
    return dict(value)
