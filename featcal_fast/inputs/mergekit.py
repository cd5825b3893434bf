"""From a folder that mergekit wrote to the recipe that repairs its merge."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcal_fast import files
from featcal_fast.checkpoints.documents import inside
from featcal_fast.checkpoints.find import HUB_ID, find_folder, is_cache, split_reference, split_revision
from featcal_fast.checkpoints.reader import ADAPTER_CONFIG, read_json
from featcal_fast.data.sources import is_hub_id
from featcal_fast.errors import RecipeError, named, shown
from featcal_fast.inputs.merge_config import MergeConfig, Reference, parse_config
from featcal_fast.inputs.names import ModelName, find_name, listed, model_names
from featcal_fast.inputs.paths import check_text, checked_path
from featcal_fast.inputs.recipe import MERGEKIT_CONFIG, ExpertRecipe, Recipe, working_directory
from featcal_fast.inputs.recipe_file import recipe_text, write_recipe
from featcal_fast.settings import PRESETS
from featcal_fast.untrusted.documents import DocumentError, parse_yaml

MOE_CONFIG = "mergekit_moe_config.yml"
# Methods whose `base_model` is one of the merged models, not what they were fine-tuned from.
AMONG_EQUALS = ("slerp", "nearswap", "arcee_fusion", "linear", "karcher", "passthrough")
DECODERS = re.compile(r"(llama|mistral|mixtral|qwen\d|gemma\d?|phi\d?|gpt2)(_moe|_text)?")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")


@dataclass(frozen=True)
class Model:
    """An input of the merge: an absolute path or hub id, with `@revision` if it has one, and an adapter likewise."""

    path: str
    adapter: str | None = None

    @property
    def reference(self) -> str:
        return self.path if self.adapter is None else f"{self.path}+{self.adapter}"

    @property
    def key(self) -> tuple[str, str | None]:
        """What it is, whatever way leads to it."""
        return _resolved(self.path), None if self.adapter is None else _resolved(self.adapter)


def from_mergekit(
    folder: str | Path,
    data: Mapping[str, str | Path] | Iterable[tuple[str, str | Path]],
    *,
    skip: Iterable[str] = (),
    base: str | None = None,
    out: str | Path | None = None,
    recipe_out: str | Path | None = None,
) -> Recipe:
    """The recipe that repairs a merge, from the folder that mergekit wrote and calibration data.

    What was merged is read from the folder's `mergekit_config.yml`; mergekit itself is not needed.

    Args:
        folder: the merged model; or its hub id.
        data: file, folder or hub id of calibration data, by a name of each expert: a short one that is made of the
            models' names (`math` and `code` of `Llama-3-8B-math` and `Llama-3-8B-code`), the last part of its path or
            hub id, or as the config has it. Paths are relative to the working directory.
        skip: names of merged models that need no data, and are left out.
        base: folder or hub id of what the experts were fine-tuned from, in place of the config's `base_model`. Where
            neither names one, it is the merged model itself, and the anchor is the merge alone.
        out: the folder to write.
        recipe_out: a YAML file to write the recipe to; none may be there yet, unless it holds the same.

    Returns:
        The recipe, of the preset for this kind of model, all paths absolute; texts are cut at 512 tokens, or at what
        the model takes.

    Raises:
        FeatCalError: the folder was not written by mergekit, is made of other layers than its inputs have in these
            places, models are not where the config says, or names and data do not belong together.
    """
    root = working_directory()
    given = checked_path("mergekit", folder)
    path = find_folder(str(given), root, "merged model")
    values = read_json(path, "config.json", "merged model")
    config = _read_config(path)
    inputs = _Inputs(path, root, config, base)
    _check_layers(config, inputs, values)
    names = model_names([(reference.text, model.path, model.adapter) for reference, model in inputs.experts])
    chosen = _choose(names, data.items() if isinstance(data, Mapping) else data, skip, _about_base(config))
    experts = {
        name.short: ExpertRecipe(inputs.expert(model), _data(root, name.short, chosen[name.short]))
        for name, (_, model) in zip(names, inputs.experts, strict=True)
        if name.short in chosen
    }
    recipe = Recipe(
        base_model=inputs.base.reference,
        experts=experts,
        merged_model=str(root / given if _is((root / given).exists) else given),
        out=None if out is None else str(root / checked_path("out", out)),
        settings=PRESETS[_preset(values)],
        root=root,
    )
    if recipe_out is not None:
        told = f"featcal-fast calibrate --mergekit {recipe.merged_model}"
        comment = f"What `{told}` amounts to; from its {MERGEKIT_CONFIG}."
        write_recipe(root / checked_path("recipe-out", recipe_out), recipe_text(recipe, comment), inputs.folders)
    return recipe


def _read_config(folder: Path) -> MergeConfig:
    path = folder / MERGEKIT_CONFIG
    try:
        if not path.is_file():
            raise RecipeError(_no_config(folder))
        return parse_config(parse_yaml(files.read_bytes(inside(path, folder, "merged model"))))
    except DocumentError as error:
        several = "another document" in str(error)
        hint = "; of a file for mergekit-multi only the part belongs here that made this folder" if several else ""
        raise RecipeError(f"{path} is not YAML that can be taken: {error}; mend it{hint}") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}; check the file and its rights") from error
    except RecipeError as error:
        raise RecipeError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def _no_config(folder: Path) -> str:
    if (folder / MOE_CONFIG).is_file():
        return (
            f"{folder / MOE_CONFIG}: mergekit-moe made this model, whose experts stand side by side in it instead of "
            "being merged; it cannot be calibrated toward them"
        )
    return (
        f"{folder / MERGEKIT_CONFIG} is missing, by which a merge is told; mergekit writes none with "
        "--no-write-model-card: put the YAML that the folder was made from there under that name"
    )


class _Inputs:
    """The models of a merge, each found, in its role.

    Attributes:
        experts: what was merged, as written and as found.
        base: what they were fine-tuned from; the merged folder itself, where nobody says.
    """

    def __init__(self, folder: Path, root: Path, config: MergeConfig, base: str | None) -> None:
        places = _Places([root, *folder.parents, *Path(_resolved(str(folder))).parents], folder / MERGEKIT_CONFIG)
        merged = [(each, places.find(each)) for each in config.models]
        own = None if config.base is None else places.find(config.base)
        if config.base and own and config.method in AMONG_EQUALS:
            if config.adds_base:
                merged.append((config.base, own))
            own = None
        given = None if base is None else _Places([root]).find(Reference(base, "base"))
        bases = {each.key for each in (own, given) if each}
        distinct: dict[tuple[str, str | None], tuple[Reference, Model]] = {}
        for each, model in merged:
            distinct.setdefault(model.key, (each, model))
        self.experts = [found for key, found in distinct.items() if key not in bases]
        for each, model in self.experts:
            if model.key == (_resolved(str(folder)), None):
                raise RecipeError(
                    f"{folder / MERGEKIT_CONFIG}: {each.where} names {shown(each.text)}, which is the merged model "
                    "itself"
                )
        if not self.experts:
            raise RecipeError(f"{folder / MERGEKIT_CONFIG}: nothing is merged but the base model")
        adapted = {model.path for _, model in self.experts if model.adapter}
        alike = len(adapted) == 1 and all(model.adapter for _, model in self.experts)
        self.base = given or own or Model(adapted.pop() if alike else str(folder))
        self.folders = [folder, *(Path(text) for each in (self.base, *self._models()) for text in _local_paths(each))]

    def _models(self) -> list[Model]:
        return [model for _, model in self.experts]

    def expert(self, model: Model) -> str:
        """How a recipe names an expert: an adapter of the base model by itself."""
        if model.adapter is not None and Model(model.path).key == self.base.key:
            return model.adapter
        return model.reference


class _Places:
    """Where paths in a config may start: where mergekit was run is not told.

    Args:
        folders: in which to look, the nearest first.
        file: the config; None, where references are typed.
    """

    def __init__(self, folders: Sequence[Path], file: Path | None = None) -> None:
        self._folders, self._file = list(dict.fromkeys(folders)), file

    def find(self, reference: Reference) -> Model:
        """The model that a reference names.

        Raises:
            RecipeError: there is none, and it is no hub id.
        """
        key = reference.where if self._file is None else f"{self._file}: {reference.where}"
        for text in filter(None, reference.parts or (reference.text,)):
            check_text(key, text)
            checked_path(key, text)
        model, adapter = reference.parts or split_reference(reference.text, lambda part: self._look(part) is not None)
        found = [self._find(key, reference, part) for part in (model, adapter) if part is not None]
        return Model(*found)

    def _find(self, key: str, reference: Reference, part: str) -> str:
        found = self._look(part)
        if found is None:
            looked = " or ".join(str(folder) for folder in self._folders)
            where = "" if part.startswith(("/", "~")) else f" (looked for it in {looked})"
            told = "" if part == reference.text else f" of {shown(reference.text)}"
            hint = "" if self._file is None else ", or run this where mergekit was run"
            raise RecipeError(
                f"{key}: {shown(part)}{told} is no folder{where} and no hub id org/name; correct the path{hint}"
            )
        return found

    def _look(self, part: str) -> str | None:
        """Where `path[@revision]` leads: an absolute path or a hub id."""
        for text in (part, split_revision(part)[0]):
            if path := self._folder(text):
                return f"{path}{part[len(text) :]}"
        return part if HUB_ID.fullmatch(part) else None

    def _folder(self, text: str) -> Path | None:
        try:
            path = Path(text).expanduser()
        except RuntimeError:  # there is no such home
            return None
        every = [path] if path.is_absolute() else [folder / path for folder in self._folders]
        found = [each for each in every if _is(each.is_dir)]
        with_model = [each for each in found if path.is_absolute() or _holds_model(each)]
        if not with_model and HUB_ID.fullmatch(text):
            return None
        return next(iter(with_model or found), None)


def _is(question: Any) -> bool:
    """What the operating system does not let one ask is not so."""
    with suppress(OSError):
        return bool(question())
    return False


def _holds_model(folder: Path) -> bool:
    marks = (folder / name for name in ("config.json", ADAPTER_CONFIG))
    return any(_is(mark.is_file) for mark in marks) or _is(lambda: is_cache(folder))


def _resolved(text: str) -> str:
    """A local path without links; a hub id as it is."""
    with suppress(OSError):
        return str(files.resolve(Path(text))) if text.startswith("/") else text
    return text


def _local_paths(model: Model) -> list[str]:
    return [text for text in (model.path, model.adapter) if text and text.startswith("/")]


def _check_layers(config: MergeConfig, inputs: _Inputs, merged: Mapping[str, Any]) -> None:
    """Refuse a slice that is a part of the models only."""
    found = {reference.text: model for reference, model in inputs.experts}
    for reference, (_, last) in config.layers:
        counts = [("the merged model", _layer_count(merged))]
        model = found.get(reference.text)
        if model is not None and model.path.startswith("/"):
            label = f"{MERGEKIT_CONFIG}: {named(reference.text)}"
            counts.append((named(reference.text), _layer_count(_config_of(model, label))))
        for whose, count in counts:
            if count is not None and count != last:
                raise RecipeError(
                    f"{inputs.folders[0] / MERGEKIT_CONFIG}: slices[0] cannot be mapped: it takes layers 0 to {last} "
                    f"of {named(reference.text)}, but {whose} has {count} layers; expected all layers of whole models"
                )


def _config_of(model: Model, label: str) -> dict[str, Any]:
    return read_json(find_folder(model.path, Path("/"), label), "config.json", label)


def _layer_count(config: Mapping[str, Any]) -> int | None:
    for values in (config, config.get("text_config")):
        if isinstance(values, Mapping):
            found = [values[key] for key in LAYERS if type(values.get(key)) is int]
            if found:
                return int(found[0])
    return None


def _choose(
    names: Sequence[ModelName], data: Iterable[tuple[str, str | Path]], skip: Iterable[str], about_base: str
) -> dict[str, str | Path]:
    """The data of every model that is not left out, by short name."""
    given: dict[str, str | Path] = {}
    for key, value in data:
        name = find_name(key, names, "data")
        if name.short in given:
            raise RecipeError(f"data: found two for {listed([name])}: {shown(str(value))} too; expected one for each")
        given[name.short] = value
    left_out: set[str] = set()
    for key in [skip] if isinstance(skip, str) else skip:
        name = find_name(key, names, "skip")
        if name.short in left_out:
            raise RecipeError(f"skip: found {listed([name])} twice; expected each once")
        left_out.add(name.short)
    if both := [name for name in names if name.short in left_out and name.short in given]:
        raise RecipeError(f"skip: found {listed(both)}, for which there is data, too; expected one of the two")
    if len(left_out) == len(names):
        raise RecipeError(f"skip: found all merged models, {listed(names)}; expected data for one at least")
    if missing := [name for name in names if name.short not in left_out and name.short not in given]:
        first = missing[0].short
        raise RecipeError(
            f"data: missing for {listed(missing)}; expected --data {first}=FILE for each, or --skip {first} where it "
            f"needs none{about_base}"
        )
    return given


def _about_base(config: MergeConfig) -> str:
    if config.base is None or config.method not in AMONG_EQUALS:
        return ""
    return (
        f". Its base_model {named(config.base.text)} is one of the models that {named(config.method)} merges; if it is "
        "what the others were fine-tuned from, say so with --base"
    )


def _data(root: Path, task: str, value: str | Path) -> str:
    path = root / checked_path(f"data {task}", value)
    return str(value) if is_hub_id(str(value)) and not _is(path.exists) else str(path)


def _preset(config: Mapping[str, Any]) -> str:
    """The published settings for a model's kind, by its `config.json`."""
    kind, classes = str(config.get("model_type")), config.get("architectures")
    if "t5" in kind:
        return "flan-t5"
    causal = isinstance(classes, list) and any(str(each).endswith(("ForCausalLM", "LMHeadModel")) for each in classes)
    return "llm" if causal or DECODERS.fullmatch(kind) else "default"
