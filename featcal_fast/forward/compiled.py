"""A forward of one kind of block, compiled by torch.compile for all its layers, models and chunks."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Hashable
from itertools import chain
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from featcal_fast.forward.hooks import given_input

BACKEND: Any = "inductor"  # of torch.compile
# By how many dimensions a tensor has that a block is called with, those that count samples or tokens: of position ids,
# of hidden states and rotary angles, of masks and position biases. What is compiled takes any number of them (but one
# sample is a form of its own). Chunks padded to sizes in steps would do as well, for memory where there may be none.
COUNTS = {1: [0], 2: [0, 1], 3: [0, 1], 4: [0, 2, 3]}
OF_ANY_MODULE = vars(nn.Module()).keys() - {"training"}  # attributes

Captured = tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]  # inputs, outputs, what the block makes


class CompiledForward:
    """A forward of one kind of block, as a function of all that differs between its layers, models and chunks.

    What is compiled is a skeleton without weights, with hooks that stay: a block itself would be kept, and the next
    layer's compiled anew. Each call brings a block's tensors as arguments, and its other attributes (a config,
    `layer_idx`) for the skeleton; those that the forward reads torch.compile compares before it runs what it made.

    Args:
        block: one of the kind.
        inputs: modules whose inputs are wanted.
        outputs: modules whose outputs are wanted.
        whole: whether what the block makes is wanted; if not, what only that needs is not computed.
    """

    def __init__(self, block: nn.Module, inputs: list[str], outputs: list[str], whole: bool) -> None:
        self._skeleton = copy.deepcopy(
            block, {id(tensor): _without_storage(tensor) for tensor in _tensors(block).values()}
        )
        self._lock = Lock()
        self._seen: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
        for name in inputs:
            self._skeleton.get_submodule(name).register_forward_pre_hook(self._before(name), with_kwargs=True)
        for name in outputs:
            self._skeleton.get_submodule(name).register_forward_hook(self._after(name))

        def forward(
            tensors: dict[str, Tensor], hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Captured:
            given: dict[str, Tensor] = {}
            made: dict[str, Tensor] = {}
            self._seen = given, made
            out = torch.func.functional_call(self._skeleton, tensors, (hidden, *args), kwargs)
            self._seen = None
            out = out[0] if isinstance(out, tuple) else out
            return (
                {name: given[name] for name in inputs if name in given},
                {name: made[name] for name in outputs if name in made},
                out if whole else None,
            )

        # With code of its own: it is by its code that torch.compile counts how often it compiled a function.
        own = types.FunctionType(forward.__code__.replace(), forward.__globals__, None, None, forward.__closure__)
        self._forward = torch.compile(own, fullgraph=True, backend=BACKEND)

    def __call__(self, block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
        hidden, args, kwargs = tree_map(_of_any_size, (hidden, args, kwargs))
        with self._lock:  # one skeleton for all threads
            for module, own in zip(self._skeleton.modules(), block.modules(), strict=True):
                vars(module).update({name: value for name, value in vars(own).items() if name not in OF_ANY_MODULE})
            try:
                found: Captured = self._forward(_tensors(block), hidden, args, kwargs)
                return found
            finally:
                self._seen = None

    def _before(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert self._seen is not None
            self._seen[0][name] = given_input(name, args, kwargs, self._seen[0])

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            assert self._seen is not None
            self._seen[1][name] = output

        return hook


def kind_of(block: nn.Module) -> Hashable:
    """What blocks have in common that one skeleton will do for; torch.compile sees to the rest."""
    modules = tuple(
        (name, type(module), bool(module._forward_hooks or module._forward_pre_hooks))
        for name, module in block.named_modules()
    )
    return modules, tuple((name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in _tensors(block).items())


def form_of(arguments: Any) -> Hashable:
    """What of a call is compiled in: types, numbers of dimensions, and what there is only one of."""
    return tuple(
        (leaf.dtype, *(size == 1 for size in leaf.shape)) if isinstance(leaf, Tensor) else type(leaf)
        for leaf in tree_leaves(arguments)
    )


def _tensors(block: nn.Module) -> dict[str, Tensor]:
    return dict(chain(block.named_parameters(), block.named_buffers()))


def _of_any_size(value: Any) -> Any:
    """A tensor on the same memory, to be taken for one of any number of samples and tokens; what is no tensor, itself.

    torch.compile would compile in, too, what it is a view of, and how far apart is what there is only one of.
    """
    if not isinstance(value, Tensor):
        return value
    strides = torch.empty(value.shape, device="meta").stride() if value.is_contiguous() else value.stride()
    tensor = value.new_empty(0).set_(value.untyped_storage(), value.storage_offset(), value.shape, strides)
    torch._dynamo.maybe_mark_dynamic(tensor, COUNTS.get(tensor.ndim, []))
    return tensor


def _without_storage(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
