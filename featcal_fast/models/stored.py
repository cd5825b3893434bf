"""What a model's parameters are called in a checkpoint: transformers renames some, and stacks routed experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from featcal_fast.checkpoints.renamed import meanings

# One routed expert's matrix on disk -> the model's stacked parameter, and its place along the output axis.
ROUTED = re.compile(r"(?P<stack>.+\.experts)\.(?P<expert>\d+)\.(?P<matrix>\w+)\.weight")
MATRICES = {
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", 0),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0),
}


class StoredNames:
    """Which tensors of a checkpoint make up each parameter of a model.

    Args:
        parameters: canonical names of the model's parameters.
        stored: a checkpoint's tensor names by canonical name.
    """

    def __init__(self, parameters: Iterable[str], stored: Mapping[str, str]) -> None:
        known = set(parameters)
        self._whole: dict[str, str] = {}
        self._stacked: dict[str, dict[tuple[int, int], str]] = {}
        self.unknown: dict[str, list[str]] = {}  # tensors of no parameter, with what their names may mean
        for name, own in stored.items():
            possible = meanings(name)
            for meaning in possible:
                if meaning in known:
                    self._whole[meaning] = own
                    break
                parameter, place = _routed(meaning)
                if parameter in known:
                    self._stacked.setdefault(parameter, {})[place] = own
                    break
            else:
                self.unknown[own] = possible

    def __contains__(self, parameter: str) -> bool:
        return parameter in self._whole or parameter in self._stacked

    def __getitem__(self, parameter: str) -> str:
        """The tensor that is this parameter, or one of those that make it up."""
        return self._whole.get(parameter) or next(iter(self._stacked[parameter].values()))

    def tensors(self, parameter: str) -> list[str]:
        """All tensors that make up a parameter."""
        if parameter in self._whole:
            return [self._whole[parameter]]
        return list(self._stacked[parameter].values())

    def shape(self, parameter: str, shape_of: Callable[[str], tuple[int, ...]]) -> tuple[int, ...]:
        """The shape that the parameter would have, from its tensors' shapes."""
        if parameter in self._whole:
            return shape_of(self._whole[parameter])
        parts = self._stacked[parameter]
        experts, slots = (len({key[axis] for key in parts}) for axis in (0, 1))
        shapes = {shape_of(own) for own in parts.values()}
        if len(shapes) != 1 or len(parts) != experts * slots or max(parts)[0] != experts - 1:
            return (len(parts),)  # some are missing, or differ: no shape that any model expects
        rows, *rest = shapes.pop()
        return (experts, slots * rows, *rest)

    def assemble(self, parameter: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The parameter, from tensors by their own names."""
        if parameter in self._whole:
            return tensors[self._whole[parameter]]
        parts = self._stacked[parameter]
        experts = sorted({expert for expert, _ in parts})
        slots = sorted({slot for _, slot in parts})
        return torch.stack([torch.cat([tensors[parts[expert, slot]] for slot in slots]) for expert in experts])


def _routed(name: str) -> tuple[str, tuple[int, int]]:
    """The stacked parameter that one routed expert's matrix is a part of, and where; "" for any other tensor."""
    match = ROUTED.fullmatch(name)
    if match is None or match["matrix"] not in MATRICES:
        return "", (0, 0)
    parameter, slot = MATRICES[match["matrix"]]
    return f"{match['stack']}.{parameter}", (int(match["expert"]), slot)
