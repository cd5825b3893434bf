"""A checkpoint's model on the meta device: its modules by its config, without storage for parameters."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from featcal_fast.checkpoints import TensorSource, canonical
from featcal_fast.errors import UnsupportedModelError
from featcal_fast.models.stored import StoredNames


def meta_model(checkpoint: TensorSource, device: torch.device) -> tuple[nn.Module, StoredNames]:
    """The checkpoint's model with buffers on the device and parameters on meta, and what they are called on disk.

    All have the dtype that most of the checkpoint has, as models are loaded, save for what the model wants in float32.
    """
    import transformers

    config = checkpoint.config
    names = getattr(config, "architectures", None) or [None]
    cls = getattr(transformers, names[0], None) if isinstance(names[0], str) else None
    if cls is None or not issubclass(cls, transformers.PreTrainedModel):
        raise UnsupportedModelError(
            f"{checkpoint.label}: config.json names the architectures {names}, expected one that transformers "
            f"{transformers.__version__} has; models with code of their own cannot be calibrated"
        )
    try:
        model = copy.deepcopy(_empty_model(cls, _Config(config)))
    except Exception as error:  # whatever a model's code makes of values that are not what they should be
        raise UnsupportedModelError(
            f"{checkpoint.label}: config.json describes no {names[0]} that can be built: {error}"
        ) from error
    stored = StoredNames((canonical(name) for name in model.state_dict()), checkpoint.names)
    for names in _tied(model):
        for name in names[1:]:
            if canonical(name) in stored:  # a weight of its own, then (FLAN-T5's head)
                owner, _, own = name.rpartition(".")
                setattr(model.get_submodule(owner), own, copy.copy(model.get_parameter(name)))
    dtype = _main_dtype(checkpoint)
    wide = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype.itemsize == 2 else set()
    if dtype == torch.float16:
        wide |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if canonical(name) in stored:
            parameter.data = parameter.data.to(dtype if wide.isdisjoint(name.split(".")) else torch.float32)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    return model, stored


def _main_dtype(checkpoint: TensorSource) -> torch.dtype:
    sizes: Counter[torch.dtype] = Counter()
    for info in checkpoint.tensors.values():
        if info.dtype.is_floating_point:
            sizes[info.dtype] += math.prod(info.shape)
    return sizes.most_common(1)[0][0] if sizes else torch.float32


class _Config:
    """A config as a cache's key: by its contents."""

    def __init__(self, config: Any) -> None:
        self.config, self._text = config, config.to_json_string(use_diff=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Config) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@lru_cache(maxsize=2)
def _empty_model(cls: type[nn.Module], config: _Config) -> nn.Module:
    """A model without parameters' storage; copied for each checkpoint of a merge, since building one takes a while."""
    with parameters_on_meta():
        return cls(config.config).eval().requires_grad_(False)


def tied_names(model: nn.Module, stored: StoredNames) -> dict[str, str]:
    """For each parameter that shares its storage with others: the one of them that the checkpoint has."""
    return {
        name: next((each for each in names if canonical(each) in stored), name)
        for names in _tied(model)
        for name in names
        if canonical(name) not in stored
    }


def _tied(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    return [names for names in shared.values() if len(names) > 1]


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built here have parameters without storage; buffers (rotary angles, ...) are computed as usual."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is already there is tied to another
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
