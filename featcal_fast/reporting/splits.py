"""How far a layer's output is from the experts', taken apart: numbers of one layer, by model, task and module."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from statistics import fmean

MERGED, CALIBRATED = "merged", "calibrated"


@dataclass
class Split:
    """Drift of a layer's output on a task, and its two parts, all relative to `||H_e||_F` of the expert's `H_e`.

    As vectors the parts add up, `D = L + U`; so do their shares, but not their norms.

    Attributes:
        drift: `||D||_F`, `D = H - H_e`.
        local: `||L||_F`, local mismatch: the model's block against the expert's, both given what enters the model's.
        upstream: `||U||_F`, upstream propagation: the expert's block, given what enters the model's and its own.
        local_share: `<D, L> / ||D||_F`, signed: with the next one it adds up to `drift`.
        upstream_share: `<D, U> / ||D||_F`, likewise.
    """

    drift: float
    local: float
    upstream: float
    local_share: float
    upstream_share: float

    @classmethod
    def of_sums(cls, sums: Iterable[float]) -> Split:
        """From `||D||^2`, `||L||^2`, `||U||^2`, `<D, L>`, `<D, U>` and `||H_e||^2`: the numbers `sums`."""
        drift, local, upstream, with_local, with_upstream, energy = sums
        scale = math.sqrt(energy) or 1e-30
        norms = [math.sqrt(each) / scale for each in (drift, local, upstream)]
        shares = [each / (math.sqrt(drift) * scale) if drift else 0.0 for each in (with_local, with_upstream)]
        return cls(*norms, *shares)

    @classmethod
    def mean(cls, splits: Iterable[Split]) -> Split:
        """The mean of several tasks' `splits`: shares still add up."""
        return cls(*(fmean(values) for values in zip(*(asdict(each).values() for each in splits), strict=True)))


@dataclass
class ModuleError:
    """What a linear module makes of what the calibrated model gives it, against what the expert's makes of its own.

    Attributes:
        merged: `||W xs + b - y_e||_F^2 / ||y_e||_F^2` with the merged weights, `y_e = W_t xe + b_t`.
        calibrated: the same with the calibrated ones.
    """

    merged: float
    calibrated: float


@dataclass
class LayerSplit:
    """One layer.

    Attributes:
        index: its number, in forward order.
        path: its name in the model.
        merged: drift of the merged model's output, by task.
        calibrated: likewise of the calibrated one's; empty where none was given.
        modules: by linear module, by task, the errors of its output; likewise.
        picked: by linear module, the `ridge_lambda` that was chosen for it, where the calibrated model's report says
            so.
        kept: its linear modules that kept their merged weights, each with the reason, likewise.
        alpha: the `teacher_alpha` that was chosen for it, likewise.
    """

    index: int
    path: str
    merged: dict[str, Split]
    calibrated: dict[str, Split] = field(default_factory=dict)
    modules: dict[str, dict[str, ModuleError]] = field(default_factory=dict)
    picked: dict[str, float] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    alpha: float | None = None

    def splits(self, model: str) -> dict[str, Split]:
        """Drift by task of the `model` `"merged"` or `"calibrated"`."""
        return self.merged if model == MERGED else self.calibrated

    def mean(self, model: str) -> Split:
        """The mean over tasks, of the `model` of that name."""
        return Split.mean(self.splits(model).values())

    def removed(self, module: str) -> float:
        """The share of a `module`'s error that calibration removed, the mean over tasks: 1 is all of it, below 0 more
        than there was."""
        errors = self.modules[module].values()
        return fmean(1 - each.calibrated / each.merged if each.merged else 0.0 for each in errors)
