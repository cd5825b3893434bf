"""How much of the weights' mismatch a linear update can remove, by samples that it is not fitted to.

The fraction of residual energy that a basis captures tells from calibration data alone what a merge can gain (arXiv
2605.29101); here the basis is every linear update of a module. With `T_t = W_t - W`, `S_t` the second moments of what
the merged model gives the module, and `w_t` as in the method, the update that serves all tasks best,

    V = (sum_t w_t T_t S_t) (sum_t w_t S_t + mu I)^-1,

is fitted to some samples and judged on others, of moments `S*_t`:

    captured = 1 - sum_t w_t tr((T_t - V) S*_t (T_t - V)') / sum_t w_t tr(T_t S*_t T_t')

which is 1 where nothing is left, and below 0 where the update does harm. What is fitted to few samples depends on `mu`:
all of `RIDGES` are followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from featcal_kernels import add_scaled_, frobenius, gram_, symmetrize_
from torch import Tensor, nn

from featcal_fast.errors import UnsupportedModelError
from featcal_fast.layer.cholesky import factor_, solve_
from featcal_fast.layer.layout import InputGroup, Layout
from featcal_fast.layer.tokens import Tokens
from featcal_fast.models.linear import oriented

# For each task, whose moments have norm 1: float32 will do, down to there.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
ROWS = 256  # outputs that stand for all of a group's, evenly spread: each is a problem of its own
TOKENS = 2048  # that are float32 at a time
EPS = 1e-12  # least norm of a task's moments


@dataclass(frozen=True)
class Energies:
    """Of one group's outputs, on the device: float64.

    Attributes:
        mismatch: `E||T_t x||^2 / E||W_t x||^2`, `[tasks]`.
        total: `sum_t w_t tr(T_t S*_t T_t')`, a scalar.
        left: what each of `RIDGES` leaves of it, `[ridges]`.
        fitted: of the same energy for the samples that are fitted to, the share that each leaves, `[ridges]`.
    """

    mismatch: Tensor
    total: Tensor
    left: Tensor
    fitted: Tensor


class CapturedEnergy:
    """One layer's: of each task `begin`, then `fit` and `aim` all of its chunks, `fold`; `solve`; `judge` these.

    It takes the memory of the layer's moments and systems in calibration, if not from the tokens' side, and a
    few `[256, in]` a group.

    Args:
        layout: of the block.
        merged: the block.
        device: where sums live.
    """

    def __init__(self, layout: Layout, merged: nn.Module, device: torch.device) -> None:
        self._path, self._merged = layout.path, merged
        self._groups = {group.leader: _Group(group, device) for group in layout.groups}
        self._task = ""
        self._added: dict[tuple[object, ...], tuple[int, int]] = {}  # how far each sum has come: batch, samples of it

    @property
    def leaders(self) -> list[str]:
        """The modules whose inputs are wanted."""
        return list(self._groups)

    def begin(self, task: str, expert: nn.Module) -> None:
        """The next task, and its expert's block."""
        self._task = task
        for group in self._groups.values():
            group.begin(group.rows_of(self._merged), group.rows_of(expert))

    def fit(self, name: str, x: Tensor, tokens: Tokens, end: tuple[int, int]) -> None:
        """What the merged model gives a module for samples that are fitted to.

        Args:
            name: of a group's leader.
            x: `[samples, tokens, in]` or `[tokens, in]`.
            tokens: of these samples.
            end: of the chunk: a sample counts once, though the chunk may come again in halves.
        """
        self._add("fit", name, x, tokens, end)

    def aim(self, name: str, x: Tensor, tokens: Tokens, end: tuple[int, int]) -> None:
        """The same for samples to judge by, before there is anything to judge."""
        self._add("aim", name, x, tokens, end)

    def fold(self, own: int, memory: int) -> None:
        """All of the task's samples have passed.

        Args:
            own: how many tokens of those that are fitted to count.
            memory: likewise, for modules that are given the previous stage's final output.

        Raises:
            UnsupportedModelError: a module was given another number.
        """
        for name, group in self._groups.items():
            expected = memory if group.group.memory else own
            if group.tokens != expected:
                raise UnsupportedModelError(
                    f"{self._path}.{name}: found {group.tokens} tokens of task {self._task} to reach it in the merged "
                    f"model, expected {expected}: its layer's forward calls it for some samples only; exclude it "
                    "(settings.exclude)"
                )
            group.fold(self._task)

    def solve(self) -> None:
        """All tasks were folded."""
        for group in self._groups.values():
            group.solve()

    def judge(self, task: str, name: str, x: Tensor, tokens: Tokens, end: tuple[int, int]) -> None:
        """As `aim`, the same samples once more."""
        self._task = task
        self._add("judge", name, x, tokens, end)

    def energies(self) -> dict[tuple[str, ...], Energies]:
        """By the modules of each group."""
        return {group.group.modules: group.energies() for group in self._groups.values()}

    def _add(self, what: str, name: str, x: Tensor, tokens: Tokens, end: tuple[int, int]) -> None:
        key = what, self._task, name
        if self._added.get(key, (-1, 0)) >= end:
            return
        group = self._groups[name]
        if group.group.memory:
            assert tokens.memory is not None
            tokens = tokens.memory
        if not tokens.fit(x):
            raise UnsupportedModelError(
                f"{self._path}.{name}: found an input of shape {tuple(x.shape)}, expected one row for each of "
                f"{tokens.shape[0]} x {tokens.shape[1]} tokens; exclude it (settings.exclude)"
            )
        weights, n = tokens.weights(group.group.weights)
        add: Callable[..., None] = getattr(group, what)
        add(tokens.rows(x), weights, n, self._task)
        self._added[key] = end


class _Group:
    """The modules that share an input."""

    def __init__(self, group: InputGroup, device: torch.device) -> None:
        self.group = group
        size, total = group.in_features, sum(group.out_features)
        count = min(total, size, ROWS)
        index = torch.arange(count) * total // count
        firsts = torch.tensor(group.out_features).cumsum(0) - torch.tensor(group.out_features)
        self._index = {
            name: (index[(index >= first) & (index < first + out)] - first).to(device)
            for name, first, out in zip(group.modules, firsts.tolist(), group.out_features, strict=True)
        }
        self._s, self._a = torch.zeros(2, size, size, device=device).unbind()
        self._r, self._aimed, self._cross = torch.zeros(3, count, size, device=device).unbind()
        self._v: list[Tensor] = []
        self._fitted: list[Tensor] = []
        self._total, self._total_fitted = torch.zeros(2, dtype=torch.float64, device=device).unbind()
        self._mismatch: list[Tensor] = []
        self._scales: dict[str, Tensor] = {}  # w_t over the judging tokens' weight
        self._kept: dict[str, Tensor] = {}  # sum of ||V x||^2 over these, of each ridge

    def rows_of(self, block: nn.Module) -> Tensor:
        """The outputs that stand for all, of a block's weights: `[rows, in]` float32."""
        weights = oriented(block)
        return torch.cat([weights[f"{name}.weight"][index].float() for name, index in self._index.items()])

    def begin(self, merged: Tensor, expert: Tensor) -> None:
        self._s.zero_()
        self._cross.zero_()
        self._expert, self._t = expert, expert - merged
        self.tokens, self._n, self._judging = 0, 0.0, 0.0
        self._energies = torch.zeros(2, dtype=torch.float64, device=expert.device)

    def fit(self, x: Tensor, weights: Tensor | None, n: float, _task: str) -> None:
        gram_(self._s, x, weights)
        self._n += n
        self.tokens += len(x)

    def aim(self, x: Tensor, weights: Tensor | None, n: float, _task: str) -> None:
        cross, energies = torch.zeros_like(self._cross), torch.zeros_like(self._energies)
        for part, own in _parts(x, weights):
            wanted, made = part @ self._t.mT, part @ self._expert.mT
            energies += torch.stack([_energy(each, own) for each in (wanted, made)])
            cross.addmm_((wanted if own is None else wanted * own).mT, part)
        self._cross += cross
        self._energies += energies
        self._judging += n

    def fold(self, task: str) -> None:
        s = symmetrize_(self._s)
        weight = (frobenius(s) / self._n).clamp_min(EPS).reciprocal()
        add_scaled_(self._a, s, weight / self._n)
        target = self._t @ s
        self._r += (weight / self._n).float() * target
        self._total_fitted += weight / self._n * (target * self._t).sum(dtype=torch.float64)
        mismatch, energy = self._energies.unbind()
        self._mismatch.append(mismatch / energy.clamp_min(1e-60))
        if self._judging:
            scale = self._scales[task] = weight / self._judging
            self._aimed += scale.float() * self._cross
            self._total += scale * mismatch
            self._kept[task] = torch.zeros(len(RIDGES), dtype=torch.float64, device=s.device)
        del self._t, self._expert

    def solve(self) -> None:
        tasks = len(self._mismatch)
        for ridge in RIDGES:
            a, v = self._s.copy_(self._a), self._r.clone()
            a.diagonal().add_(ridge * tasks)
            info = factor_(a)
            solve_(a, v.mT, split=False)  # which would do for a better condition
            v = torch.where(info == 0, v, torch.zeros_like(v))  # what cannot be had captures nothing
            # Of V (A + mu I) = R: <V A, V> = <R, V> - mu ||V||^2.
            taken = (self._r * v).sum(dtype=torch.float64) + ridge * tasks * v.square().sum(dtype=torch.float64)
            self._v.append(v)
            self._fitted.append(1 - taken / self._total_fitted.clamp_min(1e-60))

    def judge(self, x: Tensor, weights: Tensor | None, _n: float, task: str) -> None:
        found = torch.zeros_like(self._kept[task])
        for part, own in _parts(x, weights):
            found += torch.stack([_energy(part @ v.mT, own) for v in self._v])
        self._kept[task] += found

    def energies(self) -> Energies:
        both = torch.stack([(v * self._aimed).sum(dtype=torch.float64) for v in self._v])
        kept = sum((scale * self._kept[task] for task, scale in self._scales.items()), torch.zeros_like(both))
        left = self._total - 2 * both + kept
        return Energies(torch.stack(self._mismatch), self._total, left, torch.stack(self._fitted))


def _parts(x: Tensor, weights: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Some tokens at a time in float32, with their weights, `[tokens, 1]`."""
    for start in range(0, len(x), TOKENS):
        part = slice(start, start + TOKENS)
        yield x[part].float(), None if weights is None else weights[part, None]


def _energy(y: Tensor, weights: Tensor | None) -> Tensor:
    squares = y.square() if weights is None else y.square() * weights
    return squares.sum(dtype=torch.float64)
