"""The loop: forward order over layers, tasks and batches.

for each layer:
    for each task:        run the expert's layer and the student's on the same batches,
                          accumulate second moments of what their linear modules are given,
                          fold them into the layer's ridge systems
    solve, load the new weights, advance the student through the calibrated layer
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from featcal_fast.forward.hooks import Activations
from featcal_fast.layer.layout import find_layout
from featcal_fast.layer.moments import TaskMoments
from featcal_fast.layer.selection import check_settings
from featcal_fast.layer.solve import (
    MAX_CONDITION_FLOAT32,
    Update,
    check_finite,
    load_update,
    max_condition,
    relative_changes,
    solve_layer,
)
from featcal_fast.layer.systems import Anchor, LayerSystem
from featcal_fast.models.structure import Layer
from featcal_fast.reporting.clock import Clock
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import GroupReport, LayerReport, Peaks, Report
from featcal_fast.reporting.warnings import about_run, about_settings
from featcal_fast.settings import Settings
from featcal_fast.streaming.chunks import Chunk
from featcal_fast.streaming.culprit import Culprits
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

    Attributes:
        first: the first layer that is not done yet.
        snapshots: where hidden states are kept to go on from, if they are.
    """

    first = 0
    snapshots: Snapshots | None = None

    def __init__(self, write: Write) -> None:
        self.write = write

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
        settings: the method's constants.
        device: where to compute; by default where `merged` is.
        progress: told how the run goes.

    Returns:
        What happened, layer by layer.

    Raises:
        DataError: a task without batches, or batches without a task, or a batch that a model cannot take.
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
    sources = {task: ModuleSource(model, f"expert {task}", device) for task, model in experts.items()}
    updates: list[dict[str, Tensor]] = []
    report = calibrate_source(
        student,
        ModuleSource(base, "base model", device),
        sources,
        batches,
        settings,
        device,
        Output(lambda _index, parameters: updates.append(parameters)),
        progress or Progress(),
        clock,
    )
    condition = max_condition(settings, len(experts))
    report.warnings = [*about_settings(settings, condition, MAX_CONDITION_FLOAT32), *about_run(report)]
    with torch.no_grad(), clock("finishing"):
        for block, parameters in zip(student.structure.blocks, updates, strict=True):
            own = dict(block.named_parameters())
            for name, value in parameters.items():
                own[name].copy_(value)
    report.phases = clock.seconds
    report.seconds = sum(report.phases.values())
    return report


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
            if layer.index < output.first:
                with clock("entering"):
                    output.restore(layer, report, streams)
                continue
            with clock("accumulating"):
                done, kept = calibrate_layer(layer, streams, settings, output.write)
            report.layers.append(done)
            report.kept |= kept
            progress.layer(done)
            with clock("keeping"):
                output.keep(layer, report, streams)
    report.bytes_read, report.bytes_written = streams.traffic
    report.peaks = Peaks(peak_resident_bytes(), peak_device_bytes(device))
    return report


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
    system = LayerSystem(layout, anchor, settings, streams.device, streams.counts)
    moments = TaskMoments(layout, student, streams.counts, settings, streams.device)

    for task, expert in streams.experts(layer):
        moments.reset(task)
        for chunk in streams.chunks(task):
            with chunk:
                states = streams.expert_states[task], streams.student_states[task]
                accumulate(chunk, layer, (expert, student), states, moments)
        moments.check_complete(*streams.counted(task))
        system.fold(moments, expert)
        streams.drift.advance_expert(layer, task, expert)
        del expert  # before the next but one is read

    with Culprits(streams, layer, layout), clock("solving"):
        update = solve_layer(system, moments, streams.counts.tasks)
        streams.drift.advance_merged(layer, student)
        changes = relative_changes(layout, update, student)
        parameters = streams.to_host(load_update(student, update))
        streams.drift.advance_calibrated(layer, student)
        # Besides the solve, the one time that the host waits for the device within a layer.
        (before, after), changed, sums, repeats = read_scalars(
            streams.drift.distances(), changes, update.sums, streams.drift.repeats()
        )
        streams.drift.check_repeats(layer, repeats)
        check_finite(system.systems, sums, [before, after, *changed])
    streams.advance_student(layer, student)
    with clock("writing"):
        write(layer.index, parameters.synchronize())  # while a GPU advances

    groups = _group_reports(system, moments, update, changed)
    seconds = time.perf_counter() - began
    return LayerReport(layer.index, before, after, seconds, groups, list(moments.norms)), layout.kept


def accumulate(
    chunk: Chunk,
    layer: Layer,
    blocks: tuple[nn.Module, nn.Module],
    states: tuple[HiddenStates, HiddenStates],
    moments: TaskMoments,
) -> None:
    """Run a chunk through a layer of the expert and of the student; moments grow.

    Nothing is lost when memory runs out in the middle: the expert's hidden states advance last. A function of its own,
    so that no activations are left when the next chunk comes.

    Args:
        chunk: some samples of a batch.
        layer: where the blocks are in their models.
        blocks: the expert's and the student's.
        states: the expert's hidden states and the student's.
        moments: of the task.
    """
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
