"""Blocks are run here: as they are or through torch.compile, with their activations captured.

A kind of block is compiled once for each forward that the loop makes of it, not for every layer, model or chunk. What
cannot be compiled runs as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Iterator

import torch
from torch import Tensor, nn

from featcal_fast.forward import compiled
from featcal_fast.forward.calls import BatchCalls
from featcal_fast.forward.compiled import Captured, CompiledForward, form_of, kind_of
from featcal_fast.forward.hooks import ActivationHooks, Activations, OnActivation
from featcal_fast.settings import Settings

_known: dict[Hashable, CompiledForward] = {}  # of the whole process: the next run of a model of this shape finds them


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
        on_input: OnActivation,
        outputs: Iterable[str] = (),
        on_output: OnActivation | None = None,
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
        found = self._run_compiled(calls, number, block, hidden, inputs, outputs, stop_at) if self._compiled else None
        if found is None:
            with ActivationHooks(block, inputs, on_input, outputs, on_output, stop_at):
                return calls.run(number, block, hidden)
            return None
        given, made, out = found
        for name in [name for name in inputs if name in given]:  # the forward may not reach them all
            on_input(name, given.pop(name))
        for name in [name for name in outputs if name in made]:
            assert on_output is not None
            on_output(name, made.pop(name))
        return out

    def _run_compiled(
        self,
        calls: BatchCalls,
        number: int,
        block: nn.Module,
        hidden: Tensor,
        inputs: list[str],
        outputs: list[str],
        stop_at: str | None,
    ) -> Captured | None:
        """What a compiled forward makes; None where there is none."""
        if hidden.is_meta:
            return _run_eager(calls, number, block, hidden, inputs, outputs, stop_at)
        kind = kind_of(block)
        if kind in self._given_up:
            return None
        args, kwargs = calls.args[number], calls.kwargs[number]
        key = (kind, form_of([hidden, args, kwargs]), *inputs, None, *outputs, stop_at, compiled.BACKEND)
        try:
            if key in _known:
                return _known[key](block, hidden, args, kwargs)
            _check(calls, number, block, hidden, inputs, outputs)
            _known[key] = CompiledForward(block, inputs, outputs, stop_at is None)
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


def _nothing(_name: str, _tensor: Tensor) -> None:
    pass


def _run_eager(
    calls: BatchCalls,
    number: int,
    block: nn.Module,
    hidden: Tensor,
    inputs: list[str],
    outputs: list[str],
    stop_at: str | None,
) -> Captured:
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
    for kept in _run_eager(one, number, block, hidden[:1], inputs, outputs, None)[:2]:
        for name in kept:
            kept[name]


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
