"""A model whose blocks arrive one at a time: modules in memory, or a checkpoint, of which one block is loaded."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from featcal_fast.checkpoints import TensorSource, canonical, is_finite
from featcal_fast.checkpoints.nested import model_folder
from featcal_fast.errors import CheckpointError, ModelMismatchError, UnsupportedModelError, told
from featcal_fast.forward.calls import BatchCalls, move, stage_inputs
from featcal_fast.forward.outputs import NoOutputs, Outputs, model_outputs
from featcal_fast.forward.shared import SharedTensors
from featcal_fast.models import Structure, find_structure, not_supported
from featcal_fast.models.configs import differences
from featcal_fast.models.meta import meta_model
from featcal_fast.models.tokens import own_inputs
from featcal_fast.ranks.shares import in_turn
from featcal_fast.ranks.world import World

RECORDING = Lock()  # while a model's forward is recorded its blocks are not themselves, and nobody copies one


class Source(Protocol):
    """What the loop needs of a model."""

    label: str
    described: str  # where its config is
    structure: Structure  # parameters may be on the meta device
    tokens: Tensor | None  # the student's token ids -> its own (models/tokens.py); None where they are the same
    shared: SharedTensors  # of the calls that `stage_inputs` made since `release_stage_inputs`
    made_once: bool  # whether several ranks get its blocks from one, as they are made of many models

    def stage_inputs(
        self, batch: Mapping[str, Tensor], stage: int, previous: Tensor | None
    ) -> tuple[Tensor, BatchCalls]:
        """The hidden states that enter a stage, `[batch, tokens, width]`, and its blocks' calls, on the device.

        Of the calls, `shared` keeps what batches share. `previous` are the hidden states that leave the last block
        of the stage before it; None in the first.
        """
        ...

    def outputs(self, batch: Mapping[str, Tensor], final: Tensor) -> Outputs:
        """What the model makes of the hidden states that leave its last block, `[batch, tokens, width]`, on the device.

        Raises:
            NoOutputs: it has none to compare, or cannot be run for them.
        """
        ...

    def release_stage_inputs(self) -> None:
        """No more batches for now: what only `stage_inputs` and `outputs` needed may go."""
        ...

    def block(self, index: int) -> nn.Module:
        """A block of the caller's own, where its weights were, in eval mode; it goes when the caller drops it."""
        ...

    def empty_block(self, index: int) -> nn.Module:
        """The same on the host, its tensors without values."""
        ...


class ModuleSource:
    """A model in memory; it is never changed. Its blocks are copied one at a time."""

    tokens: Tensor | None = None
    made_once = False

    def __init__(self, model: nn.Module, label: str, device: torch.device) -> None:
        self.model, self.label, self.device = model, label, device
        self.described = f"{label}: its config"
        self.structure = find_structure(model, label)
        self.shared = SharedTensors()
        self._shell: Structure | None = None
        self._training = [module for module in model.modules() if module.training]
        for index, block in enumerate(self.structure.blocks):
            for name, parameter in block.named_parameters():
                found = "is on the meta device, without values" if parameter.is_meta else "holds NaN or Inf"
                if parameter.is_meta or not is_finite(parameter):
                    raise ModelMismatchError(f"{label}: block {index}, {name} {found}; expected finite weights")

    def stage_inputs(
        self, batch: Mapping[str, Tensor], stage: int, previous: Tensor | None
    ) -> tuple[Tensor, BatchCalls]:
        home = next(self.model.parameters()).device
        with RECORDING, _eval_mode(self._training):
            hidden, calls = stage_inputs(
                self.structure, move(dict(batch), home), stage, move(previous, home), label=self.label
            )
        return move(hidden, self.device), move(calls, self.device).sharing(self.shared, len(hidden))

    def outputs(self, batch: Mapping[str, Tensor], final: Tensor) -> Outputs:
        if self._shell is None:
            self._shell = _shell(self.structure, self.label, self.device)
        return model_outputs(self._shell, move(dict(batch), self.device), final, _lone_block(self), self.label)

    def release_stage_inputs(self) -> None:
        self.shared, self._shell = SharedTensors(), None

    def block(self, index: int) -> nn.Module:
        with RECORDING:
            block = copy.deepcopy(self.structure.blocks[index])
        return block.eval().requires_grad_(False)

    def empty_block(self, index: int) -> nn.Module:
        return self.block(index).to_empty(device="cpu")


class StoredParameter(NamedTuple):
    """A parameter in checkpoints of one layout.

    Attributes:
        tensors: their names of what it is made of.
        assemble: makes it of those.
    """

    tensors: list[str]
    assemble: Callable[[Mapping[str, Tensor]], Tensor]

    def read(self, checkpoint: TensorSource) -> Tensor:
        """The parameter of one of them."""
        return self.assemble(checkpoint.read(self.tensors))


class CheckpointSource:
    """A checkpoint; its model exists on the meta device, and parameters are read when a module first runs.

    Args:
        checkpoint: a folder in any form, or several merged on the fly.
        device: where hidden states go.
        tokens: for each token id of the merged model this one's own, `[ids]`, int64; None where they are the same.
        made_once: whether several ranks get its blocks from one.

    Raises:
        UnsupportedModelError: no transformers class or no family fits.
        CheckpointError: a block's tensor is missing.
        ModelMismatchError: a block's tensor has another shape than the config says.
    """

    def __init__(
        self, checkpoint: TensorSource, device: torch.device, tokens: Tensor | None = None, made_once: bool = False
    ) -> None:
        self.made_once = made_once
        self.checkpoint, self.label, self.device, self.tokens = checkpoint, checkpoint.label, device, tokens
        self.described = f"{self.label}: {model_folder(checkpoint.path) / 'config.json'}"
        self.model, self._stored = meta_model(checkpoint, device)
        self.structure = find_structure(self.model, self.label)
        self._check_blocks()
        self.shared = SharedTensors()
        self._loaded: list[nn.Module] = []
        self._held: dict[str, nn.Parameter] = {}  # by the name that is stored: what is tied is read once
        self._first_blocks: dict[int, nn.Module] = {}
        for name, module in self.model.named_modules():
            if not self.structure.inside(name):
                module.register_forward_pre_hook(self._load_on_first_use(name))

    def block_tensors(self, index: int) -> list[str]:
        """The checkpoint's names of everything that block `index` is made of."""
        names = self.structure.blocks[index].state_dict()
        return list(dict.fromkeys(own for name in names for own in self.tensors_of(index, name)))

    def tensors_of(self, index: int, name: str) -> list[str]:
        """The checkpoint's names of what parameter `name` of block `index` is made of."""
        return self._stored.tensors(self._canonical(index, name))

    def parameter(self, index: int, name: str) -> StoredParameter:
        """How parameter `name` of block `index` is stored."""
        own = self._canonical(index, name)
        return StoredParameter(self._stored.tensors(own), partial(self._stored.assemble, own))

    def stored(self, index: int, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of block `index` as the checkpoint has them; what shares a tensor with them keeps its values.

        Args:
            index: the block's.
            parameters: by name.

        Returns:
            The checkpoint's tensors, by its own names.
        """
        values = {self._canonical(index, name): value for name, value in parameters.items()}
        for name in self._stored.beside(values):
            tensors = self.checkpoint.read(self._stored.tensors(name))
            values[name] = self._stored.assemble(name, tensors).to(next(iter(parameters.values())).device)
        return self._stored.disassemble(values)

    def stage_inputs(
        self, batch: Mapping[str, Tensor], stage: int, previous: Tensor | None
    ) -> tuple[Tensor, BatchCalls]:
        if self.structure.family.relays and stage not in self._first_blocks:
            first = next(layer.index for layer in self.structure.layers if layer.stage == stage)
            self._first_blocks[stage] = self.block(first).to(self.device)
        own = own_inputs(batch, self.tokens, self.checkpoint.config)
        with RECORDING:
            hidden, calls = stage_inputs(
                self.structure,
                move(own, self.device),
                stage,
                previous,
                self._first_blocks.get(stage),
                self.label,
            )
        leaves = tree_leaves([hidden, calls.args, calls.kwargs])
        if self.device.type != "meta" and any(isinstance(each, Tensor) and each.is_meta for each in leaves):
            reason = "its forward takes weights from modules that it does not call, so that they are not read"
            raise not_supported(self.model, self.label, reason)
        return hidden, calls.sharing(self.shared, len(hidden))

    def outputs(self, batch: Mapping[str, Tensor], final: Tensor) -> Outputs:
        own, alone = own_inputs(batch, self.tokens, self.checkpoint.config), _lone_block(self)
        with RECORDING:
            return model_outputs(self.structure, move(own, self.device), final, alone, self.label)

    def release_stage_inputs(self) -> None:
        self.shared = SharedTensors()
        self._first_blocks.clear()
        for module in self._loaded:
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
        self._loaded.clear()
        self._held.clear()

    def block(self, index: int) -> nn.Module:
        block = self._bare_block(index)
        tensors = self.checkpoint.read(self.block_tensors(index))
        state = {
            name: self._stored.assemble(self._canonical(index, name), tensors).to(like.dtype)
            for name, like in block.state_dict().items()
        }
        block.load_state_dict(state, assign=True)
        return block.requires_grad_(False)

    def empty_block(self, index: int) -> nn.Module:
        block = self._bare_block(index)
        state = {name: torch.empty(like.shape, dtype=like.dtype) for name, like in block.state_dict().items()}
        block.load_state_dict(state, assign=True)
        return block.requires_grad_(False)

    def _bare_block(self, index: int) -> nn.Module:
        with RECORDING:
            # The config is shared, not copied: blocks only read it.
            config = self.model.config
            return copy.deepcopy(self.structure.blocks[index], {id(config): config})

    def check_whole(self) -> None:
        """Raises:
        CheckpointError: a tensor of the model is missing, outside of its blocks too.
        ModelMismatchError: one has another shape than the config says."""
        ignored = getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ()
        for name, parameter in self.model.named_parameters():
            if not any(re.search(pattern, name) for pattern in ignored):
                self._check_tensor(name, parameter)

    def _load_on_first_use(self, prefix: str) -> Callable[..., None]:
        def hook(module: nn.Module, _args: Any) -> None:
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta:
                    full = f"{prefix}.{name}" if prefix else name
                    self._check_tensor(full, parameter)
                    stored = self._stored.resolved(canonical(full))
                    if stored not in self._held:
                        tensors = self.checkpoint.read(self._stored.tensors(stored))
                        value = self._stored.assemble(stored, tensors).to(self.device, parameter.dtype)
                        self._held[stored] = nn.Parameter(value, requires_grad=False)
                    setattr(module, name, self._held[stored])
                    self._loaded.append(module)

        return hook

    def _check_blocks(self) -> None:
        for layer, block in zip(self.structure.layers, self.structure.blocks, strict=True):
            for name, parameter in block.state_dict().items():
                self._check_tensor(f"{layer.path}.{name}", parameter)
        roots = tuple(canonical(f"{path}.") for path in self.structure.paths)
        ignored = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        buffers = {canonical(name) for name, _ in self.model.named_buffers()}  # GPT-2's masks are not in its state
        for own, meanings in self._stored.unknown.items():
            if (
                any(name.startswith(roots) for name in meanings)
                and own.endswith((".weight", ".bias"))
                and not any(name in buffers for name in meanings)
                and not any(re.search(pattern, own) for pattern in ignored)
            ):
                raise ModelMismatchError(
                    f"{self.label}: {self.checkpoint.path}: tensor {own} belongs to no module of "
                    f"{type(self.model).__name__} as config.json describes it; weights and config.json are not of the "
                    "same model"
                )

    def _check_tensor(self, name: str, parameter: Tensor) -> None:
        known = canonical(name)
        where = f"{self.label}: {self.checkpoint.path}:"
        if known not in self._stored:
            raise CheckpointError(f"{where} {self._stored.why_missing(known)}")
        found = self._stored.shape(known)
        if found != tuple(parameter.shape):
            raise ModelMismatchError(
                f"{where} tensor {self._stored[known]} has shape {found}, expected {tuple(parameter.shape)} from "
                "config.json"
            )
        for own in self._stored.tensors(known):
            dtype = self.checkpoint.tensors[own].dtype
            if parameter.is_floating_point() and not dtype.is_floating_point:
                raise UnsupportedModelError(
                    f"{where} tensor {own} has dtype {dtype}, expected plain floating-point weights; it is quantised "
                    "in a way that config.json does not tell of"
                )

    def _canonical(self, index: int, name: str) -> str:
        return canonical(f"{self.structure.layers[index].path}.{name}")


def block_for_all(source: Source, index: int, world: World) -> nn.Module:
    """A block that one rank makes for all, each in its turn, where the source says so; on the host then."""
    if not source.made_once or world.size == 1:
        return source.block(index)
    owner = in_turn(index, world.size)
    block = source.block(index).to("cpu") if owner == world.rank else source.empty_block(index)
    for tensor in block.state_dict().values():
        world.broadcast(tensor, owner)
    return block


def check_same_architecture(student: Source, others: Mapping[str, Source]) -> None:
    """Every model must have the student's blocks: same number, same parameters, same shapes, same forward.

    Raises:
        ModelMismatchError: names the model and the first parameter, or all keys of its config, that differ.
        UnsupportedModelError: two blocks of the student share a parameter, which could take one of two new values.
    """
    ours = student.structure
    owners: dict[int, str] = {}
    for layer, block in zip(ours.layers, ours.blocks, strict=True):
        for name, parameter in block.named_parameters():
            owner = owners.setdefault(id(parameter), layer.path)
            if owner != layer.path:
                raise UnsupportedModelError(
                    f"{student.label}: {layer.path}.{name} is a parameter of {owner}, too; expected layers that share "
                    "none: each is calibrated by itself"
                )
    expected = _block_shapes(ours)
    for other in others.values():
        theirs = other.structure
        if len(theirs.blocks) != len(ours.blocks) or theirs.family is not ours.family:
            raise ModelMismatchError(
                f"{other.label}: found {len(theirs.blocks)} blocks of a {theirs.family.name}, expected "
                f"{len(ours.blocks)} of a {ours.family.name} as in the {student.label}"
            )
        found = _block_shapes(theirs)
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise ModelMismatchError(
                    f"{other.label}: block parameter {name} is {found.get(name, 'absent')}, but "
                    f"{expected.get(name, 'absent')} in the {student.label}; all models must have one architecture"
                )
        if None in (ours.config, theirs.config):
            continue
        if differing := differences(theirs.config, ours.config, other.tokens):
            raise ModelMismatchError(
                f"{other.described} differs from that of the {student.label}: {', '.join(differing)}; they "
                "would compute different things with the same weights; correct what is wrong, or choose other models"
            )


def _block_shapes(structure: Structure) -> dict[str, tuple[int, ...]]:
    return {
        f"{layer.index}.{name}": tuple(parameter.shape)
        for layer, block in zip(structure.layers, structure.blocks, strict=True)
        for name, parameter in block.named_parameters()
    }


def _lone_block(source: ModuleSource | CheckpointSource) -> nn.Module | None:
    """A model's last block on the device, if it is the only one of its stage."""
    last = source.structure.layers[-1]
    return None if last.number else source.block(last.index).to(source.device)


def _shell(structure: Structure, label: str, device: torch.device) -> Structure:
    """A model in eval mode on a device, its blocks without weights; what is there already is shared, not copied.

    A head's products are too large for the host where the blocks run on a GPU.

    Raises:
        NoOutputs: the model cannot be copied.
    """
    known: dict[int, Any] = {id(structure.config): structure.config}
    for block in structure.blocks:
        known[id(block)] = hollow = copy.copy(block)
        hollow._parameters, hollow._buffers, hollow._modules = {}, {}, {}
    for name, tensor in (*structure.model.named_parameters(), *structure.model.named_buffers()):
        if not structure.inside(name):
            moved = tensor.detach().to(device)
            known[id(tensor)] = nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved
    try:
        return find_structure(copy.deepcopy(structure.model, known).eval(), label)
    except (TypeError, RuntimeError) as error:
        raise NoOutputs(f"the {label} cannot be copied: {told(error)}") from error


@contextmanager
def _eval_mode(training: Sequence[nn.Module]) -> Iterator[None]:
    """Modules in eval mode, for a while."""
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
