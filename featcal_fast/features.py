"""Run one block and hand over the inputs of its linear modules and LayerNorms, grouped by the tensor they share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from torch import Tensor, nn

from featcal_fast.models.family import LastLayerWeights
from featcal_fast.models.stepping import BatchCalls


@dataclass(frozen=True)
class InputGroup:
    """Linear modules that read the same tensor with the same token weights (q/k/v; gate/up), and so share moments."""

    modules: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    weights: LastLayerWeights | None

    @property
    def leader(self) -> str:
        """The module whose input stands for the group's."""
        return self.modules[0]


@dataclass(frozen=True)
class Layout:
    """What there is to calibrate in a block, and the last module that its forward reaches.

    `norms` are the LayerNorms with a weight and a bias, each with its token weights.
    """

    groups: tuple[InputGroup, ...]
    norms: dict[str, LastLayerWeights | None]
    last: str


class _Stop(Exception):
    """The last input was captured: nothing after it is needed."""


@contextmanager
def tapped(
    block: nn.Module,
    inputs: Collection[str],
    on_input: Callable[[str, Tensor], None],
    outputs: Collection[str] = (),
    on_output: Callable[[str, Tensor], None] | None = None,
    stop_at: str | None = None,
) -> Iterator[None]:
    """Within the context, a forward of `block` reports the inputs (and outputs) of the named modules in call order.

    With `stop_at`, the forward ends, without an error, once that module's input was reported.
    """

    def before(name: str):
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            on_input(name, args[0])
            if name == stop_at:
                raise _Stop

        return hook

    def after(name: str):
        def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            assert on_output is not None
            on_output(name, output)

        return hook

    with ExitStack() as stack:
        for name in inputs:
            stack.callback(block.get_submodule(name).register_forward_pre_hook(before(name)).remove)
        for name in outputs:
            stack.callback(block.get_submodule(name).register_forward_hook(after(name)).remove)
        with suppress(_Stop):
            yield


class Kept(dict[str, Tensor]):
    """Captured tensors by module name; reading one that the forward has since overwritten is an error."""

    def __setitem__(self, name: str, x: Tensor) -> None:
        super().__setitem__(name, x)
        self._versions = {**getattr(self, "_versions", {}), name: x._version}

    def __getitem__(self, name: str) -> Tensor:
        x = super().__getitem__(name)
        if x._version != self._versions[name]:
            raise RuntimeError(f"the block overwrites the input of {name} in place: its features cannot be kept")
        return x


def find_layout(
    block: nn.Module, index: int, hidden: Tensor, calls: BatchCalls, rule: LastLayerWeights | None
) -> Layout:
    """Run `block` once and see which modules share an input, by the identity of the tensor they are given.

    Args:
        block: block `index` of a model.
        hidden: `[batch, tokens, width]`.
        calls: how the model calls its blocks on this batch.
        rule: the token weights of the block where it is the last one.

    Returns:
        What there is to calibrate.
    """
    linears = {name: module for name, module in block.named_modules() if type(module) is nn.Linear}
    norms = {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.LayerNorm) and module.weight is not None and module.bias is not None
    }
    inputs: dict[str, Tensor] = {}  # keeps every input alive, so identities are unambiguous
    with tapped(block, [*linears, *norms], inputs.__setitem__):
        calls.run(index, block, hidden)

    def weights_of(name: str) -> LastLayerWeights | None:
        return rule if rule is not None and rule.applies_to(name) else None

    members: dict[tuple[int, bool], list[str]] = {}
    for name, x in inputs.items():
        if name in linears:
            members.setdefault((id(x), weights_of(name) is not None), []).append(name)
    groups = tuple(
        InputGroup(
            modules=tuple(names),
            in_features=linears[names[0]].in_features,
            out_features=tuple(linears[name].out_features for name in names),
            weights=weights_of(names[0]),
        )
        for names in members.values()
    )
    return Layout(groups, {name: weights_of(name) for name in inputs if name in norms}, list(inputs)[-1])
