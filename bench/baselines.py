"""A Llama layer as reference implementations calibrate it, in plain torch: float32 moments, one LU solve for a group.

Written from descriptions, not copied. A group's modules are given the same input; the official demo (github
egangu/featcal) takes each module by itself, FusionEval (github Baicaihaochi/FusionEval_Benchmark, `methods/featcal`)
those of `GROUPS` together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import featcal_fast as ff

Group = tuple[str, ...]
Sums = dict[Group, tuple[Tensor, Tensor]]
GROUPS: tuple[Group, ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
ALONE: tuple[Group, ...] = tuple((name,) for group in GROUPS for name in group)


def run_block(block: nn.Module, hidden: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Hidden states `[batch, tokens, width]` after a layer; texts are whole, so there is no mask but the causal one."""
    return block(hidden, position_embeddings=angles, attention_mask=None)


def capture(
    block: nn.Module, groups: Sequence[Group], hidden: Tensor, angles: tuple[Tensor, Tensor]
) -> tuple[dict[Group, Tensor], Tensor]:
    """What each group's modules are given, `[tokens, in]`, and the layer's output."""
    seen: dict[Group, Tensor] = {}
    hooks = [
        block.get_submodule(group[0]).register_forward_pre_hook(
            lambda _, args, group=group: seen.__setitem__(group, args[0].flatten(0, -2))
        )
        for group in groups
    ]
    out = run_block(block, hidden, angles)
    for hook in hooks:
        hook.remove()
    return seen, out


def add(sums: Sums, own: Mapping[Group, Tensor], expert: Mapping[Group, Tensor], alpha: float) -> None:
    """Add `S = X' X` and `C = X' (alpha X_expert + (1 - alpha) X)` of each group."""
    for group, x in own.items():
        s, e = x.float(), expert[group].float()
        products = s.T @ s, s.T @ (alpha * e + (1 - alpha) * s)
        if group in sums:
            for total, product in zip(sums[group], products, strict=True):
                total += product
        else:
            sums[group] = products


def solve(
    block: nn.Module,
    base: nn.Module,
    group: Group,
    means: Sequence[tuple[Tensor, Tensor]],
    experts: Sequence[Mapping[str, Tensor]],
    settings: ff.Settings,
) -> None:
    """Load a group's weights from every task's S and C, means over its tokens, and its expert's parameters."""
    names = [f"{name}.weight" for name in group]
    device = block.get_parameter(names[0]).device
    merged, origin = (torch.cat([each.get_parameter(name).float() for name in names]) for each in (block, base))
    anchor = settings.anchor_rho * merged + (1 - settings.anchor_rho) * origin.to(device)
    ridge, eps = settings.ridge_lambda, settings.covariance_eps
    left = (ridge + eps) * torch.eye(anchor.shape[1], device=device)
    right = ridge * anchor.T
    for (s, c), weights in zip(means, experts, strict=True):
        s, c = s.to(device), c.to(device)
        norm = s.norm().clamp_min(eps)
        left += s / norm
        right += (c / norm) @ torch.cat([weights[name].float() for name in names]).to(device).T
    solved = torch.linalg.solve(left, right).T
    for name, rows in zip(names, solved.split([len(block.get_parameter(name)) for name in names]), strict=True):
        block.get_parameter(name).copy_(rows)
