"""A layer's running ridge systems, which each task is folded into (`docs/method.md`, the same solution with less work).

For one group, with a task's moments S and Q (`moments.py`) and w = 1 / max(||S||_F / n, eps):

    A = sum_t w/n S                                                   upper triangle, [in, in]
    R = sum_t w/n (alpha W_t Q + (W_t - W_a) S)                       [out, in], stored like a weight

so that `(A + (lambda + eps) I) V' = R' - eps W_a'` gives the change V. From the token side, the tasks' rows one below
the other,

    Z = sqrt(w/n D) Xs                                                [tokens, in]
    M = sqrt(w/n D) (alpha (Xe - Xs) W_t' + Xs (W_t - W_a)')          [tokens, out]

with A = Z'Z and R' = Z'M.

Where settings choose themselves, what alpha multiplies is kept apart, below the rest: R is `[2 out, in]`, M `[tokens,
2 out]`. The change is linear in alpha, so that one solve gives it for every alpha.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from featcal_kernels import panel_rows
from torch import Tensor, nn

from featcal_fast.layer.layout import InputGroup, Layout
from featcal_fast.layer.moments import GroupMoments, InputMoments, NormMoments, RowMoments, token_side
from featcal_fast.layer.tokens import TokenCounts
from featcal_fast.models.linear import oriented
from featcal_fast.ranks.panels import row_panels
from featcal_fast.settings import Settings

BLOCK = 2048  # columns of a weight at a time
ALL = slice(None)
ROUNDED_RIDGE = 1e-3


class Anchor:
    """`W_a = rho * merged + (1 - rho) * base` for a block's parameters, formed when asked for (paper eq. 11)."""

    def __init__(self, merged: nn.Module, base: nn.Module, rho: float) -> None:
        self.merged = oriented(merged)
        self.base = oriented(base)
        self.rho = rho

    def __getitem__(self, name: str) -> Tensor:
        """The anchor of parameter `name`, float32."""
        return self.columns(name, ALL)

    def columns(self, name: str, part: slice, rows: slice = ALL) -> Tensor:
        """Some columns of a weight's anchor, and of them some rows; they are all that is formed."""
        merged, base = self.merged[name], self.base[name]
        if merged.ndim > 1:
            merged, base = merged[rows, part], base[rows, part]
        return torch.lerp(base.to(merged.device).float(), merged.float(), self.rho).contiguous()

    def subtract_from_(self, weight: Tensor, name: str, rows: slice, part: slice) -> None:
        """`weight -= W_a` of some rows and columns."""
        for block in column_blocks(weight.shape[1]):
            own = slice(part.start + block.start, part.start + block.stop)
            weight[:, block] -= self.columns(name, own, rows)


def least_ridge(settings: Settings, tasks: int, width: int) -> float:
    """What is added to the diagonal, at least, of the sum over `tasks` of `width` inputs.

    A task's scaled moment has norm 1, and so a trace from 1 to the root of `width`.
    """
    return settings.ridge_lambda * (tasks / width if settings.ridge_scale == "trace" else 1)


def fold_precision(merged: Tensor, settings: Settings) -> str:
    """Of the products that make a new weight in place of `merged`.

    One that will be rounded to bfloat16 is folded with left factors rounded to 11 bits, in two products instead of
    three. That is as if the target weight were off by 2^-12 of `W_t - W_a`, in output space of `(1 - alpha) W_t - W_a`,
    which no small lambda amplifies; emulated, at most 6% of the rounding to bfloat16 (`tests/test_fold_precision.py`,
    for `alpha` up to 1, 1 to 8 tasks). Below `ROUNDED_RIDGE` the change is so much larger
    that more of it would be lost than the rounding loses; float16 rounds too little to hide behind.
    """
    known = not settings.auto and least_ridge(settings, 1, merged.shape[1]) >= ROUNDED_RIDGE
    rounds = merged.dtype == torch.bfloat16 and known
    return "fp16x2" if rounds else "fp16x3"


def fold_columns(scratch: GroupMoments, device: torch.device) -> int:
    """How many columns of a weight a task is folded by at a time: all, or as many as copied operands have room for.

    Those of a Llama-8B are folded at once, but for `down_proj`, in two panels.
    """
    group = scratch.group
    return panel_rows(device, group.in_features * (1 if scratch.output_space else 2) + max(group.out_features))


def column_blocks(size: int, width: int = BLOCK) -> list[slice]:
    """What a weight is taken apart into, so that no whole one is ever formed in float32."""
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


@dataclass
class BiasSums:
    """The task-weighted sums that one module's bias update needs, float64 (paper appendix G)."""

    target: Tensor  # sum_t w_t (b_t + W_t m_t), [out]; where alpha is kept apart, as for an alpha of 0
    teacher: Tensor  # sum_t w_t W_t (m_e - m_s), [out], where alpha is kept apart
    student: Tensor  # sum_t w_t m_s, [in]
    weight: Tensor  # sum_t w_t

    @classmethod
    def zero(cls, bias: Tensor, width: int) -> BiasSums:
        target, teacher = torch.zeros(2, *bias.shape, dtype=torch.float64, device=bias.device)
        student = torch.zeros(width, dtype=torch.float64, device=bias.device)
        return cls(target, teacher, student, torch.zeros_like(student[0]))


@dataclass
class NormSums:
    """Sums over tasks for one LayerNorm, float64, `[width]` each."""

    energy: Tensor
    mean: Tensor
    target_weight: Tensor  # sum_t (e_t gamma_t + m_t beta_t)
    target_bias: Tensor  # sum_t (m_t gamma_t + beta_t)
    tasks: Tensor  # how many, a scalar

    @classmethod
    def zero(cls, weight: Tensor) -> NormSums:
        zeros = torch.zeros(4, *weight.shape, dtype=torch.float64, device=weight.device)
        energy, mean, target_weight, target_bias = zeros
        return cls(energy, mean, target_weight, target_bias, torch.zeros_like(zeros[0].flatten()[0]))


class Panel(NamedTuple):
    """Some rows of one module.

    Attributes:
        module: by its name in the block.
        rows: of the right-hand side.
        own: of the module's weight.
    """

    module: str
    rows: slice
    own: slice


System = TypeVar("System", bound="InputSystem")


class InputSystem(ABC):
    """What the two kinds of system of one input group share.

    Args:
        group: of modules.
        apart: whether what alpha multiplies is kept apart.

    Attributes:
        r: `[sum of out, in]`, the right-hand side, and when it is solved the change; `[2 sum of out, in]` if what alpha
            multiplies is kept apart, as the second half.
        tokens: how many there were, of all tasks.
        distances: by module, sum over tasks of `||W_t - W_a||_F`, on the device; where `max_change` asks for it.
        panels: of the modules' weights, in order.
        own: of these, the numbers of those to solve for; all, unless other ranks solve for some.
        ridge: what `ridge_lambda` amounts to, once `find_ridge` was asked for it.
    """

    r: Tensor
    ridge: float | Tensor

    def __init__(self, group: InputGroup, apart: bool) -> None:
        self.group, self.apart = group, apart
        self.tokens = 0
        self.biases: dict[str, BiasSums] = {}
        self.distances: dict[str, Tensor] = {}
        self.panels = [
            Panel(name, slice(rows.start + own.start, rows.start + own.stop), own)
            for name, rows in self.rows().items()
            for own in row_panels(rows.stop - rows.start, group.in_features)
        ]
        self.own = list(range(len(self.panels)))

    @property
    def own_panels(self) -> list[Panel]:
        """To solve for."""
        return [self.panels[number] for number in self.own]

    @abstractmethod
    def mean_diagonal(self) -> Tensor:
        """Of the sum over tasks: a scalar on the device, float64."""

    def find_ridge(self, settings: Settings) -> float | Tensor:
        """What is added to the diagonal for `ridge_lambda`."""
        scale = self.mean_diagonal() if settings.ridge_scale == "trace" else 1
        self.ridge = settings.ridge_lambda * scale
        return self.ridge

    @property
    def parts(self) -> Tensor:
        """`r` as `[parts, sum of out, in]`: one, or what alpha does not multiply and what it does."""
        return self.r.view(1 + self.apart, -1, self.group.in_features)

    @abstractmethod
    def copied(self) -> InputSystem:
        """To be solved without using this one up."""

    @abstractmethod
    def at(self, alpha: float) -> InputSystem:
        """Of a system that keeps what alpha multiplies apart, a copy for one alpha."""

    def _with_one_part(self: System, alpha: float) -> System:
        other = copy(self)
        other.apart = False
        other.biases = {
            name: replace(sums, target=sums.target + alpha * sums.teacher) for name, sums in self.biases.items()
        }
        return other

    def change(self, module: str, alpha: float) -> Tensor:
        """A module's change once it is solved: its place in `r`, or new where what alpha multiplies is kept apart."""
        first, *teacher = self.parts[:, self.rows()[module]]
        return torch.add(first, teacher[0], alpha=alpha) if teacher else first

    def measure(self, expert: Mapping[str, Tensor], anchor: Anchor) -> None:
        """Add how far a task's expert is from the anchor."""
        for name in self.group.modules:
            squares = [
                (expert[f"{name}.weight"][:, part].float() - anchor.columns(f"{name}.weight", part)).norm()
                for part in column_blocks(self.group.in_features)
            ]
            self.distances[name] += torch.stack(squares).norm()

    def rows(self) -> dict[str, slice]:
        """Each module's rows of `r`."""
        starts, start = {}, 0
        for name, out in zip(self.group.modules, self.group.out_features, strict=True):
            starts[name] = slice(start, start + out)
            start += out
        return starts


class GroupSystem(InputSystem):
    """A and R.

    Args:
        group: of modules.
        a: `[in, in]` zeros, the upper triangle counts.
        apart: whether what alpha multiplies is kept apart.
    """

    def __init__(self, group: InputGroup, a: Tensor, apart: bool = False) -> None:
        super().__init__(group, apart)
        self.a = a
        self.r = torch.zeros((1 + apart) * sum(group.out_features), group.in_features, device=a.device)

    def copied(self) -> GroupSystem:
        other = copy(self)
        other.a, other.r = self.a.clone(), self.r.clone()
        return other

    def at(self, alpha: float) -> GroupSystem:
        other = self._with_one_part(alpha)
        other.a, other.r = self.a.clone(), torch.add(*self.parts, alpha=alpha)
        return other

    def mean_diagonal(self) -> Tensor:
        return self.a.diagonal().double().mean()


class RowSystem(InputSystem):
    """Z and M: all tasks' rows, one below the other.

    Args:
        group: of modules.
        tokens: of all tasks.
        device: where they live.
        apart: whether what alpha multiplies is kept apart.
    """

    def __init__(self, group: InputGroup, tokens: int, device: torch.device, apart: bool = False) -> None:
        super().__init__(group, apart)
        out = (1 + apart) * sum(group.out_features)
        self._z = torch.empty(tokens, group.in_features, device=device)
        self._m = torch.empty(tokens, out, device=device)
        self._filled = 0

    @property
    def z(self) -> Tensor:
        return self._z[: self._filled]

    @property
    def m(self) -> Tensor:
        return self._m[: self._filled]

    def copied(self) -> RowSystem:
        return copy(self)  # the rows stay as they are

    def at(self, alpha: float) -> RowSystem:
        other = self._with_one_part(alpha)
        other._m = torch.add(*self._m.chunk(2, 1), alpha=alpha)
        return other

    def mean_diagonal(self) -> Tensor:
        energy: Tensor = self.z.norm(dtype=torch.float64).square()
        return energy / self.group.in_features

    def add(
        self,
        scratch: RowMoments,
        task_weight: Tensor,
        expert: Mapping[str, Tensor],
        anchor: Anchor,
        settings: Settings,
    ) -> None:
        """Add a task's rows.

        Args:
            scratch: the task's rows, complete.
            task_weight: `w`, a scalar on the device.
            expert: the task's parameters.
            anchor, settings: of the layer.
        """
        xs, difference = scratch.xs, scratch.difference
        z, m = self.more(len(xs))
        scale = (task_weight / scratch.n).sqrt().float()
        torch.mul(xs, scale, out=z)
        alpha = 1.0 if self.apart else settings.teacher_alpha
        parts = m.zero_().unflatten(1, (1 + self.apart, -1))
        for name, rows in self.rows().items():
            own, teacher = parts[:, 0, rows], parts[:, -1, rows]
            for part in column_blocks(self.group.in_features):
                weight = expert[f"{name}.weight"][:, part].float()
                teacher.addmm_(difference[:, part], weight.mT, alpha=alpha)
                own.addmm_(xs[:, part], (weight - anchor.columns(f"{name}.weight", part)).mT)
        m *= scale

    def clear(self) -> None:
        """Begin anew."""
        self._filled = 0

    def more(self, count: int) -> tuple[Tensor, Tensor]:
        """Room for so many tokens more, of Z and M."""
        own = slice(self._filled, self._filled + count)
        self._filled = own.stop
        return self._z[own], self._m[own]


class LayerSystem:
    """What a layer's tasks add up to; memory does not grow with their number, unless there are very few tokens.

    Args:
        layout: of the block.
        anchor: of the block's parameters.
        settings: the constants.
        device: where the sums live.
        counts: of the tokens to come.
        apart: whether what alpha multiplies is kept apart.
    """

    def __init__(
        self,
        layout: Layout,
        anchor: Anchor,
        settings: Settings,
        device: torch.device,
        counts: TokenCounts,
        apart: bool = False,
    ) -> None:
        self.layout, self.anchor, self.settings = layout, anchor, settings
        self.systems: list[GroupSystem | RowSystem] = [
            RowSystem(group, counts.total, device, apart)
            if token_side(group, counts)
            else GroupSystem(group, torch.zeros(group.in_features, group.in_features, device=device), apart)
            for group in layout.groups
        ]
        merged = anchor.merged
        for system in self.systems:
            for name in system.group.modules:
                if settings.calibrate_bias and f"{name}.bias" in merged:
                    system.biases[name] = BiasSums.zero(merged[f"{name}.bias"], system.group.in_features)
                if settings.max_change is not None:
                    system.distances[name] = torch.zeros((), device=device)
        norms = layout.norms if settings.calibrate_layernorm else ()
        self.norms = {name: NormSums.zero(merged[f"{name}.weight"]) for name in norms}
        self.width = max((group.in_features for group in layout.groups), default=1)  # of the largest system

    def alone(self, system: GroupSystem | RowSystem, settings: Settings) -> LayerSystem:
        """A layer of one system and no LayerNorms, under other settings."""
        other = copy(self)
        other.settings, other.systems, other.norms = settings, [system], {}
        other.width = system.group.in_features
        return other

    def small(self) -> list[Tensor]:
        """All sums but the systems' own, always in the same order."""
        found: list[Tensor] = []
        for system in self.systems:
            for sums in system.biases.values():
                found += [sums.target, sums.teacher, sums.student, sums.weight]
            found += system.distances.values()
        for norm in self.norms.values():
            found += [norm.energy, norm.mean, norm.target_weight, norm.target_bias, norm.tasks]
        return found

    def add_biases(
        self,
        task: str,
        system: InputSystem,
        scratch: InputMoments,
        task_weight: Tensor,
        expert: Mapping[str, Tensor],
    ) -> None:
        """Add what a task says of the biases of one input group.

        Args:
            task: its name.
            system: of the group.
            scratch: the task's sums.
            task_weight: `w`, a scalar on the device.
            expert: the task's parameters.
        """
        mean_student, mean_expert = scratch.sum_student / scratch.n, scratch.sum_expert / scratch.n
        mean_target = torch.lerp(mean_student, mean_expert, 0.0 if system.apart else self.settings.teacher_alpha)
        for name, sums in system.biases.items():
            weight, bias = expert[f"{name}.weight"], expert[f"{name}.bias"]
            sums.target += task_weight * (bias.double() + matvec(weight, mean_target))
            if system.apart:
                sums.teacher += task_weight * matvec(weight, mean_expert - mean_student)
            sums.student += task_weight * mean_student
            sums.weight += task_weight

    def add_norm(self, name: str, scratch: NormMoments, expert: Mapping[str, Tensor]) -> None:
        """Add a task's sums of one LayerNorm."""
        mean, energy = scratch.mean / scratch.n, scratch.energy / scratch.n
        gamma, beta = expert[f"{name}.weight"].double(), expert[f"{name}.bias"].double()
        sums = self.norms[name]
        sums.energy += energy
        sums.mean += mean
        sums.target_weight += energy * gamma + mean * beta
        sums.target_bias += mean * gamma + beta
        sums.tasks += 1


def matvec(weight: Tensor, x: Tensor) -> Tensor:
    """`weight @ x` in float64, `[out]`, with no copy of the whole weight."""
    parts = column_blocks(weight.shape[1])
    return torch.stack([weight[:, part].double() @ x[part] for part in parts]).sum(0)
