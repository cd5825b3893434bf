"""What models make of held-out samples in the end: the merged one and the calibrated one against the experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import fmean
from textwrap import fill
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # only terminals need it, and bench.gpu runs without
    from rich.table import Table

KL, OUTPUTS, DRIFT = "KL of the outputs", "drift of the outputs", "drift of the features"  # what is judged by
# Why a weight keeps its merged values:
LAYER_WORSE = "its layer is worse with a new one, on held-out samples"
MODEL_WORSE = "the model is worse with new ones, on held-out samples"
WORSE = "held-out: the calibrated model is worse"  # how a line begins that says so
WIDTH = 80  # columns of a line
DEEP = 700  # nats, of which the exponential is still a number


@dataclass
class TaskOutcome:
    """One task's held-out samples; None where a number does not apply to its models.

    Attributes:
        samples: how many.
        drift_merged: `||H - H_expert||_F / ||H_expert||_F` of the hidden states `H` after the last block of the merged
            model, over tokens that count.
        drift_calibrated: the same, calibrated.
        kl_merged: of language models, `KL(expert || merged)` of the next token's distribution (of a masked one's for an
            encoder), in nats, the mean over tokens that count; of two vocabularies, over the tokens that both have.
        kl_calibrated: the same, calibrated.
        loss_merged: cross entropy of the texts' own next tokens, of an encoder-decoder's targets, in nats, the mean
            over tokens that count and have one; its exponential is the perplexity.
        loss_calibrated: the same, calibrated.
        loss_expert: the same of the expert.
        agreement_merged: of classifiers, the share of samples (of tokens, where each has a class) whose most likely
            class is the expert's; the expert's head reads the features of all three, since the classes are its own.
        agreement_calibrated: the same, calibrated.
        output_drift_merged: of other models, `||y - y_expert||_F / ||y_expert||_F` of what they give for a sample: an
            embedding, or the mean of its tokens' after all norms.
        output_drift_calibrated: the same, calibrated.
        reason: why only features are compared, where the outputs are not.
    """

    samples: int
    drift_merged: float
    drift_calibrated: float
    kl_merged: float | None = None
    kl_calibrated: float | None = None
    loss_merged: float | None = None
    loss_calibrated: float | None = None
    loss_expert: float | None = None
    agreement_merged: float | None = None
    agreement_calibrated: float | None = None
    output_drift_merged: float | None = None
    output_drift_calibrated: float | None = None
    reason: str = ""


@dataclass
class Outcome:
    """Whether calibration helped, on samples that nothing was fitted to.

    Attributes:
        tasks: each task's numbers.
        measure: what it is judged by: `KL of the outputs` if all tasks have that, else `drift of the outputs` likewise,
            else `drift of the features`.
        merged: that of the merged model: the mean over tasks, of drifts the root of the mean of squares.
        calibrated: the same, calibrated.
        spread: standard error of their difference, of differences sample by sample, tasks weighing the same. A task
            with one sample adds nothing to it, so that with one a task any difference is larger than the spread.
        worse: whether the calibrated model is worse than the merged one by more than the spread; or gives numbers that
            are not finite, where the merged one does not.
        kept: which of the two was kept; empty where nothing was decided.
    """

    tasks: dict[str, TaskOutcome] = field(default_factory=dict)
    measure: str = DRIFT
    merged: float = math.nan
    calibrated: float = math.nan
    spread: float = math.nan
    worse: bool = False
    kept: str = ""

    def summary(self) -> str:
        """A sentence of means over tasks, and one more if the calibrated model is worse; lines of at most 80 columns.

        Perplexities are of the mean loss.
        """
        drift, kl, output = self._means("drift"), self._means("kl"), self._means("output_drift")
        loss, agreement = self._means("loss"), self._means("agreement")
        found = []
        if kl:
            found.append(f"KL to experts {_change(kl, _number)}")
        else:
            found.append(f"drift of the features {_change(drift or (), _number)}")
        if loss:
            known = list(_known(each.loss_expert for each in self.tasks.values()))
            experts = f" (experts {_perplexity(fmean(known))})" if known else ""
            found.append(f"perplexity {_change(loss, _perplexity)}{experts}")
        if agreement:
            found.append(f"the experts' own class in {_change(agreement, _percent)}")
        if output:
            found.append(f"drift of the outputs {_change(output, _number)}")
        text = fill(f"held-out: {', '.join(found)}", WIDTH, subsequent_indent="  ")
        return f"{text}\n{self.verdict()}" if self.worse else text

    def verdict(self) -> str:
        """How the two compare by the measure, with the spread; lines of at most 80 columns."""
        better = "better than" if self.merged - self.calibrated > self.spread else "no different from"
        how = "worse than" if self.worse else better
        numbers = f"{_change((self.merged, self.calibrated), _number)}, spread {_number(self.spread)}"
        text = f"held-out: the calibrated model is {how} the merged one by {self.measure}: {numbers}"
        return fill(text, WIDTH, subsequent_indent="  ")

    def table(self) -> Table:
        """A task a row, for a terminal: `merged -> calibrated`."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Held-out samples: merged -> calibrated", box=SIMPLE_HEAD, pad_edge=False)
        columns = [name for name in COLUMNS if self._means(name)]
        experts = ["expert's"] if "loss" in columns else []  # perplexity
        for title in ("task", "samples", *(COLUMNS[name].title for name in columns), *experts):
            table.add_column(title, justify="left" if title == "task" else "right", overflow="fold")
        for task, outcome in self.tasks.items():
            cells = [str(outcome.samples)]
            for name in columns:
                pair = outcome_pair(outcome, name)
                cells.append(_change(pair, COLUMNS[name].form) if pair else "")
            if experts:
                cells.append("" if outcome.loss_expert is None else _perplexity(outcome.loss_expert))
            table.add_row(Text(task), *cells)  # not markup
        return table

    def _means(self, name: str) -> tuple[float, float] | None:
        """Over the tasks that have them: of the merged and the calibrated model's."""
        pairs = [pair for each in self.tasks.values() if (pair := outcome_pair(each, name))]
        return (fmean(pair[0] for pair in pairs), fmean(pair[1] for pair in pairs)) if pairs else None


def outcome_pair(outcome: TaskOutcome, name: str) -> tuple[float, float] | None:
    """The merged and the calibrated model's `drift`, `kl`, `loss`, `agreement` or `output_drift`; None without.

    Args:
        outcome: a task's.
        name: of the number.
    """
    merged, calibrated = (getattr(outcome, f"{name}_{model}") for model in ("merged", "calibrated"))
    return None if merged is None or calibrated is None else (merged, calibrated)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _number(value: float) -> str:
    return f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss) if loss < DEEP else math.inf:.3g}"


def _change(values: Iterable[float], form: Callable[[float], str]) -> str:
    return " -> ".join(map(form, values))


class Column(NamedTuple):
    """What a number is called in a table, and how it is written."""

    title: str
    form: Callable[[float], str]


COLUMNS = {  # by the numbers' names in a `TaskOutcome`
    "drift": Column("drift", _number),
    "kl": Column("KL", _number),
    "loss": Column("perplexity", _perplexity),
    "agreement": Column("expert's class", _percent),
    "output_drift": Column("output drift", _number),
}
