"""The loop: forward order over layers, tasks and batches. Nobody else loops.

for each layer:
    for each task:        run the expert's layer and the student's on the same batches,
                          accumulate second moments of what their linear modules are given,
                          fold them into the layer's ridge systems
    solve, load the new weights, advance the student through the calibrated layer
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featcal_fast.errors import DataError, UnsupportedModelError
from featcal_fast.forward.compiled import BlockRunner, should_compile
from featcal_fast.layer.features import Activations, Layout, find_layout
from featcal_fast.layer.moments import TaskMoments
from featcal_fast.layer.precision import ieee_float32
from featcal_fast.layer.selection import check_patterns
from featcal_fast.layer.solve import Update, check_finite, solve_layer
from featcal_fast.layer.systems import Anchor, LayerSystem
from featcal_fast.layer.tokens import TokenCounts, Tokens
from featcal_fast.models import Structure
from featcal_fast.models.linear import is_linear, oriented
from featcal_fast.models.structure import Layer
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import GroupReport, LayerReport, Report
from featcal_fast.settings import Settings
from featcal_fast.streaming.chunks import Chunks, explain_out_of_memory
from featcal_fast.streaming.drift import DriftProbe
from featcal_fast.streaming.hidden_states import HOST, HiddenStates, Offload
from featcal_fast.streaming.machine import caching_malloc, find_device, trim_malloc
from featcal_fast.streaming.prefetch import BlockPrefetcher
from featcal_fast.streaming.sources import ModuleSource, Source, check_same_architecture
from featcal_fast.streaming.transfers import Transfers, empty_pinned

Batches = Sequence[Mapping[str, Tensor]]
SCRATCH = "hidden states"  # in a report of what was read and written


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
    """Calibrate `merged` in offload, towards `experts`, with models in memory.

    Args:
        merged: the model to repair. Its parameters change only once every layer has been solved.
        base: the model that the experts were fine-tuned from.
        experts: by task. Never changed.
        batches: by task, dicts of the models' keyword arguments (`pixel_values`, or `input_ids` and
            `attention_mask`, ...), samples first. Read once.
        settings: the method's constants.
        device: where to compute; by default where `merged` is.
        progress: told how the run goes.

    Returns:
        What happened, layer by layer.

    Raises:
        DataError: a task without batches, or batches without a task.
        DeviceError: there is no such device.
        ModelMismatchError: the models differ in architecture.
        UnsupportedModelError: no family fits.
        SolveError: features that are not finite.
        MemoryBudgetError: the device's memory will not do, however few samples it takes at a time.
    """
    device = find_device(device) if device is not None else next(merged.parameters()).device
    student = ModuleSource(merged, "merged model", device)
    others = {task: ModuleSource(model, f"expert {task}", device) for task, model in experts.items()}
    updates: list[dict[str, Tensor]] = []
    report = calibrate_source(
        student,
        ModuleSource(base, "base model", device),
        others,
        batches,
        settings,
        device,
        write=lambda _index, parameters: updates.append(parameters),
        progress=progress or Progress(),
    )
    with torch.no_grad():
        for block, parameters in zip(student.structure.blocks, updates, strict=True):
            own = dict(block.named_parameters())
            for name, value in parameters.items():
                own[name].copy_(value)
    return report


@torch.no_grad()
def calibrate_source(
    student: Source,
    base: Source,
    experts: Mapping[str, Source],
    batches: Mapping[str, Iterable[Mapping[str, Tensor]]],
    settings: Settings,
    device: torch.device,
    write: Callable[[int, dict[str, Tensor]], None],
    progress: Progress,
    offload: Offload = HOST,
    chunk: int | None = None,
) -> Report:
    """Calibrate a model whose blocks arrive one at a time, each being read while the one before it is in use.

    `write` takes each layer's new parameters, in its dtype; `place` is where hidden states wait between layers;
    `chunk` is how many tokens pass a layer at a time, by default a batch's. A task's batches are gone through once, and
    dropped before the next task's are. Everything else is as in `calibrate_model`.
    """
    started = time.perf_counter()
    structure = student.structure
    _check_tasks(experts, batches)
    check_same_architecture(student, {"base": base, **experts})
    check_settings(structure, settings)

    transfers = Transfers(device, "hidden-states")
    student_streams = {task: HiddenStates(student, task, device, transfers, offload) for task in experts}
    expert_streams = {task: HiddenStates(expert, task, device, transfers, offload) for task, expert in experts.items()}
    chunks = Chunks(device, chunk, settings.forward_dtype)
    runner = BlockRunner(should_compile(settings, device))
    probe = DriftProbe(student, experts, device, chunks, transfers, runner.run)
    inputs: dict[str, Batches] = {}
    tokens: dict[str, list[Tokens]] = {}
    report = Report(settings, structure.family.name, str(device), dict.fromkeys(experts, 0))
    report.kept |= structure.outside

    order = ((source, layer.index) for layer in structure.layers for source in (student, base, *experts.values()))
    with (
        closing(progress),
        transfers,
        BlockPrefetcher(order, device) as blocks,
        explain_out_of_memory(device),
        ieee_float32(),
    ):
        for layer in structure.layers:
            if layer.number == 0:  # a stage begins: most models have one, an encoder-decoder two
                for task, expert in experts.items():
                    items = inputs[task] if layer.stage else _checked(task, batches[task], structure)
                    for stream in (student_streams[task], expert_streams[task]):
                        stream.enter(layer.stage, items)
                        trim_malloc()
                    tokens[task] = _tokens_of(task, items, layer, student_streams[task], device, tokens.get(task))
                    probe.enter(layer.stage, task, items[0])
                    expert.release_stage_inputs()
                    if len(structure.paths) > 1:  # they are needed again; else one task's data at a time
                        inputs[task] = items
                    del items
                student.release_stage_inputs()
                counts = {task: sum(item.count for item in items) for task, items in tokens.items()}
                report.tokens = {task: report.tokens[task] + count for task, count in counts.items()}
                progress.stage(len(structure.layers) - layer.index, sum(counts.values()))

            index, number, began = layer.index, layer.number, time.perf_counter()
            block = blocks.next()
            anchor = Anchor(block, blocks.next(), settings.anchor_rho)
            layout = find_layout(block, layer, *probe.sample(next(iter(experts))), settings)

            system = LayerSystem(layout, anchor, settings, device, TokenCounts.of(counts))
            moments = TaskMoments(layout, block, TokenCounts.of(counts), settings, device)
            for task in experts:
                progress.task(index, task)
                teacher = blocks.next()
                with caching_malloc() as limit:
                    moments.reset()
                    for i, counted in enumerate(tokens[task]):
                        moments.begin_batch()
                        streams = expert_streams[task], student_streams[task]
                        # No name for the step: it would keep the blocks and the moments beyond their time.
                        chunks.each(
                            counted.extent,
                            partial(
                                accumulate_chunk, runner, number, (teacher, block), streams, i, layout, moments, counted
                            ),
                        )
                        limit()
                        progress.tokens(counted.count)
                    system.fold(moments, teacher, task)
                    probe.advance_expert(number, task, teacher)
                    del teacher  # before the next but one is read

            update = solve_layer(system, moments, len(experts))
            probe.advance_merged(number, block)
            changes = _changes(layout, update, block)
            new = _load(block, update)
            leaving = transfers.submit(partial(_to_host, new))
            probe.advance_calibrated(number, block)
            # Besides the solve, the one time that the host waits for the device within a layer.
            drift, changed, sums = _read(probe.drift(), changes, update.sums)
            check_finite(system.systems, sums)
            if index < len(structure.layers) - 1:
                with caching_malloc() as limit:
                    for task, stream in student_streams.items():
                        for i, counted in enumerate(tokens[task]):
                            chunks.each(counted.extent, partial(stream.advance, number, block, i, run=runner.run))
                            limit()
            write(index, leaving.synchronize())  # while a GPU advances

            groups = _group_reports(layout, moments, update, changed)
            done = LayerReport(index, drift[0], drift[1], time.perf_counter() - began, groups, list(moments.norms))
            report.layers.append(done)
            report.kept |= layout.kept
            progress.layer(done)
            del block, anchor, system, moments, update, new, leaving, changes  # before the next layer's are made
    if isinstance(offload, Path):
        traffic = [stream.traffic for stream in (*student_streams.values(), *expert_streams.values())]
        report.bytes_read[SCRATCH] = sum(each.read for each in traffic)
        report.bytes_written[SCRATCH] = sum(each.written for each in traffic)
    report.seconds = time.perf_counter() - started
    return report


def accumulate_chunk(
    runner: BlockRunner,
    number: int,
    blocks: tuple[nn.Module, nn.Module],
    streams: tuple[HiddenStates, HiddenStates],
    batch: int,
    layout: Layout,
    moments: TaskMoments,
    tokens: Tokens,
    rows: slice,
) -> None:
    """Run some samples of a batch through a layer of the expert and of the student; moments grow.

    Nothing is lost when memory runs out in the middle: the expert's hidden states advance last.

    Args:
        runner: run the blocks.
        number: the layer's, in its stage.
        blocks: the expert's and the student's.
        streams: the expert's and the student's hidden states.
        batch: which one.
        layout: of the layer.
        moments: of the task.
        tokens: of the batch.
        rows: the samples.
    """
    seen, out = forward_expert(runner, blocks[0], number, streams[0], batch, rows, layout, moments)
    forward_student(runner, blocks[1], number, streams[1], batch, rows, layout, moments, seen, tokens)
    streams[0].store(batch, rows, out)


def forward_expert(
    runner: BlockRunner,
    teacher: nn.Module,
    number: int,
    stream: HiddenStates,
    batch: int,
    rows: slice,
    layout: Layout,
    moments: TaskMoments,
) -> tuple[tuple[Activations, Activations], Tensor]:
    """What the expert's linear modules are given, and make of it; and the hidden states after its layer."""
    inputs, outputs = Activations(), Activations()
    leaders = [group.leader for group in layout.groups]
    hidden, calls = stream.load(batch, rows)
    out = runner.capture(
        calls, number, teacher, hidden, leaders, inputs.__setitem__, moments.outputs, outputs.__setitem__
    )
    assert out is not None
    return (inputs, outputs), out


def forward_student(
    runner: BlockRunner,
    block: nn.Module,
    number: int,
    stream: HiddenStates,
    batch: int,
    rows: slice,
    layout: Layout,
    moments: TaskMoments,
    expert: tuple[Activations, Activations],
    tokens: Tokens,
) -> None:
    """Run the student's layer up to its last captured input; moments grow."""
    if layout.last is None:
        return
    hidden, calls = stream.load(batch, rows)
    counted = tokens.part(rows)
    taps = [*(group.leader for group in layout.groups), *moments.norms]
    runner.capture(
        calls,
        number,
        block,
        hidden,
        dict.fromkeys([*taps, layout.last]),
        lambda name, x: moments.add(name, x, *expert, counted, rows.stop),
        stop_at=layout.last,
    )


def _load(block: nn.Module, update: Update) -> dict[str, Tensor]:
    """Put a layer's new parameters into `block`, all at once; they are returned as the block has them."""
    views, own = oriented(block), dict(block.named_parameters())
    for name, value in update.parameters.items():
        views[name].copy_(value)
    return {name: own[name] for name in update.parameters}


def _to_host(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: empty_pinned(tuple(value.shape), value.dtype, value.device).copy_(value, non_blocking=True)
        for name, value in parameters.items()
    }


def _changes(layout: Layout, update: Update, merged: nn.Module) -> list[Tensor]:
    """`||W' - W_merged||_F / ||W_merged||_F` of each group: scalars on the device."""
    before, changes = oriented(merged), []
    for group in layout.groups:
        names = [f"{name}.weight" for name in group.modules]
        change = torch.stack([(update.parameters[name] - before[name].float()).norm() for name in names]).norm()
        changes.append(change / torch.stack([before[name].float().norm() for name in names]).norm().clamp_min(1e-30))
    return changes


def _read(*scalars: list[Tensor]) -> list[list[float]]:
    """Lists of scalars, read from the device in one go."""
    values = iter(torch.stack([each.double() for one in scalars for each in one]).tolist())
    return [list(islice(values, len(one))) for one in scalars]


def _group_reports(layout: Layout, moments: TaskMoments, update: Update, changes: list[float]) -> list[GroupReport]:
    return [
        GroupReport(
            modules=list(group.modules),
            in_features=group.in_features,
            out_features=sum(group.out_features),
            space=moments.groups[group.leader].space,
            solver=update.solver[group.leader],
            change=change,
        )
        for group, change in zip(layout.groups, changes, strict=True)
    ]


def _tokens_of(
    task: str, batches: Batches, layer: Layer, stream: HiddenStates, device: torch.device, before: list[Tokens] | None
) -> list[Tokens]:
    """The tokens of every batch in the layer's stage, which know those of the stage before it."""
    mask = layer.family.stages[layer.stage].mask
    found: list[Tokens] = []
    for i, batch in enumerate(batches):
        try:
            found.append(Tokens(mask(batch), stream.shape(i), device, before[i] if before else None))
        except DataError as error:
            raise DataError(f"task {task}, batch {i}: {error}") from None
    return found


def _check_tasks(experts: Mapping[str, Source], batches: Mapping[str, Any]) -> None:
    if not experts:
        raise DataError("no experts: at least one is needed")
    for task in experts.keys() ^ batches.keys():
        there = "an expert but no batches" if task in experts else "batches but no expert"
        raise DataError(f"task {task}: found {there}; experts and batches must name the same tasks")


def _checked(task: str, batches: Iterable[Mapping[str, Tensor]], structure: Structure) -> Batches:
    """A task's batches, read, each with what the family needs."""
    items = list(batches)
    if not items:
        raise DataError(f"task {task}: found no batch, expected at least one")
    if structure.family.needs is not None:
        keys, why = structure.family.needs
        for number, batch in enumerate(items):
            if not any(key in batch for key in keys):
                found, wanted = ", ".join(batch), " or ".join(keys)
                raise DataError(f"task {task}, batch {number}: found {found}, expected {wanted} too: {why}")
    return items


def check_settings(structure: Structure, settings: Settings) -> None:
    """Refuse settings that do not go with a model.

    Raises:
        RecipeError: a pattern of `include` or `exclude` matches nothing.
        UnsupportedModelError: the layers' dtype rules `forward_dtype` out.
    """
    dtypes = {parameter.dtype for block in structure.blocks for parameter in block.parameters()}
    if settings.forward_dtype != "auto" and not dtypes <= {torch.float32, torch.bfloat16}:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise UnsupportedModelError(
            f"settings.forward_dtype: found {settings.forward_dtype} for layers of {found}, expected float32 or "
            "bfloat16 ones; leave it at auto"
        )
    if settings.include is not None or settings.exclude is not None:
        modules = [
            f"{layer.path}.{name}"
            for layer, block in zip(structure.layers, structure.blocks, strict=True)
            for name, module in block.named_modules()
            if is_linear(module) or isinstance(module, nn.LayerNorm)
        ]
        check_patterns(modules, settings)
