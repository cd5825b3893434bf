"""A job, described and checked: what to calibrate, with what, into what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from shlex import quote
from typing import Any

from featcal_fast import files
from featcal_fast.checkpoints import STORAGES
from featcal_fast.errors import RecipeError, named, printable, shown
from featcal_fast.inputs.merge_recipe import MergeRecipe
from featcal_fast.inputs.paths import check_text, checked_path
from featcal_fast.settings import Settings, number, unknown_key
from featcal_fast.untrusted.documents import DocumentError, parse_yaml

LONGEST_NAME = 200  # characters of a task's name
MERGEKIT_CONFIG = "mergekit_config.yml"  # what mergekit writes into a merged model's folder
MOST = 2**31 - 1  # samples, tokens
MAX_LENGTH = 512  # tokens that a text is cut at, where neither a recipe nor a model says anything else
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("samples", "max_length", "batch_size"), (1, MOST)),
    "seed": (0, 2**63 - 1),
    "held_out": (0, 0.5),
}


@dataclass(frozen=True)
class ExpertRecipe:
    """One expert: its model, its calibration data, and where it departs from the recipe's sampling.

    Attributes:
        model: folder or hub id, of a checkpoint or of a LoRA adapter of the base model; or `model+adapter`, of an
            adapter of another model.
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
        experts: by task, whose name is a text of at most 200 characters.
        merged_model: folder or hub id of the model to repair; or else
        merge: how to make it from base and experts.
        out: the folder to write.
        settings: the method's constants.
        samples: calibration samples a task; all, where a task has fewer. Like the next two, 1 to 2^31 - 1.
        max_length: tokens a text is cut at; by default 512, or as many as a task's models take if that is fewer.
        batch_size: samples a forward pass; by default as many as have some 16,000 tokens on a GPU and 2,000 on a CPU,
            padding included, or fewer where memory is short.
        expert_storage: where experts' tensors stay after their first read: `disk`, that is nowhere; `host` memory as
            they are; or there compressed by bitsandbytes, `host-int8` or `host-nf4`, with the error that the report
            states.
        held_out: share of each task's samples that nothing is fitted to, so that the result is judged on them: 0 to
            0.5. The last ones that are drawn; none of one or two samples.
        seed: of the sampling, 0 to 2^63 - 1.
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
    max_length: int | None = None
    batch_size: int | None = None
    expert_storage: str = "disk"
    held_out: float = 0.2
    seed: int = 0
    root: Path = field(default_factory=lambda: working_directory())

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", checked_path("root", self.root))
        _check_fields(self, "")
        if not isinstance(self.settings, Settings):
            raise RecipeError(f"settings: found {shown(self.settings)}, expected a Settings")
        if (self.merged_model is None) == (self.merge is None):
            found = "neither" if self.merge is None else "both"
            raise RecipeError(f"recipe: found {found} of merged_model and merge, expected exactly one of them")
        if self.merge is not None and not isinstance(self.merge, MergeRecipe):
            raise RecipeError(f"merge: found {shown(self.merge)}, expected a MergeRecipe")
        if self.expert_storage not in STORAGES:
            raise RecipeError(
                f"expert_storage: found {shown(self.expert_storage)}, expected one of {', '.join(STORAGES)}"
            )
        if self.settings.auto and not self.held_out:
            raise RecipeError("held_out: found 0, expected a share above it: settings.auto chooses by held-out samples")
        self._check_experts()
        if self.merge is not None:
            self.merge.check(self.experts)

    def _check_experts(self) -> None:
        experts = self.experts
        if not isinstance(experts, Mapping) or not experts:
            found = "none" if isinstance(experts, Mapping) else shown(experts)
            raise RecipeError(f"experts: found {found}, expected at least one `name: {{model: ..., data: ...}}`")
        for task, expert in experts.items():
            if not isinstance(task, str) or not task or len(task) > LONGEST_NAME or printable(task) != task:
                raise RecipeError(
                    f"experts: found the name {shown(task)}, expected a text of 1 to {LONGEST_NAME} characters that "
                    "can be shown"
                )
            if not isinstance(expert, ExpertRecipe):
                raise RecipeError(f"experts.{task}: found {shown(expert)}, expected an ExpertRecipe")
            _check_fields(expert, f"experts.{task}.")

    @classmethod
    def load(cls, recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
        """A recipe, read and checked.

        Args:
            recipe: the path of a YAML file; a mapping, with paths relative to the working directory; or a `Recipe`,
                which is returned as it is.

        Returns:
            The recipe.

        Raises:
            RecipeError: no such file, unreadable, not YAML, an unknown key (with the one that is probably meant), a
                missing or wrong value.
        """
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Mapping):
            _check_kind("recipe", recipe, Path("OUT_FOLDER"))
            return cls._from_mapping(recipe, working_directory())
        path = checked_path("recipe", recipe)
        try:
            if (path / MERGEKIT_CONFIG).is_file():
                raise RecipeError(f"{path}: found a folder that mergekit wrote, expected a recipe; {_command(path)}")
            if not path.is_file():
                raise RecipeError(f"{path} is not a file; expected a recipe in YAML (docs/recipes.md)")
            values = parse_yaml(files.read_bytes(path))
            root = files.resolve(path).parent
        except DocumentError as error:
            raise RecipeError(f"{path} is not valid YAML: {error}") from error
        except OSError as error:
            raise RecipeError(
                f"{path} cannot be read: {error.strerror or error}; check the file and its rights"
            ) from error
        if not isinstance(values, dict):
            raise RecipeError(
                f"{path}: found {type(values).__name__}, expected a mapping with base_model, experts, ..."
            )
        _check_kind(str(path), values, path.parent if path.name == MERGEKIT_CONFIG else Path("OUT_FOLDER"))
        try:
            return cls._from_mapping(values, root)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None

    @classmethod
    def _from_mapping(cls, given: Mapping[Any, Any], root: Path) -> Recipe:
        values = _known(cls, given, "")
        if "settings" in values:
            values["settings"] = Settings.from_dict(values["settings"])
        if values.get("merge") is not None:
            values["merge"] = MergeRecipe(**_known(MergeRecipe, values["merge"], "merge."))
        experts: dict[Any, ExpertRecipe] = {}
        for name, expert in _mapping(values["experts"], "experts").items():
            task = str(name) if type(name) is int else name
            if task in experts:
                raise RecipeError(f"experts: found the name {shown(task)} twice; each may be there once")
            experts[task] = ExpertRecipe(**_known(ExpertRecipe, expert, f"experts.{named(task)}."))
        values["experts"] = experts
        return cls(**values, root=root)

    @property
    def folder(self) -> Path | None:
        """The folder to write, where the recipe names one."""
        return None if self.out is None else self.path(self.out)

    def path(self, text: str) -> Path:
        """Where `text`, a path in this recipe, leads to."""
        return self.root / Path(text).expanduser()

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, as a YAML file would hold it."""
        values = asdict(self)
        values["settings"] = {
            key: list(each) if type(each) is tuple else each for key, each in values["settings"].items()
        }
        if self.merge is not None:
            values["merge"] = {key: value for key, value in values["merge"].items() if value is not None}
        root = values.pop("root")
        return {**{key: value for key, value in values.items() if value is not None}, "root": str(root)}


RecipeLike = Recipe | Mapping[str, Any] | str | Path  # what `Recipe.load` takes


def with_out(recipe: RecipeLike, out: str | Path | None) -> Recipe:
    """A recipe, loaded, with another folder to write, relative to the working directory, where one is given."""
    loaded = Recipe.load(recipe)
    return loaded if out is None else replace(loaded, out=str(working_directory() / checked_path("out", out)))


def _check_kind(where: str, values: Mapping[Any, Any], folder: Path) -> None:
    """Refuse what mergekit makes a model from; `folder` is what it wrote."""
    experts = values.get("experts")
    if isinstance(experts, list) and any(isinstance(each, Mapping) and "source_model" in each for each in experts):
        raise RecipeError(
            f"{where}: found a config of mergekit-moe, whose models cannot be calibrated; expected a recipe"
        )
    if "merge_method" in values:
        raise RecipeError(f"{where}: found a mergekit config, expected a recipe; {_command(folder)}")


def _command(folder: Path) -> str:
    return (
        "for the folder that mergekit wrote use "
        f"featcal-fast calibrate --mergekit {quote(str(folder))} --data NAME=FILE --out DIR (docs/mergekit.md)"
    )


# What a field may hold, by its annotation.
_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}
_NAMES = {"str": "a text", "int": "an integer", "float": "a number"}
_REQUIRED = {"Recipe": ("base_model", "experts"), "ExpertRecipe": ("model", "data"), "MergeRecipe": ("method",)}
_PATHS = ("base_model", "merged_model", "out", "model", "data")  # or hub ids


def _known(cls: type, given: Any, where: str) -> dict[str, Any]:
    """`given` with only keys of the dataclass `cls`, the required ones present."""
    values = _mapping(given, where.rstrip("."))
    known = [item.name for item in fields(cls) if item.name != "root"]
    for key in values:
        if key not in known:
            raise unknown_key(where, key, known)
        check_text(f"{where}{key}", values[key])
    for name in _REQUIRED[cls.__name__]:
        if name not in values:
            raise RecipeError(f"{where}{name}: missing; it is required")
    return values


def _check_fields(part: Recipe | ExpertRecipe, where: str) -> None:
    """Refuse texts, numbers and paths of a part of a recipe that are of another type, or out of range."""
    for item in fields(part):
        kind, _, optional = str(item.type).partition(" | ")
        name, value = f"{where}{item.name}", getattr(part, item.name)
        if value is None and optional:
            continue
        if kind in _TYPES and (isinstance(value, bool) or not isinstance(value, _TYPES[kind]) or value == ""):
            raise RecipeError(f"{name}: found {shown(value)}, expected {_NAMES[kind]}")
        if item.name in RANGES:
            number(name, value, *RANGES[item.name])
        if item.name in _PATHS:
            checked_path(name, value)


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where}: found {shown(value)}, expected a mapping")
    return dict(value)


def working_directory() -> Path:
    try:
        return Path.cwd()
    except OSError as error:
        raise RecipeError(f"the working directory, where a recipe's paths start, is gone: {error.strerror}") from error
