"""What a model makes of the hidden states that leave its last block: its own norms, pooling and head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from featcal_fast.errors import FeatCalError, told
from featcal_fast.models.structure import Structure

# What is looked for in what a model returns, the first that is there. A text model's pooler is seldom what is read:
# encoders of sentences average tokens.
OF_TEXTS = ("logits", "text_embeds", "last_hidden_state")
OF_IMAGES = ("logits", "image_embeds", "pooler_output", "last_hidden_state")
# A config may ask for more, which comes of blocks that run, or for values without names.
PLAIN = {"return_dict": True, "output_attentions": False, "output_hidden_states": False, "output_router_logits": False}


class Outputs(NamedTuple):
    """What a model returns after its blocks.

    Attributes:
        name: `logits`, `image_embeds`, `text_embeds`, `pooler_output` or `last_hidden_state`.
        values: `[batch, ...]`, in the dtype that the model gives.
    """

    name: str
    values: Tensor


class NoOutputs(Exception):
    """A model has no outputs to compare, or cannot be run for them; the text says why."""


class _NotHandedOn(Exception):
    """A block was not given what the one before it returned."""


def model_outputs(
    structure: Structure,
    batch: Mapping[str, Tensor],
    final: Tensor,
    alone: nn.Module | None = None,
    label: str = "model",
) -> Outputs:
    """What the model's own forward returns if its last block hands on `final`.

    Every block is replaced by one that hands its input on, so all that comes after the blocks is the model's own. Of an
    encoder-decoder the encoder's hidden states do not count: the decoder's blocks, which would read them, do not run.
    The whole model runs; where it cannot (a `CLIPModel` that is given images alone), its part that has the blocks.

    Args:
        structure: the model.
        batch: its keyword arguments; `labels` only make an encoder-decoder's inputs.
        final: hidden states that leave the last block of the last stage, `[batch, tokens, width]`.
        alone: that block with its weights, if it is the only one of its stage.
        label: what to call the model.

    Raises:
        NoOutputs: the model cannot be run this way, or returns nothing that is known here.
        torch.OutOfMemoryError: of the device.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels" or len(structure.paths) > 1}
    reason = ""
    for part in dict.fromkeys((structure.model, structure.entry)):
        config = getattr(part, "config", None)
        plain = {name: value for name, value in PLAIN.items() if getattr(config, name, value) != value}
        call = partial(part, **inputs, **structure.family.forward_kwargs, **plain)
        try:
            return _known(_handed_on(structure, call, final, alone), inputs, final)
        except torch.OutOfMemoryError:
            raise
        except (FeatCalError, NoOutputs) as error:
            reason = reason or str(error)
        except Exception as error:  # whatever a model's own code raises
            reason = reason or told(error)
    raise NoOutputs(f"the {label}, a {type(structure.model).__name__}, has no outputs to compare: {reason}")


def _handed_on(structure: Structure, call: Callable[[], Any], final: Tensor, alone: nn.Module | None) -> Any:
    """What `call` returns, in a model whose blocks hand on hidden states, and the last one `final`."""
    last = len(structure.paths) - 1
    relays = structure.family.relays
    handed: Any = None
    bare = not relays

    def hand_on(stage: int, number: int, *args: Any, **kwargs: Any) -> Any:
        nonlocal handed, bare
        hidden = args[0] if args else kwargs["hidden_states"]
        if number and hidden is not handed:
            raise _NotHandedOn("hidden states change between its blocks")
        if alone is not None and stage == last and not relays:
            # No block comes after it, of which it could be seen whether a model unpacks what it is given.
            bare = not isinstance(alone(*args, **kwargs), tuple)
        handed = final if stage == last and number == len(structure.stage(last)) - 1 else hidden
        return handed if bare else (handed, *[None] * relays)

    with ExitStack() as stack:
        for stage in range(last + 1):
            for number, block in enumerate(structure.stage(stage)):
                block.forward = partial(hand_on, stage, number)
                stack.callback(block.__dict__.pop, "forward")
        if bare:  # a model unpacks what its blocks return, or does not: the second block tells
            with suppress(_NotHandedOn):
                return call()
            bare = False
        return call()


def _known(made: Any, inputs: Mapping[str, Tensor], final: Tensor) -> Outputs:
    """What counts of what a model returned."""
    for name in OF_TEXTS if "input_ids" in inputs else OF_IMAGES:
        values = getattr(made, name, None)
        if isinstance(values, Tensor) and values.is_floating_point() and values.shape[:1] == final.shape[:1]:
            if values.is_meta and not final.is_meta:
                raise NoOutputs(
                    "its forward takes weights from modules that it does not call, so that they are not read"
                )
            return Outputs(name, values)
    raise NoOutputs(f"it returns a {type(made).__name__} without any of {', '.join(OF_TEXTS + OF_IMAGES[1:3])}")
