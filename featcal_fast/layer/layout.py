"""What there is to calibrate in a block: its linear modules, grouped by the input that they share, and LayerNorms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from featcal_fast.forward.calls import BatchCalls
from featcal_fast.forward.hooks import ActivationHooks
from featcal_fast.layer.selection import reason_to_keep
from featcal_fast.layer.tokens import Tokens
from featcal_fast.models.family import LastLayerWeights
from featcal_fast.models.linear import is_linear, oriented
from featcal_fast.models.structure import Layer
from featcal_fast.settings import Settings


@dataclass(frozen=True)
class InputGroup:
    """Linear modules that read the same tensor with the same token weights (q/k/v; gate/up), and so share moments.

    With `memory`, that tensor is the previous stage's final output (keys and values of cross-attention).
    """

    modules: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    weights: LastLayerWeights | None
    memory: bool = False

    @property
    def leader(self) -> str:
        """The module whose input stands for the group's."""
        return self.modules[0]


@dataclass(frozen=True)
class Layout:
    """What there is to calibrate in a block, and the last module of it that its forward reaches; None without any.

    `norms` are the LayerNorms with a weight and a bias, each with its token weights; `kept` are the linear weights that
    keep their merged values, by full name, each with the reason.
    """

    groups: tuple[InputGroup, ...]
    norms: dict[str, LastLayerWeights | None]
    last: str | None
    kept: dict[str, str] = field(default_factory=dict)


def find_layout(
    block: nn.Module, layer: Layer, hidden: Tensor, calls: BatchCalls, tokens: Tokens, settings: Settings
) -> Layout:
    """Run `block` once and see which modules share an input, by the identity of the tensor they are given.

    Args:
        block: a block of a model.
        layer: where it sits.
        hidden: `[batch, tokens, width]`.
        calls: how the model calls its blocks on this batch.
        tokens: of the batch.
        settings: what to calibrate.

    Returns:
        What there is to calibrate.
    """
    weights = oriented(block)
    kept = _kept(block, weights, layer, settings)
    linears = [name for name, module in block.named_modules() if is_linear(module) and name not in kept]
    norms = [
        name
        for name, module in block.named_modules()
        if isinstance(module, nn.LayerNorm)
        and (settings.calibrate_layernorm and module.weight is not None and module.bias is not None)
        and reason_to_keep(f"{layer.path}.{name}", settings) is None
    ]
    inputs: dict[str, Tensor] = {}  # keeps every input alive, so identities are unambiguous
    with ActivationHooks(block, [*linears, *norms], inputs.__setitem__):
        calls.run(layer.number, block, hidden)
    kept |= {name: "not used by the layer's forward" for name in linears if name not in inputs}

    rule = layer.token_weights
    ruled = {name: rule if rule is not None and rule.applies_to(name) else None for name in inputs}
    members: dict[tuple[int, bool, bool], list[str]] = {}
    for name, x in list(inputs.items()):
        memory = layer.reads_memory(name)
        of = tokens.memory if memory else tokens
        if of is None or not of.fit(x):
            if name in linears:
                kept[name] = "its input does not have one row a token"
            del inputs[name]
        elif name in linears:
            members.setdefault((id(x), ruled[name] is not None, memory), []).append(name)
    groups = tuple(
        InputGroup(
            modules=tuple(names),
            in_features=weights[f"{names[0]}.weight"].shape[1],
            out_features=tuple(weights[f"{name}.weight"].shape[0] for name in names),
            weights=ruled[names[0]],
            memory=memory,
        )
        for (_, _, memory), names in members.items()
    )
    return Layout(
        groups,
        {name: ruled[name] for name in inputs if name in norms},
        list(inputs)[-1] if inputs else None,
        {f"{layer.path}.{name}": reason for name, reason in kept.items()},
    )


def _kept(block: nn.Module, weights: Mapping[str, Tensor], layer: Layer, settings: Settings) -> dict[str, str]:
    """Modules whose weights keep their merged values by the family's word or the settings', with the reason."""
    kept = {}
    for name, weight in weights.items():
        owner = block.get_submodule(name.rpartition(".")[0])
        module = name.removesuffix(".weight")
        reason = layer.family.reason_to_keep(name)
        if is_linear(owner) and weight.ndim == 2:
            reason = reason or reason_to_keep(f"{layer.path}.{module}", settings)
        if reason is not None:
            kept[module] = reason
    return kept
