"""Solve a layer: batched ridge systems in place, then biases and LayerNorm affines.

The ladder, a system at a time, when a factorisation fails:

    1. Cholesky in the chosen precision (`solve_dtype`), in place in the accumulated buffers: no copy of A or R is made.
       On a GPU, a large and well-conditioned float32 system is then solved by blocks (`cholesky`).
    2. Cholesky in float64, of the same system.
    3. float64 with the diagonal raised, tenfold each time, from 1e-7 of its mean; what was added is reported.
    4. SolveError. A result that is not finite is a SolveError too: no ladder mends NaN features.

A system that is solved from the token side has steps 1, 2 and 4, and buffers of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from featcal_fast.checkpoints import is_finite
from featcal_fast.errors import SolveError
from featcal_fast.layer.cholesky import BY_BLOCKS, arithmetic, factor_, solve_
from featcal_fast.layer.layout import InputGroup, Layout
from featcal_fast.layer.moments import GroupMoments, TaskMoments
from featcal_fast.layer.systems import (
    Anchor,
    GroupSystem,
    InputSystem,
    LayerSystem,
    NormSums,
    RowSystem,
    column_blocks,
    least_ridge,
    matvec,
)
from featcal_fast.models.linear import oriented
from featcal_fast.settings import Settings

MAX_CONDITION_FLOAT32 = 1e4  # beyond this bound on cond(A), float32's 6e-8 leaves too few digits
# Beyond this one, no split products. Errors of the solution relative to the update, the worst of four kinds of
# features, n = 768 in blocks of 128, on a CPU that imitates split products; "cut off": and matrix units that cut each
# product off at 24 bits of the largest of sixteen, and then their sum. There the factorisation went by blocks, too; now
# it is the library's.
#
#     bound      library    by blocks      cut off
#         1        7e-10        6e-10        7e-10
#         9         5e-8         6e-8         8e-8
#       161       1.6e-6       1.9e-6       2.9e-6
#       801       8.5e-6       1.0e-5       1.6e-5
#     8,001       8.1e-5       8.9e-5       1.4e-4
MAX_CONDITION_SPLIT = 1e3
OUT_OF_RANGE = (
    "the drift, or the change of the weights, leaves float32's range (3.4e+38), though all of both are finite; look at"
    " weights of the merged model, the experts and the base model that are larger than 1e+17"
)
TINY = torch.finfo(torch.float32).tiny
RAISES = (1e-7, 1e-6, 1e-5, 1e-4)  # of the mean of the diagonal


class NotFinite(SolveError):
    """A number of a layer is NaN or Inf: of which groups, or of none where it is another; not yet, whose fault."""

    def __init__(self, groups: Sequence[InputGroup] = ()) -> None:
        names = ", ".join(name for group in groups for name in group.modules)
        super().__init__(f"{names}: found NaN or Inf, expected finite numbers" if names else OUT_OF_RANGE)
        self.groups = list(groups)


@dataclass
class Update:
    """A layer's new parameters, and how they were found.

    Attributes:
        parameters: by name, float32.
        solver: by group leader: "float32", "float64", "float64, diagonal raised by 1e-07 of its mean".
        raised: by group leader, what was added to the diagonal for that, relative to its mean.
        steps: by group leader, what was tried; the last of it gave the solution.
        changes: by module, of each panel that was solved for `||W' - W_merged||_F`, scalars on the device.
        sums: likewise, of its new weights, for `check_finite`.
    """

    parameters: dict[str, Tensor] = field(default_factory=dict)
    solver: dict[str, str] = field(default_factory=dict)
    raised: dict[str, float] = field(default_factory=dict)
    steps: dict[str, list[str]] = field(default_factory=dict)
    changes: dict[str, list[Tensor]] = field(default_factory=dict)
    sums: dict[str, list[Tensor]] = field(default_factory=dict)

    def solved(self, system: InputSystem, steps: list[str]) -> None:
        """Note what was tried."""
        side = ", token side" if isinstance(system, RowSystem) else ""
        self.steps[system.group.leader] = steps
        self.solver[system.group.leader] = steps[-1].removesuffix(BY_BLOCKS) + side


def max_condition(settings: Settings, tasks: int, width: int) -> float:
    """A bound on cond(A) of `width` inputs: each task's scaled moment has norm 1, and so a trace of 1 at least."""
    ridge = least_ridge(settings, tasks, width) + settings.covariance_eps
    return (tasks + ridge) / ridge


def solve_dtype(settings: Settings, tasks: int, width: int) -> torch.dtype:
    """The arithmetic of the solve."""
    if settings.solve_dtype != "auto":
        return {"float32": torch.float32, "float64": torch.float64}[settings.solve_dtype]
    return torch.float32 if max_condition(settings, tasks, width) <= MAX_CONDITION_FLOAT32 else torch.float64


def solve_layer(layer: LayerSystem, scratch: TaskMoments, tasks: int) -> Update:
    """A layer's new parameters; they take the place of `layer`'s sums. Arguments and errors are `solve_systems`'s."""
    update = solve_systems(layer, scratch, tasks)
    for solved in layer.systems:
        for name in solved.group.modules:
            set_parameters(update, layer, solved, name, tasks, layer.settings.teacher_alpha, solved.ridge)
    update.parameters |= solve_norms(layer)
    return update


def solve_systems(layer: LayerSystem, scratch: TaskMoments, tasks: int) -> Update:
    """Solve a layer's systems for the changes, in place in `layer`'s buffers (they are used up).

    The device is read once, unless the ladder is needed; whether the result is finite is for `check_finite` to say.

    Args:
        layer: complete sums.
        scratch: the layer's task moments; their `s` buffers, free by now, hold copies of the systems for the ladder.
        tasks: how many tasks were folded.

    Returns:
        How they were solved; without parameters.

    Raises:
        NotFinite: features are not, or their sums.
        SolveError: names the modules; not positive definite at the ladder's end.
    """
    settings, update = layer.settings, Update()
    width = layer.width
    dtype, split = solve_dtype(settings, tasks, width), max_condition(settings, tasks, width) <= MAX_CONDITION_SPLIT
    groups = [system for system in layer.systems if isinstance(system, GroupSystem)]
    backups = {}
    for system in groups:
        moments = scratch.groups[system.group.leader]
        assert isinstance(moments, GroupMoments)
        system.a.diagonal().add_(system.find_ridge(settings) + settings.covariance_eps)
        backups[system.group.leader] = moments.s.copy_(system.a)
        for panel in system.own_panels:
            for part in column_blocks(system.group.in_features):
                columns = layer.anchor.columns(f"{panel.module}.weight", part, panel.own)
                system.r[panel.rows, part].sub_(columns, alpha=settings.covariance_eps)

    failed = _factor(groups) if dtype == torch.float32 else set()
    for system in groups:
        leader = system.group.leader
        if dtype == torch.float64 or leader in failed:
            extra = update.raised[leader] = _solve_float64(system, backups[leader])
            update.solved(system, ["float32"] * (leader in failed) + _float64_steps(extra))
        else:
            for right in _right_sides(system):
                solve_(system.a, right.mT, split=split)
            update.solved(system, [arithmetic(system.a, split=split)])
    for rows_system in layer.systems:
        if isinstance(rows_system, RowSystem):
            update.solved(rows_system, _solve_rows(rows_system, layer.anchor, settings, dtype, split))
    return update


def _right_sides(system: GroupSystem) -> list[Tensor]:
    """`[rows, in]` each: the panels to solve for, of both parts where what alpha multiplies is kept apart."""
    return [part[panel.rows] for part in system.parts for panel in system.own_panels]


def set_parameters(
    update: Update,
    layer: LayerSystem,
    system: InputSystem,
    module: str,
    tasks: int,
    alpha: float,
    ridge: float | Tensor,
) -> None:
    """A module's new weight and, where it is solved for, bias; the panels that were solved for, others are undefined.

    Args:
        update: to put them into.
        layer: the sums.
        system: the one of the module, solved.
        module: by its name in the block.
        tasks: how many tasks were folded.
        alpha: of the teacher; without effect unless what it multiplies is kept apart.
        ridge: that the system was solved with.
    """
    name, cap, weight = f"{module}.weight", layer.settings.max_change, system.change(module, alpha)
    if cap is not None:
        weight *= (cap / tasks * system.distances[module] / weight.norm().clamp_min(TINY)).clamp(max=1)
    update.parameters[name] = weight
    bias = torch.empty(len(weight), device=weight.device)
    changes, sums = update.changes[module], update.sums[module] = [], []
    for own in (panel.own for panel in system.own_panels if panel.module == module):
        rows = weight[own]
        for part in column_blocks(system.group.in_features):
            rows[:, part] += layer.anchor.columns(name, part, own)
        changes.append((rows - layer.anchor.merged[name][own].float()).norm())
        sums.append(rows.sum())
        if module in system.biases:
            bias[own] = _solve_bias(layer, system, module, rows, own, alpha, ridge)
    if module in system.biases:
        update.parameters[f"{module}.bias"] = bias


def solve_norms(layer: LayerSystem) -> dict[str, Tensor]:
    """New weights and biases of a layer's LayerNorms, float32."""
    found = {}
    for name, sums in layer.norms.items():
        anchor = layer.anchor[f"{name}.weight"].double(), layer.anchor[f"{name}.bias"].double()
        found[f"{name}.weight"], found[f"{name}.bias"] = solve_layernorm(sums, *anchor, layer.settings)
    return found


def _factor(systems: Sequence[GroupSystem]) -> set[str]:
    """Leaders of the groups whose factorisation stopped: one read of the device for the whole layer."""
    infos = [factor_(system.a) for system in systems]
    flags = torch.stack(infos).tolist() if infos else []
    return {system.group.leader for system, info in zip(systems, flags, strict=True) if info != 0}


def _float64_steps(extra: float) -> list[str]:
    """Steps 2 and 3 as far as they went."""
    raised = [f"float64, diagonal raised by {each:.0e} of its mean" for each in RAISES if each <= extra]
    return ["float64", *raised]


def _solve_float64(system: GroupSystem, backup: Tensor) -> float:
    """Steps 2 and 3 of the ladder; the solution overwrites `system.r`. What was added to the diagonal, of its mean."""
    mean = backup.diagonal().double().mean()
    for extra in (0.0, *RAISES):
        a = backup.double()
        a.diagonal().add_(extra * mean)
        if int(factor_(a)) == 0:
            for right in _right_sides(system):
                r = right.double()
                solve_(a, r.mT)
                right.copy_(r)
            return extra
    if not bool(backup.triu().isfinite().all()):
        raise NotFinite([system.group])
    raise SolveError(
        f"{', '.join(system.group.modules)}: the ridge system is not positive definite, even with its "
        "diagonal raised by "
        f"{RAISES[-1]:.0e} of its mean; use a larger ridge_lambda or more samples"
    )


def _solve_rows(system: RowSystem, anchor: Anchor, settings: Settings, dtype: torch.dtype, split: bool) -> list[str]:
    """The change from the token side, as `system.r`; float64 where float32 fails. With mu = lambda + eps,

    `V' = Z' (Z Z' + mu I)^-1 (M + eps/mu Z W_a') - eps/mu W_a'`.

    Returns:
        What was tried.
    """
    mu = float(system.find_ridge(settings)) + settings.covariance_eps
    share = settings.covariance_eps / mu
    anchors = [
        (rows, part, f"{name}.weight")
        for name, rows in system.rows().items()
        for part in column_blocks(system.group.in_features)
    ]
    steps: list[str] = []
    for each in dict.fromkeys((dtype, torch.float64)):
        z, right = system.z.to(each), system.m.to(each, copy=True)
        for rows, part, name in anchors:
            right[:, rows].addmm_(z[:, part], anchor.columns(name, part).to(each).mT, alpha=share)
        k = z @ z.mT
        k.diagonal().add_(mu)
        steps.append(arithmetic(k, split=split))
        if int(factor_(k)) == 0:
            solve_(k, right, split=split)
            system.r = (right.mT @ z).float()
            for rows, part, name in anchors:
                system.r[rows, part].sub_(anchor.columns(name, part), alpha=share)
            return steps
    if not is_finite(system.z):
        raise NotFinite([system.group])
    raise SolveError(
        f"{', '.join(system.group.modules)}: the ridge system is not positive definite; use a larger ridge_lambda or "
        "more samples"
    )


def check_finite(
    groups: Sequence[InputGroup],
    parameters: Mapping[str, Tensor],
    sums: Sequence[float],
    others: Sequence[float] = (),
) -> None:
    """Whether a layer's new weights are finite, told by `Update.sums`: NaN and Inf come through a sum.

    Args:
        groups: that were solved for.
        parameters: new ones, any shape and dtype.
        sums: of weights.
        others: that must be finite too: the drift, by which NaN in biases and LayerNorms shows, and changes.

    Raises:
        NotFinite: a number is not; it has the groups whose weights are not.
    """
    if all(map(math.isfinite, [*sums, *others])):
        return
    broken = [group for group in groups if not all(is_finite(parameters[f"{name}.weight"]) for name in group.modules)]
    if broken or not all(map(math.isfinite, others)):
        raise NotFinite(broken)


def _solve_bias(
    layer: LayerSystem,
    system: InputSystem,
    name: str,
    weight: Tensor,
    own: slice,
    alpha: float,
    ridge: float | Tensor,
) -> Tensor:
    """`b = (sum_t w_t (b_t + W_t m_t - W m_s) + lambda b_a) / (sum_t w_t + lambda)`, float64 inside, of some rows."""
    sums = system.biases[name]
    target = sums.target[own] - matvec(weight, sums.student) + ridge * layer.anchor[f"{name}.bias"][own].double()
    if system.apart:
        target += alpha * sums.teacher[own]
    return (target / (sums.weight + ridge).clamp_min(torch.finfo(torch.float32).eps)).float()


def solve_layernorm(sums: NormSums, gamma: Tensor, beta: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """The two-by-two system of each channel (`docs/method.md`, LayerNorms).

    Args:
        sums: over tasks, float64.
        gamma, beta: the anchor, `[width]` float64.

    Returns:
        Weight and bias, `[width]` float32.
    """
    ridge = settings.ridge_lambda
    a11, a12, a22 = sums.energy + ridge, sums.mean, sums.tasks + ridge
    r1, r2 = sums.target_weight + ridge * gamma, sums.target_bias + ridge * beta
    det = (a11 * a22 - a12.square()).clamp_min(settings.covariance_eps)
    return ((a22 * r1 - a12 * r2) / det).float(), ((a11 * r2 - a12 * r1) / det).float()


def load_update(block: nn.Module, update: Update) -> None:
    """Put a layer's new parameters into `block`, all at once."""
    views = oriented(block)
    for name, value in update.parameters.items():
        views[name].copy_(value)


def loaded(block: nn.Module, update: Update) -> dict[str, Tensor]:
    """A layer's new parameters, as the block that they were put into has them."""
    own = dict(block.named_parameters())
    return {name: own[name] for name in update.parameters}


def relative_changes(layout: Layout, update: Update, merged: nn.Module) -> list[Tensor]:
    """`||W' - W_merged||_F / ||W_merged||_F` of each group: scalars on the device."""
    before, changes = oriented(merged), []
    for group in layout.groups:
        change = torch.stack([each for name in group.modules for each in update.changes[name]]).norm()
        whole = torch.stack([before[f"{name}.weight"].float().norm() for name in group.modules]).norm()
        changes.append(change / whole.clamp_min(1e-30))
    return changes
