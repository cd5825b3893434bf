"""Linear modules, whichever way they store their weight: everywhere else a weight is `[out, in]`."""

from __future__ import annotations

from torch import Tensor, nn


def is_transposed(module: nn.Module) -> bool:
    """Whether `module` is a GPT-2 `Conv1D`: a linear module whose weight is `[in, out]`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes `x W' + b` with a plain weight (quantised subclasses do not count)."""
    return type(module) is nn.Linear or is_transposed(module)


def oriented(block: nn.Module) -> dict[str, Tensor]:
    """The parameters of `block` by name, weights of linear modules as `[out, in]`.

    They are views: writing to them writes to the block.
    """
    parameters: dict[str, Tensor] = dict(block.named_parameters())
    for name, module in block.named_modules():
        if is_transposed(module):
            own = f"{name}.weight"
            parameters[own] = parameters[own].mT
    return parameters
