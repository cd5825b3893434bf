"""A model whose blocks arrive one at a time: modules in memory, or a checkpoint, of which one block is loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from featcal_fast.checkpoints import Checkpoint, canonical, is_finite
from featcal_fast.errors import CheckpointError, ModelMismatchError, UnsupportedModelError
from featcal_fast.merge import MergedCheckpoint
from featcal_fast.models import Family, find_family
from featcal_fast.models.stepping import BatchCalls, first_hidden, move


class Source(Protocol):
    """What the loop needs of a model."""

    label: str
    family: Family
    blocks: nn.ModuleList  # their structure; parameters may be on the meta device

    def first_hidden(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, BatchCalls]:
        """The hidden states that enter block 0, `[batch, tokens, width]`, and every block's calls, on the device."""
        ...

    def end_first_hidden(self) -> None:
        """No more batches: what only `first_hidden` needed may go."""
        ...

    def block(self, index: int) -> nn.Module:
        """A block of the caller's own, on the device, in eval mode; it goes when the caller drops it."""
        ...


class ModuleSource:
    """A model in memory; it is never changed. Its blocks are copied to the device one at a time."""

    def __init__(self, model: nn.Module, label: str, device: torch.device) -> None:
        self.model, self.label, self.device = model, label, device
        self.family, path = find_family(model, label)
        blocks = model.get_submodule(path)
        assert isinstance(blocks, nn.ModuleList)
        self.blocks = blocks

    def first_hidden(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, BatchCalls]:
        home = next(self.model.parameters()).device
        with _eval_mode(self.model):
            hidden, calls = first_hidden(self.model, self.blocks, move(dict(batch), home), self.family.forward_kwargs)
        return move(hidden, self.device), move(calls, self.device)

    def end_first_hidden(self) -> None:
        pass

    def block(self, index: int) -> nn.Module:
        block = copy.deepcopy(self.blocks[index]).to(self.device).eval().requires_grad_(False)
        for name, parameter in block.named_parameters():
            if not is_finite(parameter):
                raise ModelMismatchError(
                    f"{self.label}: block {index}, {name} holds NaN or Inf; expected finite weights"
                )
        return block


class CheckpointSource:
    """A checkpoint; its model exists on the meta device, and parameters are read when a module first runs.

    Args:
        checkpoint: a folder, or several merged on the fly.
        device: where blocks and hidden states go.

    Raises:
        UnsupportedModelError: no transformers class or no family fits.
        CheckpointError: a block's tensor is missing.
        ModelMismatchError: a block's tensor has another shape than the config says.
    """

    def __init__(self, checkpoint: Checkpoint | MergedCheckpoint, device: torch.device) -> None:
        self.checkpoint, self.label, self.device = checkpoint, checkpoint.label, device
        self.model = _meta_model(checkpoint, device)
        self.family, path = find_family(self.model, self.label)
        blocks = self.model.get_submodule(path)
        assert isinstance(blocks, nn.ModuleList)
        self.blocks, self.path = blocks, path
        self._check_blocks()
        self._loaded: list[nn.Module] = []
        for name, module in self.model.named_modules():
            if not name.startswith(f"{path}."):
                module.register_forward_pre_hook(self._load_on_first_use(name))

    def tensor_name(self, index: int, name: str) -> str:
        """The checkpoint's name of parameter `name` of block `index`."""
        return self.checkpoint.names[canonical(f"{self.path}.{index}.{name}")]

    def first_hidden(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, BatchCalls]:
        return first_hidden(self.model, self.blocks, move(dict(batch), self.device), self.family.forward_kwargs)

    def end_first_hidden(self) -> None:
        for module in self._loaded:
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
        self._loaded.clear()

    def block(self, index: int) -> nn.Module:
        # The config is shared, not copied: blocks only read it.
        block = copy.deepcopy(self.blocks[index], {id(self.model.config): self.model.config})
        names = {name: self.tensor_name(index, name) for name in block.state_dict()}
        tensors = self.checkpoint.read(names.values())
        block.load_state_dict({name: tensors[own] for name, own in names.items()}, assign=True)
        return block.to(self.device).requires_grad_(False)

    def _load_on_first_use(self, prefix: str):
        def hook(module: nn.Module, _args: Any) -> None:
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta:
                    full = f"{prefix}.{name}" if prefix else name
                    self._check_tensor(full, parameter)
                    own = self.checkpoint.names[canonical(full)]
                    tensor = self.checkpoint.read([own])[own].to(self.device)
                    setattr(module, name, nn.Parameter(tensor, requires_grad=False))
                    self._loaded.append(module)

        return hook

    def _check_blocks(self) -> None:
        expected = {canonical(f"{self.path}.{name}") for name in self.blocks.state_dict()}
        for name, parameter in self.blocks.state_dict().items():
            self._check_tensor(f"{self.path}.{name}", parameter)
        root = canonical(f"{self.path}.")
        for name, own in self.checkpoint.names.items():
            if name.startswith(root) and name not in expected and name.endswith((".weight", ".bias")):
                raise ModelMismatchError(
                    f"{self.label}: tensor {own} belongs to no module of {type(self.model).__name__} as "
                    "config.json describes it; "
                    "weights and config.json are not of the same model"
                )

    def _check_tensor(self, name: str, parameter: Tensor) -> None:
        own = self.checkpoint.names.get(canonical(name))
        if own is None:
            raise CheckpointError(
                f"{self.label}: tensor {name} is missing from the checkpoint; the download is incomplete, "
                "or config.json is "
                "another model's"
            )
        found = self.checkpoint.tensors[own].shape
        if found != tuple(parameter.shape):
            raise ModelMismatchError(
                f"{self.label}: tensor {own} has shape {found}, expected {tuple(parameter.shape)} from config.json"
            )


def check_same_architecture(student: Source, others: Mapping[str, Source]) -> None:
    """Every model must have the student's blocks: same number, same parameters, same shapes.

    Raises:
        ModelMismatchError: names the model and the first parameter that differs.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in student.blocks.named_parameters()}
    for other in others.values():
        if len(other.blocks) != len(student.blocks) or other.family is not student.family:
            raise ModelMismatchError(
                f"{other.label}: found {len(other.blocks)} blocks of a {other.family.name}, expected "
                f"{len(student.blocks)} of a "
                f"{student.family.name} as in the {student.label}"
            )
        found = {name: tuple(parameter.shape) for name, parameter in other.blocks.named_parameters()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise ModelMismatchError(
                    f"{other.label}: block parameter {name} is {found.get(name, 'absent')}, but "
                    f"{expected.get(name, 'absent')} in the "
                    f"{student.label}; all models must have one architecture"
                )


def _meta_model(checkpoint: Checkpoint | MergedCheckpoint, device: torch.device) -> nn.Module:
    """The checkpoint's model with buffers on the device and meta parameters, in the dtypes that the checkpoint has."""
    import transformers

    config = checkpoint.config
    names = getattr(config, "architectures", None) or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None or not issubclass(cls, transformers.PreTrainedModel):
        raise UnsupportedModelError(
            f"{checkpoint.label}: config.json names the architectures {names}, expected one that transformers "
            f"{transformers.__version__} has; models with code of their own cannot be calibrated"
        )
    with _parameters_on_meta():
        model = cls(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        own = checkpoint.names.get(canonical(name))
        if own is not None:
            parameter.data = parameter.data.to(checkpoint.tensors[own].dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built here have parameters without storage; buffers (rotary angles, ...) are computed as usual."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
