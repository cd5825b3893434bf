"""Activations of a block's modules, captured by forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from featcal_fast.forward.failures import Passing, Refused

OnActivation = Callable[[str, Tensor], None]  # takes a module's name and its input or output


class _Stop(Passing):
    """The last input was captured: nothing after it is needed."""


class ActivationHooks:
    """Within the context, a forward of `block` hands over the inputs (and outputs) of named modules, in call order.

    With `stop_at`, the forward ends, without an error, once that module's input was reported. A class, not a generator:
    from Python 3.12 on a generator's context that swallows an exception keeps its frames, and so every feature of the
    forward, until garbage is collected.

    Raises, in the middle of the forward:
        Refused: a module is called twice, or with no tensor: whoever takes its input would take one of two.
    """

    def __init__(
        self,
        block: nn.Module,
        inputs: Collection[str],
        on_input: OnActivation,
        outputs: Collection[str] = (),
        on_output: OnActivation | None = None,
        stop_at: str | None = None,
    ) -> None:
        self._block, self._inputs, self._outputs = block, inputs, outputs
        self._on_input, self._on_output, self._stop_at = on_input, on_output, stop_at
        self._seen: set[str] = set()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for name in self._inputs:
                module = self._block.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(self._before(name), with_kwargs=True).remove)
            for name in self._outputs:
                module = self._block.get_submodule(name)
                stack.callback(module.register_forward_hook(self._after(name)).remove)
            self._hooks = stack.pop_all()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._hooks.close()
        return kind is _Stop

    def _before(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = given_input(name, args, kwargs, self._seen)
            self._seen.add(name)
            self._on_input(name, x)
            if name == self._stop_at:
                raise _Stop

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            assert self._on_output is not None
            self._on_output(name, output)

        return hook


def given_input(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], before: Container[str]) -> Tensor:
    """The one input of the module `name`, if it is called for the first time: `before` has those that were.

    Raises:
        Refused: it was, or there is no tensor.
    """
    x = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(x, Tensor):
        raise Refused(f"{name} is called with a {type(x).__name__}, expected a tensor")
    if name in before:
        raise Refused(f"{name} is called twice in one forward, expected once: no one input stands for both; exclude it")
    return x


class Activations(dict[str, Tensor]):
    """Captured tensors by module name; reading one that the forward has since overwritten is an error."""

    def __setitem__(self, name: str, x: Tensor) -> None:
        super().__setitem__(name, x)
        self._versions = {**getattr(self, "_versions", {}), name: x._version}

    def __getitem__(self, name: str) -> Tensor:
        x = super().__getitem__(name)
        if x._version != self._versions[name]:
            raise Refused(f"the block overwrites the input of {name} in place: its features cannot be kept")
        return x
