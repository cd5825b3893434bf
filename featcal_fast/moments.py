"""One task's scratch moments, and the layer's running system that they are folded into (design sections 3.4 to 3.8).

Everything is kept in the form that solves for the *change* `V = W - W_a` (design 3.8), so that float32 rounding acts on
differences of features and of weights. For one group, per task, with `D` the token weights and `n` their sum:

    S = Xs' D Xs                            upper triangle, [in, in]
    Q = (Xe - Xs)' D Xs                     input space,  [in, in]
    H = Ye' D Xs,  Ye = Xe W_t'             output space, [out, in]; then W_t Q = H - W_t S

and over tasks, with w = 1 / max(||S||_F / n, eps):

    A = sum_t w/n S                                                   upper triangle, [in, in]
    R = sum_t w/n (alpha W_t Q + (W_t - W_a) S)                       [out, in], stored like a weight
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from featcal_kernels import add_scaled_, addmm_, cross_, frobenius, gram_cross_, symmetrize_
from torch import Tensor, nn

from featcal_fast.errors import SolveError
from featcal_fast.features import InputGroup, Kept, Layout
from featcal_fast.models.linear import oriented
from featcal_fast.settings import Settings
from featcal_fast.tokens import Tokens


class Anchor:
    """`W_a = rho * merged + (1 - rho) * base` for a block's parameters, formed when asked for (paper eq. 11)."""

    def __init__(self, merged: nn.Module, base: nn.Module, rho: float) -> None:
        self.merged = oriented(merged)
        self.base = oriented(base)
        self.rho = rho

    def __getitem__(self, name: str) -> Tensor:
        """The anchor of parameter `name`, float32."""
        merged, base = self.merged[name], self.base[name].to(self.merged[name].device)
        return torch.lerp(base.float(), merged.float(), self.rho).contiguous()


def output_space(group: InputGroup, tokens: int) -> bool:
    """Whether `H` (out * in a token) is cheaper than `Q` (in * in a token, and `W_t Q` once): design 3.4."""
    out = sum(group.out_features)
    return tokens * out < tokens * group.in_features + out * group.in_features


class GroupMoments:
    """The scratch moments of one input group and one task; means only where a module has a bias."""

    def __init__(self, group: InputGroup, needs_means: bool, tokens: int, device: torch.device) -> None:
        self.group, self.needs_means = group, needs_means
        self.output_space = output_space(group, tokens)
        rows = sum(group.out_features) if self.output_space else group.in_features
        self.s = torch.zeros(group.in_features, group.in_features, device=device)
        self.t = torch.zeros(rows, group.in_features, device=device)
        self.sum_student = torch.zeros(group.in_features, dtype=torch.float64, device=device)
        self.sum_expert = torch.zeros(group.in_features, dtype=torch.float64, device=device)
        self.n = 0.0
        self.whole = False  # t holds Xe' D Xs, not yet (Xe - Xs)' D Xs

    def reset(self) -> None:
        for tensor in (self.s, self.t, self.sum_student, self.sum_expert):
            tensor.zero_()
        self.n = 0.0

    def add(self, xs: Tensor, xe: Tensor, ye: list[Tensor], weights: Tensor | None, n: float) -> None:
        """Accumulate one chunk.

        Args:
            xs: student features, `[tokens, in]`.
            xe: expert features, same shape.
            ye: in output space, the expert's outputs, bias included, one `[tokens, out]` a module.
            weights: `[tokens]` or None.
            n: sum of the weights.
        """
        self.n += n
        if self.needs_means:
            self.sum_student += _column_sums(xs, weights)
            self.sum_expert += _column_sums(xe, weights)
        if self.output_space:
            first, *rest = self.t.split(list(self.group.out_features))
            gram_cross_(self.s, first, xs, ye[0], weights)
            for t, y in zip(rest, ye[1:], strict=True):
                cross_(t, y, xs, weights)
        else:
            # A 16-bit difference would be rounded again, while products of 16-bit features are exact.
            self.whole = xs.dtype != torch.float32
            gram_cross_(self.s, self.t, xs, xe if self.whole else xe - xs, weights)


class NormMoments:
    """First and second moments of the student's affine-free normalised input of one LayerNorm, one task, float64."""

    def __init__(self, norm: nn.LayerNorm, device: torch.device) -> None:
        self.shape, self.eps = norm.normalized_shape, norm.eps
        self.mean = torch.zeros(*self.shape, dtype=torch.float64, device=device)
        self.energy = torch.zeros_like(self.mean)
        self.n = 0.0

    def reset(self) -> None:
        self.mean.zero_()
        self.energy.zero_()
        self.n = 0.0

    def add(self, x: Tensor, weights: Tensor | None, n: float) -> None:
        z = F.layer_norm(x.float() if x.dtype != torch.float64 else x, self.shape, eps=self.eps)
        self.mean += _column_sums(z, weights)
        self.energy += _column_sums(z.square(), weights)
        self.n += n


class TaskMoments:
    """The scratch moments of a layer for one task; reused from task to task."""

    def __init__(self, layout: Layout, block: nn.Module, tokens: int, settings: Settings, device: torch.device) -> None:
        self.layout = layout
        self.settings = settings
        self.groups = {}
        for group in layout.groups:
            has_bias = any(block.get_submodule(name).bias is not None for name in group.modules)
            self.groups[group.leader] = GroupMoments(group, has_bias, tokens, device)
        norms = layout.norms if settings.calibrate_layernorm else {}
        self.norms = {name: NormMoments(_layer_norm(block, name), device) for name in norms}

    @property
    def outputs(self) -> list[str]:
        """Modules whose outputs in the expert are needed: those of the groups in output space."""
        return [name for moments in self.groups.values() if moments.output_space for name in moments.group.modules]

    def reset(self) -> None:
        for group in self.groups.values():
            group.reset()
        for norm in self.norms.values():
            norm.reset()

    def add(self, name: str, x: Tensor, expert_inputs: Kept, expert_outputs: Kept, tokens: Tokens) -> None:
        """Accumulate the student's input `x` of module `name` for one batch, as its forward reaches the module.

        Args:
            x: `[batch, tokens, in]`, as captured.
            expert_inputs: the expert's inputs on the same batch, by module.
            expert_outputs: the expert's outputs of `self.outputs`.
            tokens: which tokens of the batch count.
        """
        if name in self.norms:
            weights, n = tokens.weights(self.layout.norms[name])
            self.norms[name].add(tokens.rows(x), weights, n)
        elif name in self.groups:
            moments = self.groups[name]
            if moments.group.memory:
                assert tokens.memory is not None
                tokens = tokens.memory
            weights, n = tokens.weights(moments.group.weights)
            names = moments.group.modules if moments.output_space else ()
            features = [tokens.rows(x), tokens.rows(expert_inputs[name])]
            features += [tokens.rows(expert_outputs[module]) for module in names]
            xs, xe, *ye = self._in_one_dtype(features)
            moments.add(xs, xe, ye, weights, n)

    def _in_one_dtype(self, features: list[Tensor]) -> list[Tensor]:
        dtypes = {x.dtype for x in features}
        if self.settings.moment_dtype != "auto":
            dtypes = {getattr(torch, self.settings.moment_dtype)}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        return [x.to(torch.float32 if dtype == torch.float64 else dtype) for x in features]


@dataclass
class BiasSums:
    """The task-weighted sums that one module's bias update needs, float64 (paper appendix G)."""

    target: Tensor  # sum_t w_t (b_t + W_t m_t), [out]
    student: Tensor  # sum_t w_t m_s, [in]
    weight: Tensor  # sum_t w_t


@dataclass
class NormSums:
    """Sums over tasks for one LayerNorm, float64, `[width]` each (design section 2)."""

    energy: Tensor
    mean: Tensor
    target_weight: Tensor  # sum_t (e_t gamma_t + m_t beta_t)
    target_bias: Tensor  # sum_t (m_t gamma_t + beta_t)
    tasks: int = 0

    @classmethod
    def zero(cls, like: Tensor) -> NormSums:
        energy, mean, target_weight, target_bias = torch.zeros(4, *like.shape, dtype=like.dtype, device=like.device)
        return cls(energy, mean, target_weight, target_bias)


@dataclass
class GroupSystem:
    """The running ridge system of one input group."""

    group: InputGroup
    a: Tensor  # [in, in], upper triangle; a view into the layer's stack of equal sizes
    r: Tensor  # [sum of out, in]
    biases: dict[str, BiasSums] = field(default_factory=dict)

    def rows(self) -> dict[str, slice]:
        """Each module's rows of `r`."""
        starts, start = {}, 0
        for name, out in zip(self.group.modules, self.group.out_features, strict=True):
            starts[name] = slice(start, start + out)
            start += out
        return starts


class LayerSystem:
    """What a layer's tasks add up to; memory does not grow with their number.

    Args:
        layout: of the block.
        anchor: of the block's parameters.
        settings: the constants.
        device: where the sums live.
    """

    def __init__(self, layout: Layout, anchor: Anchor, settings: Settings, device: torch.device) -> None:
        self.anchor = anchor
        self.settings = settings
        self.stacks: dict[int, Tensor] = {}
        self.systems: list[GroupSystem] = []
        for size in sorted({group.in_features for group in layout.groups}):
            groups = [group for group in layout.groups if group.in_features == size]
            self.stacks[size] = torch.zeros(len(groups), size, size, device=device)
            for a, group in zip(self.stacks[size], groups, strict=True):
                r = torch.zeros(sum(group.out_features), size, device=device)
                self.systems.append(GroupSystem(group, a, r))
        self.norms: dict[str, NormSums] = {}

    def fold(self, moments: TaskMoments, expert: nn.Module, task: str) -> None:
        """Add one task: `moments` is complete, `expert` is its block. The scratch is used up.

        Raises:
            SolveError: no token of the task counts.
        """
        parameters = oriented(expert)
        for system in self.systems:
            self._fold_group(system, moments.groups[system.group.leader], parameters, task)
        for name, scratch in moments.norms.items():
            self._fold_norm(name, scratch, parameters)

    def _fold_group(self, system: GroupSystem, scratch: GroupMoments, expert: Mapping[str, Tensor], task: str) -> None:
        if scratch.n <= 0:
            raise SolveError(f"task {task}: no token counts (every position is padding); check its attention_mask")
        alpha, eps = self.settings.teacher_alpha, self.settings.covariance_eps
        s, t = symmetrize_(scratch.s), scratch.t
        task_weight = (frobenius(s) / scratch.n).clamp_min(eps).reciprocal()  # on the device: no host sync
        scale = task_weight / scratch.n
        add_scaled_(system.a, s, scale)
        if scratch.whole:
            t -= s
        mean_student, mean_expert = scratch.sum_student / scratch.n, scratch.sum_expert / scratch.n
        mean_target = torch.lerp(mean_student, mean_expert, alpha)
        for name, rows in system.rows().items():
            stored, bias = expert[f"{name}.weight"], expert.get(f"{name}.bias")
            weight = stored.float()
            if scratch.output_space:
                if bias is not None:
                    t[rows].addr_(bias.float(), scratch.sum_student.float(), alpha=-1)
                add_scaled_(system.r[rows], t[rows], scale * alpha)
                addmm_(system.r[rows], (1 - alpha) * weight - self.anchor[f"{name}.weight"], s, scale)
            else:
                addmm_(system.r[rows], stored, t, scale * alpha)  # 16-bit weights take fewer products
                addmm_(system.r[rows], weight - self.anchor[f"{name}.weight"], s, scale)
            if bias is not None and self.settings.calibrate_bias:
                sums = system.biases.setdefault(
                    name,
                    BiasSums(
                        torch.zeros_like(bias, dtype=torch.float64),
                        torch.zeros_like(mean_student),
                        0 * task_weight,
                    ),
                )
                sums.target += task_weight * (bias.double() + weight.double() @ mean_target)
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


def _column_sums(x: Tensor, weights: Tensor | None) -> Tensor:
    """`[tokens, d] -> [d]` float64: float32 tree sums of a chunk, to be added up in float64."""
    x = x.float() if weights is None else x.float() * weights[:, None]
    return x.sum(0).double()


def _layer_norm(block: nn.Module, name: str) -> nn.LayerNorm:
    norm = block.get_submodule(name)
    assert isinstance(norm, nn.LayerNorm)
    return norm
