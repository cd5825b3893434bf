"""A job's models as a plan sees them: headers only, what their reads would take, and what would change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from featcal_fast.checkpoints import (
    UNPACKING,
    CachedExpert,
    GgufExpert,
    LoraExpert,
    QuantisedCheckpoint,
    TensorSource,
    WrappedSource,
    cached_bytes,
)
from featcal_fast.inputs.models import RecipeModels
from featcal_fast.inputs.recipe import Recipe
from featcal_fast.layer.selection import check_settings
from featcal_fast.merging.merged import MergedCheckpoint
from featcal_fast.planning.plan import LayerPlan
from featcal_fast.planning.shared import Role
from featcal_fast.streaming.hidden_states import HOST
from featcal_fast.streaming.sources import CheckpointSource, check_same_architecture


class MetaCheckpoint(WrappedSource):
    """A source whose tensors have a form but no memory, and whose reads are only noted."""

    def __init__(self, source: TensorSource) -> None:
        super().__init__(source)
        self.reads: list[str] = []

    @property
    def bytes_read(self) -> int:
        return self.source.stored_bytes(self.reads)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Zeros, one value for all of a tensor."""
        infos = {name: self.tensors[name] for name in names}
        self.reads += infos
        return {name: torch.zeros((), dtype=info.dtype).expand(info.shape) for name, info in infos.items()}


class PlannedModels:
    """Student, base and experts on the meta device.

    Args:
        recipe: the job.
        models: its models.

    Raises:
        FeatCalError: a tensor is missing, models differ, or settings do not go with them.
    """

    def __init__(self, recipe: Recipe, models: RecipeModels) -> None:
        self.recipe, self.models = recipe, models
        self.student = CheckpointSource(MetaCheckpoint(models.merged), HOST)
        self.base = CheckpointSource(MetaCheckpoint(models.base), HOST, models.base_tokens.table)
        self.experts = {
            task: CheckpointSource(MetaCheckpoint(each), HOST, models.tokens[task].table)
            for task, each in models.experts.items()
        }
        self.layers = self.student.structure.layers
        self.student.check_whole()
        check_same_architecture(self.student, {"base": self.base, **self.experts})
        check_settings(self.student.structure, recipe.settings)

    def largest_block(self, index: int) -> int:
        """Bytes of an expert's block."""
        return max(block_bytes(expert, index) for expert in self.experts.values())

    def blocks(self, index: int) -> dict[str | None, int]:
        """Bytes of each expert's block, by task; and under None, of the merged model's and the base model's."""
        own: dict[str | None, int] = {task: block_bytes(expert, index) for task, expert in self.experts.items()}
        return {**own, None: block_bytes(self.student, index) + block_bytes(self.base, index)}

    def largest_pinned(self, index: int) -> int:
        """Of three blocks in pinned memory: one being read, one being copied, and the calibrated one."""
        blocks = [expert.structure.blocks[index] for expert in self.experts.values()]
        return 3 * max(sum(pinned_bytes(value.nbytes) for value in block.state_dict().values()) for block in blocks)

    def kept(self, layers: list[LayerPlan]) -> dict[str, str]:
        """Every tensor of the merged model that will not change, and why."""
        changed = self.changed(layers)
        reasons = dict.fromkeys(self.models.merged.tensors, "outside of the layers")
        for layer, planned in zip(self.layers, layers, strict=True):
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

    def merging_bytes(self) -> int:
        """The most that merging a tensor on the fly takes of a GPU's memory."""
        merged = self.models.merged
        return (
            max(merged.merging_bytes(name)[1] for name in merged.tensors) if isinstance(merged, MergedCheckpoint) else 0
        )

    def tensors_that_stay(self, layers: list[LayerPlan]) -> list[str]:
        """The merged model's tensors that are copied as they are."""
        changed = self.changed(layers)
        return [name for name in self.models.merged.tensors if name not in changed]

    def changed(self, layers: list[LayerPlan]) -> set[str]:
        """The merged model's names of what will be solved for."""
        settings, changed = self.recipe.settings, set()
        for layer in layers:
            own = dict(self.student.structure.blocks[layer.index].named_parameters())
            names = [f"{module}.weight" for module in layer.modules]
            if settings.calibrate_bias:
                names += [f"{module}.bias" for module in layer.modules if own.get(f"{module}.bias") is not None]
            names += [f"{norm}.{part}" for norm in layer.layout.norms for part in ("weight", "bias")]
            changed |= {own for name in names for own in self.student.tensors_of(layer.index, name)}
        return changed

    def bytes_read(
        self,
        layers: list[LayerPlan],
        entered: Mapping[str | None, int],
        heads: Collection[str],
        roles: Sequence[Role],
    ) -> dict[str, int]:
        """What each model's files will be read for by all ranks: the first forward, blocks, heads, and what is copied.

        Args:
            layers: planned.
            entered: as `Stages.reads`.
            heads: as `Heads.student`.
            roles: of each rank.
        """
        rest, merges = self.tensors_that_stay(layers), isinstance(self.models.merged, MergedCheckpoint)
        total = {source.label: 0 for source in self.models.files}
        known: dict[object, int] = {}
        for role in roles:
            compares = any(task in heads for task in role.owned)
            student = bool(role.tasks), compares, role.first, role.rank if merges else None
            own = {source.label: task for task, source in self.models.experts.items()}
            for source in self.models.files:
                task = own.get(source.label)
                # Several ranks read a layer's first expert first, before what is merged of it.
                early = not role.alone and task == next(iter(role.tasks), "")
                key = source.label, student, task in role.tasks, task in role.owned, early
                if key not in known:
                    blocks = [layer.index for layer in self.layers if not merges or role.merges(layer.index)]
                    names = self._student_reads(*student[:3], blocks, entered[None], rest)
                    known[key] = self._role_reads(source, task, names, entered, *key[2:])
                total[source.label] += known[key]
        return total

    def _student_reads(
        self, enters: bool, compares: bool, copies: bool, blocks: list[int], entered: int, rest: list[str]
    ) -> list[str]:
        """What a rank reads of the merged model; `blocks` are the layers that it reads."""
        reads = meta_checkpoint(self.student).reads
        first, head = reads[:entered] if enters else [], reads[entered:] if compares else []
        names = [name for index in blocks for name in self.student.block_tensors(index)]
        return [*first, *head, *names, *(rest if copies else [])]

    def _role_reads(
        self,
        source: TensorSource,
        task: str | None,
        student: list[str],
        entered: Mapping[str | None, int],
        enters: bool,
        compares: bool,
        early: bool,
    ) -> int:
        """Bytes that a rank reads of one model's files; the last three are of an expert."""
        merging, own = list[str](), list[str]()
        if isinstance(self.models.merged, MergedCheckpoint):
            reads = self.models.merged.reads(student)
            merging = reads[task] if task is not None else reads[None] if source is self.models.base else []
        elif source is self.models.merged:
            own = student
        if task is not None and enters:
            found = meta_checkpoint(self.experts[task]).reads
            head = found[entered[task] :] if compares else []
            own = [*found[: entered[task]], *head, *block_reads(self.experts[task])]
        elif source is self.models.base:
            own = block_reads(self.base)
        return _from_files(source, merging, own, block_reads(self.experts[task]) if task is not None and early else ())


def meta_checkpoint(source: CheckpointSource) -> MetaCheckpoint:
    """What a source of these reads from."""
    assert isinstance(source.checkpoint, MetaCheckpoint)
    return source.checkpoint


def pinned_bytes(nbytes: int) -> int:
    """What torch takes for a pinned tensor: a power of two."""
    return 1 << (max(nbytes, 1) - 1).bit_length()


def block_reads(source: CheckpointSource) -> list[str]:
    """What is read for all blocks."""
    return [name for layer in source.structure.layers for name in source.block_tensors(layer.index)]


def _from_files(source: TensorSource, merging: list[str], own: list[str], early: Collection[str]) -> int:
    """Bytes read for a merge on the fly and for the model itself; kept in host memory, one read serves all.

    Args:
        source: the model.
        merging, own: what is read for the two.
        early: of `own`, what is read before it is merged.
    """
    if not isinstance(source, CachedExpert):
        return source.stored_bytes([*merging, *own])
    # A merge reads what is kept compressed again, to be exact.
    again = [
        name for name in merging if cached_bytes(source.tensors[name], source.storage) < source.tensors[name].nbytes
    ]
    repeated = (Counter(again) - Counter(set(again) - set(early))).elements()
    return source.stored_bytes([*dict.fromkeys([*merging, *own]), *repeated])


def unpacking_bytes(source: TensorSource, names: Iterable[str]) -> int:
    """The most memory that reading one of the named tensors takes besides the tensor itself."""
    return max((_unpacking_one(source, name) for name in dict.fromkeys(names)), default=0)


def _unpacking_one(source: TensorSource, name: str) -> int:
    info = source.tensors[name]
    numel = torch.Size(info.shape).numel()
    if isinstance(source, CachedExpert):  # to compress, restore and compare
        return _unpacking_one(source.source, name) + (12 * numel if source.storage != "host" else 0)
    if isinstance(source, MergedCheckpoint):
        unpacking = (_unpacking_one(*each) for each in source.read_whole(name))
        return source.merging_bytes(name)[0] + max(unpacking, default=0)
    if isinstance(source, LoraExpert):
        return max(source.forming_bytes(name), _unpacking_one(source.base, name))
    if isinstance(source, GgufExpert):
        return source.unpacking_bytes(name)
    if isinstance(source, QuantisedCheckpoint) and name in source.packed:
        return source.stored_bytes([name]) + UNPACKING
    return 0


def block_bytes(source: CheckpointSource, index: int) -> int:
    """Bytes of a block."""
    return sum(tensor.nbytes for tensor in source.structure.blocks[index].state_dict().values())
