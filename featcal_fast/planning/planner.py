"""How a plan is made: the engine's own first forward and layers, on tensors without storage (see `footprint.py`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from featcal_kernels.configs import PANEL_BYTES, SLAB_BYTES
from torch import Tensor
from torch.utils._pytree import tree_leaves

from featcal_fast.checkpoints import BitsAndBytesCheckpoint, CachedExpert, LoraExpert, TensorSource, canonical
from featcal_fast.checkpoints import kept_bytes as kept_in_host
from featcal_fast.checkpoints.adapter import ROWS
from featcal_fast.errors import DataError, FeatCalError
from featcal_fast.forward.runner import should_compile
from featcal_fast.inputs.load import RecipeModels, TaskData, load_data, output_folder
from featcal_fast.inputs.recipe import Recipe, RecipeLike
from featcal_fast.layer.selection import check_settings
from featcal_fast.layer.tokens import TokenCounts
from featcal_fast.merging.merged import MergedCheckpoint
from featcal_fast.models.structure import Layer
from featcal_fast.planning.footprint import Footprint, MetaCheckpoint, StageInputs, measure_layer
from featcal_fast.planning.plan import LayerPlan, Plan, folded
from featcal_fast.planning.remedies import problems
from featcal_fast.streaming.drift import PROBE_SAMPLES
from featcal_fast.streaming.hidden_states import HOST, Offload, check_scratch
from featcal_fast.streaming.machine import available_device_bytes, available_host_bytes, find_device, resident_bytes
from featcal_fast.streaming.malloc import MALLOC_CACHE_BYTES
from featcal_fast.streaming.sources import CheckpointSource, check_same_architecture

States = dict[str, tuple[StageInputs, StageInputs]]  # the student's and the expert's, by task
# Measured by bench/jobs.py: what libraries take once they compute (threads, their buffers, code paged in).
RUNTIME = 40 * 2**20
# What torch.compile takes of this process's memory, measured on a CPU: a Llama's forwards 143 MiB, a T5's 178.
COMPILER = 180 * 2**20


def plan(
    recipe: RecipeLike,
    *,
    device: torch.device | str | None = None,
    device_memory: int | None = None,
    host_memory: int | None = None,
    scratch: str | Path | None = None,
) -> Plan:
    """What a recipe will need, from headers, configs and data alone; nothing is computed or written.

    Args:
        recipe: a `Recipe`, a mapping, or the path of a YAML file.
        device: where it would compute; by default the first GPU, or the CPU.
        device_memory: bytes of it that may be used; by default what is free.
        host_memory: the same of host memory.
        scratch: a folder for hidden states; by default they wait in host memory.

    Raises:
        FeatCalError: the recipe, a model, the data or the output folder is not usable. A job that only does not fit
            is no error: see `Plan.problems`.
    """
    recipe = Recipe.load(recipe)
    device = find_device(device, present=device_memory is None)
    models = RecipeModels(recipe)
    if recipe.out is not None:
        output_folder(recipe, models)
    data = load_data(recipe, models, device, tables=False)[1]
    return choose_offload(recipe, models, device, data, device_memory, host_memory, scratch)[0]


def choose_offload(
    recipe: Recipe,
    models: RecipeModels,
    device: torch.device,
    data: Mapping[str, TaskData],
    device_memory: int | None,
    host_memory: int | None,
    scratch: str | Path | None,
) -> tuple[Plan, Offload]:
    """The plan, and where hidden states wait: in `scratch` if given, on a GPU if they fit there, or on the host.

    Unless the recipe says how many samples pass a layer at a time, they are halved until the job fits.

    Raises:
        OutputError: `scratch` cannot be written to.
    """
    if scratch is not None:
        check_scratch(Path(scratch))
        targets: list[Offload] = [Path(scratch)]
    else:
        targets = [device, HOST] if device.type == "cuda" else [HOST]
    planners = [Planner(recipe, models, device, offload) for offload in targets]
    halves = 1
    while True:
        sizes = {task: each.resized(batch_size=max(1, each.batch_size // halves)) for task, each in data.items()}
        for planner in planners:
            plan = planner.plan(sizes, device_memory, host_memory)
            if plan.fits:
                break
        if plan.fits or recipe.batch_size or all(each.batch_size == 1 for each in sizes.values()):
            plan.problems = problems(plan, sizes, recipe, planner.offload, planner.measure)
            return plan, planner.offload
        halves *= 2


class Planner:
    """Plans one job, for any size of data.

    Args:
        recipe: the job.
        models: its models.
        device: where it would compute.
        offload: where hidden states wait between layers.
    """

    def __init__(self, recipe: Recipe, models: RecipeModels, device: torch.device, offload: Offload = HOST) -> None:
        self.recipe, self.models, self.device, self.offload = recipe, models, device, offload
        self.student = CheckpointSource(MetaCheckpoint(models.merged), HOST)
        self.base = CheckpointSource(MetaCheckpoint(models.base), HOST)
        self.experts = {task: CheckpointSource(MetaCheckpoint(each), HOST) for task, each in models.experts.items()}
        self.layers = self.student.structure.layers
        self.student.check_whole()
        check_same_architecture(self.student, {"base": self.base, **self.experts})
        check_settings(self.student.structure, recipe.settings)

    def plan(
        self, data: Mapping[str, TaskData], device_memory: int | None = None, host_memory: int | None = None
    ) -> Plan:
        """The plan for data of this size, and what there is; without a word on whether it fits."""
        plan = self.measure(data)
        held = resident_bytes()
        plan.host_budget = held + available_host_bytes() if host_memory is None else host_memory
        if self.device.type == "cuda":
            free = available_device_bytes(self.device) if device_memory is None else device_memory
            plan.device_budget = free
        return plan

    def measure(self, data: Mapping[str, TaskData]) -> Plan:
        """The plan for data of this size, without budgets."""
        states, shared, turns = self._first_states(data)
        counts = [
            {task: round(data[task].batches * pair[0].hidden.shape[:2].numel()) for task, pair in stage.items()}
            for stage in states
        ]
        tokens = {task: sum(count[task] for count in counts) for task in self.experts}
        plan = Plan(str(self.device), tokens, all(each.exact for each in data.values()))
        plan.chunk = max(
            data[task].batch_size * max(stage[task][0].hidden.shape[1] for stage in states) for task in self.experts
        )
        seen: dict[Any, Footprint] = {}
        for layer in self.layers:
            here = TokenCounts.of(counts[layer.stage])
            plan.layers.append(self._layer(layer, data, states[layer.stage], here, seen))
        plan.kept = folded(self._kept(plan))
        self._count_bytes(plan)
        self._count_memory(plan, data, states, shared, turns)
        return plan

    def _first_states(self, data: Mapping[str, TaskData]) -> tuple[list[States], list[int], list[Counter[str]]]:
        """What enters each stage, the student's and the expert's by task; the bytes of what calls share; turns.

        A turn is what one task takes while its batches go through the model's own forward.
        """
        states: list[States] = []
        shared: list[int] = []
        turns: list[Counter[str]] = []
        entered: dict[Any, StageInputs] = {}
        student = _checkpoint(self.student)
        for source in (self.student, *self.experts.values()):
            _checkpoint(source).reads.clear()
        for stage in range(len(self.student.structure.paths)):
            start = len(student.reads)
            first = next(layer.index for layer in self.layers if layer.stage == stage)
            beside = _unpacking(student.source, self.student.block_tensors(first))
            states.append({})
            shared.append(0)
            for task, expert in self.experts.items():
                own = _checkpoint(expert)
                before = len(own.reads)
                previous = states[-2][task] if stage else (None, None)
                form = _form(data[task].example)
                if stage or "attention_mask" in data[task].example or form not in entered:  # images are all alike
                    entered[form] = self._enter(self.student, task, data[task], stage, previous[0])
                states[-1][task] = entered[form], self._enter(expert, task, data[task], stage, previous[1])
                shared[-1] += expert.shared.nbytes
                expert.release_stage_inputs()
                batch = data[task].entering * max(state.hidden.nbytes + state.call_bytes for state in states[-1][task])
                there = {
                    "a batch": round(4 * batch),
                    "calibration data of a task": round(data[task].nbytes) if data[task].lazy else 0,
                    "the next block": _nbytes(self.student, first),
                }
                # The student's embeddings are read before the expert's, both beside the stage's first block.
                held, read = _loaded(student, start), _unpacking(student.source, student.reads[start:])
                turns.append(Counter({**there, "embeddings": held, "reading": beside + read}))
                held, read = held + _loaded(own, before), _unpacking(own.source, own.reads[before:])
                turns.append(Counter({**there, "embeddings": held, "reading": beside + read}))
            shared[-1] += self.student.shared.nbytes
            self.student.release_stage_inputs()
        return states, shared, turns

    def _enter(
        self, source: CheckpointSource, task: str, data: TaskData, stage: int, before: StageInputs | None
    ) -> StageInputs:
        try:
            return StageInputs.of(source, data.example, stage, before)
        except FeatCalError:
            raise
        except Exception as error:  # whatever a model makes of inputs that are not its own
            found = ", ".join(f"{name} {tuple(value.shape)}" for name, value in data.example.items())
            raise DataError(f"task {task}: the {source.label} cannot take the inputs {found}: {error}") from error

    def _layer(
        self,
        layer: Layer,
        data: Mapping[str, TaskData],
        states: States,
        counts: TokenCounts,
        seen: dict[Any, Footprint],
    ) -> LayerPlan:
        """Layers that are called alike with weights of one form are measured once."""
        chosen = self.recipe.settings.include is not None or self.recipe.settings.exclude is not None
        forward = moments = fold = 0.0
        found: list[Footprint] = []
        for task, expert in self.experts.items():
            calls = states[task][0].calls
            key = (
                _form(self.student.structure.blocks[layer.index].state_dict()),
                _form(expert.structure.blocks[layer.index].state_dict()),
                _form([states[task][0].hidden, calls.args[layer.number], calls.kwargs[layer.number]]),
                (layer.token_weights, layer.stage, layer.path if chosen else None),
            )
            if key not in seen:
                settings = self.recipe.settings
                seen[key] = measure_layer(self.student, expert, layer, states[task], counts, settings, self.device)
            found.append(seen[key])
            # The student's second pass, through the calibrated layer, is as the expert's; the last layer needs none.
            passes = 1 if layer is self.layers[-1] else 2
            forward += data[task].batches * (found[-1].student + passes * found[-1].expert)
            moments += data[task].batches * found[-1].moments
            fold += found[-1].fold
        worst = max(found, key=lambda each: each.working)
        # An expert's block is gone when the layer is solved.
        working = max(worst.working, worst.solving - self._largest_block(layer.index))
        if self.recipe.settings.forward_dtype == "bfloat16":  # a copy of a weight at a time
            sizes = (2 * group.in_features * out for group in worst.layout.groups for out in group.out_features)
            working += max(sizes, default=0)
        flops = {"forward": forward, "moments": moments, "fold": fold, "solve": worst.solve}
        return LayerPlan(layer.index, worst.layout, worst.kept, worst.system, worst.scratch, working, flops)

    def _largest_block(self, index: int) -> int:
        return max(_nbytes(expert, index) for expert in self.experts.values())

    def _largest_pinned(self, index: int) -> int:
        """Of three blocks in pinned memory: one being read, one being copied, and the calibrated one."""
        blocks = [expert.structure.blocks[index] for expert in self.experts.values()]
        return 3 * max(sum(_pinned(value.nbytes) for value in block.state_dict().values()) for block in blocks)

    def _kept(self, plan: Plan) -> dict[str, str]:
        """Every tensor of the merged model that will not change, and why."""
        changed = self._changed(plan)
        reasons = dict.fromkeys(self.models.merged.tensors, "outside of the layers")
        for layer, planned in zip(self.layers, plan.layers, strict=True):
            state = self.student.structure.blocks[layer.index].state_dict()
            own_names = {own: name for name in state for own in self.student.tensors_of(layer.index, name)}
            for own, name in own_names.items():
                module, _, part = name.rpartition(".")
                if module in planned.kept or name in planned.kept:
                    reasons[own] = planned.kept.get(module) or planned.kept[name]
                elif part == "bias":
                    reasons[own] = "biases and LayerNorms are left out by settings"
                elif len(self.models.merged.tensors[own].shape) >= 2:
                    reasons[own] = "not a linear weight"
                elif f"{module}.bias" in own_names.values():
                    reasons[own] = "biases and LayerNorms are left out by settings"
                else:
                    reasons[own] = "RMSNorm has no closed-form update"
        return {name: reason for name, reason in reasons.items() if name not in changed}

    def _changed(self, plan: Plan) -> set[str]:
        """The merged model's names of what will be solved for."""
        settings, changed = self.recipe.settings, set()
        for layer in plan.layers:
            own = dict(self.student.structure.blocks[layer.index].named_parameters())
            names = [f"{module}.weight" for module in layer.modules]
            if settings.calibrate_bias:
                names += [f"{module}.bias" for module in layer.modules if own.get(f"{module}.bias") is not None]
            names += [f"{norm}.{part}" for norm in layer.layout.norms for part in ("weight", "bias")]
            changed |= {self.student.tensor_name(layer.index, name) for name in names}
        return changed

    def _count_bytes(self, plan: Plan) -> None:
        """What each model's files will be read for: the first forward, the blocks, and what is copied at the end."""
        changed = self._changed(plan)
        rest = [name for name in self.models.merged.tensors if name not in changed]
        student = [*_checkpoint(self.student).reads, *_block_reads(self.student), *rest]
        reads: dict[str, list[str]] = {
            source.label: [*_checkpoint(own).reads, *_block_reads(own)]
            for source, own in zip(self.models.experts.values(), self.experts.values(), strict=True)
        }
        reads[self.models.base.label] = _block_reads(self.base)
        merged: dict[str, list[str]] = {source.label: [] for source in self.models.files}
        if isinstance(self.models.merged, MergedCheckpoint):
            for name in student:
                merged[self.models.base.label].append(name)
                if self.models.merged.tensors[name].dtype.is_floating_point:
                    for expert in self.models.experts.values():
                        merged[expert.label].append(expert.names[canonical(name)])
        else:
            reads[self.models.merged.label] = student
        plan.bytes_read = {
            source.label: _from_files(source, merged[source.label], reads[source.label]) for source in self.models.files
        }
        plan.bytes_written = {"calibrated model": self.models.nbytes}
        plan.disk = {"calibrated model": self.models.nbytes}

    def _count_memory(
        self,
        plan: Plan,
        data: Mapping[str, TaskData],
        stages: list[States],
        shared: list[int],
        turns: list[Counter[str]],
    ) -> None:
        """The sum of what is there all the time and of the worst moment: a first forward, a layer, or the end."""
        on_device, host, device = self.device.type != "cpu", Counter[str](), Counter[str]()
        hidden = calls = alike = probe = entering = passing = 0.0
        for states, of_stage in zip(stages, shared, strict=True):
            every = [(data[task], state) for task, pair in states.items() for state in pair]
            room = _pinned if on_device and self.offload == HOST else int
            hidden = max(hidden, sum(each.batches * room(state.hidden.nbytes) for each, state in every))
            calls = max(calls, sum(each.batches * state.kept_bytes for each, state in every))
            alike = max(alike, of_stage)
            entering = max(entering, *(each.entering * state.hidden.nbytes for each, state in every))
            passing = max(passing, *(state.call_bytes for _, state in every))
            probe = max(probe, 1.5 * sum(_of_a_probe(state) for _, state in every))  # student's twice, expert's once
        there = round(sum(each.nbytes for each in data.values() if each.loaded))
        host["interpreter and libraries"] = resident_bytes() - there + RUNTIME
        host["compiler"] = COMPILER if should_compile(self.recipe.settings, self.device) else 0
        host["freed blocks kept for use"] = MALLOC_CACHE_BYTES
        stays = len(stages) > 1  # an encoder-decoder's inputs are needed again
        host["calibration data"] = round(sum(each.nbytes for each in data.values() if stays or not each.lazy))
        (device if on_device and self.offload == self.device else host)["masks of batches"] = round(calls)
        (device if on_device else host)["masks and positions"] = round(alike + passing)
        host["drift probe"] = round(probe)
        if isinstance(self.offload, Path):
            plan.disk["hidden states"] = round(hidden)
        else:
            (device if on_device and self.offload == self.device else host)["hidden states"] = round(hidden)
        if self.recipe.expert_storage != "disk":
            host["experts kept"] = sum(
                kept_in_host(source.tensors[name], self.recipe.expert_storage)
                for source, own in zip(self.models.experts.values(), self.experts.values(), strict=True)
                for name in {*_checkpoint(own).reads, *_block_reads(own)}
            )
        sources = (self.student, *self.experts.values())
        reading = max(_unpacking(_checkpoint(source).source, _block_reads(source)) for source in sources)
        changed = self._changed(plan)
        rest = [name for name in self.models.merged.tensors if name not in changed]
        largest = max((self.models.merged.tensors[name].nbytes for name in rest), default=0)
        largest += _unpacking(self.models.merged, rest)
        moments = turns
        for layer in plan.layers:
            blocks = _nbytes(self.student, layer.index) + _nbytes(self.base, layer.index)
            needs = {
                "blocks: student, base, expert": blocks + self._largest_block(layer.index),
                "the next block": self._largest_block(layer.index),
                "ridge systems": layer.system,
                "moments of a task": layer.scratch,
                "features and workspace": layer.working,
                "reading": reading,
            }
            moments.append(Counter(needs))
        # The expert's and the student's next, and one that leaves.
        ahead = 0 if self.offload == self.device else 3 * entering
        (device if on_device else host)["hidden states on their way"] = round(ahead)
        if on_device:
            device["a batch"] = round(entering)
            device["operands of the kernels"] = PANEL_BYTES + SLAB_BYTES
            arriving = [max(self._largest_pinned(layer.index) for layer in plan.layers)]
            arriving[0] += reading + max(self._largest_block(layer.index) for layer in plan.layers)
            if isinstance(self.offload, Path):
                arriving[0] += 2 * _pinned(round(entering))
            for moment in moments:
                arriving.append(sum(moment.pop(name, 0) for name in ("reading", "calibration data of a task")))
            host["what is on its way"] = max(largest, *arriving)
            plan.device_items = {name: size for name, size in (device + max(moments, key=_total)).items() if size}
        else:
            host.update(max([*moments, Counter({"tensors that stay": largest})], key=_total))
        plan.host = {name: size for name, size in host.items() if size}


def _checkpoint(source: CheckpointSource) -> MetaCheckpoint:
    assert isinstance(source.checkpoint, MetaCheckpoint)
    return source.checkpoint


def _pinned(nbytes: int) -> int:
    """What torch takes for a pinned tensor: a power of two."""
    return 1 << (max(nbytes, 1) - 1).bit_length()


def _loaded(source: MetaCheckpoint, start: int) -> int:
    """Bytes of the parameters that were read since `start`."""
    return sum(source.tensors[name].nbytes for name in source.reads[start:])


def _block_reads(source: CheckpointSource) -> list[str]:
    return [name for layer in source.structure.layers for name in source.block_tensors(layer.index)]


def _from_files(source: TensorSource, merging: list[str], own: list[str]) -> int:
    """Bytes read for a merge on the fly and for the model itself; kept in host memory, one read serves all."""
    if not isinstance(source, CachedExpert):
        return source.stored_bytes([*merging, *own])
    # A merge reads what is kept compressed again, to be exact.
    again = [
        name for name in merging if kept_in_host(source.tensors[name], source.storage) < source.tensors[name].nbytes
    ]
    repeated = (Counter(again) - Counter(set(again))).elements()
    return source.stored_bytes([*dict.fromkeys([*merging, *own]), *repeated])


def _unpacking(source: TensorSource, names: Iterable[str]) -> int:
    """The most memory that reading one of the named tensors takes besides the tensor itself."""
    return max((_unpacking_one(source, name) for name in dict.fromkeys(names)), default=0)


def _unpacking_one(source: TensorSource, name: str) -> int:
    info = source.tensors[name]
    numel = torch.Size(info.shape).numel()
    if isinstance(source, CachedExpert):  # to compress, restore and compare
        return _unpacking_one(source.source, name) + (12 * numel if source.storage != "host" else 0)
    if isinstance(source, MergedCheckpoint):
        if not info.dtype.is_floating_point:
            return 0
        own = ((expert, expert.names[canonical(name)]) for expert in source.experts.values())
        return (4 + info.dtype.itemsize) * numel + max(_unpacking_one(*each) for each in own)
    if isinstance(source, LoraExpert):
        return 16 * min(numel, ROWS * info.shape[-1]) if name in source.low_rank else 0
    if isinstance(source, BitsAndBytesCheckpoint) and name in source.packed:
        return source.stored_bytes([name]) + 64 * 2**20
    return 0


def _nbytes(source: CheckpointSource, index: int) -> int:
    """Of a block."""
    return sum(tensor.nbytes for tensor in source.structure.blocks[index].state_dict().values())


def _of_a_probe(state: StageInputs) -> float:
    rows = state.hidden.shape[0]
    return min(PROBE_SAMPLES, rows) / rows * (state.hidden.nbytes + state.kept_bytes)


def _total(items: Mapping[str, int]) -> int:
    return sum(items.values())


def _form(value: Any) -> Any:
    """Shapes and types of whatever holds tensors, to be compared."""
    if isinstance(value, Mapping):
        names = tuple(value)
        return names, _form(list(value.values()))
    return tuple(
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else str(leaf) for leaf in tree_leaves(value)
    )
