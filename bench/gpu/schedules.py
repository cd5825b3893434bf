"""One Llama-3.1-8B-shaped layer, calibrated by the engine, as the official demo does it, and as FusionEval does it.

Weights are random; tasks share their batches' shape, so one task's moments and fold are measured and counted for each.

Where the baselines differ from their originals, they are the faster for it:

- official (github egangu/featcal): float32 forward and moments and an LU solve for every linear module on its own, as
  there; its statistics stay on the device here, go to the host there. Once more with a bfloat16 forward.
- FusionEval (github Baicaihaochi/FusionEval_Benchmark): bfloat16 forward in chunks of 256 tokens, batch 1, float32
  moments a group of modules with one input, one solve a group, as there; chunks attend to themselves only here, to all
  tokens before them there, and the statistics stay on the device here, go to the host there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.phases import Clock
from featcal_fast.forward.calls import BatchCalls, stage_inputs
from featcal_fast.forward.hooks import ActivationHooks, Activations
from featcal_fast.forward.runner import BlockRunner
from featcal_fast.layer.layout import Layout, find_layout
from featcal_fast.layer.moments import TaskMoments, output_space
from featcal_fast.layer.solve import solve_layer
from featcal_fast.layer.systems import Anchor, LayerSystem
from featcal_fast.layer.tokens import TokenCounts, Tokens
from featcal_fast.models import find_structure
from featcal_fast.settings import Settings

SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
TOY = {"hidden_size": 64, "intermediate_size": 224, "num_attention_heads": 4, "num_key_value_heads": 1}
SETTINGS = Settings(ridge_lambda=0.1, anchor_rho=1.5, teacher_alpha=0.25)


class Workload:
    """A merged, a base and an expert block, and hidden states of `batches` batches of a task, in bfloat16."""

    def __init__(self, device: torch.device, toy: bool) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.tasks, self.batches, self.samples, self.length = (2, 2, 2, 64) if toy else (5, 2, 32, 512)
        config = LlamaConfig(num_hidden_layers=1, vocab_size=128, **(TOY if toy else SHAPE))
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(device, torch.bfloat16).eval().requires_grad_(False)
        ids = torch.randint(0, 128, (self.samples, self.length), device=device)
        structure = find_structure(model, "model")
        _, self.calls = stage_inputs(structure, {"input_ids": ids}, 0)
        self.layer, self.merged = structure.layers[0], structure.blocks[0]
        self.base, self.expert = copy.deepcopy(self.merged), copy.deepcopy(self.merged)
        for block in (self.base, self.expert):
            for parameter in block.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.002)
        shape = (self.batches, self.samples, self.length, config.hidden_size)
        self.student_hidden = torch.randn(shape, device=device, dtype=torch.bfloat16)
        self.expert_hidden = self.student_hidden + 0.1 * torch.randn_like(self.student_hidden)
        self.device, self.config = device, config

    def to(self, dtype: torch.dtype) -> Workload:
        """Itself, in another dtype; what it was made from stays as it is."""
        self.merged, self.base, self.expert = (
            copy.deepcopy(each).to(dtype) for each in (self.merged, self.base, self.expert)
        )
        self.student_hidden, self.expert_hidden = self.student_hidden.to(dtype), self.expert_hidden.to(dtype)
        (kwargs,) = self.calls.kwargs
        angles = tuple(each.to(dtype) for each in kwargs["position_embeddings"])
        self.calls = BatchCalls(self.calls.args, [{**kwargs, "position_embeddings": angles}])
        return self

    def layout(self, block: nn.Module) -> Layout:
        tokens = Tokens(None, (self.samples, self.length), self.device)
        return find_layout(block, self.layer, self.student_hidden[0], self.calls, tokens, SETTINGS)

    @property
    def tokens(self) -> int:
        """Of a task."""
        return self.batches * self.samples * self.length


@torch.no_grad()
def engine(work: Workload, clock: Clock, compiled: bool = False) -> Layout:
    """The layer as `featcal_fast.calibrate` runs it. Phases: forward, moments, fold, solve, advance."""
    block, device, runner = copy.deepcopy(work.merged), work.device, BlockRunner(compiled)
    layout = work.layout(block)
    tokens = Tokens(None, (work.samples, work.length), device)
    counts = TokenCounts(work.tokens, work.tasks * work.tokens, work.tasks)
    system = LayerSystem(layout, Anchor(block, work.base, SETTINGS.anchor_rho), SETTINGS, device, counts)
    moments = TaskMoments(layout, block, counts, SETTINGS, device)
    leaders = [group.leader for group in layout.groups]
    for _ in range(work.tasks):
        moments.reset()
        for batch, (hidden, expert_hidden) in enumerate(zip(work.student_hidden, work.expert_hidden, strict=True)):
            inputs, outputs = Activations(), Activations()
            with clock("forward"):
                expert = work.expert, expert_hidden, leaders, inputs.__setitem__, moments.outputs, outputs.__setitem__
                runner.capture(work.calls, 0, *expert)

            def add(
                name: str, x: Tensor, batch: int = batch, inputs: Activations = inputs, outputs: Activations = outputs
            ) -> None:
                with clock("moments"):
                    moments.add(name, x, inputs, outputs, tokens, (batch, work.samples))

            with clock("student"):
                taps = dict.fromkeys([*leaders, layout.last])
                runner.capture(work.calls, 0, block, hidden, taps, add, stop_at=layout.last)
            del inputs, outputs, add  # as the engine lets go of a chunk before the next
        with clock("fold"):
            system.fold(moments, work.expert, "task")
    with clock("solve"):
        update = solve_layer(system, moments, work.tasks)
    for name, value in update.parameters.items():
        block.get_parameter(name).copy_(value)
    with clock("advance"):
        for _ in range(work.tasks):
            for hidden in work.student_hidden:
                runner.run(work.calls, 0, block, hidden)
    return layout


def official(work: Workload, clock: Clock) -> None:
    """The demo's schedule: a float32 forward, each linear module's float32 moments by themselves, LU solves."""
    official_bfloat16(copy.copy(work).to(torch.float32), clock)


@torch.no_grad()
def official_bfloat16(work: Workload, clock: Clock) -> None:
    """The same with the checkpoint's own forward."""
    names = [name for name, module in work.merged.named_modules() if isinstance(module, nn.Linear)]
    _baseline(work, clock, [[name] for name in names], work.student_hidden, work.expert_hidden, work.calls)


@torch.no_grad()
def fusioneval(work: Workload, clock: Clock) -> None:
    """FusionEval's schedule: modules of one input together, batch 1, chunks of 256 tokens."""
    layout = work.layout(work.merged)
    chunk = min(256, work.length)
    cos, sin = work.calls.kwargs[0]["position_embeddings"]
    kwargs = {**work.calls.kwargs[0], "attention_mask": None, "position_embeddings": (cos[:, :chunk], sin[:, :chunk])}
    kwargs["position_ids"] = torch.arange(chunk, device=work.device)[None]
    width = work.config.hidden_size
    student, expert = (h.reshape(-1, 1, chunk, width) for h in (work.student_hidden, work.expert_hidden))
    groups = [list(group.modules) for group in layout.groups]
    _baseline(work, clock, groups, student, expert, BatchCalls([()], [kwargs]))


def _baseline(
    work: Workload, clock: Clock, groups: list[list[str]], student: Tensor, expert: Tensor, calls: BatchCalls
) -> None:
    """Float32 moments S and C and one `torch.linalg.solve` a group. One task is run; its statistics serve for all."""
    block, alpha = copy.deepcopy(work.merged), SETTINGS.teacher_alpha
    leaders = [names[0] for names in groups]
    sums: dict[str, list[Tensor]] = {}
    for hidden, expert_hidden in zip(student, expert, strict=True):
        xs: dict[str, Tensor] = {}
        xe: dict[str, Tensor] = {}
        with clock("forward"), ActivationHooks(block, leaders, xs.__setitem__):
            calls.run(0, block, hidden)
        with clock("forward"), ActivationHooks(work.expert, leaders, xe.__setitem__):
            calls.run(0, work.expert, expert_hidden)
        with clock("moments"):
            for name in leaders:
                s, e = (x[name].flatten(0, -2).float() for x in (xs, xe))
                products = s.T @ s, s.T @ (alpha * e + (1 - alpha) * s)
                sums[name] = [a + b for a, b in zip(sums[name], products, strict=True)] if name in sums else [*products]
    ridge = SETTINGS.ridge_lambda + SETTINGS.covariance_eps
    with clock("solve"):
        for names in groups:
            s, c = (total / work.tokens for total in sums.pop(names[0]))
            weight = torch.cat([work.expert.get_parameter(f"{name}.weight").float() for name in names])
            left, right = ridge * torch.eye(len(s), device=work.device), 0 * weight.T
            for _ in range(work.tasks):
                norm = s.norm().clamp_min(SETTINGS.covariance_eps)
                left, right = left + s / norm, right + (c / norm) @ weight.T
            for name, rows in zip(names, torch.linalg.solve(left, right).T.split(_rows(block, names)), strict=True):
                block.get_parameter(f"{name}.weight").copy_(rows)
    with clock("advance"):
        for hidden in student:
            calls.run(0, block, hidden)


def _rows(block: nn.Module, names: list[str]) -> list[int]:
    return [len(block.get_parameter(f"{name}.weight")) for name in names]


def flops(work: Workload, layout: Layout) -> dict[str, float]:
    """FLOPs that each phase of the engine needs, for all tasks; a float32 product counts once."""
    tokens = work.tasks * work.tokens
    weights = {group.leader: group.in_features * sum(group.out_features) for group in layout.groups}
    attention = 2 * 2 * work.length * work.config.hidden_size / 2  # causal scores and values
    whole = 2 * sum(weights.values()) + attention
    last = next(group for group in layout.groups if layout.last in group.modules)
    need = {"forward": tokens * (2 * whole - 2 * weights[last.leader]), "advance": tokens * whole}
    need |= {"moments": 0.0, "fold": 0.0, "solve": 0.0}
    for group in layout.groups:
        d, out = group.in_features, sum(group.out_features)
        by_output = output_space(group, work.tokens)
        need["moments"] += tokens * (d * d + 2 * d * (out if by_output else d))
        need["fold"] += work.tasks * 2 * out * d * d * (1 if by_output else 2)
        need["solve"] += d**3 / 3 + 2 * out * d * d
    return need


def milliseconds(run: Callable[[Workload, Clock], Any], work: Workload, scale: dict[str, int]) -> dict[str, float]:
    """A warm run's phases; `scale` multiplies phases that were run for one task only."""
    for _ in range(2):
        clock = Clock(work.device)
        run(work, clock)
        found = clock.read()
    if "student" in found:  # the student's forward has the moments within it
        found["forward"] += found.pop("student") - found["moments"]
    return {phase: ms * scale.get(phase, 1) for phase, ms in found.items()}
