"""Which tokens count, in a batch and in parts of it; what the device is told of them, it is told without waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from featcal_fast.layer.tokens import Tokens
from featcal_fast.models.family import LastLayerWeights

CPU, GPU, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
RULE = LastLayerWeights(rest=0.01, except_modules=())
SIZES = (6, 5)
MASKS = {
    "none": None,
    "all": torch.ones(SIZES),
    "right": torch.tensor([5, 2, 5, 5, 1, 3])[:, None] > torch.arange(5),
    "left": torch.tensor([0, 3, 0, 0, 4, 2])[:, None] <= torch.arange(5),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("rows", [slice(0, 6), slice(0, 2), slice(1, 2), slice(2, 4), slice(3, 6)])
def test_parts_and_weights_are_those_of_the_mask(mask: str, rows: slice) -> None:
    valid = torch.ones(SIZES) if MASKS[mask] is None else MASKS[mask]
    part = Tokens(MASKS[mask], SIZES, CPU, Tokens(None, SIZES, CPU)).part(rows)
    counts = valid[rows].bool()
    x = torch.arange(counts.numel() * 2.0).view(*counts.shape, 2)
    assert part.count == int(counts.sum())
    assert torch.equal(part.rows(x), x[counts])
    weights, n = part.weights(RULE)
    expected = torch.where(torch.arange(5) == 0, 1.0, 0.01).expand(counts.shape)[counts]
    assert torch.equal(weights, expected)
    assert n == float(expected.double().sum())
    assert part.weights(None) == (None, part.count)
    assert part.memory.shape == part.shape


class StandIn(TorchFunctionMode):
    """The meta device in a GPU's place: nothing can be read from it. Notes what is copied to it, and how."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: set[int] = set()
        self.copies: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.pin_memory:
            self.pinned.add(args[0].data_ptr())
            return args[0]
        args = [META if arg == GPU else arg for arg in args] if func is Tensor.to else args
        kwargs = {name: META if name == "device" and value == GPU else value for name, value in (kwargs or {}).items()}
        if func is Tensor.to and not args[0].is_meta and META in (*args[1:], kwargs.get("device")):
            free = args[0].data_ptr() in self.pinned and kwargs.get("non_blocking")
            self.copies.append("free" if free else "waits")
        elif {each.is_meta for each in args if isinstance(each, Tensor)} == {True, False}:
            self.copies.append("waits")
        return func(*args, **kwargs)


@pytest.mark.parametrize("mask", MASKS)
def test_a_gpu_is_told_without_waiting(mask: str) -> None:
    with StandIn() as device:
        tokens = Tokens(MASKS[mask], SIZES, GPU, Tokens(MASKS[mask], SIZES, GPU))
        padded = mask in ("left", "right")
        assert device.copies == ["free", "free"] * padded
        for rows in (slice(0, 6), slice(0, 2), slice(2, 4), slice(3, 6)):
            part = tokens.part(rows)
            weights, _ = part.weights(RULE)
            assert weights.is_meta
            assert part.rows(torch.empty(*part.shape, 2, device=META)).shape == (part.count, 2)
            assert part.memory.count == part.count == len(weights)
        assert device.copies == ["free", "free"] * padded  # parts and weights are made there
