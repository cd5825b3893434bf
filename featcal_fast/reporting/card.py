"""The card of a model that was made, as the hub has it: README.md, of what was done, with what, and what came of it.

It is meant to be published: it names models and data by the hub or by the last part of their paths, never where they
lie on this machine. It holds no times, so that the same inputs give the same card.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from featcal_fast.reporting.markdown import code, demoted, escaped, fenced, table
from featcal_fast.reporting.own_card import OwnCard
from featcal_fast.reporting.report import LayerReport, Report, drift_text
from featcal_fast.reporting.usage import shell_quoted, usage
from featcal_fast.version import __version__

PAPER = "https://arxiv.org/abs/2605.13030"
LAYERS = 16  # rows of the table, at most
TAGS = ("merge", "featcal")
METHOD = (
    f"[FeatCal]({PAPER}), as `featcal-fast` does it, goes through a merge's layers in order and solves in closed form "
    "for weights that bring the features of each layer closer to those of models that were merged, on samples of "
    "their own tasks. Nothing is trained by gradients; names, shapes and dtypes of all weights are those of the merge."
)
FOLDERS = re.compile(r"(?<![\w.~/-])~?/(?:[^/\s]+/)+")  # of a path, all but its last part


@dataclass(frozen=True)
class Name:
    """What a model is called in what is published.

    Attributes:
        text: its id on the hub, or the last part of its path.
        hub: whether it is the former.
        revision: the commit, of one of the hub.
    """

    text: str
    hub: bool = False
    revision: str = ""

    @property
    def reference(self) -> str:
        """As a recipe has it."""
        return f"{self.text}@{self.revision}" if self.revision else self.text

    @property
    def link(self) -> str:
        """In Markdown."""
        if not self.hub:
            return code(self.text)
        at = f" at {code(self.revision[:12])}" if self.revision else ""
        return f"[{self.text}](https://huggingface.co/{self.text}){at}"


@dataclass(frozen=True)
class Origin:
    """What a model was made of.

    Attributes:
        title: the name of its folder.
        merged: the merge that was calibrated; None for one that was made on the fly.
        base: what the experts were fine-tuned from.
        experts: by task; a model, and the adapter on it where it is one.
        data: the calibration data by task, the last part of its path or its id on the hub.
        recipe: of the job, as it may be published.
        folders: what it calls models that are folders here; none of these is a name on the hub.
        own: the card that the model came with whose files it has: the merge's, or else the base's.
        config: of the model, as its `config.json` has it.
        files: what lies in its folder.
        parents: the folders of this machine that models and data lie in; warnings may name them.
    """

    title: str
    merged: Name | None
    base: Name
    experts: Mapping[str, Sequence[Name]]
    data: Mapping[str, str]
    recipe: Mapping[str, Any]
    folders: frozenset[str]
    own: OwnCard | None
    config: Mapping[str, Any]
    files: Iterable[str]
    parents: Iterable[str] = ()


def card(origin: Origin, report: Report | None = None, plot: str = "") -> str:
    """The card of a model.

    Args:
        origin: what it was made of.
        report: what its calibration has to say for itself; None of a merge that was not calibrated.
        plot: the name of the picture of its layers' drift, beside it; empty where there is none.

    Returns:
        Metadata in YAML, then Markdown.
    """
    parts = [f"---\n{_yaml(metadata(origin))}\n---", f"# {escaped(origin.title)}"]
    parts += _merge(origin) if report is None else _calibration(origin, report, plot)
    if origin.own is not None and origin.own.text.strip():
        whose = "base" if origin.merged is None else "merged"
        parts += [
            f"## The {whose} model's own card",
            f"What the {whose} model's `README.md` says, before anything was done:",
            demoted(origin.own.text, 2).strip("\r\n"),
        ]
    return "\n\n".join(parts) + "\n"


def metadata(origin: Origin) -> dict[str, Any]:
    """What the hub is told of a model. Folders on this machine are left out: there they would be links to models of
    strangers."""
    own = {} if origin.own is None else dict(origin.own.metadata)
    listed, tags, library = own.pop("base_model", []), own.pop("tags", []), own.pop("library_name", "transformers")
    if origin.merged is None:  # what the base is called and made of is not true of a merge
        listed, tags = [], []
    models = [origin.base, *(name for names in origin.experts.values() for name in names)]
    found = [name.text for name in models if name.hub] + [name for name in listed if name not in origin.folders]
    return {
        "base_model": list(dict.fromkeys(found)),
        "base_model_relation": "merge",
        "library_name": library,
        **own,
        "tags": list(dict.fromkeys([*TAGS, *tags])),
    }


def _calibration(origin: Origin, report: Report, plot: str) -> list[str]:
    total = report.calibrated + len(report.kept)
    parts = [
        f"This model is a merge that was calibrated toward {_count(len(origin.experts), 'model')}. {METHOD}",
        f"**{report.calibrated:,} of {total:,} linear weights were calibrated**; all others keep their merged values.",
        "## Merged from",
        _models(origin, report),
    ]
    if report.layers:
        parts += ["## Drift", *_drift(report.layers, plot)]
    if report.warnings:
        told = (escaped(_without_folders(each, origin.parents)) for each in report.warnings)
        parts += ["## Warnings", "\n".join(f"- {each}" for each in told)]
    versions = ", ".join(f"{code(name)} {escaped(version)}" for name, version in report.versions.items())
    name = f"./{origin.title}" if origin.title.startswith("-") else origin.title
    return [
        *parts,
        *_usage(origin),
        "## Settings and recipe",
        "As a recipe of `featcal-fast` has them, but that paths are cut down to their last part:",
        fenced(_yaml(origin.recipe), "yaml"),
        f"Made with {versions}, on {code(report.device)}. `report.json` tells more: every weight that was or was not "
        "calibrated, how it was solved, and how long it took.",
        "## Is it whole?",
        "This compares every tensor and file, the card included, with the SHA-256 that `report.json` has of it:",
        fenced(f"featcal-fast check {shell_quoted(name)}", "console"),
    ]


def _without_folders(text: str, parents: Iterable[str]) -> str:
    """A text whose paths are cut down to their last part; where one ends, with blanks in it, is told of known ones."""
    for folder in sorted(parents, key=len, reverse=True):
        text = text.replace(folder, "")
    return FOLDERS.sub("", text)


def _merge(origin: Origin) -> list[str]:
    return [
        f"This model is a merge of {_count(len(origin.experts), 'model')}, made by `featcal-fast` {__version__}: "
        f"{_method(origin)}. **It is not calibrated.**",
        "## Merged from",
        _models(origin, None),
        *_usage(origin),
        "## Recipe",
        fenced(_yaml(origin.recipe), "yaml"),
    ]


def _models(origin: Origin, report: Report | None) -> str:
    """The models, and for those that were calibrated towards what samples."""
    rows = [["base", origin.base.link]]
    if report is None:
        rows += [[code(task), _links(names)] for task, names in origin.experts.items()]
        return table(["", "model"], rows)
    rows = [
        ["merged", _method(origin) if origin.merged is None else origin.merged.link, "", "", ""],
        [*rows[0], "", "", ""],
    ]
    for task, names in origin.experts.items():
        data = report.inputs.data.get(task)
        samples = "" if data is None else f"{data.samples:,}"
        rows.append([code(task), _links(names), code(origin.data[task]), samples, f"{report.tokens.get(task, 0):,}"])
    return table(["", "model", "calibration data", "samples", "tokens"], rows, numbers=2)


def _drift(layers: Sequence[LayerReport], plot: str) -> list[str]:
    shown = list(layers)
    if len(layers) > LAYERS:
        shown = [layers[round(place * (len(layers) - 1) / (LAYERS - 1))] for place in range(LAYERS)]
    rows = [[str(each.index), drift_text(each.drift_before), drift_text(each.drift_after)] for each in shown]
    last = layers[-1]
    parts = [
        "How far each layer's output `H` is from the experts', `norm(H - H_expert) / norm(H_expert)`, on the first "
        "samples of each task, the mean over tasks; before calibration and after. After the last layer: "
        f"**{drift_text(last.drift_before)} before, {drift_text(last.drift_after)} after**."
    ]
    if plot:
        parts.append(f"![Drift of every layer, before and after]({plot})")
    parts.append(table(["layer", "before", "after"], rows, numbers=3))
    if len(shown) < len(layers):
        parts.append(f"{len(shown)} of {len(layers)} layers; `report.json` has them all.")
    return parts


def _usage(origin: Origin) -> list[str]:
    snippets = usage(origin.config, origin.title, origin.files)
    parts = ["## How to use it"] if snippets else []
    for title, snippet in snippets:
        parts += [f"### {escaped(title)}", fenced(snippet, "python" if "transformers" in title else "console")]
    return parts


def _method(origin: Origin) -> str:
    """How a merge is made on the fly."""
    values = dict(origin.recipe.get("merge") or {})
    method, weights = values.pop("method", None), values.pop("weights", None) or {}
    told = [f"{name} {value:g}" for name, value in values.items()]
    told += [f"weights {', '.join(f'{value:g} of {code(task)}' for task, value in weights.items())}"] if weights else []
    return ", ".join([f"{code(str(method))} of base and experts", *told])


def _links(names: Sequence[Name]) -> str:
    return " + ".join(each.link for each in names)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _yaml(values: Mapping[str, Any]) -> str:
    text: str = yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text.rstrip("\n")
