"""How far models' features are from their experts', layer by layer, and why: JSON, a table, a summary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from featcal_fast.errors import printable
from featcal_fast.reporting.outcome import Outcome
from featcal_fast.reporting.report import drift_text, finite, read_report, versions
from featcal_fast.reporting.splits import CALIBRATED, MERGED, LayerSplit, Split
from featcal_fast.settings import Settings

if TYPE_CHECKING:  # only terminals need it
    from rich.table import Table

SCHEMA_VERSION = 1  # of `drift.json`; a key that is gone, or means something else, makes it the next one


@dataclass
class DriftReport:
    """Everything that was measured; `schema_version` is that of the form that `to_json` gives it.

    Attributes:
        family: of the models, by name.
        device: where it was computed.
        samples: number of samples that were measured on, by task.
        held_out: how many of these are held out, so that nothing was fitted to them: all of a task's, or none.
        layers: one entry a layer.
        outcome: what the models give in the end, on held-out samples, where the calibrated one is the merged one
            outside of its layers.
        model: the calibrated model's folder, where one was given.
        settings: that it was calibrated with, where its report says so.
        recipe: the job.
        seconds: wall clock, in seconds.
        versions: of this package, torch, transformers and Python.
        warnings: what should be known before the result is trusted, a sentence each.
    """

    schema_version: ClassVar[int] = SCHEMA_VERSION

    family: str
    device: str
    samples: dict[str, int]
    held_out: dict[str, int]
    layers: list[LayerSplit] = field(default_factory=list)
    outcome: Outcome | None = None
    model: str | None = None
    settings: Settings | None = None
    recipe: dict[str, Any] | None = None
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=lambda: versions())
    warnings: list[str] = field(default_factory=list)

    @property
    def tasks(self) -> list[str]:
        """Their names, in order."""
        return list(self.samples)

    @property
    def models(self) -> list[str]:
        """What was measured: `"merged"`, and `"calibrated"` where one was given."""
        return [MERGED, CALIBRATED] if self.layers and self.layers[-1].calibrated else [MERGED]

    def to_json(self) -> str:
        """All of it as a JSON text, with means over tasks: `drift.schema.json` beside this module describes it."""
        values = {"schema_version": self.schema_version, **asdict(self)}
        for layer, written in zip(self.layers, values["layers"], strict=True):
            written["mean"] = {model: asdict(layer.mean(model)) for model in self.models}
            written["removed"] = {module: layer.removed(module) for module in layer.modules}
        return json.dumps(finite(values), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> DriftReport:
        """A report from its JSON text.

        Args:
            text: as `to_json` gives it; keys that are not known do not count.

        Returns:
            The report.

        Raises:
            CheckpointError: it is none, or a later version's.
        """
        return read_report(cls, text, "drift", cls.schema_version)

    def summary(self) -> str:
        """A line on the drift of what leaves the last layer, and on what it is measured; the outcome; warnings."""
        last = self.layers[-1]
        found = " -> ".join(drift_text(last.mean(model).drift, 3) for model in self.models)
        if len(self.models) == 2 and last.mean(MERGED).drift:
            found += f" ({last.mean(CALIBRATED).drift / last.mean(MERGED).drift - 1:+.0%})"
        kind = "held-out samples" if all(self.held_out.values()) else "samples"
        tasks = "task" if len(self.samples) == 1 else "tasks"
        total = f"{sum(self.samples.values())} {kind} of {len(self.samples)} {tasks}"
        return "\n".join(
            (
                f"drift after the last layer {found}, on {total}, in {self.seconds:.1f} s",
                *([] if self.outcome is None else [self.outcome.summary()]),
                *(f"warning: {each}" for each in self.warnings),
            )
        )

    def tables(self) -> list[Table]:
        """For a terminal: a layer a row, means over tasks; and a task a row, after the last layer."""
        caption = "||H - H_expert|| / ||H_expert||; of it, by the layer itself + by what entered it"
        layers = {str(layer.index): layer for layer in self.layers}
        means = {name: {model: layer.mean(model) for model in self.models} for name, layer in layers.items()}
        last = self.layers[-1]
        tasks = {task: {model: last.splits(model)[task] for model in self.models} for task in self.tasks}
        return [
            _table("Drift to the experts, mean over tasks", "layer", means, caption),
            _table("After the last layer", "task", tasks, None),
            *([] if self.outcome is None else [self.outcome.table()]),
        ]

    def plot(self, path: str | Path) -> None:
        """Draw all of it: drift over depth, its parts, and what calibration removed.

        Args:
            path: the file to write; its suffix says what kind: `.png`, `.pdf` or `.svg`.

        Raises:
            FeatCalError: matplotlib is not installed.
        """
        from featcal_fast.reporting.charts import Curve
        from featcal_fast.reporting.drift_charts import charts
        from featcal_fast.reporting.picture import draw

        found = charts(self.layers)
        first = found.drift
        if len(found.tasks) > 1:
            tasks = [Curve("", curve.kind, curve.values, faint=True) for panel in found.tasks for curve in panel.curves]
            first = replace(first, title="Drift over depth, mean over tasks", curves=[*first.curves, *tasks])
        draw([first, *found.split, *filter(None, (found.removed, found.picked))], path)


def _table(title: str, first: str, rows: Mapping[str, Mapping[str, Split]], caption: str | None) -> Table:
    from rich.table import Table

    table = Table(title=title, caption=caption)
    table.add_column(first, justify="right" if first == "layer" else "left")
    for model in next(iter(rows.values())):
        table.add_column(model, justify="right")
        table.add_column("local + upstream", justify="right")
    for name, row in rows.items():
        cells = [printable(name)]
        for each in row.values():
            shares = f"{drift_text(each.local_share)} {'-' if each.upstream_share < 0 else '+'} "
            cells += [drift_text(each.drift), shares + drift_text(abs(each.upstream_share))]
        table.add_row(*cells)
    return table
