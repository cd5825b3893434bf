"""The method's constants, under the names the paper and the official demo use where they have one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from featcal_fast.errors import RecipeError, named, shown
from featcal_fast.untrusted.patterns import PatternError, full_matches

FORWARD_DTYPES = ("auto", "bfloat16")
MOMENT_DTYPES = ("auto", "float32", "bfloat16")
SOLVE_DTYPES = ("auto", "float32", "float64")
RIDGE_SCALES = ("absolute", "trace")
CHOICES = {
    "ridge_scale": RIDGE_SCALES,
    "forward_dtype": FORWARD_DTYPES,
    "moment_dtype": MOMENT_DTYPES,
    "solve_dtype": SOLVE_DTYPES,
}
# Beyond these float32 overflows or divides by nothing, or a value means something else than its writer thought.
RANGES: dict[str, tuple[float, float]] = {
    "ridge_lambda": (0, 10**6),
    "anchor_rho": (-100, 100),
    "teacher_alpha": (0, 1),
    "covariance_eps": (1e-12, 1),
    "max_change": (0, 10**6),
}
OPTIONAL = ("max_change",)  # of these, that may be None
MOST_SUFFIXES = 1000  # in a list of patterns
MOST_SHARDS = 1024  # of a task's samples
MOST_DIGITS = 40  # of a number that is a text
Patterns = str | tuple[str, ...]


def _patterns(name: str, value: object) -> Patterns | None:
    if value is None:
        return value
    if isinstance(value, str):
        try:
            full_matches([value], [])
        except PatternError as error:
            raise RecipeError(f"settings.{name}: {error}") from error
        return value
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(item, str) and item for item in value):
        raise RecipeError(
            f"settings.{name}: found {shown(value)}, expected a regular expression or a list of name suffixes"
        )
    if len(value) > MOST_SUFFIXES:
        raise RecipeError(f"settings.{name}: found {len(value)} name suffixes, expected at most {MOST_SUFFIXES}")
    return tuple(value)


def number(key: str, value: object, least: float, most: float) -> float:
    """`value` where it is a number of a range; a text like `1e-5`, which some readers of YAML take for none, counts.

    Args:
        key: what it stands under, for the error.
        value: to look at.
        least: the smallest that it may be.
        most: the largest.

    Raises:
        RecipeError: no number, or out of the range.
    """
    found = value
    if isinstance(found, str) and len(found) <= MOST_DIGITS and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", found):
        found = float(found)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not least <= found <= most:  # as NaN is not
        raise RecipeError(f"{key}: found {shown(value)}, expected a number from {least:,} to {most:,}")
    return found


def unknown_key(where: str, key: object, known: Iterable[str]) -> RecipeError:
    """The error for a key that there is not, with the one that is probably meant."""
    near = get_close_matches(str(key), known, n=1) if isinstance(key, str) else []
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
    return RecipeError(f"{where}{named(key)}: unknown key; {hint}")


@dataclass(frozen=True)
class Settings:
    """Constants of FeatCal (arXiv 2605.13030, eq. 10, 11, 12 and 17).

    Attributes:
        ridge_lambda: weight of the anchor against the sum over tasks (eq. 12); each task's moment is scaled to norm
            1, so the same value means less with more tasks. 0 to 1e6; zero leaves only `covariance_eps`.
        anchor_rho: the anchor is `rho * merged + (1 - rho) * base` (eq. 11), -100 to 100; above 1 it extrapolates
            past the merge.
        teacher_alpha: the target feature is `alpha * expert + (1 - alpha) * student` (eq. 10), 0 to 1; without
            effect with `auto`.
        covariance_eps: added to the diagonal (eq. 17), and the floor of the task weights' denominators; 1e-12 to 1.
        ridge_scale: what `ridge_lambda` is relative to: `absolute`, the paper's; `trace`, the mean diagonal of the sum
            over tasks, so that it means the same for every linear module, model and number of tasks.
        max_change: how far a new weight may be from the anchor, `||W' - W_a||_F`, as a multiple of the mean distance of
            the experts' from it; what is farther is drawn back to there. 0 to 1e6; None for as far as it goes.
        calibrate_bias: also update the biases of linear modules (appendix G).
        calibrate_layernorm: also update LayerNorm's weight and bias (appendix G; RMSNorm keeps its merged value).
        forward_dtype: `auto` runs the models' layers as they are; `bfloat16` rounds what enters their products,
            weights and features, to bfloat16, while hidden states, solved weights and the experts' weights in the
            targets stay as they are. Faster where bfloat16 is, at some cost in accuracy, and not for a
            `ridge_lambda` as small as 1e-5: the rounding then changes weights more than the calibration does.
        moment_dtype: what features are rounded to before their moments are taken. `auto` takes them as the
            model multiplies them. Sums are always float32.
        solve_dtype: arithmetic of the Cholesky solve. `auto` is float32 while the bound on the condition
            number, `(tasks + lambda) / lambda`, allows it, and float64 beyond.
        compile_blocks: whether layers' forwards go through torch.compile; None for on a GPU only. What they make is the
            same within the rounding of its dtype.
        auto: choose the ridge of each linear module, relative to its features, and `teacher_alpha` of each layer, by
            what they make of held-out samples; LayerNorms keep `ridge_lambda`.
        keep_better: where samples are held out, a layer that its new weights make worse on them keeps merged ones, of
            as many modules as that takes; and so does the whole model.
        sample_shards: how many parts each task's samples are split into, 1 to 1,024, whose sums are made apart and then
            added: with as many, several ranks share a task's samples. Results differ by roundings from those of
            another number, but not with the number of ranks.
        include: calibrate only the modules of these names: a string is a regular expression that the full name
            must match, a list holds suffixes (`q_proj`, `mlp.down_proj`), 1,000 at most, as in PEFT's `target_modules`.
        exclude: leave out the modules of these names, likewise.

    Raises:
        RecipeError: a value out of range.
    """

    ridge_lambda: float = 0.05
    anchor_rho: float = 2.0
    teacher_alpha: float = 0.3
    covariance_eps: float = 1e-8
    ridge_scale: str = "absolute"
    max_change: float | None = None
    calibrate_bias: bool = True
    calibrate_layernorm: bool = True
    forward_dtype: str = "auto"
    moment_dtype: str = "auto"
    solve_dtype: str = "auto"
    compile_blocks: bool | None = None
    auto: bool = False
    keep_better: bool = True
    sample_shards: int = 1
    include: Patterns | None = None
    exclude: Patterns | None = None

    def __post_init__(self) -> None:
        for name, (least, most) in RANGES.items():
            if (value := getattr(self, name)) is not None or name not in OPTIONAL:
                object.__setattr__(self, name, number(f"settings.{name}", value, least, most))
        for name in ("calibrate_bias", "calibrate_layernorm", "auto", "keep_better"):
            if not isinstance(getattr(self, name), bool):
                raise RecipeError(f"settings.{name}: found {shown(getattr(self, name))}, expected true or false")
        if self.compile_blocks is not None and not isinstance(self.compile_blocks, bool):
            found = shown(self.compile_blocks)
            raise RecipeError(f"settings.compile_blocks: found {found}, expected true, false or null (on a GPU only)")
        shards = self.sample_shards
        if type(shards) is not int or not 1 <= shards <= MOST_SHARDS:
            raise RecipeError(
                f"settings.sample_shards: found {shown(shards)}, expected a whole number from 1 to {MOST_SHARDS:,}"
            )
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices or not isinstance(value, str):
                raise RecipeError(f"settings.{name}: found {shown(value)}, expected one of {', '.join(choices)}")
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from a recipe's mapping.

        Args:
            values: an optional `preset`, and single values on top of it; or the name of a preset alone.

        Returns:
            The settings.

        Raises:
            RecipeError: neither, an unknown preset or key, or a value out of range.
        """
        if not isinstance(values, (Mapping, str)):
            raise RecipeError(f"settings: found {shown(values)}, expected a mapping, or the name of a preset")
        values = {"preset": values} if isinstance(values, str) else dict(values)
        preset = values.pop("preset", "default")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise RecipeError(f"settings.preset: found {shown(preset)}, expected one of {', '.join(PRESETS)}")
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise unknown_key("settings.", key, ["preset", *known])
        return replace(PRESETS[preset], **values)


# Published settings: the paper's CLIP text, the official demo's CLIP run, FLAN-T5 (LayerNorm is an RMSNorm there),
# and the middle of the range used for 3B to 8B language models. `llm-small` was chosen on validation texts of
# SmolLM2-135M (`bench.real`), for which the published lambda is too large: few directions of its features are above it.
PRESETS = {
    "default": Settings(),
    "clip-demo": Settings(ridge_lambda=0.05, anchor_rho=2.2, teacher_alpha=0.25),
    "flan-t5": Settings(ridge_lambda=1e-5, anchor_rho=2.0, teacher_alpha=0.6),
    "llm": Settings(ridge_lambda=0.1, anchor_rho=1.5, teacher_alpha=0.1),
    "llm-small": Settings(ridge_lambda=0.001, anchor_rho=1.5, teacher_alpha=0.3),
    "auto": Settings(auto=True),
}
