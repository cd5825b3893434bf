"""How good weights are on samples that nothing was fitted to, from these samples' moments (`docs/method.md`).

With a task's held-out moments, `y = W_t x_e + b_t` what its expert's module makes, and V = W - W_a, a module's error

    sum_t w_t E||W x_s + b - y||^2

is, but for what does not depend on W and b,

    <V A, V> - 2 <V, R>  +  2 <b, W m> - 2 sum_t w_t <b_t, W m_t> - 2 <b, y> + w ||b||^2

where A and R are the sums of `systems.py` for a teacher_alpha of 1, m_t the mean of x_s, and m, y and w the sums over
tasks of w_t m_t, w_t E y and w_t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from featcal_kernels import symmetrize_
from torch import Tensor

from featcal_fast.layer.layout import Layout
from featcal_fast.layer.moments import InputMoments
from featcal_fast.layer.solve import Update
from featcal_fast.layer.systems import (
    Anchor,
    GroupSystem,
    InputSystem,
    LayerSystem,
    RowSystem,
    column_blocks,
    matvec,
)
from featcal_fast.layer.tokens import TokenCounts
from featcal_fast.settings import Settings


class Judge(LayerSystem):
    """A layer's held-out sums; tasks are folded into it as into a `LayerSystem`, a task without samples not at all.

    Args:
        layout, anchor, device: as of the system that is judged.
        settings: likewise; of a teacher_alpha nothing is taken, and there is one right-hand side.
        counts: of the held-out tokens to come.
        tasks: all, in order.
    """

    def __init__(
        self,
        layout: Layout,
        anchor: Anchor,
        settings: Settings,
        device: torch.device,
        counts: TokenCounts,
        tasks: Sequence[str],
    ) -> None:
        super().__init__(
            layout,
            anchor,
            replace(settings, teacher_alpha=1.0, calibrate_bias=True, max_change=None),
            device,
            counts,
        )
        # By module, of all tasks w_t b_t and m_t.
        self._biased = {
            name: (sums.target.new_zeros(len(tasks), *sums.target.shape), sums.student.new_zeros(len(tasks), size))
            for system in self.systems
            for size in [system.group.in_features]
            for name, sums in system.biases.items()
        }
        self._tasks = list(tasks)

    def complete(self) -> None:
        """All tasks are folded."""
        for system in self.systems:
            if isinstance(system, GroupSystem):
                symmetrize_(system.a)

    def errors(self, update: Update) -> dict[str, Tensor]:
        """The error of each module in `update` with its new weights, against that with the anchor's: scalars on the
        device, float64.

        They are relative to `sum_t w_t E||W_a x_s||^2`, and negative where the new weights are better.
        """
        found: dict[str, Tensor] = {}
        for system in self.systems:
            for name, rows in system.rows().items():
                if f"{name}.weight" not in update.parameters:
                    continue
                anchor = self.anchor[f"{name}.weight"]
                change = update.parameters[f"{name}.weight"] - anchor
                error = _quadratic(system, change, rows) + self._of_bias(system, name, update)
                found[name] = error / _quadratic(system, anchor).clamp_min(torch.finfo(torch.float32).tiny)
        return found

    def _of_bias(self, system: GroupSystem | RowSystem, name: str, update: Update) -> Tensor | float:
        if name not in system.biases:
            return 0.0
        # The bias that stays where none is solved for.
        sums, own = system.biases[name], self.anchor.merged[f"{name}.bias"].double()

        def of(weight: Tensor, bias: Tensor) -> Tensor:
            error = 2 * bias @ (matvec(weight, sums.student) - sums.target) + sums.weight * bias.square().sum()
            for expert, mean in zip(*self._biased[name], strict=True):
                error = error - 2 * expert @ matvec(weight, mean)
            return error

        new = update.parameters.get(f"{name}.bias")
        weight = update.parameters[f"{name}.weight"]
        return of(weight, own if new is None else new.double()) - of(self.anchor[f"{name}.weight"], own)

    def small(self) -> list[Tensor]:
        return [*super().small(), *(each for pair in self._biased.values() for each in pair)]

    def add_biases(
        self,
        task: str,
        system: InputSystem,
        scratch: InputMoments,
        task_weight: Tensor,
        expert: Mapping[str, Tensor],
    ) -> None:
        super().add_biases(task, system, scratch, task_weight, expert)
        for name in system.biases:
            biases, means = self._biased[name]
            biases[self._tasks.index(task)] = task_weight * expert[f"{name}.bias"].double()
            means[self._tasks.index(task)] = scratch.sum_student / scratch.n


def _quadratic(system: GroupSystem | RowSystem, change: Tensor, rows: slice | None = None) -> Tensor:
    """`<V A, V>`, and less `2 <V, R>` of a module's rows: float64."""
    total = torch.zeros((), dtype=torch.float64, device=change.device)
    if isinstance(system, RowSystem):
        made = system.z @ change.mT
        return total + (made * (made if rows is None else made - 2 * system.m[:, rows])).sum(dtype=torch.float64)
    for part in column_blocks(system.group.in_features):
        product = change @ system.a[:, part]
        if rows is not None:
            product -= 2 * system.r[rows, part]
        total += (product * change[:, part]).sum(dtype=torch.float64)
    return total
