"""The method's constants, under the names the paper and the official demo use where they have one."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from featcal_fast.errors import RecipeError

FORWARD_DTYPES = ("auto", "bfloat16")
MOMENT_DTYPES = ("auto", "float32", "bfloat16")
SOLVE_DTYPES = ("auto", "float32", "float64")
Patterns = str | tuple[str, ...]


def _patterns(name: str, value: object) -> Patterns | None:
    if value is None or isinstance(value, str):
        try:
            re.compile(value or "")
        except re.error as error:
            raise RecipeError(f"settings.{name}: {value!r} is not a regular expression: {error}") from error
        return value
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(item, str) and item for item in value):
        raise RecipeError(f"settings.{name}: found {value!r}, expected a regular expression or a list of name suffixes")
    return tuple(value)


def number(value: object) -> float | None:
    """`value` where it is a finite number, or a text like `1e-5`, which YAML does not take for one; else None."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        value = float(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return value
    return None


@dataclass(frozen=True)
class Settings:
    """Constants of FeatCal (arXiv 2605.13030, eq. 10, 11, 12 and 17).

    Attributes:
        ridge_lambda: weight of the anchor against the sum over tasks (eq. 12); each task's moment is scaled to norm
            1, so the same value means less with more tasks. Zero is allowed and leaves only `covariance_eps`.
        anchor_rho: the anchor is `rho * merged + (1 - rho) * base` (eq. 11); above 1 it extrapolates past the merge.
        teacher_alpha: the target feature is `alpha * expert + (1 - alpha) * student` (eq. 10).
        covariance_eps: added to the diagonal (eq. 17), and the floor of the task weights' denominators.
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
        include: calibrate only the modules of these names: a string is a regular expression that the full name
            must match, a list holds suffixes (`q_proj`, `mlp.down_proj`), as in PEFT's `target_modules`.
        exclude: leave out the modules of these names, likewise.

    Raises:
        RecipeError: a value out of range.
    """

    ridge_lambda: float = 0.05
    anchor_rho: float = 2.0
    teacher_alpha: float = 0.3
    covariance_eps: float = 1e-8
    calibrate_bias: bool = True
    calibrate_layernorm: bool = True
    forward_dtype: str = "auto"
    moment_dtype: str = "auto"
    solve_dtype: str = "auto"
    compile_blocks: bool | None = None
    include: Patterns | None = None
    exclude: Patterns | None = None

    def __post_init__(self) -> None:
        for name in ("ridge_lambda", "anchor_rho", "teacher_alpha", "covariance_eps"):
            value = number(getattr(self, name))
            if value is None:
                raise RecipeError(f"settings.{name}: found {getattr(self, name)!r}, expected a number")
            object.__setattr__(self, name, value)
        for name in ("calibrate_bias", "calibrate_layernorm"):
            if not isinstance(getattr(self, name), bool):
                raise RecipeError(f"settings.{name}: found {getattr(self, name)!r}, expected true or false")
        if self.compile_blocks is not None and not isinstance(self.compile_blocks, bool):
            found = self.compile_blocks
            raise RecipeError(f"settings.compile_blocks: found {found!r}, expected true, false or null (on a GPU only)")
        if self.ridge_lambda < 0:
            raise RecipeError(f"settings.ridge_lambda: found {self.ridge_lambda}, expected 0 or more")
        if not 0 <= self.teacher_alpha <= 1:
            raise RecipeError(f"settings.teacher_alpha: found {self.teacher_alpha}, expected a value in [0, 1]")
        if self.covariance_eps <= 0:
            raise RecipeError(f"settings.covariance_eps: found {self.covariance_eps}, expected more than 0")
        if self.forward_dtype not in FORWARD_DTYPES:
            raise RecipeError(f"settings.forward_dtype: found {self.forward_dtype!r}, expected one of {FORWARD_DTYPES}")
        if self.moment_dtype not in MOMENT_DTYPES:
            raise RecipeError(f"settings.moment_dtype: found {self.moment_dtype!r}, expected one of {MOMENT_DTYPES}")
        if self.solve_dtype not in SOLVE_DTYPES:
            raise RecipeError(f"settings.solve_dtype: found {self.solve_dtype!r}, expected one of {SOLVE_DTYPES}")
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """Settings from a recipe's mapping.

        Args:
            values: an optional `preset`, and single values on top of it.

        Returns:
            The settings.

        Raises:
            RecipeError: an unknown preset or key, or a value out of range.
        """
        values = dict(values)
        preset = values.pop("preset", "default")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise RecipeError(f"settings.preset: found {preset!r}, expected one of {', '.join(PRESETS)}")
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                near = get_close_matches(str(key), [*known, "preset"], n=1, cutoff=0)[0]
                raise RecipeError(f"settings.{key}: unknown key; did you mean {near!r}?")
        return replace(PRESETS[preset], **values)


# Published settings: the paper's CLIP text, the official demo's CLIP run, FLAN-T5 (LayerNorm is an RMSNorm there),
# and the middle of the range used for 3B to 8B language models.
PRESETS = {
    "default": Settings(),
    "clip-demo": Settings(ridge_lambda=0.05, anchor_rho=2.2, teacher_alpha=0.25),
    "flan-t5": Settings(ridge_lambda=1e-5, anchor_rho=2.0, teacher_alpha=0.6),
    "llm": Settings(ridge_lambda=0.1, anchor_rho=1.5, teacher_alpha=0.1),
}
