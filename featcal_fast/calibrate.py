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
from featcal_fast.layer.choice import choose, hardest
from featcal_fast.layer.judge import Judge
from featcal_fast.layer.layout import find_layout
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
from featcal_fast.models.structure import Layer, Structure
from featcal_fast.reporting.clock import Clock
from featcal_fast.reporting.outcome import LAYER_WORSE, MODEL_WORSE
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import GroupReport, LayerReport, Peaks, Report, TaskDrift
from featcal_fast.reporting.warnings import about_run, about_settings
from featcal_fast.settings import Settings
from featcal_fast.streaming.chunks import Chunk
from featcal_fast.streaming.culprit import Culprits
from featcal_fast.streaming.gate import Gate, load_best
from featcal_fast.streaming.held_out import with_held_out
from featcal_fast.streaming.hidden_states import HOST, HiddenStates, Offload
from featcal_fast.streaming.machine import find_device, forget_device_peak, peak_device_bytes, peak_resident_bytes
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
        snapshots: where hidden states are kept to go on from, if they are.
        was_put_back: whether a run before this one has begun to give layers their merged weights again.
    """

    first = 0
    snapshots: Snapshots | None = None
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
) -> Report:
    """Calibrate a model whose blocks arrive one at a time, each being read while the one before it is in use.

    `output` takes each layer's new parameters, and knows which are done already; `clock` is told what each moment is
    for, which the report does not hold yet; `offload` is where hidden states wait between layers; `chunk` is how many
    tokens pass a layer at a time, by default a batch's. A task's batches are gone through once, and dropped before the
    next task's are. Everything else is as in `calibrate_model`.
    """
    forget_device_peak(device)
    structure = student.structure
    check_tasks(experts, batches)
    check_same_architecture(student, {"base": base, **experts})
    check_settings(structure, settings)
    report = Report(settings, structure.family.name, str(device), dict.fromkeys(experts, 0))
    report.kept |= structure.outside
    sources = student, base, experts
    with Streams(
        *sources, batches, settings, device, progress, clock, offload, chunk, output.snapshots, output.first
    ) as streams:
        for layer in structure.layers:
            for task, count in streams.enter(layer).items():
                report.tokens[task] += count
            report.held_out = dict(streams.drift.held_out)
            if settings.auto and not streams.drift.judges:
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
                    report.outcome = streams.drift.outcome(settings.forward_dtype)
            with clock("keeping"):
                output.keep(layer, report, streams)
        if settings.keep_better and report.outcome is not None:
            keep_better(report, structure, output)
    report.bytes_read, report.bytes_written = streams.traffic
    report.peaks = Peaks(peak_resident_bytes(), peak_device_bytes(device))
    return report


def keep_better(report: Report, structure: Structure, output: Output) -> None:
    """Where the calibrated model is worse than the merged one on held-out samples, the latter is what there is."""
    assert report.outcome is not None
    worse = report.outcome.worse or output.was_put_back
    report.outcome.kept = "merged" if worse else "calibrated"
    if worse:
        output.put_back()
        for layer, done in zip(structure.layers, report.layers, strict=True):
            names = (name for group in done.groups for name in group.modules)
            report.kept |= {f"{layer.path}.{name}": MODEL_WORSE for name in names}
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
    layout, made = find_layout(student, layer, *streams.drift.sample(), settings)
    streams.drift.begin(layer, student, made)
    counts = streams.counts if not settings.auto else streams.counts.at_least(streams.drift.counts)
    system = LayerSystem(layout, anchor, settings, streams.device, counts, apart=settings.auto)
    judge = Judge(layout, anchor, settings, streams.device, counts) if settings.auto else None
    moments = TaskMoments(layout, student, counts, settings, streams.device)

    fold_tasks(layer, streams, student, moments, system, judge)
    with Culprits(streams, layer, layout), clock("solving"):
        updates, chosen = choose(system, moments, counts.tasks, judge)
        streams.drift.advance_merged(layer, student)
        with clock("judging"):
            gate = Gate(streams, layer, layout, student) if settings.keep_better and streams.drift.judges else None
            found = load_best(streams, layer, layout, student, updates)
            del updates
            judged = None if gate is None else gate.keep_better(found)
        parameters = streams.to_host(loaded(student, found.update))
        streams.drift.advance_calibrated(layer, student)
        # Besides the solve, the choice and the gate, the one time that the host waits for the device.
        before, after, changed, sums, repeats = read_scalars(
            *streams.drift.distances(), found.changes, found.update.sums, streams.drift.repeats()
        )
        streams.drift.check_repeats(layer, repeats)
        check_finite(system.systems, sums, [*before, *after, *changed])
    streams.advance_student(layer, student)
    with clock("writing"):
        write(layer.index, parameters.synchronize())  # while a GPU advances

    kept, groups = set(judged.kept if judged else ()), _group_reports(system, moments, found.update, changed)
    report = LayerReport(
        layer.index,
        drift_before=statistics.fmean(before),
        drift_after=statistics.fmean(after),
        seconds=time.perf_counter() - began,
        groups=[group for group in groups if not kept & {*group.modules}],
        norms=[name for name in moments.norms if name not in kept],
        tasks=dict(zip(streams.tasks, map(TaskDrift, before, after), strict=True)),
        chosen=chosen,
        alpha=found.alpha,
        gate=judged,
    )
    reasons = {f"{layer.path}.{name}": LAYER_WORSE for group in groups for name in kept & {*group.modules}}
    return report, layout.kept | reasons


def fold_tasks(
    layer: Layer, streams: Streams, student: nn.Module, moments: TaskMoments, system: LayerSystem, judge: Judge | None
) -> None:
    """Every task's samples pass the layer of its expert and of the student, and are folded into the layer's sums.

    Args:
        layer, streams: as in `calibrate_layer`.
        student: the merged model's block.
        moments: scratch of one task after the other.
        system: what fitted samples add up to.
        judge: what those that are held out do, where settings choose themselves.
    """
    for task, expert in streams.experts(layer):
        moments.reset(task)
        states = streams.expert_states[task], streams.student_states[task]
        accumulate(streams.chunks(task), layer, (expert, student), states, moments)
        moments.check_complete(*streams.counted(task))
        system.fold(moments, expert)
        streams.drift.check_expert(layer, task, expert)
        if judge is None or not streams.drift.held_out[task]:
            streams.drift.advance_expert(layer, task, expert)
        else:  # likewise, with those that are held out
            moments.reset(task)
            accumulate(streams.drift.chunks(task), layer, (expert, student), streams.drift.states(task), moments)
            moments.check_complete(*streams.drift.counted(task))
            judge.fold(moments, expert)
        del expert  # before the next but one is read


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
    system: LayerSystem, moments: TaskMoments, update: Update, changes: list[float]
) -> list[GroupReport]:
    return [
        GroupReport(
            modules=list(group.modules),
            in_features=group.in_features,
            out_features=sum(group.out_features),
            space=moments.groups[group.leader].space,
            solver=update.solver[group.leader],
            change=change,
            tokens=solved.tokens,
            raised=update.raised.get(group.leader, 0.0),
            solver_steps=update.steps[group.leader],
        )
        for group, solved, change in zip(moments.layout.groups, system.systems, changes, strict=True)
    ]
