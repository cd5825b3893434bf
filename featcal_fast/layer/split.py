"""How far a layer's output is from an expert's, taken apart; and how far each of its linear modules' is.

With `h` what enters the block `f` of a model, and `h_e`, `f_e` the expert's (paper, section 3):

    D = f(h) - f_e(h_e) = L + U,    L = f(h) - f_e(h)        local mismatch: the same input, other weights
                                    U = f_e(h) - f_e(h_e)    upstream propagation: the same weights, other inputs

Sums are float64, over the tokens that count.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featcal_fast.errors import UnsupportedModelError
from featcal_fast.forward.hooks import Activations
from featcal_fast.layer.layout import InputGroup, Layout
from featcal_fast.layer.tokens import Tokens

ELEMENTS = 2**22  # of features that are float64 at a time


def split_sums(found: Tensor, mixed: Tensor, expert: Tensor, tokens: Tokens) -> Tensor:
    """`||D||^2`, `||L||^2`, `||U||^2`, `<D, L>`, `<D, U>` and `||f_e(h_e)||^2`.

    Args:
        found: `f(h)`, `[samples, tokens, width]`.
        mixed: `f_e(h)`, likewise.
        expert: `f_e(h_e)`, likewise.
        tokens: of these samples.

    Returns:
        `[6]`, float64.
    """
    samples = max(1, ELEMENTS // found[0].numel())
    parts = []
    for rows in (slice(start, start + samples) for start in range(0, len(found), samples)):
        out, own, theirs = (each[rows].double() for each in (found, mixed, expert))
        drift, local, upstream = out - theirs, out - own, own - theirs
        products = (drift, drift), (local, local), (upstream, upstream), (drift, local), (drift, upstream)
        parts.append(torch.stack([(a * b).sum(2) for a, b in (*products, (theirs, theirs))]))
    return torch.stack([tokens.sums(each).sum() for each in torch.cat(parts, 1)])


class ModuleErrors:
    """Errors of the outputs of a layer's linear modules, with the weights of several blocks, on the same inputs.

    Of one module, `||W xs + b - (W_t xe + b_t)||_F^2`, tokens weighing what they weigh in calibration: `xs` is what the
    calibrated model gives it, `xe` what the expert does.

    Args:
        layout: of the block.
        blocks: whose weights are compared.
        tokens: of the samples that pass.
        expert: the expert's outputs, by module.

    Attributes:
        sums: by module, `[blocks + 1]` float64: the error with each block's weights, then `||W_t xe + b_t||_F^2`.
    """

    def __init__(self, layout: Layout, blocks: tuple[nn.Module, ...], tokens: Tokens, expert: Activations) -> None:
        self._groups = {group.leader: group for group in layout.groups}
        self._path, self._blocks, self._tokens, self._expert = layout.path, blocks, tokens, expert
        self.sums: dict[str, Tensor] = {}

    def take(self, name: str, x: Tensor) -> None:
        """What the calibrated model gives the leader of a group, `[samples, tokens, in]` or `[tokens, in]`."""
        group = self._groups[name]
        tokens = self._tokens.memory if group.memory else self._tokens
        assert tokens is not None
        if not tokens.fit(x):
            raise UnsupportedModelError(
                f"{self._path}.{name}: found an input of shape {tuple(x.shape)}, expected one row for each of "
                f"{tokens.shape[0]} x {tokens.shape[1]} tokens"
            )
        x = tokens.rows(x)
        for module in group.modules:
            if module not in self._expert:
                raise UnsupportedModelError(
                    f"{self._path}.{module}: found that the expert's forward does not reach it where the calibrated "
                    "model's does, expected both to call it for every sample"
                )
            self.sums[module] = self._sums(group, module, x, tokens)

    def _sums(self, group: InputGroup, module: str, x: Tensor, tokens: Tokens) -> Tensor:
        wanted, weights = tokens.rows(self._expert[module]), tokens.weights(group.weights)[0]
        # Not called, but for its forward: a call would be seen by the hook that brought `x` here.
        found = [block.get_submodule(module).forward(x) - wanted for block in self._blocks]
        return torch.stack([_energy(each, weights) for each in (*found, wanted)])


def _energy(x: Tensor, weights: Tensor | None) -> Tensor:
    """`||sqrt(D) x||_F^2` of `[tokens, out]`: a scalar, float64."""
    rows = max(1, ELEMENTS // x.shape[1])
    sums = torch.cat([part.double().square().sum(1) for part in x.split(rows)])
    return sums.sum() if weights is None else sums @ weights.double()
