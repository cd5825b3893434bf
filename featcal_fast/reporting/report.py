"""What happened: JSON, a table, a plot."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch

from featcal_fast.errors import CheckpointError, shown
from featcal_fast.reporting.forms import FormError, build
from featcal_fast.reporting.inputs import Inputs
from featcal_fast.reporting.outcome import Outcome
from featcal_fast.settings import Settings
from featcal_fast.untrusted.documents import DocumentError, parse_json
from featcal_fast.version import __version__

if TYPE_CHECKING:  # only terminals need it, and bench.gpu runs without
    from rich.table import Table

T = TypeVar("T")
LARGEST = 1000  # number that is shown with all of its digits
SCHEMA_VERSION = 1  # of `report.json`; a key that is gone, or means something else, makes it the next one


@dataclass
class GroupReport:
    """One input group of a layer: linear modules that are given the same tensor, and so share second moments.

    Attributes:
        modules: their names in the layer.
        in_features, out_features: of their weights; `out_features` is the sum.
        space: where the right-hand side was accumulated: by features of the `input` or of the `output`, or by
            `tokens`, where they are fewer.
        solver: precision of the solve, and what had to be added to the diagonal for it.
        change: `||W' - W_merged||_F / ||W_merged||_F` over the group's weights.
        raised: what was added to the diagonal beyond `covariance_eps` so that it could be solved, relative to its mean.
        tokens: number of tokens, all tasks' together, that its sums are of; 0 where that was not counted.
        solver_steps: what was tried, the last of which gave the solution: `float32`, `float32, by blocks`, `float64`,
            or `float64, diagonal raised by 1e-07 of its mean`.
    """

    modules: list[str]
    in_features: int
    out_features: int
    space: str
    solver: str
    change: float
    raised: float = 0.0
    tokens: int = 0
    solver_steps: list[str] = field(default_factory=list)


@dataclass
class TaskDrift:
    """How far a layer's output is from that of one task's expert.

    Attributes:
        before: `||H - H_expert||_F / ||H_expert||_F` of the merged model's output `H`.
        after: the same, calibrated.
    """

    before: float
    after: float


@dataclass
class ChosenReport:
    """What was chosen for a linear module on held-out samples.

    Attributes:
        ridge_lambda: that its weights were solved with, relative to the mean diagonal (`ridge_scale: trace`).
        curve: for every value that was tried, as text, the module's squared error on held-out samples (against what the
            experts' modules make of theirs), less that of the anchor `W_a`, relative to the
            mean square of what `W_a` makes: negative is better than the anchor. Not finite where there was no solution.
    """

    ridge_lambda: float
    curve: dict[str, float] = field(default_factory=dict)


@dataclass
class AlphaReport:
    """What was chosen for a layer on held-out samples, given what the calibrated layers before it make of them.

    Attributes:
        teacher_alpha: that its linear modules were solved with.
        curve: for every value that was tried, as text, the root of the mean of `||h - h_expert||^2 / ||h_expert||^2`
            of its output, as `GateReport` has it.
    """

    teacher_alpha: float
    curve: dict[str, float] = field(default_factory=dict)


@dataclass
class GateReport:
    """What a layer makes of held-out samples, given what the calibrated layers before it make of them.

    Attributes:
        merged: with merged weights, the root of the mean of `||h - h_expert||^2 / ||h_expert||^2` over tokens (weighted
            as the layer's are), samples and tasks weighing the same.
        calibrated: the same, with every weight as it was solved for.
        spread: standard error of the difference of the two means, of squares, over samples.
        kept: names of the modules in the layer that keep their merged weights, because the layer got worse.
    """

    merged: float
    calibrated: float
    spread: float
    kept: list[str] = field(default_factory=list)


@dataclass
class LayerReport:
    """One layer: how far its output is from the experts', and what was solved.

    Attributes:
        index: its number, in forward order.
        drift_before: `||H - H_expert||_F / ||H_expert||_F` of its output `H` as it was, on held-out samples, or on each
            task's first ones where none are; the mean over tasks.
        drift_after: the same, calibrated.
        seconds: wall clock, in seconds.
        groups: its linear weights that were calibrated.
        norms: names of its LayerNorms that were updated.
        tasks: the drift of each task.
        chosen: by linear module, the settings, where they choose themselves.
        alpha: likewise, of the layer.
        gate: how it was judged, where samples are held out.
    """

    index: int
    drift_before: float
    drift_after: float
    seconds: float
    groups: list[GroupReport]
    norms: list[str]
    tasks: dict[str, TaskDrift] = field(default_factory=dict)
    chosen: dict[str, ChosenReport] = field(default_factory=dict)
    alpha: AlphaReport | None = None
    gate: GateReport | None = None


@dataclass
class Peaks:
    """The most memory that was in use, and that the plan said would be, in bytes; None where nobody says.

    Attributes:
        host_bytes: resident memory of the process at its largest, since it began.
        device_bytes: what torch held allocated on the device at its largest, since the run began; None on a CPU.
        planned_host_bytes, planned_device_bytes: likewise as planned, where there was a plan.
    """

    host_bytes: int | None = None
    device_bytes: int | None = None
    planned_host_bytes: int | None = None
    planned_device_bytes: int | None = None


@dataclass
class RankReport:
    """One of several processes that shared a job.

    Attributes:
        samples: that it had: names of tasks, with `2/4` behind it for the second of four shards.
        device: where it computed.
        peaks: its memory.
        sent, received: bytes of tensors, to and from other ranks; what all were sent counts once where it came from.
        waited: seconds that its host waited for others, their computing included.
    """

    samples: list[str]
    device: str
    peaks: Peaks = field(default_factory=Peaks)
    sent: int = 0
    received: int = 0
    waited: float = 0.0


@dataclass
class Report:
    """Everything that a run has to say for itself; `schema_version` is that of the form that `to_json` gives it.

    Attributes:
        settings: the constants used.
        family: of the model, by name.
        device: where it was computed.
        tokens: calibration tokens that counted, by task.
        layers: one entry a calibrated layer.
        held_out: samples that nothing was fitted to, by task.
        outcome: what the models make of these in the end, where there are any.
        kept: linear weights that keep their merged values, each with the reason.
        seconds: wall clock of the whole run, in seconds.
        phases: these seconds, by what they were for (`reporting.clock`).
        peaks: memory; of several ranks, the largest of each kind.
        ranks: the processes that shared the job, where there were several.
        flops: floating-point operations of the layers, where there was a plan.
        bytes_read: bytes of tensors, by model, where there was a recipe; and of hidden states, where they were on disk:
            of these, what the last run read, where one went on with another.
        bytes_written: bytes, likewise.
        storage_error: `||W_kept - W||_F / ||W||_F` of experts kept in host memory, by task (`expert_storage`); of what
            the last run read.
        inputs: models and data that were read, where there was a recipe.
        recipe: the job, where there was a recipe.
        out: the folder written, where there is one.
        contents: SHA-256 of what is in it, which `featcal-fast check` compares: of `tensors`, of the `headers` of
            their files, and of all other `files`.
        left_out: files of the merged model's folder that are not in it, because they hold its old weights.
        versions: of this package, torch, transformers and Python.
        warnings: what should be known before the result is trusted, a sentence each.
    """

    schema_version: ClassVar[int] = SCHEMA_VERSION

    settings: Settings
    family: str
    device: str
    tokens: dict[str, int]
    layers: list[LayerReport] = field(default_factory=list)
    held_out: dict[str, int] = field(default_factory=dict)
    outcome: Outcome | None = None
    kept: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    peaks: Peaks = field(default_factory=Peaks)
    ranks: list[RankReport] = field(default_factory=list)
    flops: float = 0.0
    bytes_read: dict[str, int] = field(default_factory=dict)
    bytes_written: dict[str, int] = field(default_factory=dict)
    storage_error: dict[str, float] = field(default_factory=dict)
    inputs: Inputs = field(default_factory=Inputs)
    recipe: dict[str, Any] | None = None
    out: str | None = None
    contents: dict[str, dict[str, str]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: versions())
    warnings: list[str] = field(default_factory=list)

    @property
    def calibrated(self) -> int:
        """Number of linear weights calibrated."""
        return sum(len(group.modules) for layer in self.layers for group in layer.groups)

    @property
    def better(self) -> bool:
        """Whether the calibrated model is known not to be worse than the merged one, by held-out samples."""
        return self.outcome is not None and not self.outcome.worse

    @property
    def rate(self) -> float:
        """Floating-point operations a second within the layers; 0 where they were not counted."""
        return self.flops / max(sum(layer.seconds for layer in self.layers), 1e-9)

    def to_json(self) -> str:
        """All of it as a JSON text, as `report.json` holds it: `report.schema.json` beside this module describes it."""
        counts = {"calibrated_weights": self.calibrated, "linear_weights": self.calibrated + len(self.kept)}
        values = {"schema_version": self.schema_version, **asdict(self), **counts}
        return json.dumps(finite(values), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """A report from its JSON text.

        Args:
            text: as `to_json` gives it, of this version or of one before it; keys that are not known do not count.

        Returns:
            The report.

        Raises:
            CheckpointError: it is none, or a later version's.
        """
        return read_report(cls, text, "report", cls.schema_version)

    def summary(self) -> str:
        """A line of how many weights, how long, how much drift is left; some on held-out samples; and one a warning."""
        last = self.layers[-1]
        total = self.calibrated + len(self.kept)
        rate = f" ({self.rate / 1e12:.3g} TFLOP/s)" if self.flops else ""
        return "\n".join(
            (
                f"{self.calibrated} of {total} linear weights calibrated in {self.seconds:.1f} s{rate}; drift after "
                f"the last layer {drift_text(last.drift_before, 3)} -> {drift_text(last.drift_after, 3)}",
                *self._judged(),
                *(f"warning: {each}" for each in self.warnings),
            )
        )

    def _judged(self) -> Iterator[str]:
        """What held-out samples say, and what was done about it."""
        if self.outcome is None:
            return
        yield self.outcome.summary()
        kept = {layer.index: len(layer.gate.kept) for layer in self.layers if layer.gate and layer.gate.kept}
        if kept:
            yield (
                f"{sum(kept.values())} modules of {len(kept)} layers keep their merged weights, which are better on "
                "held-out samples"
            )

    def tables(self) -> list[Table]:
        """For a terminal: layers, and tasks' held-out samples where there are any."""
        return [self.table(), *([] if self.outcome is None else [self.outcome.table()])]

    def table(self) -> Table:
        """A layer a row, for a terminal."""
        from rich.table import Table

        table = Table(title="Feature drift to the experts", caption="||H - H_expert|| / ||H_expert||, mean over tasks")
        for name in ("layer", "before", "after", "weight change", "seconds"):
            table.add_column(name, justify="right")
        for layer in self.layers:
            change = max((group.change for group in layer.groups), default=0.0)
            cells = (
                drift_text(layer.drift_before),
                drift_text(layer.drift_after),
                percent_text(change),
                f"{layer.seconds:.2f}",
            )
            table.add_row(str(layer.index), *cells)
        return table

    def plot(self, path: str | Path) -> None:
        """Draw each layer's drift, before and after.

        Args:
            path: the file to write; its suffix says what kind: `.png`, `.pdf` or `.svg`.

        Raises:
            FeatCalError: matplotlib is not installed.
        """
        from featcal_fast.reporting.charts import drift_panel
        from featcal_fast.reporting.picture import draw

        layers = self.layers
        before, after = [layer.drift_before for layer in layers], [layer.drift_after for layer in layers]
        draw([drift_panel([layer.index for layer in layers], before, after)], path)


def drift_text(drift: float, digits: int = 4) -> str:
    """A drift with so many digits behind the point; never long, however little sense it makes."""
    return f"{drift:.{digits}f}" if abs(drift) < LARGEST else f"{drift:.1e}"


def percent_text(share: float) -> str:
    """A share as `25.8%`, likewise."""
    return f"{share:.1%}" if abs(share) < LARGEST else f"{100 * share:.1e}%"


def versions() -> dict[str, str]:
    """Of this package, torch, transformers and Python."""
    import transformers

    return {
        "featcal_fast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def read_report(cls: type[T], text: str, kind: str, known: int) -> T:
    """A report of a class from its JSON text: one of its `kind`, of the version `known` or of one before it.

    Raises:
        CheckpointError: it is none, or a later version's.
    """
    try:
        values = parse_json(text)
        check_version(values, known)
        return build(cls, values)
    except (DocumentError, FormError) as error:
        raise CheckpointError(f"{kind}: it cannot be read: {error}") from error


def check_version(values: object, known: int = SCHEMA_VERSION) -> None:
    """Whether a report is one of this version or of one before it; the first ones had no number.

    Args:
        values: what its JSON text holds.
        known: this version.

    Raises:
        FormError: it is a later version's, or has no version that there could be.
    """
    found = values.get("schema_version", known) if isinstance(values, dict) else known
    if type(found) is not int or found < 1:
        raise FormError(f"schema_version: found {shown(found)}, expected a whole number from 1 on")
    if found > known:
        raise FormError(
            f"schema_version: found {shown(found)}, expected {known} or less; a newer featcal_fast wrote it, "
            "which can read it"
        )


def finite(value: Any) -> Any:
    """The same with null for numbers that are not finite: JSON has none."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
