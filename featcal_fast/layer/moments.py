"""One task's scratch: what accumulates while its batches pass (`docs/method.md`, the same solution with less work).

Everything is kept in the form that solves for the *change* `V = W - W_a`, so that float32 rounding acts on
differences of features and of weights. For one group, with `D` the token weights and `n` their sum:

    S = Xs' D Xs                            upper triangle, [in, in]
    Q = (Xe - Xs)' D Xs                     input space,  [in, in]
    H = Ye' D Xs,  Ye = Xe W_t'             output space, [out, in]; then W_t Q = H - W_t S

or, where a layer sees so few tokens that it is cheaper, the rows of Xs and Xe - Xs themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import partial

import torch
import torch.nn.functional as F
from featcal_kernels import cross_, gram_cross_
from torch import Tensor, nn

from featcal_fast.errors import UnsupportedModelError
from featcal_fast.forward.hooks import Activations
from featcal_fast.layer.layout import InputGroup, Layout
from featcal_fast.layer.tokens import TokenCounts, Tokens
from featcal_fast.settings import Settings

AddOnce = Callable[[str, Callable[[], object]], None]


def output_space(group: InputGroup, tokens: int) -> bool:
    """Whether `H` (out * in a token) is cheaper than `Q` (in * in a token, and `W_t Q` once)."""
    out = sum(group.out_features)
    return tokens * out < tokens * group.in_features + out * group.in_features


def token_side(group: InputGroup, counts: TokenCounts) -> bool:
    """Whether solving from the token side (Woodbury) takes fewer operations.

    Only with few tokens: a layer of `in` inputs and eight tasks must see fewer than about `in` in all.
    """
    n, size, out = counts.total, group.in_features, sum(group.out_features)
    if group.memory:  # sees other tokens than those that were counted
        return False
    products = 1 if output_space(group, counts.largest) else 2
    features: float = n * size * size + 2 * n * size * min(size, out) + 2 * products * counts.tasks * out * size * size
    features += size**3 / 3 + 2 * out * size * size
    rows = 2 * n * n * size + n**3 / 3 + 2 * n * n * out + 8 * n * size * out
    return n < size and rows < features


class InputMoments:
    """What both kinds of scratch have: sums of the inputs, where a module has a bias, and of the token weights.

    Attributes:
        n: sum of the token weights.
        tokens: how many tokens there were.
    """

    output_space = False  # whether the expert's outputs are wanted

    def __init__(self, group: InputGroup, needs_means: bool, device: torch.device) -> None:
        self.group, self.needs_means = group, needs_means
        self.sum_student = torch.zeros(group.in_features, dtype=torch.float64, device=device)
        self.sum_expert = torch.zeros_like(self.sum_student)
        self.n, self.tokens = 0.0, 0

    @property
    def space(self) -> str:
        """Where the right-hand side is accumulated: for a report."""
        return "output" if self.output_space else "input"

    def reset(self) -> None:
        self.sum_student.zero_()
        self.sum_expert.zero_()
        self.n, self.tokens = 0.0, 0

    def join(self, other: InputMoments) -> None:
        """Add the sums of the task's samples after these."""
        self.sum_student += other.sum_student
        self.sum_expert += other.sum_expert
        self.n += other.n
        self.tokens += other.tokens

    def add(
        self, xs: Tensor, xe: Tensor, ye: list[Tensor], weights: Tensor | None, n: float, add_once: AddOnce
    ) -> None:
        """Accumulate one chunk.

        Args:
            xs: student features, `[tokens, in]`.
            xe: expert features, same shape.
            ye: in output space, the expert's outputs, bias included, one `[tokens, out]` a module.
            weights: `[tokens]` or None.
            n: sum of the weights.
            add_once: carries out an addition, unless it was before memory ran out.
        """
        add_once("means", lambda: self._add_means(xs, xe, weights, n))

    def _add_means(self, xs: Tensor, xe: Tensor, weights: Tensor | None, n: float) -> None:
        if self.needs_means:
            student, expert = _column_sums(xs, weights), _column_sums(xe, weights)
            self.sum_student += student
            self.sum_expert += expert
        self.n += n
        self.tokens += len(xs)


class GroupMoments(InputMoments):
    """S, and Q or H, of one input group and one task."""

    def __init__(self, group: InputGroup, needs_means: bool, tokens: int, device: torch.device) -> None:
        super().__init__(group, needs_means, device)
        self.output_space = output_space(group, tokens)
        rows = sum(group.out_features) if self.output_space else group.in_features
        self.s = torch.zeros(group.in_features, group.in_features, device=device)
        self.t = torch.zeros(rows, group.in_features, device=device)
        self.whole = False  # t holds Xe' D Xs, not yet (Xe - Xs)' D Xs

    def reset(self) -> None:
        super().reset()
        self.s.zero_()
        self.t.zero_()
        self.whole = False

    def join(self, other: InputMoments) -> None:
        assert isinstance(other, GroupMoments)
        super().join(other)
        self.s += other.s
        self.t += other.t
        self.whole |= other.whole

    def add(
        self, xs: Tensor, xe: Tensor, ye: list[Tensor], weights: Tensor | None, n: float, add_once: AddOnce
    ) -> None:
        super().add(xs, xe, ye, weights, n, add_once)
        if self.output_space:
            first, *rest = self.t.split(list(self.group.out_features))
            add_once("s", lambda: gram_cross_(self.s, first, xs, ye[0], weights))
            for number, (t, y) in enumerate(zip(rest, ye[1:], strict=True)):
                add_once(f"t{number}", partial(cross_, t, y, xs, weights))
        else:
            # A 16-bit difference would be rounded again, while products of 16-bit features are exact.
            self.whole = xs.dtype != torch.float32
            add_once("s", lambda: gram_cross_(self.s, self.t, xs, xe if self.whole else xe - xs, weights))


class RowMoments(InputMoments):
    """The tokens' rows, `[tokens, in]` float32: `sqrt(D) Xs` and `sqrt(D) (Xe - Xs)`."""

    def __init__(self, group: InputGroup, needs_means: bool, tokens: int, device: torch.device) -> None:
        super().__init__(group, needs_means, device)
        self._xs, self._difference = torch.empty(2, tokens, group.in_features, device=device).unbind()
        self.filled = 0

    def reset(self) -> None:
        super().reset()
        self.filled = 0

    def join(self, other: InputMoments) -> None:
        assert isinstance(other, RowMoments)
        super().join(other)
        self.append(other)

    def append(self, other: InputMoments) -> None:
        """Another's rows below these."""
        assert isinstance(other, RowMoments)
        xs, difference = self.more(other.filled)
        xs.copy_(other.xs)
        difference.copy_(other.difference)

    def more(self, count: int) -> tuple[Tensor, Tensor]:
        """Room for so many rows more, of both."""
        rows = slice(self.filled, self.filled + count)
        self.filled = rows.stop
        return self._xs[rows], self._difference[rows]

    @property
    def space(self) -> str:
        return "tokens"

    @property
    def xs(self) -> Tensor:
        return self._xs[: self.filled]

    @property
    def difference(self) -> Tensor:
        return self._difference[: self.filled]

    def add(
        self, xs: Tensor, xe: Tensor, ye: list[Tensor], weights: Tensor | None, n: float, add_once: AddOnce
    ) -> None:
        super().add(xs, xe, ye, weights, n, add_once)
        add_once("rows", lambda: self._append(xs, xe, weights))

    def _append(self, xs: Tensor, xe: Tensor, weights: Tensor | None) -> None:
        rows, difference = self.more(len(xs))
        rows.copy_(xs)
        torch.sub(xe.float(), xs, out=difference)
        if weights is not None:
            rows *= weights.sqrt()[:, None]
            difference *= weights.sqrt()[:, None]


class NormMoments:
    """First and second moments of the student's affine-free normalised input of one LayerNorm, one task, float64."""

    def __init__(self, norm: nn.LayerNorm, device: torch.device) -> None:
        self.shape, self.eps = norm.normalized_shape, norm.eps
        self.mean = torch.zeros(*self.shape, dtype=torch.float64, device=device)
        self.energy = torch.zeros_like(self.mean)
        self.n, self.tokens = 0.0, 0

    def reset(self) -> None:
        self.mean.zero_()
        self.energy.zero_()
        self.n, self.tokens = 0.0, 0

    def join(self, other: NormMoments) -> None:
        """Add the sums of the task's samples after these."""
        self.mean += other.mean
        self.energy += other.energy
        self.n += other.n
        self.tokens += other.tokens

    def add(self, x: Tensor, weights: Tensor | None, n: float) -> None:
        z = F.layer_norm(x.float() if x.dtype != torch.float64 else x, self.shape, eps=self.eps)
        mean, energy = _column_sums(z, weights), _column_sums(z.square(), weights)
        self.mean += mean
        self.energy += energy
        self.n += n
        self.tokens += len(x)


class TaskMoments:
    """The scratch moments of a layer for one task; reused from task to task."""

    def __init__(
        self, layout: Layout, block: nn.Module, counts: TokenCounts, settings: Settings, device: torch.device
    ) -> None:
        self.layout = layout
        self.settings = settings
        self.groups: dict[str, GroupMoments | RowMoments] = {}
        for group in layout.groups:
            has_bias = any(block.get_submodule(name).bias is not None for name in group.modules)
            kind = RowMoments if token_side(group, counts) else GroupMoments
            self.groups[group.leader] = kind(group, has_bias, counts.largest, device)
        norms = layout.norms if settings.calibrate_layernorm else {}
        self.norms = {name: NormMoments(_layer_norm(block, name), device) for name in norms}
        self.task = ""
        self._added: dict[tuple[str, str], tuple[int, int]] = {}  # how far each sum has come: batch, samples of it

    @property
    def outputs(self) -> list[str]:
        """Modules whose outputs in the expert are needed: those of the groups in output space."""
        return [name for moments in self.groups.values() if moments.output_space for name in moments.group.modules]

    def reset(self, task: str) -> None:
        """Begin the next task."""
        self.task = task
        self._added.clear()
        for group in self.groups.values():
            group.reset()
        for norm in self.norms.values():
            norm.reset()

    def join(self, other: TaskMoments) -> None:
        """Add the sums of the task's samples after these."""
        for leader, group in self.groups.items():
            group.join(other.groups[leader])
        for name, norm in self.norms.items():
            norm.join(other.norms[name])

    def add(
        self,
        name: str,
        x: Tensor,
        expert_inputs: Activations,
        expert_outputs: Activations,
        tokens: Tokens,
        end: tuple[int, int],
    ) -> None:
        """Accumulate the student's input `x` of module `name` for one chunk, as its forward reaches the module.

        Memory may run out between any two sums, and the chunk come again in halves: each sum takes a sample once.

        Args:
            x: `[samples, tokens, in]`, as captured.
            expert_inputs: the expert's inputs on the same chunk, by module.
            expert_outputs: the expert's outputs of `self.outputs`.
            tokens: which tokens of the chunk count.
            end: of the chunk: the batch's number, and its samples up to there.

        Raises:
            UnsupportedModelError: the merged model and the expert do not give the module the same tokens.
        """

        def add_once(part: str, addition: Callable[[], object]) -> None:
            if self._added.get((name, part), (-1, 0)) < end:
                addition()
                self._added[name, part] = end

        if name in self.layout.unused:
            self.check_unused((name,))
        if name in self.norms:
            weights, n = tokens.weights(self.layout.norms[name])
            self._check_rows(name, x, tokens)
            add_once("norm", lambda: self.norms[name].add(tokens.rows(x), weights, n))
        elif name in self.groups:
            moments = self.groups[name]
            if moments.group.memory:
                assert tokens.memory is not None
                tokens = tokens.memory
            weights, n = tokens.weights(moments.group.weights)
            names = moments.group.modules if moments.output_space else ()
            self._check_reached(name, expert_inputs)
            for module in names:
                self._check_reached(module, expert_outputs)
            self._check_rows(name, x, tokens)
            self._check_rows(name, expert_inputs[name], tokens, expert=True)
            features = [tokens.rows(x), tokens.rows(expert_inputs[name])]
            features += [tokens.rows(expert_outputs[module]) for module in names]
            xs, xe, *ye = self._in_one_dtype(features)
            moments.add(xs, xe, ye, weights, n, add_once)

    def check_complete(self, own: int, memory: int) -> None:
        """Once all of a task's batches have passed: every module must have been given each token once.

        A module that was passed by would keep sums of zero, and get a weight that looks like any other.

        Args:
            own: tokens of the task that count.
            memory: those that modules see which are given the previous stage's final output.

        Raises:
            UnsupportedModelError: names the first module that saw another number.
        """
        for name, found in [*self.groups.items(), *self.norms.items()]:
            expected = memory if isinstance(found, InputMoments) and found.group.memory else own
            if found.tokens != expected:
                raise UnsupportedModelError(
                    f"{self.layout.path}.{name}: found {found.tokens} tokens of task {self.task} to reach it in the "
                    f"merged model, expected {expected}: its layer's forward calls it for some samples only, so its "
                    "moments would be of those; exclude it (settings.exclude)"
                )

    def check_unused(self, reached: Container[str]) -> None:
        """Modules that the layout passed over, because the forward did not reach them, must stay unreached.

        Raises:
            UnsupportedModelError: names the first that was.
        """
        for name in self.layout.unused:
            if name in reached:
                raise UnsupportedModelError(
                    f"{self.layout.path}.{name}: its layer's forward reached it for task {self.task}, but not for the "
                    "first sample: a module that is called for some samples only cannot be calibrated; exclude it "
                    "(settings.exclude)"
                )

    def _check_reached(self, name: str, expert: Activations) -> None:
        if name not in expert:
            raise UnsupportedModelError(
                f"{self.layout.path}.{name}: the merged model's forward reaches it where that of expert {self.task} "
                "does not; expected both to call it for every sample; exclude it (settings.exclude)"
            )

    def _check_rows(self, name: str, x: Tensor, tokens: Tokens, expert: bool = False) -> None:
        if not tokens.fit(x):
            model = f"expert {self.task}" if expert else "merged model"
            raise UnsupportedModelError(
                f"{model}, {self.layout.path}.{name}: found an input of shape {tuple(x.shape)} for task "
                f"{self.task}, expected one row for each of {tokens.shape[0]} x {tokens.shape[1]} tokens"
            )

    def _in_one_dtype(self, features: list[Tensor]) -> list[Tensor]:
        dtypes = {x.dtype for x in features}
        if self.settings.moment_dtype != "auto":
            dtypes = {getattr(torch, self.settings.moment_dtype)}
        elif self.settings.forward_dtype == "bfloat16":
            dtypes = {torch.bfloat16}  # as the modules round them, which are float32 or bfloat16 then
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        return [x.to(torch.float32 if dtype == torch.float64 else dtype) for x in features]


def _column_sums(x: Tensor, weights: Tensor | None) -> Tensor:
    """`[tokens, d] -> [d]` float64: float32 tree sums of a chunk, to be added up in float64."""
    if weights is None:
        return x.sum(0, dtype=torch.float32).double()
    return (x.float() * weights[:, None]).sum(0).double()


def _layer_norm(block: nn.Module, name: str) -> nn.LayerNorm:
    norm = block.get_submodule(name)
    assert isinstance(norm, nn.LayerNorm)
    return norm
