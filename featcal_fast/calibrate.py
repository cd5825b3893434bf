"""The loop: forward order over layers, tasks and batches.

for each layer:
    for each task:        run the expert's layer and the student's on the same batches,
                          accumulate second moments of what their linear modules are given,
                          fold them into the layer's ridge systems
    solve, load the new weights, advance the student through the calibrated layer
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from featcal_fast.errors import DataError
from featcal_fast.forward.hooks import Activations
from featcal_fast.layer.chain import Chain
from featcal_fast.layer.choice import hardest
from featcal_fast.layer.dealt import solve_together
from featcal_fast.layer.judge import Judge
from featcal_fast.layer.layout import Layout
from featcal_fast.layer.moments import TaskMoments
from featcal_fast.layer.selection import check_settings
from featcal_fast.layer.solve import (
    MAX_CONDITION_FLOAT32,
    Update,
    check_finite,
    loaded,
    max_condition,
)
from featcal_fast.layer.systems import Anchor, LayerSystem
from featcal_fast.layer.tokens import TokenCounts
from featcal_fast.models.structure import Layer, Structure
from featcal_fast.ranks.shares import Part, Shares
from featcal_fast.ranks.world import World
from featcal_fast.reporting.clock import Clock
from featcal_fast.reporting.outcome import LAYER_WORSE, MODEL_WORSE, Outcome
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import GroupReport, LayerReport, Peaks, Report, TaskDrift
from featcal_fast.reporting.warnings import about_run, about_settings
from featcal_fast.settings import Settings
from featcal_fast.streaming.chunks import Chunk
from featcal_fast.streaming.culprit import Culprits
from featcal_fast.streaming.gate import Gate, Loaded, load_best
from featcal_fast.streaming.held_out import with_held_out
from featcal_fast.streaming.hidden_states import HOST, HiddenStates, Offload
from featcal_fast.streaming.machine import find_device, forget_device_peak, peak_device_bytes, peak_resident_bytes
from featcal_fast.streaming.outcome import Compared, judge_outputs
from featcal_fast.streaming.scratch import Snapshots
from featcal_fast.streaming.sources import ModuleSource, Source, check_same_architecture
from featcal_fast.streaming.streams import Streams, check_tasks
from featcal_fast.streaming.transfers import read_scalars

Write = Callable[[int, dict[str, Tensor]], None]  # of a layer's new parameters, in its dtype, on the host


class Output:
    """Takes what the loop makes. This one starts at the first layer and keeps nothing to go on from.

    Args:
        write: takes the number of a layer and its new parameters.
        put_back: gives every layer its merged weights again, which are better than all that was written.

    Attributes:
        first: the first layer that is not done yet.
        snapshots: for a part of a task, by its number, where hidden states are kept to go on from, if they are.
        was_put_back: whether a run before this one has begun to give layers their merged weights again.
    """

    first = 0
    snapshots: Callable[[int], Snapshots] | None = None
    was_put_back = False

    def __init__(self, write: Write, put_back: Callable[[], None]) -> None:
        self.write, self.put_back = write, put_back

    def restore(self, layer: Layer, report: Report, streams: Streams) -> None:
        """A layer that is done: what happened, and its hidden states where they are needed again."""

    def keep(self, layer: Layer, report: Report, streams: Streams) -> None:
        """A layer is done and written: the place to make sure that nothing of it gets lost."""


def calibrate_model(
    merged: nn.Module,
    *,
    base: nn.Module,
    experts: Mapping[str, nn.Module],
    batches: Mapping[str, Iterable[Mapping[str, Tensor]]],
    held_out: Mapping[str, Iterable[Mapping[str, Tensor]]] | None = None,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Calibrate `merged` in place, towards `experts`, with models in memory.

    Args:
        merged: the model to repair. Its parameters change only once every layer has been solved.
        base: the model that the experts were fine-tuned from.
        experts: by task. Never changed.
        batches: by task, dicts of the models' keyword arguments (`pixel_values`, or `input_ids` and
            `attention_mask`, ...): tensors `[samples, ...]`, of the models' dtype or integers. Read once.
        held_out: others `[samples, ...]`, of the same dtypes, for some tasks or all: nothing is fitted to these.
        settings: the method's constants.
        device: where to compute; by default where `merged` is.
        progress: told how the run goes.

    Returns:
        What happened, layer by layer.

    Raises:
        DataError: a task without batches, or batches without a task; a batch that a model cannot take; nothing is held
            out for settings that choose themselves.
        DeviceError: there is no such device.
        ModelMismatchError: the models differ in architecture.
        UnsupportedModelError: no family fits, or a layer's forward fails, draws random numbers, or does not give each
            module every token once.
        SolveError: numbers that are not finite; it says whose.
        MemoryBudgetError: the device's memory will not do, however few samples it takes at a time.
    """
    clock = Clock()
    device = find_device(device) if device is not None else next(merged.parameters()).device
    student = ModuleSource(merged, "merged model", device)
    updates: dict[int, dict[str, Tensor]] = {}
    report = calibrate_source(
        student,
        ModuleSource(base, "base model", device),
        {task: ModuleSource(model, f"expert {task}", device) for task, model in experts.items()},
        with_held_out(batches, held_out or {}),
        settings,
        device,
        Output(updates.__setitem__, updates.clear),
        progress or Progress(),
        clock,
    )
    worst = hardest(settings)
    about = about_settings(worst, _condition(worst, merged, len(experts)), MAX_CONDITION_FLOAT32)
    report.warnings = [*about, *about_run(report)]
    with clock("finishing"):
        _change(student.structure, updates)
    report.phases = clock.seconds
    report.seconds = sum(report.phases.values())
    return report


@torch.no_grad()
def _change(structure: Structure, updates: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Give a model's blocks new parameters."""
    for index, parameters in updates.items():
        own = dict(structure.blocks[index].named_parameters())
        for name, value in parameters.items():
            own[name].copy_(value)


def _condition(settings: Settings, model: nn.Module, tasks: int) -> float:
    """Of the worst system that there may be."""
    return max_condition(settings, tasks, max(value.shape[-1] for value in model.parameters() if value.ndim))


@torch.no_grad()
def calibrate_source(
    student: Source,
    base: Source,
    experts: Mapping[str, Source],
    batches: Mapping[str, Iterable[Mapping[str, Tensor]]],
    settings: Settings,
    device: torch.device,
    output: Output,
    progress: Progress,
    clock: Clock,
    offload: Offload = HOST,
    chunk: int | None = None,
    shares: Shares | None = None,
    world: World | None = None,
) -> Report:
    """Calibrate a model whose blocks arrive one at a time, each being read while the one before it is in use.

    `output` takes each layer's new parameters, and knows which are done already; `clock` is told what each moment is
    for, which the report does not hold yet; `offload` is where hidden states wait between layers; `chunk` is how many
    tokens pass a layer at a time, by default a batch's. A task's batches are gone through once, and dropped before the
    next task's are. `shares` says whose samples are whose among the ranks of `world`: `experts` and `batches` are those
    of this rank's. Everything else is as in `calibrate_model`.
    """
    forget_device_peak(device)
    structure = student.structure
    shares, world = shares or Shares(tuple(experts), settings.sample_shards), world or World()
    check_tasks(shares.tasks, experts, batches)
    check_same_architecture(student, {"base": base, **experts})
    check_settings(structure, settings)
    report = Report(settings, structure.family.name, str(device), dict.fromkeys(shares.tasks, 0))
    report.kept |= structure.outside
    sources = student, base, experts
    with Streams(
        *sources,
        batches,
        settings,
        device,
        progress,
        clock,
        offload,
        chunk,
        output.snapshots,
        output.first,
        shares,
        world,
    ) as streams:
        calibrate_layers(streams, structure, settings, output, report, progress)
    report.bytes_read, report.bytes_written = streams.traffic
    report.peaks = Peaks(peak_resident_bytes(), peak_device_bytes(device))
    return report


def calibrate_layers(
    streams: Streams, structure: Structure, settings: Settings, output: Output, report: Report, progress: Progress
) -> None:
    """All layers in forward order, and what became of the whole; arguments are those of `calibrate_source`."""
    clock = streams.clock
    for layer in structure.layers:
        for task, count in streams.enter(layer).items():
            report.tokens[task] += count
        report.held_out = dict(streams.held_out)
        if settings.auto and not any(streams.held_out.values()):
            raise DataError("settings.auto: found no samples of any task held out, expected some to choose by")
        if layer.index < output.first:
            with clock("entering"):
                output.restore(layer, report, streams)
            continue
        with clock("accumulating"):
            done, kept = calibrate_layer(layer, streams, settings, output.write)
        report.layers.append(done)
        report.kept |= kept
        progress.layer(done)
        if layer is structure.layers[-1]:
            with clock("judging"):
                report.outcome = judge_outcome(streams, settings)
        with clock("keeping"):
            output.keep(layer, report, streams)
    if settings.keep_better and report.outcome is not None:
        keep_better(report, structure, output)


def judge_outcome(streams: Streams, settings: Settings) -> Outcome | None:
    """What the models make of all ranks' held-out samples in the end; None where there are none."""
    own = streams.drift.compare(settings.forward_dtype)
    every = streams.world.merge({task: [*compared] for task, compared in own.items()})
    compared = {task: Compared(*every[task]) for task in streams.tasks if task in every}
    return judge_outputs(compared) if compared else None


def keep_better(report: Report, structure: Structure, output: Output) -> None:
    """Where the calibrated model is worse than the merged one on held-out samples, the latter is what there is."""
    assert report.outcome is not None
    worse = report.outcome.worse or output.was_put_back
    report.outcome.kept = "merged" if worse else "calibrated"
    if worse:
        output.put_back()
        for done in report.layers:
            path, names = structure.layers[done.index].path, (name for group in done.groups for name in group.modules)
            report.kept |= {f"{path}.{name}": MODEL_WORSE for name in names}
            done.groups, done.norms, done.drift_after = [], [], done.drift_before
            for task in done.tasks.values():
                task.after = task.before


def calibrate_layer(
    layer: Layer, streams: Streams, settings: Settings, write: Write
) -> tuple[LayerReport, dict[str, str]]:
    """One layer of the method (paper eq. 10 to 17; `docs/method.md`).

    Args:
        layer: the one that `streams` has entered.
        streams: blocks and hidden states of all models.
        settings: the method's constants.
        write: takes the new parameters.

    Returns:
        What happened, and the linear weights that keep their merged values, each with the reason.
    """
    began, clock = time.perf_counter(), streams.clock
    student = streams.next_block()
    anchor = Anchor(student, streams.next_block(), settings.anchor_rho)
    layout = streams.find_layout(layer, student, settings)
    counts = streams.counts if not settings.auto else streams.counts.at_least(streams.held_out_counts)
    system = LayerSystem(layout, anchor, settings, streams.device, counts, apart=settings.auto)
    judge = Judge(layout, anchor, settings, streams.device, counts, streams.tasks) if settings.auto else None

    scratch = fold_tasks(layer, streams, student, counts, system, judge)
    with Culprits(streams, layer, layout), clock("solving"):
        updates, chosen = solve_together(system, scratch, counts, judge, streams.shares, streams.world)
        streams.drift.advance_merged(layer, student)
        with clock("judging"):
            judged_by = settings.keep_better and any(streams.held_out.values())
            gate = Gate(streams, layer, layout, student) if judged_by else None
            found = load_best(streams, layer, layout, student, updates)
            del updates
            judged = None if gate is None else gate.keep_better(found)
        parameters = streams.to_host(loaded(student, found.update))
        streams.drift.advance_calibrated(layer, student)
        before, after, changed = read_back(streams, layer, layout, found)
    streams.advance_student(layer, student)
    with clock("writing"):
        write(layer.index, parameters.synchronize())  # while a GPU advances

    kept, groups = set(judged.kept if judged else ()), _group_reports(streams, system, scratch, found.update, changed)
    report = LayerReport(
        layer.index,
        drift_before=statistics.fmean(before),
        drift_after=statistics.fmean(after),
        seconds=time.perf_counter() - began,
        groups=[group for group in groups if not kept & {*group.modules}],
        norms=[name for name in scratch.norms if name not in kept],
        tasks=dict(zip(streams.tasks, map(TaskDrift, before, after), strict=True)),
        chosen=chosen,
        alpha=found.alpha,
        gate=judged,
    )
    reasons = {f"{layer.path}.{name}": LAYER_WORSE for group in groups for name in kept & {*group.modules}}
    return report, layout.kept | reasons


def read_back(
    streams: Streams, layer: Layer, layout: Layout, found: Loaded
) -> tuple[list[float], list[float], list[float]]:
    """Besides the solve, the choice and the gate, the one time that the host waits for the device.

    Args:
        streams, layer: as in `calibrate_layer`.
        layout: of its block.
        found: the update that the block has now.

    Returns:
        Drift before and after, by task, and each group's change.

    Raises:
        NotFinite: a number is not.
        UnsupportedModelError: the layer draws random numbers.
    """
    *distances, changed, sums, repeats = read_scalars(
        *streams.drift.distances(),
        found.changes,
        [each for sums in found.update.sums.values() for each in sums],
        streams.drift.repeats(),
    )
    streams.drift.check_repeats(layer, repeats)
    before, after = streams.of_all_tasks(*distances)
    check_finite(layout.groups, found.update.parameters, sums, [*before, *after, *changed])
    return before, after, changed


def fold_tasks(
    layer: Layer,
    streams: Streams,
    student: nn.Module,
    counts: TokenCounts,
    system: LayerSystem,
    judge: Judge | None,
) -> TaskMoments:
    """Every task's samples pass the layer of its expert and of the student, and are folded into the layer's sums.

    Args:
        layer, streams: as in `calibrate_layer`.
        student: the merged model's block.
        counts: of the layer's tokens.
        system: what fitted samples add up to.
        judge: what those that are held out do, where settings choose themselves.

    Returns:
        Scratch of a task that nobody needs any more.
    """

    def new() -> TaskMoments:
        return TaskMoments(system.layout, student, counts, system.settings, streams.device)

    free: list[TaskMoments] = []
    chain = Chain(system, new, free, streams.shares, streams.world)
    judged = None if judge is None else Chain(judge, new, free, streams.shares, streams.world, split=False)
    for task, expert in streams.experts(layer):
        for part in streams.parts(task):
            moments = chain.moments(task)
            states = streams.expert_states[part], streams.student_states[part]
            accumulate(streams.chunks(part), layer, (expert, student), states, moments)
            moments.check_complete(*streams.counted(part))
            chain.add(part, moments, expert)
        if task in streams.drift.tasks:
            streams.drift.check_expert(layer, task, expert)
            if judged is None or not streams.drift.held_out[task]:
                streams.drift.advance_expert(layer, task, expert)
            else:  # likewise, with those that are held out
                moments = judged.moments(task)
                accumulate(streams.drift.chunks(task), layer, (expert, student), streams.drift.states(task), moments)
                moments.check_complete(*streams.drift.counted(task))
                judged.add(Part(task, streams.shares.shards - 1), moments, expert)
        del expert  # before the next but one is read
    if streams.shares.parts:
        streams.look_ahead(layer, moments)
    if judged is not None:
        judged.finish()
    return chain.finish()


def accumulate(
    chunks: Iterable[Chunk],
    layer: Layer,
    blocks: tuple[nn.Module, nn.Module],
    states: tuple[HiddenStates, HiddenStates],
    moments: TaskMoments,
) -> None:
    """Run a task's samples through a layer of the expert and of the student; moments grow.

    Nothing is lost when memory runs out in the middle of a chunk: the expert's hidden states advance last.

    Args:
        chunks: the samples.
        layer: where the blocks are in their models.
        blocks: the expert's and the student's.
        states: the expert's hidden states and the student's.
        moments: of the task.
    """
    for chunk in chunks:
        with chunk:
            accumulate_chunk(chunk, layer, blocks, states, moments)


def accumulate_chunk(
    chunk: Chunk,
    layer: Layer,
    blocks: tuple[nn.Module, nn.Module],
    states: tuple[HiddenStates, HiddenStates],
    moments: TaskMoments,
) -> None:
    """The same for one chunk: a function of its own, so that no activations are left when the next one comes."""
    activations, hidden = forward_expert(chunk, layer, blocks[0], states[0], moments)
    forward_student(chunk, layer, blocks[1], states[1], moments, activations)
    states[0].keep(chunk, hidden)


def forward_expert(
    chunk: Chunk, layer: Layer, block: nn.Module, states: HiddenStates, moments: TaskMoments
) -> tuple[tuple[Activations, Activations], Tensor]:
    """What the expert's linear modules are given, and make of it; and the hidden states after its layer."""
    inputs, outputs = Activations(), Activations()
    wanted = [*moments.groups, *moments.layout.unused]
    hidden = states.capture(chunk, layer, block, wanted, inputs.__setitem__, moments.outputs, outputs.__setitem__)
    assert hidden is not None
    moments.check_unused(inputs)
    return (inputs, outputs), hidden


def forward_student(
    chunk: Chunk,
    layer: Layer,
    block: nn.Module,
    states: HiddenStates,
    moments: TaskMoments,
    expert: tuple[Activations, Activations],
) -> None:
    """Run the student's layer up to its last captured input; moments grow."""
    last = moments.layout.last
    if last is None:
        return
    captured = dict.fromkeys([*moments.groups, *moments.norms, *moments.layout.unused, last])
    tokens = chunk.tokens
    states.capture(
        chunk,
        layer,
        block,
        captured,
        lambda name, x: moments.add(name, x, *expert, tokens, chunk.end),
        stop_at=last,
    )


def _group_reports(
    streams: Streams, system: LayerSystem, moments: TaskMoments, update: Update, changes: list[float]
) -> list[GroupReport]:
    tokens = [sum(each) for each in zip(*streams.world.gather([each.tokens for each in system.systems]), strict=True)]
    return [
        GroupReport(
            modules=list(group.modules),
            in_features=group.in_features,
            out_features=sum(group.out_features),
            space=moments.groups[group.leader].space,
            solver=update.solver[group.leader],
            change=change,
            tokens=seen,
            raised=update.raised.get(group.leader, 0.0),
            solver_steps=update.steps[group.leader],
        )
        for group, seen, change in zip(moments.layout.groups, tokens, changes, strict=True)
    ]
