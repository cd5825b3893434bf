"""Whether a model's folder loads: opened anew, held against its config, and called once without storage."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featcal_fast.checkpoints import Checkpoint, TensorSource
from featcal_fast.errors import CheckpointError, ModelMismatchError, shown, told
from featcal_fast.models.configs import image_shape, max_positions
from featcal_fast.planning.meter import META, Meter
from featcal_fast.planning.models import MetaCheckpoint
from featcal_fast.streaming.hidden_states import HOST
from featcal_fast.streaming.sources import CheckpointSource

TOKENS = 8  # of the text that the model is called with
LABEL = "the model as written"
PADDING = "warn_if_padding_and_no_attention_mask"  # a method of transformers' models that looks at values
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
# What torch says of code that looks at values, of which there are none here, and of transformers before 5.1, which sets
# the precision of a device that it does not know.
NO_VALUES = ("meta", "data-dependent", "device type for autocast")


def check_loads(path: Path, like: TensorSource | None = None) -> None:
    """Open a folder as whoever loads it will: headers, names and shapes only, whatever its size.

    Args:
        path: the folder.
        like: what it must have the tensors and side files of; None where nobody knows better than its config.

    Raises:
        FeatCalError: something is missing or superfluous, has another form than `config.json` or `like` says, or the
            class that the config names cannot be called.
    """
    checkpoint = Checkpoint(path, LABEL)
    if like is not None:
        check_tensors(checkpoint, like)
        for name in sorted(like.side_files()):
            if not (path / name).is_file():
                raise CheckpointError(f"{LABEL}: {path}: {shown(name)} is missing, which the {like.label} has")
    source = CheckpointSource(MetaCheckpoint(checkpoint), HOST)
    source.check_whole()
    failure = _failure(source)
    if failure and (like is None or not _failure(CheckpointSource(MetaCheckpoint(like), HOST))):
        raise ModelMismatchError(f"{LABEL}: {path / 'config.json'} describes a {failure}")


def check_tensors(checkpoint: Checkpoint, like: TensorSource) -> None:
    """Raises:
    FeatCalError: a checkpoint has not the tensors, in their form, that another model has."""
    where = f"{checkpoint.label}: {checkpoint.path}"
    for name in sorted(like.tensors.keys() | checkpoint.tensors.keys()):
        found, expected = (source.tensors.get(name) for source in (checkpoint, like))
        if found is None:
            raise CheckpointError(f"{where}: tensor {shown(name)} is missing, which the {like.label} has")
        if expected is None:
            raise CheckpointError(f"{where}: found a tensor {shown(name)}, which the {like.label} has not")
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            raise ModelMismatchError(
                f"{where}: tensor {shown(name)} is {found.dtype} of shape {found.shape}, expected {expected.dtype} of "
                f"shape {expected.shape} as in the {like.label}"
            )


def _failure(source: CheckpointSource) -> str:
    """Why neither the model nor what it has below its head can be called; nothing where one of them can.

    Code that wants to know a value cannot be followed, nor can what takes inputs that nobody here can make; it is taken
    to be right.
    """
    source.model.to(META)
    source.device = META  # where it loads on first use, too
    for module in source.model.modules():
        if hasattr(module, PADDING):
            setattr(module, PADDING, lambda *_: None)
    failure = ""
    for model in (source.model, getattr(source.model, "base_model", source.model)):
        inputs = _inputs(model)
        try:
            with torch.no_grad(), Meter():
                if inputs:
                    model(**inputs)
            return ""
        except Exception as error:  # whatever a model's code makes of a config that is not of its weights
            if isinstance(error, NotImplementedError) or any(word in str(error) for word in NO_VALUES):
                return ""
            shapes = {key: tuple(value.shape) for key, value in inputs.items()}
            failure = failure or f"{type(model).__name__} that cannot be called with {shapes}: {told(error)}"
    return failure


def _inputs(model: Any) -> dict[str, Tensor]:
    """The smallest batch of what a model's forward takes, `[1, ...]`; empty where it takes more, or nobody knows how
    large."""
    taken, config = inspect.signature(model.forward).parameters, model.config
    inputs = {}
    count = min(TOKENS, max_positions(getattr(config, "text_config", config)) or TOKENS)
    for key in ("input_ids", "decoder_input_ids"):
        if key in taken and (key == "input_ids" or config.is_encoder_decoder):
            inputs[key] = torch.zeros(1, count, dtype=torch.long, device=META)
    if "pixel_values" in taken:
        shape = image_shape(config)
        if shape is None:
            return {}
        inputs["pixel_values"] = torch.empty(1, *shape, device=META)
    needed = {name for name, each in taken.items() if each.default is each.empty and each.kind not in VARIABLE}
    return {} if needed - inputs.keys() else inputs
