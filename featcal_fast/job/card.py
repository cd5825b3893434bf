"""The card of what a job writes, and the picture in it: what may be said of models and data where it is published."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from featcal_fast import files
from featcal_fast.checkpoints import CARD, CheckpointWriter, LoraExpert, read_errors, unwrapped
from featcal_fast.errors import one_line
from featcal_fast.inputs.models import RecipeModels
from featcal_fast.inputs.recipe import Recipe
from featcal_fast.inputs.task_data import local_data
from featcal_fast.reporting.card import Name, Origin, card
from featcal_fast.reporting.own_card import LARGEST, OwnCard, is_hub_id, read_card
from featcal_fast.reporting.plot import drift_svg
from featcal_fast.reporting.report import Report

PLOT = "drift.svg"


def write_card(writer: CheckpointWriter, origin: Origin, report: Report | None = None) -> None:
    """Write README.md, and the picture that it shows; call it before the folder's contents are taken.

    Args:
        writer: of the output.
        origin: what it was made of.
        report: of the calibration; None of a merge that was only made.

    Raises:
        OutputError: it cannot be written.
    """
    # Of folders too; and on some file systems case is no difference.
    taken = {name.lower().split("/")[0] for name in origin.files}
    plot = ""
    if report is not None and report.layers and (drawn := drift_svg(report.layers)):
        names = (PLOT if number == 1 else f"drift-{number}.svg" for number in range(1, len(taken) + 2))
        plot = next(name for name in names if name not in taken)
        writer.add(plot, drawn)
    writer.add(CARD, card(origin, report, plot))


def find_origin(recipe: Recipe, models: RecipeModels, out: Path) -> Origin:
    """What the card will say of models and data; nothing is read for it later.

    Args:
        recipe: the job.
        models: its models.
        out: the folder to write.

    Raises:
        CheckpointError: the card that the model came with cannot be read.
    """
    experts = {task: _expert(models, task) for task in recipe.experts}
    data = {task: _data(recipe, expert.data) for task, expert in recipe.experts.items()}
    base, merged = model_name(models.base.path), None if recipe.merge is not None else model_name(models.merged.path)
    given = {recipe.base_model: [base], **({recipe.merged_model: [merged]} if recipe.merged_model and merged else {})}
    given |= {expert.model: experts[task] for task, expert in recipe.experts.items()}
    return Origin(
        title=one_line(out.name),
        merged=merged,
        base=base,
        experts=experts,
        data=data,
        recipe=_published(recipe, base, merged, experts, data, out),
        folders=frozenset(text for text, names in given.items() if not all(name.hub for name in names)),
        own=_own_card(models),
        config=models.merged.config.to_dict(),
        files=models.merged.side_files(),
        parents=_parents(recipe, models),
    )


def _parents(recipe: Recipe, models: RecipeModels) -> frozenset[str]:
    """The folders of models and data, as a message has them, each with the slash at its end."""
    sources = [unwrapped(each) for each in models.experts.values()]
    paths = {each.path for each in (models.merged, models.base, *sources)}
    paths |= {each.base.path for each in sources if isinstance(each, LoraExpert)}
    paths |= {found for each in recipe.experts.values() if isinstance(found := local_data(recipe, each.data), Path)}
    return frozenset(
        f"{one_line(str(path.parent)).rstrip('/')}/" for path in paths if path.parent != path.parent.parent
    )


def model_name(path: Path) -> Name:
    """What a model's folder is called where nobody knows this machine: the hub's id, of a snapshot in its cache."""
    real = path
    with suppress(OSError):
        real = files.resolve(path)
    for each in (path, real):
        if len(each.parts) > 2 and each.parts[-2] == "snapshots" and each.parts[-3].startswith("models--"):
            name = each.parts[-3].removeprefix("models--").replace("--", "/", 1)
            if is_hub_id(name):
                return Name(name, hub=True, revision=one_line(each.name))
    return Name(_last_part(path))


def _last_part(path: Path) -> str:
    name = path.name
    if name in ("", ".."):
        with suppress(OSError):
            name = files.resolve(path).name
    return one_line(name) or "/"


def _expert(models: RecipeModels, task: str) -> list[Name]:
    """A model; of an adapter its model too, where that is not the base."""
    source = unwrapped(models.experts[task])
    names = [model_name(source.path)]
    if isinstance(source, LoraExpert) and not source.adapts(models.base):
        names.insert(0, model_name(source.base.path))
    return names


def _data(recipe: Recipe, reference: str) -> str:
    found = local_data(recipe, reference)
    return one_line(found) if isinstance(found, str) else _last_part(found)


def _published(
    recipe: Recipe,
    base: Name,
    merged: Name | None,
    experts: Mapping[str, list[Name]],
    data: Mapping[str, str],
    out: Path,
) -> dict[str, Any]:
    """The recipe without the folders of this machine."""
    values = recipe.to_dict()
    del values["root"]
    values |= {"base_model": base.reference, "out": one_line(out.name)}
    if merged is not None:
        values["merged_model"] = merged.reference
    for task, expert in values["experts"].items():
        expert |= {"model": "+".join(name.reference for name in experts[task]), "data": data[task]}
    published: dict[str, Any] = _plain(values)
    return published


def _plain(value: Any) -> Any:
    """As YAML has it, without what is not set."""
    if isinstance(value, Mapping):
        return {one_line(name): _plain(each) for name, each in value.items() if each is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return one_line(value) if isinstance(value, str) else value


def _own_card(models: RecipeModels) -> OwnCard | None:
    path = models.merged.side_files().get(CARD)
    if path is None:
        return None
    with read_errors(models.merged.label, path):
        return read_card(files.read_bytes(path, LARGEST) if files.stat(path).st_size <= LARGEST else None)
