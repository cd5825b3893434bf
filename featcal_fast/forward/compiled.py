"""BlockRunner of blocks, compiled by torch.compile where that is wanted: elementwise work is fused into a few kernels.

A kind of block is compiled once for each forward that the loop makes of it, not for every layer, model or chunk. What
cannot be compiled runs as it is.
"""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import chain
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from featcal_fast.forward.calls import BatchCalls
from featcal_fast.layer.features import ActivationHooks, Activations
from featcal_fast.settings import Settings

BACKEND: Any = "inductor"  # of torch.compile
# By how many dimensions a tensor has that a block is called with, those that count samples or tokens: of position ids,
# of hidden states and rotary angles, of masks and position biases. What is compiled takes any number of them (but one
# sample is a form of its own). Chunks padded to sizes in steps would do as well, for memory where there may be none.
COUNTS = {1: [0], 2: [0, 1], 3: [0, 1], 4: [0, 2, 3]}
OF_ANY_MODULE = vars(nn.Module()).keys() - {"training"}  # attributes

Found = tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]  # inputs, outputs, what the block makes


def should_compile(settings: Settings, device: torch.device) -> bool:
    """Whether forwards on `device` are to be compiled."""
    return device.type == "cuda" if settings.compile_blocks is None else settings.compile_blocks


class BlockRunner:
    """Runs blocks, and shows what their modules are given and make; compiled, or as they are.

    A kind of block that cannot be compiled runs as it is from then on; of the first one, a warning says why. On the
    meta device nothing is compiled, but tensors live as long as if it were.

    Args:
        compiled: whether to compile.
    """

    def __init__(self, compiled: bool) -> None:
        self._compiled = compiled
        self._given_up: set[Hashable] = set()

    def run(self, calls: BatchCalls, number: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """`block`, called as the model calls block `number` of the stage: `[batch, tokens, width]` in and out."""
        out = self.capture(calls, number, block, hidden, (), _nothing)
        assert out is not None
        return out

    def capture(
        self,
        calls: BatchCalls,
        number: int,
        block: nn.Module,
        hidden: Tensor,
        inputs: Iterable[str],
        on_input: Callable[[str, Tensor], None],
        outputs: Iterable[str] = (),
        on_output: Callable[[str, Tensor], None] | None = None,
        stop_at: str | None = None,
    ) -> Tensor | None:
        """Run `block`, and report the inputs (and outputs) of the named modules as `ActivationHooks` does.

        Of a compiled forward they are reported when it is over, and let go of one by one.

        Args:
            calls, number, block, hidden: as in `run`.
            inputs, on_input, outputs, on_output: as in `ActivationHooks`.
            stop_at: the last of `inputs` that the forward reaches: nothing that comes after it is computed.

        Returns:
            What the block makes, `[batch, tokens, width]`; None with `stop_at`.

        Raises:
            torch.OutOfMemoryError: of the device; nothing was reported yet, or `on_input` or `on_output` raised it.
        """
        inputs, outputs = list(inputs), list(outputs)
        found = self._found(calls, number, block, hidden, inputs, outputs, stop_at) if self._compiled else None
        if found is None:
            with ActivationHooks(block, inputs, on_input, outputs, on_output, stop_at):
                return calls.run(number, block, hidden)
            return None
        given, made, out = found
        for name in inputs:
            on_input(name, given.pop(name))
        for name in outputs:
            assert on_output is not None
            on_output(name, made.pop(name))
        return out

    def _found(
        self,
        calls: BatchCalls,
        number: int,
        block: nn.Module,
        hidden: Tensor,
        inputs: list[str],
        outputs: list[str],
        stop_at: str | None,
    ) -> Found | None:
        """What a compiled forward makes; None where there is none."""
        if hidden.is_meta:
            return _kept(calls, number, block, hidden, inputs, outputs, stop_at)
        kind = _kind(block)
        if kind in self._given_up:
            return None
        args, kwargs = calls.args[number], calls.kwargs[number]
        key = (kind, _form([hidden, args, kwargs]), *inputs, None, *outputs, stop_at, BACKEND)
        try:
            if key in _known:
                return _known[key](block, hidden, args, kwargs)
            _check(calls, number, block, hidden, inputs, outputs)
            _known[key] = _Compiled(block, inputs, outputs, stop_at is None)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "TensorFloat32")  # advice to round what is kept whole on purpose
                return _known[key](block, hidden, args, kwargs)
        except Exception as error:
            # No name for a cause here: a frame that holds an error is held by it, and so are features until garbage
            # is collected.
            if (full := _out_of_memory(error)) is not None:
                raise torch.OutOfMemoryError(full) from error
            reason = _reason(error)
        # Not before the error is gone, whose frames hold on to features.
        if not self._given_up:
            warnings.warn(
                f"{type(block).__name__}: its forward cannot be compiled and runs as it is, which gives the same, more "
                f"slowly ({reason}); settings.compile_blocks: false does not try",
                stacklevel=3,
            )
        self._given_up.add(kind)
        return None


class _Compiled:
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
            self._skeleton.get_submodule(name).register_forward_pre_hook(self._before(name))
        for name in outputs:
            self._skeleton.get_submodule(name).register_forward_hook(self._after(name))

        def forward(tensors: dict[str, Tensor], hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found:
            given: dict[str, Tensor] = {}
            made: dict[str, Tensor] = {}
            self._seen = given, made
            out = torch.func.functional_call(self._skeleton, tensors, (hidden, *args), kwargs)
            self._seen = None
            out = out[0] if isinstance(out, tuple) else out
            return (
                {name: given[name] for name in inputs},
                {name: made[name] for name in outputs},
                out if whole else None,
            )

        # With code of its own: it is by its code that torch.compile counts how often it compiled a function.
        own = types.FunctionType(forward.__code__.replace(), forward.__globals__, None, None, forward.__closure__)
        self._forward = torch.compile(own, fullgraph=True, backend=BACKEND)

    def __call__(self, block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found:
        hidden, args, kwargs = tree_map(_of_any_size, (hidden, args, kwargs))
        with self._lock:  # one skeleton for all threads
            for module, own in zip(self._skeleton.modules(), block.modules(), strict=True):
                vars(module).update({name: value for name, value in vars(own).items() if name not in OF_ANY_MODULE})
            try:
                return self._forward(_tensors(block), hidden, args, kwargs)
            finally:
                self._seen = None

    def _before(self, name: str):
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert self._seen is not None
            self._seen[0][name] = args[0]

        return hook

    def _after(self, name: str):
        def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            assert self._seen is not None
            self._seen[1][name] = output

        return hook


_known: dict[Hashable, _Compiled] = {}  # of the whole process: the next run of a model of this shape finds them


def _nothing(_name: str, _tensor: Tensor) -> None:
    pass


def _kept(
    calls: BatchCalls,
    number: int,
    block: nn.Module,
    hidden: Tensor,
    inputs: list[str],
    outputs: list[str],
    stop_at: str | None,
) -> Found:
    """A forward as it is, of which all that is wanted is kept until its end."""
    given, made, out = Activations(), Activations(), None
    with ActivationHooks(block, inputs, given.__setitem__, outputs, made.__setitem__, stop_at):
        out = calls.run(number, block, hidden)
    return given, made, out


def _check(
    calls: BatchCalls, number: int, block: nn.Module, hidden: Tensor, inputs: list[str], outputs: list[str]
) -> None:
    """Raises:
    RuntimeError: hooks of others may do anything; or what is wanted does not last until the forward ends."""
    if any(module._forward_hooks or module._forward_pre_hooks for module in block.modules()):
        raise RuntimeError("it has hooks")
    one = calls.part(slice(0, 1), len(hidden))
    for kept in _kept(one, number, block, hidden[:1], inputs, outputs, None)[:2]:
        for name in kept:
            kept[name]


def _kind(block: nn.Module) -> Hashable:
    """What blocks have in common that one skeleton will do for; torch.compile sees to the rest."""
    modules = tuple(
        (name, type(module), bool(module._forward_hooks or module._forward_pre_hooks))
        for name, module in block.named_modules()
    )
    return modules, tuple((name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in _tensors(block).items())


def _form(arguments: Any) -> Hashable:
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


def _out_of_memory(error: BaseException) -> str | None:
    """What the device said, if memory ran out."""
    return next((str(cause) for cause in _causes(error) if isinstance(cause, torch.OutOfMemoryError)), None)


def _reason(error: BaseException) -> str:
    """What went wrong in the first place, in one line."""
    *_, cause = _causes(error)
    return f"{type(cause).__name__}: {cause}".strip().partition("\n")[0]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what caused it, and so on; the last is what went wrong in the first place."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = getattr(cause, "inner_exception", None) or cause.__cause__
