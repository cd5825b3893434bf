"""What there is to calibrate in a block: its linear modules, grouped by the input that they share, and LayerNorms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from featcal_fast.errors import UnsupportedModelError
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
    """What there is to calibrate in a block.

    Attributes:
        groups: of linear modules, in the order in which its forward reaches them.
        norms: the LayerNorms with a weight and a bias, each with its token weights.
        last: the last module of these that its forward reaches; None without any.
        kept: the linear weights that keep their merged values, by full name, each with the reason.
        unused: of these, the modules that the forward did not reach, by name in the block.
        path: the block's full name.
    """

    groups: tuple[InputGroup, ...]
    norms: dict[str, LastLayerWeights | None]
    last: str | None
    kept: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    path: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; of token weights, whether there are some."""
        plain = asdict(self)
        plain["groups"] = [asdict(group) | {"weights": group.weights is not None} for group in self.groups]
        plain["norms"] = {name: weights is not None for name, weights in self.norms.items()}
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], rule: LastLayerWeights | None) -> Layout:
        """What `to_dict` made of another rank's, whose layer has the token weights of `rule`."""
        groups = tuple(
            InputGroup(
                tuple(each["modules"]),
                each["in_features"],
                tuple(each["out_features"]),
                rule if each["weights"] else None,
                each["memory"],
            )
            for each in plain["groups"]
        )
        norms = {name: rule if weights else None for name, weights in plain["norms"].items()}
        return cls(groups, norms, plain["last"], plain["kept"], tuple(plain["unused"]), plain["path"])


def find_layout(
    block: nn.Module, layer: Layer, hidden: Tensor, calls: BatchCalls, tokens: Tokens, settings: Settings
) -> tuple[Layout, Tensor]:
    """Run `block` once and see which modules share an input, by the identity of the tensor they are given.

    Args:
        block: a block of a model.
        layer: where it sits.
        hidden: `[batch, tokens, width]`.
        calls: how the model calls its blocks on this batch.
        tokens: of the batch.
        settings: what to calibrate.

    Returns:
        What there is to calibrate, and what the block makes of `hidden`.

    Raises:
        UnsupportedModelError: the block's forward fails, calls a module twice, or reaches none of its linear modules.
    """
    weights = oriented(block)
    kept = _kept(block, weights, layer, settings)
    linears = [name for name, module in block.named_modules() if is_linear(module) and name not in kept]
    norms = _norms(block, layer, settings)
    inputs: dict[str, Tensor] = {}  # keeps every input alive, so identities are unambiguous
    with ActivationHooks(block, [*linears, *norms], inputs.__setitem__):
        made = calls.run(layer.number, block, hidden)
    unused = _unused(linears, inputs, layer)
    kept |= dict.fromkeys(unused, "not used by the layer's forward")

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
    layout = Layout(
        tuple(_group(names, weights, ruled[names[0]], memory) for (_, _, memory), names in members.items()),
        {name: ruled[name] for name in inputs if name in norms},
        list(inputs)[-1] if inputs else None,
        {f"{layer.path}.{name}": reason for name, reason in kept.items()},
        unused,
        layer.path,
    )
    return layout, made


def _group(names: list[str], weights: Mapping[str, Tensor], ruled: LastLayerWeights | None, memory: bool) -> InputGroup:
    return InputGroup(
        modules=tuple(names),
        in_features=weights[f"{names[0]}.weight"].shape[1],
        out_features=tuple(weights[f"{name}.weight"].shape[0] for name in names),
        weights=ruled,
        memory=memory,
    )


def _unused(linears: list[str], inputs: Mapping[str, Tensor], layer: Layer) -> tuple[str, ...]:
    """The linear modules that the forward did not call."""
    unused = tuple(name for name in linears if name not in inputs)
    if linears and len(unused) == len(linears):
        raise UnsupportedModelError(
            f"{layer.path}: its forward calls none of its linear modules ({', '.join(linears)}), expected it to call "
            "some: what they are given cannot be seen, and nothing would be calibrated"
        )
    return unused


def _norms(block: nn.Module, layer: Layer, settings: Settings) -> list[str]:
    """LayerNorms to calibrate."""
    return [
        name
        for name, module in block.named_modules()
        if isinstance(module, nn.LayerNorm)
        and (settings.calibrate_layernorm and module.weight is not None and module.bias is not None)
        and reason_to_keep(f"{layer.path}.{name}", settings) is None
    ]


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
    for module, each in block.named_modules():
        if is_linear(each) and f"{module}.weight" not in weights:
            kept[module] = "its weight is another module's"
    return kept
