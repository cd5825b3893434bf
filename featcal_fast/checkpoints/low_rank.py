"""What an adapter makes of one weight, in part after part: `W + s B A`, and with DoRA each output of it rescaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 2048  # of a weight that its change is formed for at a time


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one weight: `scale * B A`, transposed where the weight is.

    Attributes:
        a: the adapter's name of A, `[r, in]`.
        b: of B, `[out, r]`.
        scale: `alpha / r`, or with rsLoRA `alpha / sqrt(r)`.
        transposed: whether the weight is `[in, out]`: an embedding, or a module that says `fan_in_fan_out`.
        magnitude: with DoRA the name of m, `[out]`; else None.
    """

    a: str
    b: str
    scale: float
    transposed: bool
    magnitude: str | None = None

    @property
    def parts(self) -> list[str]:
        """The adapter's tensors that it is of."""
        return [self.a, self.b, *([] if self.magnitude is None else [self.magnitude])]


class NoDirectionError(ValueError):
    """An output of a weight is zero, so that DoRA cannot rescale it."""


def forming_bytes(shape: tuple[int, ...]) -> int:
    """The most memory that `form` takes besides the weight and the factors: a part in float64, and twice in float32."""
    return 16 * min(torch.Size(shape).numel(), ROWS * shape[-1])


def form(weight: Tensor, factors: Mapping[str, Tensor], low_rank: LowRank) -> None:
    """`weight` of the base made that of the expert, in place: `W' = W + s B A`, with DoRA `m W' / ||W'||`.

    As PEFT does, DoRA takes the norm of each output over its inputs, of weights in float32 that are not rounded to the
    weight's dtype before.

    Args:
        weight: `[out, in]`, or `[in, out]` where it is transposed.
        factors: the adapter's tensors, by name.
        low_rank: how they change it.

    Raises:
        NoDirectionError: an output of `W'` is zero, with DoRA.
    """
    # In float64: a program may have float32 products of other threads rounded (featcal_kernels.cpu).
    b, a = factors[low_rank.b].double(), factors[low_rank.a].double()
    left, right = (a.mT, b.mT) if low_rank.transposed else (b, a)
    parts = list(zip(weight.split(ROWS), left.split(ROWS), strict=True))
    if low_rank.magnitude is None:
        for part, factor in parts:
            part.copy_(_changed(part, factor, right, low_rank.scale))
        return
    magnitude, done = factors[low_rank.magnitude].float(), 0
    if low_rank.transposed:  # an output is a column: its norm is known once all rows were seen
        squares = torch.zeros(weight.shape[1], dtype=torch.float64)
        for part, factor in parts:
            squares += _changed(part, factor, right, low_rank.scale).double().square_().sum(0)
        magnitude = _over(magnitude, squares.sqrt_(), 0)
    for part, factor in parts:
        changed = _changed(part, factor, right, low_rank.scale)
        if low_rank.transposed:
            changed *= magnitude
        else:
            norms = changed.double().square_().sum(1).sqrt_()
            changed *= _over(magnitude[done : done + len(part)], norms, done)[:, None]
            done += len(part)
        part.copy_(changed)
        del changed  # before the next one is made


def _changed(part: Tensor, factor: Tensor, right: Tensor, scale: float) -> Tensor:
    """Rows of the base's weight with what the factors add to them, in float32."""
    return torch.add(part.float(), (factor @ right).float(), alpha=scale)


def _over(magnitude: Tensor, norms: Tensor, first: int) -> Tensor:
    """What outputs from number `first` on are multiplied with."""
    if not norms.all():
        output = first + int((norms == 0).nonzero()[0])
        raise NoDirectionError(f"output {output} of the weight is zero, which has no direction that DoRA could rescale")
    return magnitude / norms.float()
