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
from typing import TypeVar

import torch
from featcal_kernels import add_scaled_, addmm_, frobenius, pack, panel_rows, symmetrize_
from torch import Tensor, nn

from featcal_fast.layer.layout import InputGroup, Layout
from featcal_fast.layer.moments import GroupMoments, InputMoments, NormMoments, RowMoments, TaskMoments, token_side
from featcal_fast.layer.tokens import TokenCounts
from featcal_fast.models.linear import oriented
from featcal_fast.settings import Settings

BLOCK = 2048  # columns of a weight at a time
ROUNDED_RIDGE = 1e-3


class Anchor:
    """`W_a = rho * merged + (1 - rho) * base` for a block's parameters, formed when asked for (paper eq. 11)."""

    def __init__(self, merged: nn.Module, base: nn.Module, rho: float) -> None:
        self.merged = oriented(merged)
        self.base = oriented(base)
        self.rho = rho

    def __getitem__(self, name: str) -> Tensor:
        """The anchor of parameter `name`, float32."""
        return self.columns(name, slice(None))

    def columns(self, name: str, part: slice) -> Tensor:
        """Some columns of a weight's anchor; they are all that is formed."""
        merged = self.merged[name][..., part]
        base = self.base[name][..., part].to(merged.device)
        return torch.lerp(base.float(), merged.float(), self.rho).contiguous()

    def subtract_from_(self, weight: Tensor, name: str, part: slice) -> None:
        """`weight -= W_a` of some columns."""
        for block in column_blocks(weight.shape[1]):
            weight[:, block] -= self.columns(name, slice(part.start + block.start, part.start + block.stop))


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


@dataclass
class NormSums:
    """Sums over tasks for one LayerNorm, float64, `[width]` each."""

    energy: Tensor
    mean: Tensor
    target_weight: Tensor  # sum_t (e_t gamma_t + m_t beta_t)
    target_bias: Tensor  # sum_t (m_t gamma_t + beta_t)
    tasks: int = 0

    @classmethod
    def zero(cls, like: Tensor) -> NormSums:
        energy, mean, target_weight, target_bias = torch.zeros(4, *like.shape, dtype=like.dtype, device=like.device)
        return cls(energy, mean, target_weight, target_bias)


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
        ridge: what `ridge_lambda` amounts to, once `find_ridge` was asked for it.
    """

    r: Tensor
    ridge: float | Tensor

    def __init__(self, group: InputGroup, apart: bool) -> None:
        self.group, self.apart = group, apart
        self.tokens = 0
        self.biases: dict[str, BiasSums] = {}
        self.distances: dict[str, Tensor] = {}

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
            self.distances[name] = self.distances.get(name, 0) + torch.stack(squares).norm()

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

    def add(self, scratch: InputMoments, expert: Mapping[str, Tensor], anchor: Anchor, settings: Settings) -> Tensor:
        """Add a task's sums, and use them up; its weight `w`, a scalar on the device that the host never reads."""
        assert isinstance(scratch, GroupMoments)
        alpha, s, t = 1.0 if self.apart else settings.teacher_alpha, symmetrize_(scratch.s), scratch.t
        r, teacher = self.parts[0], self.parts[-1]
        task_weight = (frobenius(s) / scratch.n).clamp_min(settings.covariance_eps).reciprocal()
        scale = task_weight / scratch.n
        add_scaled_(self.a, s, scale)
        if scratch.whole:
            t -= s
        modules = {name: (expert[f"{name}.weight"], rows) for name, rows in self.rows().items()}
        if scratch.output_space:
            for name, (_, rows) in modules.items():
                if (bias := expert.get(f"{name}.bias")) is not None:
                    t[rows].addr_(bias.float(), scratch.sum_student.float(), alpha=-1)
                add_scaled_(teacher[rows], t[rows], scale * alpha)
        for part in column_blocks(self.group.in_features, fold_columns(scratch, s.device)):
            # Packed once for all modules; and 16-bit weights take fewer products as they are stored.
            right, right_t = pack(s[part]), None if scratch.output_space else pack(t[part])
            for name, (stored, rows) in modules.items():
                precision = fold_precision(anchor.merged[f"{name}.weight"], settings)
                weight = stored[:, part].to(torch.float32, copy=True)
                if right_t is not None:
                    addmm_(teacher[rows], stored[:, part], right_t, scale * alpha, precision=precision)
                elif self.apart:
                    addmm_(teacher[rows], stored[:, part], right, -scale, precision=precision)
                else:
                    weight *= 1 - alpha
                anchor.subtract_from_(weight, f"{name}.weight", part)
                addmm_(r[rows], weight, right, scale, precision=precision)
        return task_weight


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

    def add(self, scratch: InputMoments, expert: Mapping[str, Tensor], anchor: Anchor, settings: Settings) -> Tensor:
        """Add a task's rows; its weight `w`, a scalar on the device that the host never reads."""
        assert isinstance(scratch, RowMoments)
        xs, difference = scratch.xs, scratch.difference
        own = slice(self._filled, self._filled + len(xs))
        self._filled = own.stop
        # The norm of Xs' D Xs is that of its mirror image on the token side.
        task_weight = (frobenius(xs @ xs.mT) / scratch.n).clamp_min(settings.covariance_eps).reciprocal()
        scale = (task_weight / scratch.n).sqrt().float()
        torch.mul(xs, scale, out=self._z[own])
        alpha = 1.0 if self.apart else settings.teacher_alpha
        parts = self._m[own].zero_().unflatten(1, (1 + self.apart, -1))
        for name, rows in self.rows().items():
            m, teacher = parts[:, 0, rows], parts[:, -1, rows]
            for part in column_blocks(self.group.in_features):
                weight = expert[f"{name}.weight"][:, part].float()
                teacher.addmm_(difference[:, part], weight.mT, alpha=alpha)
                m.addmm_(xs[:, part], (weight - anchor.columns(f"{name}.weight", part)).mT)
        self._m[own] *= scale
        return task_weight


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
        self.anchor, self.settings = anchor, settings
        self.systems: list[GroupSystem | RowSystem] = [
            RowSystem(group, counts.total, device, apart)
            if token_side(group, counts)
            else GroupSystem(group, torch.zeros(group.in_features, group.in_features, device=device), apart)
            for group in layout.groups
        ]
        self.norms: dict[str, NormSums] = {}

    @property
    def width(self) -> int:
        """Inputs of the largest system."""
        return max((system.group.in_features for system in self.systems), default=1)

    def alone(self, system: GroupSystem | RowSystem, settings: Settings) -> LayerSystem:
        """A layer of one system and no LayerNorms, under other settings."""
        other = copy(self)
        other.settings, other.systems, other.norms = settings, [system], {}
        return other

    def fold(self, moments: TaskMoments, expert: nn.Module) -> None:
        """Add one task: `moments` is complete, `expert` is its block. The scratch is used up."""
        parameters = oriented(expert)
        for system in self.systems:
            scratch = moments.groups[system.group.leader]
            system.tokens += scratch.tokens
            task_weight = system.add(scratch, parameters, self.anchor, self.settings)
            if self.settings.max_change is not None:
                system.measure(parameters, self.anchor)
            if self.settings.calibrate_bias:
                self._fold_biases(system, scratch, task_weight, parameters)
        for name, norm in moments.norms.items():
            self._fold_norm(name, norm, parameters)

    def _fold_biases(
        self, system: InputSystem, scratch: InputMoments, task_weight: Tensor, expert: Mapping[str, Tensor]
    ) -> None:
        mean_student, mean_expert = scratch.sum_student / scratch.n, scratch.sum_expert / scratch.n
        mean_target = torch.lerp(mean_student, mean_expert, 0.0 if system.apart else self.settings.teacher_alpha)
        for name in system.group.modules:
            bias = expert.get(f"{name}.bias")
            if bias is None:
                continue
            if name not in system.biases:
                zero = torch.zeros_like(bias, dtype=torch.float64)
                system.biases[name] = BiasSums(zero, zero.clone(), 0 * mean_student, 0 * task_weight)
            sums = system.biases[name]
            sums.target += task_weight * (bias.double() + matvec(expert[f"{name}.weight"], mean_target))
            if system.apart:
                sums.teacher += task_weight * matvec(expert[f"{name}.weight"], mean_expert - mean_student)
            sums.student += task_weight * mean_student
            sums.weight += task_weight

    def _fold_norm(self, name: str, scratch: NormMoments, expert: Mapping[str, Tensor]) -> None:
        mean, energy = scratch.mean / scratch.n, scratch.energy / scratch.n
        gamma, beta = expert[f"{name}.weight"].double(), expert[f"{name}.bias"].double()
        sums = self.norms.setdefault(name, NormSums.zero(mean))
        sums.energy += energy
        sums.mean += mean
        sums.target_weight += energy * gamma + mean * beta
        sums.target_bias += mean * gamma + beta
        sums.tasks += 1


def matvec(weight: Tensor, x: Tensor) -> Tensor:
    """`weight @ x` in float64, `[out]`, with no copy of the whole weight."""
    parts = column_blocks(weight.shape[1])
    return torch.stack([weight[:, part].double() @ x[part] for part in parts]).sum(0)
