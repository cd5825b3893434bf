"""What the calls of a model's batches have in common, kept once: causal masks, rotary angles, position biases.

Batches of one length are called alike, a shorter one with the upper left corner of what a longer one is called with,
and padding does no more to a mask than hide columns of it, in some samples. So of each such tensor only the corner's
size and the hidden columns are kept with the batch: what calls take does not grow with the samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

RECENT = 16  # shared tensors that one is compared with; a model's calls have fewer, unless they differ batch by batch


@dataclass(frozen=True)
class SharedView:
    """A tensor of a batch's calls as a corner of a shared one.

    Attributes:
        shared: holds that corner.
        sizes: of the corner.
        shown: `[batch, columns]`, False where a sample has a column of `hidden` instead; None where the tensor is the
            corner itself, for all samples.
        hidden: a scalar.
    """

    shared: SharedTensor
    sizes: tuple[int, ...]
    shown: Tensor | None = None
    hidden: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Of what is the batch's own."""
        return 0 if self.shown is None else self.shown.nbytes

    def part(self, rows: slice) -> SharedView:
        """The same for some samples."""
        return self if self.shown is None else replace(self, shown=self.shown[rows])

    def tensor(self) -> Tensor:
        """The tensor, with its bits."""
        corner = self.shared.values[tuple(map(slice, self.sizes))]
        if self.shown is None or self.hidden is None:
            return corner.contiguous()
        return torch.where(_as_columns(self.shown, corner), corner, self.hidden)


class SharedTensor:
    """The largest tensor of its kind so far.

    Attributes:
        values: it.
        known: of its columns, which were seen; whoever refers to it hides the others.
    """

    def __init__(self, values: Tensor, known: Tensor) -> None:
        self.values, self.known = values.clone(memory_format=torch.contiguous_format), known

    def absorb(self, values: Tensor, known: Tensor) -> bool:
        """Make room for `values`, if one of the two is a corner of the other wherever both are known."""
        if values.dtype != self.values.dtype or values.ndim != self.values.ndim:
            return False
        sizes = tuple(map(min, values.shape, self.values.shape))
        if sizes not in (values.shape, self.values.shape):
            return False
        corner, columns = tuple(map(slice, sizes)), slice(sizes[-1])
        both = self.known[columns] & known[columns]
        if not ((values[corner] == self.values[corner]) | ~both).all():
            return False
        if sizes == values.shape:
            if not self.known[columns][known].all():
                self.values[corner] = torch.where(known, values, self.values[corner])
                self.known[columns] |= known
        else:
            older, seen, larger = self.values, self.known, SharedTensor(values, known.clone())
            larger.absorb(older, seen)
            self.values, self.known = larger.values, larger.known
        return True


class SharedTensors:
    """The tensors that one model's calls share."""

    def __init__(self) -> None:
        self._recent: list[SharedTensor] = []
        self.nbytes = 0

    def share(self, tensor: Tensor, samples: int) -> Tensor | SharedView:
        """What to keep of a tensor of the calls of a batch of `samples` samples: less than it, or else itself."""
        if tensor.ndim == 0 or not tensor.numel():
            return tensor
        if len(tensor) == 1 or tensor.ndim == 1 or len(tensor) != samples:
            everywhere = torch.ones(tensor.shape[-1], dtype=torch.bool, device=tensor.device)
            return SharedView(self._absorb(tensor, everywhere), tuple(tensor.shape))
        if tensor.ndim == 2:
            return tensor
        hidden = tensor.new_zeros(()) if tensor.dtype == torch.bool else tensor.min()
        shown = (tensor != hidden).flatten(1, -2).any(1)
        sample = shown.int().argmax(0)  # one that shows the column, if any does
        columns = torch.arange(len(sample), device=tensor.device)
        values = tensor.movedim(-1, 1)[sample, columns].movedim(0, -1)[None]
        if not torch.equal(torch.where(_as_columns(shown, values), values, hidden), tensor):
            return tensor
        return SharedView(self._absorb(values, shown.any(0)), tuple(values.shape), shown, hidden)

    def _absorb(self, values: Tensor, known: Tensor) -> SharedTensor:
        """The shared tensor that has room for `values`, or a new one."""
        for shared in self._recent:
            before = shared.values.nbytes
            if shared.absorb(values, known):
                self.nbytes += shared.values.nbytes - before
                return shared
        shared = SharedTensor(values, known)
        self.nbytes += shared.values.nbytes
        self._recent = [shared, *self._recent[: RECENT - 1]]
        return shared


def _as_columns(shown: Tensor, values: Tensor) -> Tensor:
    """`[batch, columns]` to be broadcast with `values` `[1, ..., columns]`."""
    return shown.view(len(shown), *[1] * (values.ndim - 2), shown.shape[1])
