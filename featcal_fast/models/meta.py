"""A checkpoint's model on the meta device: its modules by its config, without storage for parameters."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from featcal_fast.checkpoints import TensorSource, canonical
from featcal_fast.checkpoints.nested import model_folder
from featcal_fast.errors import ModelMismatchError, UnsupportedModelError, shown, told
from featcal_fast.models import find_structure, not_supported
from featcal_fast.models.linear import is_linear, is_transposed
from featcal_fast.models.stored import StoredNames, tied
from featcal_fast.untrusted.limits import LimitError, ProgramError, limited
from featcal_fast.untrusted.quiet import quiet

# What a model may have besides four times what its checkpoint has (which may be one of several towers), and a
# checkpoint besides four times what its model has.
PARAMETERS = 1000
VALUES = 2**24
BYTES = 2**28  # of tables, as of positions and masks
TENSORS_PER_SECOND = 1000  # a machine builds 10,000


def meta_model(checkpoint: TensorSource, device: torch.device) -> tuple[nn.Module, StoredNames]:
    """The checkpoint's model with buffers on the device and parameters on meta, and what they are called on disk.

    All have the dtype that most of the checkpoint has, as models are loaded, save for what the model wants in float32.

    Raises:
        UnsupportedModelError: `config.json` describes no model that can be built, or one far larger than the weights.
        ModelMismatchError: the weights are far more than the model.
    """
    shared = _shared_model(checkpoint)
    find_structure(shared, checkpoint.label)  # whatever else is the matter with a model that is not supported
    stored, model = StoredNames(shared, checkpoint), copy.deepcopy(shared)
    others, count = len(stored.unknown), len(checkpoint.tensors)
    if others > PARAMETERS + 4 * (count - others):
        raise ModelMismatchError(
            f"{checkpoint.label}: {checkpoint.path}: {others} of {count} tensors ({min(stored.unknown)} among them) "
            f"belong to no module of {type(model).__name__} as config.json describes it; they are not of one model"
        )
    for names in tied(model):
        there = [name for name in names if stored.has_own(canonical(name))]
        for name in there[1:]:  # of its own, then (FLAN-T5's head)
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


def stored_names(checkpoint: TensorSource) -> StoredNames:
    """What the parameters of a checkpoint's model are called in it.

    Raises:
        UnsupportedModelError: as `meta_model`.
        CheckpointError: as `StoredNames`.
    """
    return StoredNames(_shared_model(checkpoint), checkpoint)


def check_supported(checkpoint: TensorSource) -> None:
    """Raises:
    UnsupportedModelError: the checkpoint's model cannot be built, or is of no family that can be calibrated."""
    find_structure(_shared_model(checkpoint), checkpoint.label)


def _shared_model(checkpoint: TensorSource) -> nn.Module:
    """The checkpoint's model on the meta device: others' too, not to be changed.

    Raises:
        UnsupportedModelError: none can be built.
    """
    config, label = checkpoint.config, f"{checkpoint.label}: {model_folder(checkpoint.path) / 'config.json'}"
    cls = _model_class(config, label)
    try:
        return _empty_model(cls, _Config(config, _Room(checkpoint)))
    except LimitError as error:
        raise UnsupportedModelError(f"{label} describes a {cls.__name__} that cannot be built: {error}") from error
    except Exception as error:  # whatever a model's code makes of values that are not what they should be
        what = told(error).removeprefix(f"{ProgramError.__name__}: ")
        if what.startswith("ImportError"):  # of a library that none of the families needs
            raise not_supported(cls, label, f"it needs what is not installed ({what})") from error
        raise UnsupportedModelError(f"{label} describes no {cls.__name__} that can be built: {what}") from error


def token_tensors(checkpoint: TensorSource) -> tuple[list[str], list[str]]:
    """The checkpoint's names of the tensors that have a row for each token, by what its model says of itself.

    Those are the embeddings of inputs, and the output layer's weight and bias.

    Returns:
        Them, and tensors of which the model knows nothing.

    Raises:
        UnsupportedModelError: as `meta_model`.
    """
    model = _shared_model(checkpoint)
    modules = [found for module in model.modules() for found in _vocabulary_modules(module)]
    rows = {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}
    names = [name for name, each in model.named_parameters(remove_duplicate=False) if id(each) in rows]
    stored = stored_names(checkpoint)
    found = dict.fromkeys(stored[canonical(name)] for name in names if canonical(name) in stored)
    return list(found), list(stored.unknown)


def linear_tensors(checkpoint: TensorSource) -> dict[str, bool]:
    """The checkpoint's names of the weights of linear modules, and whether they are `[in, out]`, not `[out, in]`.

    Those of routed experts too, where one tensor holds several matrices; not the embeddings, nor the output layer.

    Raises:
        UnsupportedModelError: as `meta_model`.
    """
    model = _shared_model(checkpoint)
    stored = stored_names(checkpoint)
    rows = {
        id(each) for module in model.modules() for found in _vocabulary_modules(module) for each in found.parameters()
    }
    found: dict[str, bool] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            routed = parameter.dim() == 3 and "experts" in path.split(".")
            if id(parameter) in rows or canonical(name) not in stored:
                continue
            if routed or (is_linear(module) and parameter.dim() == 2):
                transposed = is_transposed(module) or (routed and bool(getattr(module, "is_transposed", False)))
                whole = stored.whole(canonical(name))  # else of matrices that are stored one by one, as they are used
                found |= dict.fromkeys(stored.tensors(canonical(name)), transposed and whole)
    return {name: transposed for name, transposed in found.items() if len(checkpoint.tensors[name].shape) in (2, 3)}


def _vocabulary_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Of a model, or of a part that is one (T5's stacks), what turns tokens into features, and features into tokens."""
    for name in ("get_input_embeddings", "get_output_embeddings"):
        found = None
        with suppress(NotImplementedError, AttributeError):  # of what has none
            found = getattr(module, name)()
        if isinstance(found, nn.Embedding if name == "get_input_embeddings" else nn.Linear):  # no image's patches
            yield found


def _main_dtype(checkpoint: TensorSource) -> torch.dtype:
    sizes: Counter[torch.dtype] = Counter()
    for info in checkpoint.tensors.values():
        if info.dtype.is_floating_point:
            sizes[info.dtype] += math.prod(info.shape)
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _model_class(config: Any, label: str) -> Any:
    """The class of transformers that a config names."""
    import transformers

    names = getattr(config, "architectures", None)
    name = names[0] if isinstance(names, list) and names else None
    found = None
    if isinstance(name, str):
        try:
            found = getattr(transformers, name, None)
        except Exception:  # a class that needs what is not installed
            found = None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise UnsupportedModelError(
            f"{label} names the architectures {shown(names)}, expected one that transformers "
            f"{transformers.__version__} has; models with code of their own cannot be calibrated"
        )
    return found


class _Room:
    """What a model may take to be built, by what its checkpoint has."""

    def __init__(self, checkpoint: TensorSource) -> None:
        self.tensors = len(checkpoint.tensors)
        self.values = sum(math.prod(info.shape) for info in checkpoint.tensors.values())

    @property
    def seconds(self) -> int:
        return 1 + self.tensors // TENSORS_PER_SECOND

    @property
    def nbytes(self) -> int:
        return BYTES + 4 * (4 * self.values)  # parameters are of float32 before they are on meta

    def check(self, count: int, total: int) -> None:
        """Raises ValueError: it is another model's config."""
        if count > PARAMETERS + 4 * self.tensors:
            raise ValueError(f"it has more than {count - 1} parameters, but the weights hold {self.tensors} tensors")
        if total > VALUES + 4 * self.values:
            raise ValueError(f"it has {total} values or more, but the weights hold {self.values}")


class _Config:
    """A config as a cache's key: by its contents."""

    def __init__(self, config: Any, room: _Room) -> None:
        self.config, self.room, self._text = config, room, config.to_json_string(use_diff=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Config) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@lru_cache(maxsize=8)
def _empty_model(cls: type[nn.Module], config: _Config) -> nn.Module:
    """A model without parameters' storage; copied for each checkpoint of a merge, since building one takes a while.

    A model's code may count to whatever number a stranger wrote: it is tried before in a process that may be ended.
    """
    limited(lambda: _build(cls, config, threads=1) is None, config.room.seconds, config.room.nbytes)
    return _build(cls, config)


def _build(cls: type[nn.Module], config: _Config, threads: int | None = None) -> nn.Module:
    if threads:  # those of the process that this one is a copy of are not there
        torch.set_num_threads(threads)
    try:
        with parameters_on_meta(config.room), _offline(), quiet("transformers"):
            model = cls(config.config).eval().requires_grad_(False)
    except RuntimeError as error:
        if "allocate memory" in str(error):  # torch's way to say so
            raise MemoryError from error
        raise
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and bool((buffer.isnan() | buffer.isposinf()).any()):
            raise ValueError(f"its {name} is not finite")
    return model


@contextmanager
def _offline() -> Iterator[None]:
    """Nothing is fetched for a model that names another one."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def parameters_on_meta(room: _Room | None = None) -> Iterator[None]:
    """Modules built here have parameters without storage; buffers (rotary angles, ...) are computed as usual.

    A ValueError where there is no `room` for one more.
    """
    register = nn.Module.register_parameter
    count = total = 0

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count, total
        if parameter is not None and not parameter.is_meta:  # one that is already there is tied to another
            count, total = count + 1, total + parameter.numel()
            if room is not None:
                room.check(count, total)
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
