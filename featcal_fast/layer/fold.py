"""What a task adds to a layer's sums (`docs/method.md`, the same solution with less work).

With the task's moments S and Q, or H (`moments.py`), and w = 1 / max(||S||_F / n, eps):

    A += w/n S
    R += w/n (alpha W_t Q + (W_t - W_a) S)

a panel at a time; and what biases and LayerNorms need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from featcal_kernels import add_scaled_, addmm_, frobenius, pack, symmetrize_
from torch import Tensor, nn

from featcal_fast.layer.moments import GroupMoments, RowMoments, TaskMoments
from featcal_fast.layer.systems import (
    Anchor,
    GroupSystem,
    LayerSystem,
    Panel,
    RowSystem,
    column_blocks,
    fold_columns,
    fold_precision,
)
from featcal_fast.models.linear import oriented
from featcal_fast.ranks.panels import row_panels
from featcal_fast.settings import Settings


class GroupFold:
    """A task's share of a `GroupSystem`.

    Args:
        system: to add to.
        scratch: the task's sums, complete; they are used up.
        expert: the task's parameters.
        anchor, settings: of the layer.

    Attributes:
        weight: of the task, `w`, a scalar on the device that the host never reads.
    """

    def __init__(
        self,
        system: GroupSystem,
        scratch: GroupMoments,
        expert: Mapping[str, Tensor],
        anchor: Anchor,
        settings: Settings,
    ) -> None:
        self._system, self._scratch, self._expert = system, scratch, expert
        self._anchor, self._settings = anchor, settings
        self._alpha = 1.0 if system.apart else settings.teacher_alpha
        self._s, self._t = symmetrize_(scratch.s), scratch.t
        self.weight = (frobenius(self._s) / scratch.n).clamp_min(settings.covariance_eps).reciprocal()
        self._scale = self.weight / scratch.n
        if scratch.whole:
            self._t -= self._s
        if scratch.output_space:
            for name, rows in system.rows().items():
                if (bias := expert.get(f"{name}.bias")) is not None:
                    self._t[rows].addr_(bias.float(), scratch.sum_student.float(), alpha=-1)

    def add_to_a(self, rows: slice) -> None:
        """Of the left side some rows."""
        add_scaled_(self._system.a[rows], self._s[rows], self._scale)

    def add_to_r(self, panels: Sequence[Panel]) -> None:
        """Of the right-hand side some panels; the more at a time, the fewer copies of S."""
        parts = self._system.parts
        r, teacher = parts[0], parts[-1]
        if self._scratch.output_space:
            for panel in panels:
                add_scaled_(teacher[panel.rows], self._t[panel.rows], self._scale * self._alpha)
        for part in column_blocks(self._system.group.in_features, fold_columns(self._scratch, self._s.device)):
            # Packed once for all panels; and 16-bit weights take fewer products as they are stored.
            right, right_t = pack(self._s[part]), None if self._scratch.output_space else pack(self._t[part])
            for panel in panels:
                self._add_product(r[panel.rows], teacher[panel.rows], panel, part, right, right_t)

    def _add_product(
        self,
        r: Tensor,
        teacher: Tensor,
        panel: Panel,
        part: slice,
        right: Any,
        right_t: Any,
    ) -> None:
        """Of some columns of the weights, with the rows of S and Q that belong to them, packed."""
        name = f"{panel.module}.weight"
        stored, precision = (
            self._expert[name][panel.own, part],
            fold_precision(self._anchor.merged[name], self._settings),
        )
        weight = stored.to(torch.float32, copy=True)
        if right_t is not None:
            addmm_(teacher, stored, right_t, self._scale * self._alpha, precision=precision)
        elif self._system.apart:
            addmm_(teacher, stored, right, -self._scale, precision=precision)
        else:
            weight *= 1 - self._alpha
        self._anchor.subtract_from_(weight, name, panel.own, part)
        addmm_(r, weight, right, self._scale, precision=precision)


class RowFold:
    """A task's share of a `RowSystem`; arguments and attributes are those of `GroupFold`."""

    def __init__(
        self, system: RowSystem, scratch: RowMoments, expert: Mapping[str, Tensor], anchor: Anchor, settings: Settings
    ) -> None:
        self._system, self._scratch, self._rest = system, scratch, (expert, anchor, settings)
        # The norm of Xs' D Xs is that of its mirror image on the token side.
        norm = frobenius(scratch.xs @ scratch.xs.mT)
        self.weight = (norm / scratch.n).clamp_min(settings.covariance_eps).reciprocal()

    def add(self) -> None:
        """All its rows."""
        self._system.add(self._scratch, self.weight, *self._rest)


class TaskFold:
    """A task's share of a layer's sums.

    Args:
        layer: to add to.
        moments: the task's, complete; used up.
        expert: its block.
    """

    def __init__(self, layer: LayerSystem, moments: TaskMoments, expert: nn.Module) -> None:
        self._layer, self._moments, self._expert = layer, moments, oriented(expert)
        self.of: dict[str, GroupFold | RowFold] = {}  # by group leader
        for system in layer.systems:
            scratch = moments.groups[system.group.leader]
            if isinstance(system, GroupSystem):
                assert isinstance(scratch, GroupMoments)
                fold: GroupFold | RowFold = GroupFold(system, scratch, self._expert, layer.anchor, layer.settings)
            else:
                assert isinstance(scratch, RowMoments)
                fold = RowFold(system, scratch, self._expert, layer.anchor, layer.settings)
            self.of[system.group.leader] = fold

    def add_small(self) -> None:
        """What `LayerSystem.small` has."""
        layer = self._layer
        for system in layer.systems:
            scratch = self._moments.groups[system.group.leader]
            system.tokens += scratch.tokens
            if layer.settings.max_change is not None:
                system.measure(self._expert, layer.anchor)
            weight = self.of[system.group.leader].weight
            layer.add_biases(self._moments.task, system, scratch, weight, self._expert)
        for name, norm in self._moments.norms.items():
            layer.add_norm(name, norm, self._expert)

    def add(self) -> None:
        """All of it, to sums that are here."""
        self.add_small()
        for system in self._layer.systems:
            fold = self.of[system.group.leader]
            if isinstance(fold, RowFold):
                fold.add()
                continue
            for rows in row_panels(system.group.in_features, system.group.in_features):
                fold.add_to_a(rows)
            fold.add_to_r(system.panels)
