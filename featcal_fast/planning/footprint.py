"""What the engine's own code needs for one layer: run on tensors without storage, while allocations are counted."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from featcal_kernels.naive import BLOCK
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from featcal_fast.calibrate import forward_expert, forward_student
from featcal_fast.forward.calls import BatchCalls, move
from featcal_fast.forward.runner import BlockRunner, should_compile
from featcal_fast.forward.shared import SharedView
from featcal_fast.layer.choice import ALPHAS, RIDGES, hardest
from featcal_fast.layer.dealt import solve_cost
from featcal_fast.layer.fold import TaskFold
from featcal_fast.layer.judge import Judge
from featcal_fast.layer.layout import InputGroup, Layout, find_layout
from featcal_fast.layer.moments import GroupMoments, TaskMoments, token_side
from featcal_fast.layer.solve import solve_dtype
from featcal_fast.layer.systems import Anchor, LayerSystem, fold_columns
from featcal_fast.layer.tokens import TokenCounts, Tokens
from featcal_fast.models.structure import Layer
from featcal_fast.planning.meter import META, Meter
from featcal_fast.planning.wire import LayerBytes, weigh
from featcal_fast.ranks.panels import row_panels
from featcal_fast.settings import Settings
from featcal_fast.streaming.chunks import Chunk
from featcal_fast.streaming.drift import ELEMENTS
from featcal_fast.streaming.hidden_states import HiddenStates
from featcal_fast.streaming.sources import CheckpointSource


@dataclass(frozen=True)
class StageInputs:
    """What enters a stage of one model for one batch.

    Attributes:
        hidden: the states that enter its first block, `[batch, tokens, width]` on the meta device.
        calls: of its blocks, on the meta device.
        call_bytes: of their tensors while a layer runs.
        kept_bytes: of them between layers, besides what batches share.
        tokens: of the batch.
    """

    hidden: Tensor
    calls: BatchCalls
    call_bytes: int
    kept_bytes: int
    tokens: Tokens

    @classmethod
    def of(
        cls, source: CheckpointSource, example: Mapping[str, Tensor], stage: int, before: StageInputs | None
    ) -> StageInputs:
        previous = None if before is None else torch.zeros((), dtype=before.hidden.dtype).expand(before.hidden.shape)
        with torch.no_grad():
            hidden, calls = source.stage_inputs(example, stage, previous)
        kept = {
            id(leaf): leaf.nbytes
            for leaf in tree_leaves([calls.args, calls.kwargs])
            if isinstance(leaf, (Tensor, SharedView))
        }
        calls = move(calls, META)
        whole = {id(leaf): leaf.nbytes for leaf in tree_leaves([calls.args, calls.kwargs]) if isinstance(leaf, Tensor)}
        mask = source.structure.family.stages[stage].mask(example)
        tokens = Tokens(mask, (hidden.shape[0], hidden.shape[1]), META, None if before is None else before.tokens)
        return cls(move(hidden, META), calls, sum(whole.values()), sum(kept.values()), tokens)


@dataclass(frozen=True)
class Footprint:
    """One layer, one batch: bytes and floating-point operations.

    Attributes:
        layout: what there is to calibrate.
        kept: linear weights that keep their merged values, by name in the block, each with the reason.
        system: bytes of A and R.
        scratch: bytes of S and T, and means.
        working: bytes beyond these, at most, while a batch passes or a task is folded.
        solving: the same while the layer is solved.
        ahead: bytes of what is kept of an expert's layer until the student's has passed.
        expert, student, moments: operations a batch; `student` stops at the last captured input.
        fold: operations a task.
        solve: operations a layer.
        wire: what ranks that share the job send to each other.
    """

    layout: Layout
    kept: dict[str, str]
    system: int
    scratch: int
    working: int
    solving: int
    ahead: int
    expert: float
    student: float
    moments: float
    fold: float
    solve: float
    wire: LayerBytes


class _MetaHiddenStates:
    """Stands in for `HiddenStates`: one batch, on the meta device."""

    def __init__(self, inputs: StageInputs, runner: BlockRunner) -> None:
        self._inputs, self._runner = inputs, runner

    def capture(self, _chunk: Chunk, layer: Layer, block: nn.Module, *captured: Any, **options: Any) -> Tensor | None:
        hidden, calls = self._inputs.hidden, self._inputs.calls
        return self._runner.capture(calls, layer.number, block, hidden, *captured, **options)


@torch.no_grad()
def measure_layer(
    student: CheckpointSource,
    expert: CheckpointSource,
    layer: Layer,
    states: tuple[StageInputs, StageInputs],
    counts: TokenCounts,
    settings: Settings,
    device: torch.device,
) -> Footprint:
    """Run the engine's steps for a layer on the meta device.

    Args:
        student, expert: the models.
        layer: of theirs.
        states: the student's and the expert's in the layer's stage, for one batch.
        counts: tokens of the layer's stage.
        settings: the recipe's.
        device: where they will run.
    """
    student_block, expert_block = (_on_meta(each, layer) for each in (student, expert))
    runner = BlockRunner(should_compile(settings, device))
    student_states, expert_states = (cast(HiddenStates, _MetaHiddenStates(each, runner)) for each in states)
    tokens = states[0].tokens
    chunk = Chunk(0, slice(0, tokens.shape[0]), tokens)
    present = [(each.hidden, each.calls.args, each.calls.kwargs) for each in states]
    with Meter(present, student_block.state_dict(), expert_block.state_dict()) as meter:
        layout, _ = find_layout(student_block, layer, states[0].hidden, states[0].calls, tokens, settings)
        start, anchor = meter.live, Anchor(student_block, student_block, settings.anchor_rho)
        system = LayerSystem(layout, anchor, settings, META, counts, apart=settings.auto)
        tasks = [str(number) for number in range(counts.tasks)]
        judge = Judge(layout, anchor, settings, META, counts, tasks) if settings.auto else None
        system_bytes = meter.live - start
        moments = TaskMoments(layout, student_block, counts, settings, META)
        scratch = meter.live - start - system_bytes
        full = meter.live
        meter.lap()
        activations, hidden = forward_expert(chunk, layer, expert_block, expert_states, moments)
        expert_peak, expert_flops = meter.lap()
        ahead = meter.live - full
        forward_student(chunk, layer, student_block, student_states, moments, activations)
        del activations, hidden
        student_peak, both = meter.lap()
        TaskFold(system, moments, expert_block).add()
        fold_peak, fold = meter.lap()
    moment_flops, (choosing, updates) = _moment_flops(moments, tokens), _choosing(layout, counts, settings)
    return Footprint(
        layout=layout,
        kept={name.removeprefix(f"{layer.path}."): reason for name, reason in layout.kept.items()},
        system=system_bytes,
        scratch=scratch,
        working=max(expert_peak, student_peak, fold_peak + _larger_weights(moments, device)) - full,
        solving=max(_solving(layout, settings, counts) + choosing, updates and updates + expert_peak - full),
        ahead=ahead,
        expert=expert_flops,
        student=both - moment_flops,
        moments=moment_flops,
        fold=fold,
        solve=sum(solve_flops(group, counts, settings) for group in layout.groups),
        wire=weigh(system, judge, moments, expert_block, counts),
    )


def _on_meta(source: CheckpointSource, layer: Layer) -> nn.Module:
    """A block's copy; the config is shared, not copied: blocks only read it."""
    config = source.model.config
    return copy.deepcopy(source.structure.blocks[layer.index], {id(config): config}).to(META)


def _larger_weights(moments: TaskMoments, device: torch.device) -> int:
    """Bytes by which what a task is folded by on `device` is larger than on the meta device."""
    sizes = [0]
    for each in moments.groups.values():
        if isinstance(each, GroupMoments):
            width = each.group.in_features
            column = 4 * max(
                part.stop - part.start for out in each.group.out_features for part in row_panels(out, width)
            )
            planned, measured = (min(width, fold_columns(each, where)) for where in (device, META))
            sizes.append(column * (planned - measured))
    return max(sizes)


def _moment_flops(moments: TaskMoments, tokens: Tokens) -> float:
    """A triangle of S in blocks of rows, and T, a token."""
    total = 0.0
    for each in moments.groups.values():
        if isinstance(each, GroupMoments):
            seen = tokens.memory if each.group.memory and tokens.memory is not None else tokens
            size = each.group.in_features
            total += 2.0 * seen.count * (triangle(size) + each.t.numel())
    return total


def comparing_bytes(hidden: Tensor) -> int:
    """What drift takes of a batch: what a block makes of it, and parts of that and of the expert's in float64, with
    their difference and a square."""
    sample = hidden.shape[1:].numel()
    return int(hidden.nbytes + 4 * 8 * sample * max(1, min(len(hidden), ELEMENTS // sample)))


def triangle(size: int) -> int:
    """Of a sum `[size, size]`, the entries that are computed: those above its diagonal, by blocks of rows."""
    return sum((size - start) * min(BLOCK, size - start) for start in range(0, size, BLOCK))


def solve_flops(group: InputGroup, counts: TokenCounts, settings: Settings, rows: int | None = None) -> float:
    """Operations that a system takes.

    To choose, it is solved with every value, at most, with a product each time to judge it; then for both right-hand
    sides with one: more, if modules differ in theirs.

    Args:
        group: that it is of.
        counts: of the layer's tokens.
        settings: the recipe's.
        rows: of the right-hand side, all by default.
    """
    size, out = group.in_features, sum(group.out_features) if rows is None else rows
    factor, row = solve_cost(group, counts)
    if not settings.auto:
        return factor + row * out
    judged = 2.0 * size * out * (counts.total if token_side(group, counts) else size)
    return len(RIDGES) * (factor + row * out + judged) + factor + row * _parts(settings) * out


def _parts(settings: Settings) -> int:
    """Right-hand sides: what alpha multiplies is kept apart where it is chosen."""
    return 1 + settings.auto


def _choosing(layout: Layout, counts: TokenCounts, settings: Settings) -> tuple[int, int]:
    """Bytes of what a choice takes beyond system, scratch and solve: of a group's sums that are solved, and of its
    solution, if its modules differ in what is best, or of what a trial is judged by; and afterwards, of the updates of
    all alphas."""
    if not settings.auto:
        return 0, 0
    group_bytes = [
        4 * group.in_features * 6 * sum(group.out_features)
        + (0 if token_side(group, counts) else 4 * group.in_features**2)
        for group in layout.groups
    ]
    weights = sum(4 * group.in_features * sum(group.out_features) for group in layout.groups)
    return max(group_bytes, default=0), len(ALPHAS) * weights


def _solving(layout: Layout, settings: Settings, counts: TokenCounts) -> int:
    """Bytes beyond system and scratch: none in float32, where a system is solved where it lies, with no more beside it
    than what is planned for the kernels' operands; else a copy of it."""
    width = max((group.in_features for group in layout.groups), default=1)
    dtype = solve_dtype(hardest(settings), counts.tasks, width)
    copies = int(dtype == torch.float64)
    needs = [0]
    for group in layout.groups:
        size, out, n = group.in_features, _parts(settings) * sum(group.out_features), counts.total
        if token_side(group, counts):
            change = (dtype.itemsize + 4 * copies) * out * size
            needs.append(dtype.itemsize * (n * n + n * out + copies * n * size) + change)
        else:
            needs.append(copies * dtype.itemsize * size * (size + out))
    return max(needs)
