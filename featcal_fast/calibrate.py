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

import torch
from torch import Tensor, nn

from featcal_fast.activations import HOST, Place, Stream
from featcal_fast.drift import Probe
from featcal_fast.errors import DataError
from featcal_fast.experts import BlockReader
from featcal_fast.features import Kept, Layout, find_layout, tapped
from featcal_fast.models import Structure
from featcal_fast.models.linear import is_linear, oriented
from featcal_fast.moments import Anchor, LayerSystem, TaskMoments
from featcal_fast.progress import Progress
from featcal_fast.report import GroupReport, LayerReport, Report
from featcal_fast.selection import check_patterns
from featcal_fast.settings import Settings
from featcal_fast.solve import Update, solve_layer
from featcal_fast.sources import ModuleSource, Source, check_same_architecture
from featcal_fast.tokens import Tokens

Batches = Sequence[Mapping[str, Tensor]]


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
            `attention_mask`, ...), samples first. Read once.
        settings: the method's constants.
        device: where to compute; by default where `merged` is.
        progress: told how the run goes.

    Returns:
        What happened, layer by layer.

    Raises:
        DataError: a task without batches, or batches without a task.
        ModelMismatchError: the models differ in architecture.
        UnsupportedModelError: no family fits.
        SolveError: features that are not finite.
    """
    device = torch.device(device) if device is not None else next(merged.parameters()).device
    student = ModuleSource(merged, "merged model", device)
    others = {task: ModuleSource(model, f"expert {task}", device) for task, model in experts.items()}
    updates: list[dict[str, Tensor]] = []
    report = calibrate_source(
        student,
        ModuleSource(base, "base model", device),
        others,
        {task: list(items) for task, items in batches.items()},
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
    batches: Mapping[str, Batches],
    settings: Settings,
    device: torch.device,
    write: Callable[[int, dict[str, Tensor]], None],
    progress: Progress,
    place: Place = HOST,
) -> Report:
    """Calibrate a model whose blocks arrive one at a time, each being read while the one before it is in use.

    `write` takes each layer's new parameters, in its dtype; `place` is where hidden states wait between layers.
    Everything else is as in `calibrate_model`.
    """
    started = time.perf_counter()
    structure = student.structure
    _check_tasks(experts, batches, structure)
    check_same_architecture(student, {"base": base, **experts})
    _check_patterns(structure, settings)

    student_streams = {task: Stream(student, task, batches[task], device, place) for task in experts}
    expert_streams = {task: Stream(expert, task, batches[task], device, place) for task, expert in experts.items()}
    probe = Probe(student, experts, batches, device)
    tokens: dict[str, list[Tokens]] = {task: [] for task in experts}
    report = Report(settings, structure.family.name, str(device), dict.fromkeys(experts, 0))
    report.kept |= structure.outside

    order = ((source, layer.index) for layer in structure.layers for source in (student, base, *experts.values()))
    with closing(progress), BlockReader(order) as blocks:
        for layer in structure.layers:
            if layer.number == 0:  # a stage begins: most models have one, an encoder-decoder two
                if layer.stage > 0:
                    for stream in (*student_streams.values(), *expert_streams.values()):
                        stream.enter(layer.stage)
                    probe.enter(layer.stage)
                for source in (student, *experts.values()):
                    source.end_first_hidden()
                tokens = _stage_tokens(structure, layer.stage, batches, student_streams, tokens, device)
                counts = {task: sum(item.count for item in items) for task, items in tokens.items()}
                report.tokens = {task: report.tokens[task] + count for task, count in counts.items()}
                if layer.stage == 0:
                    progress.start(len(structure.layers), sum(counts.values()))

            index, number, began = layer.index, layer.number, time.perf_counter()
            block = blocks.next()
            anchor = Anchor(block, blocks.next(), settings.anchor_rho)
            layout = find_layout(block, layer, *probe.sample(next(iter(experts))), settings)

            system = LayerSystem(layout, anchor, settings, device)
            moments = TaskMoments(layout, block, max(counts.values()), settings, device)
            for task in experts:
                progress.task(index, task)
                teacher = blocks.next()
                moments.reset()
                for i, batch_tokens in enumerate(tokens[task]):
                    seen = see_expert(teacher, number, expert_streams[task], i, layout, moments)
                    see_student(block, number, student_streams[task], i, layout, moments, seen, batch_tokens)
                    del seen  # before the next batch's are made
                    progress.tokens(batch_tokens.count)
                system.fold(moments, teacher, task)
                probe.advance_expert(number, task, teacher)
                del teacher  # before the next but one is read

            update = solve_layer(system, moments, len(experts))
            probe.advance_merged(number, block)
            groups = _group_reports(layout, moments, update, block)
            new = _load(block, update)
            probe.advance_calibrated(number, block)
            write(index, new)
            if index < len(structure.layers) - 1:
                for stream in student_streams.values():
                    for i in range(len(stream)):
                        stream.advance(number, block, i)

            done = LayerReport(index, *probe.drift(), time.perf_counter() - began, groups, list(moments.norms))
            report.layers.append(done)
            report.kept |= layout.kept
            progress.layer(done)
            del block, anchor, system, moments, update, new  # before the next layer's are made
    report.seconds = time.perf_counter() - started
    return report


def see_expert(
    teacher: nn.Module, number: int, stream: Stream, batch: int, layout: Layout, moments: TaskMoments
) -> tuple[Kept, Kept]:
    """Advance the expert's hidden states through its layer; keep what its linear modules are given, and made of it."""
    inputs, outputs = Kept(), Kept()
    leaders = [group.leader for group in layout.groups]
    with tapped(teacher, leaders, inputs.__setitem__, moments.outputs, outputs.__setitem__):
        stream.advance(number, teacher, batch)
    return inputs, outputs


def see_student(
    block: nn.Module,
    number: int,
    stream: Stream,
    batch: int,
    layout: Layout,
    moments: TaskMoments,
    expert: tuple[Kept, Kept],
    tokens: Tokens,
) -> None:
    """Run the student's layer up to its last captured input; moments grow as the forward goes."""
    if layout.last is None:
        return
    hidden, calls = stream.load(batch)
    taps = [*(group.leader for group in layout.groups), *moments.norms]
    with tapped(
        block,
        {*taps, layout.last},
        lambda name, x: moments.add(name, x, *expert, tokens),
        stop_at=layout.last,
    ):
        calls.run(number, block, hidden)


def _load(block: nn.Module, update: Update) -> dict[str, Tensor]:
    """Put a layer's new parameters into `block`, all at once, and return them as the block has them."""
    views, own = oriented(block), dict(block.named_parameters())
    for name, value in update.parameters.items():
        views[name].copy_(value)
    return {name: own[name].to("cpu", copy=True) for name in update.parameters}


def _group_reports(layout: Layout, moments: TaskMoments, update: Update, merged: nn.Module) -> list[GroupReport]:
    before = oriented(merged)
    reports = []
    for group in layout.groups:
        names = [f"{name}.weight" for name in group.modules]
        change = torch.stack([(update.parameters[name] - before[name].float()).norm() for name in names]).norm()
        size = torch.stack([before[name].float().norm() for name in names]).norm().clamp_min(1e-30)
        space = "output" if moments.groups[group.leader].output_space else "input"
        reports.append(
            GroupReport(
                modules=list(group.modules),
                in_features=group.in_features,
                out_features=sum(group.out_features),
                space=space,
                solver=update.solver[group.leader],
                change=float(change / size),
            )
        )
    return reports


def _stage_tokens(
    structure: Structure,
    stage: int,
    batches: Mapping[str, Batches],
    streams: Mapping[str, Stream],
    before: Mapping[str, list[Tokens]],
    device: torch.device,
) -> dict[str, list[Tokens]]:
    """The tokens of every batch in a stage, which know those of the stage before it."""
    mask = structure.family.stages[stage].mask
    return {
        task: [
            Tokens(mask(batch), stream.shape(i), device, before[task][i] if before[task] else None)
            for i, batch in enumerate(batches[task])
        ]
        for task, stream in streams.items()
    }


def _check_tasks(experts: Mapping[str, Source], batches: Mapping[str, Batches], structure: Structure) -> None:
    if not experts:
        raise DataError("no experts: at least one is needed")
    for task in experts.keys() ^ batches.keys():
        there = "an expert but no batches" if task in experts else "batches but no expert"
        raise DataError(f"task {task}: found {there}; experts and batches must name the same tasks")
    for task, items in batches.items():
        if not items:
            raise DataError(f"task {task}: found no batch, expected at least one")
    if structure.family.needs is not None:
        keys, why = structure.family.needs
        for task, items in batches.items():
            for number, batch in enumerate(items):
                if not any(key in batch for key in keys):
                    found, wanted = ", ".join(batch), " or ".join(keys)
                    raise DataError(f"task {task}, batch {number}: found {found}, expected {wanted} too: {why}")


def _check_patterns(structure: Structure, settings: Settings) -> None:
    if settings.include is not None or settings.exclude is not None:
        modules = [
            f"{layer.path}.{name}"
            for layer, block in zip(structure.layers, structure.blocks, strict=True)
            for name, module in block.named_modules()
            if is_linear(module) or isinstance(module, nn.LayerNorm)
        ]
        check_patterns(modules, settings)
