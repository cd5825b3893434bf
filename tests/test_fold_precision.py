"""How a GPU folds: what its products of float16 parts cost in accuracy of the change (emulated), what it packs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featcal_fast.layer import fold
from featcal_fast.layer.fold import GroupFold
from featcal_fast.layer.layout import InputGroup
from featcal_fast.layer.moments import GroupMoments
from featcal_fast.layer.systems import ALL, Anchor, GroupSystem, fold_columns
from featcal_fast.planning import footprint
from featcal_fast.settings import Settings

WIDTH, OUT, TOKENS = 256, 320, 2048


def parts_of(x: Tensor, count: int) -> list[Tensor]:
    """`x` as float16 parts times a power of two, as `featcal_kernels.operands_triton` makes them, in float64."""
    power = 2.0 ** (14 - torch.floor(torch.log2(x.abs().max().double())))
    rest, found = x.float() * power.float(), []
    for _ in range(count):
        part = rest.half()
        found.append(part.double() / power)
        rest = rest - part.float()
    return found


def split_addmm_(out: Tensor, a: Tensor, b: Tensor, scale: Tensor, *, precision: str = "fp16x3") -> Tensor:
    left = parts_of(a, 1 if precision == "fp16x2" or a.dtype.itemsize == 2 else 2)
    high, low = parts_of(b, 2)
    product = left[0] @ high + left[0] @ low + (left[1] @ high if len(left) > 1 else 0)
    return out.add_((scale * product).float())


def one_part_addmm_(out: Tensor, a: Tensor, b: Tensor, scale: Tensor, *, precision: str = "fp16x3") -> Tensor:
    return out.add_((scale * (parts_of(a, 1)[0] @ parts_of(b, 1)[0])).float())


class Case:
    """Models and features of one group: experts and base some way from each other, features of uneven size."""

    def __init__(self, dtype: torch.dtype, alpha: float, ridge: float, output_space: bool, tasks: int = 4) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.settings = Settings(ridge_lambda=ridge, teacher_alpha=alpha)
        self.group = InputGroup(("linear",), WIDTH, (OUT,), None)
        base = randn(OUT, WIDTH) / 16
        self.experts = [(base + 0.1 * randn(OUT, WIDTH) / 16).to(dtype) for _ in range(tasks)]
        self.base, merged = base.to(dtype), sum(expert.float() for expert in self.experts) / tasks
        self.merged = merged.to(dtype)
        self.anchor = Anchor(_linear(self.merged), _linear(self.base), self.settings.anchor_rho)
        mix = randn(WIDTH, WIDTH) / 16 * torch.linspace(-2, 1, WIDTH).exp2()
        self.student = [randn(TOKENS, WIDTH) @ mix for _ in range(tasks)]
        self.teacher = [xs + 0.3 * randn(TOKENS, WIDTH) @ mix for xs in self.student]
        self.output_space = output_space

    def change(self) -> Tensor:
        """By the engine's fold, and a float64 solve: what else rounds is not looked at."""
        system = GroupSystem(self.group, torch.zeros(WIDTH, WIDTH))
        for xs, xe, expert in zip(self.student, self.teacher, self.experts, strict=True):
            scratch = GroupMoments(self.group, False, 1 if self.output_space else 10**9, torch.device("cpu"))
            scratch.add(xs, xe, [xe @ expert.float().mT], None, len(xs), lambda _, add: add())
            assert scratch.output_space == self.output_space
            fold_in(system, scratch, {"linear.weight": expert}, self.anchor, self.settings)
        return self._solved(system.a.double().triu(), system.r.double())

    def exact(self) -> Tensor:
        a, r = torch.zeros(WIDTH, WIDTH).double(), torch.zeros(OUT, WIDTH).double()
        anchor = torch.lerp(self.base.double(), self.merged.double(), self.settings.anchor_rho)
        for xs, xe, expert in zip(self.student, self.teacher, self.experts, strict=True):
            xs, xe, weight = xs.double(), xe.double(), expert.double()
            s, q = xs.mT @ xs / len(xs), (xe - xs).mT @ xs / len(xs)
            a += s / s.norm()
            r += (self.settings.teacher_alpha * weight @ q + (weight - anchor) @ s) / s.norm()
        return self._solved(a.triu(), r)

    def _solved(self, upper: Tensor, r: Tensor) -> Tensor:
        a = upper + upper.triu(1).mT + self.settings.ridge_lambda * torch.eye(WIDTH)
        return torch.linalg.solve(a, r.mT).mT

    def rounding(self, change: Tensor) -> float:
        """Of the weight that the change makes, in the models' dtype, relative to the change."""
        weight = torch.lerp(self.base.double(), self.merged.double(), self.settings.anchor_rho) + change
        return float((weight.to(self.merged.dtype).double() - weight).norm() / change.norm())


def fold_in(
    system: GroupSystem, scratch: GroupMoments, expert: Mapping[str, Tensor], anchor: Anchor, settings: Settings
) -> None:
    task = GroupFold(system, scratch, expert, anchor, settings)
    task.add_to_a(ALL)
    task.add_to_r(system.panels)


def _linear(weight: Tensor) -> nn.Module:
    module = nn.Linear(WIDTH, OUT, bias=False)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return nn.ModuleDict({"linear": module})


def error(case: Case, addmm_: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(fold, "addmm_", addmm_)
    exact = case.exact()
    assert exact.isfinite().all()
    return float((case.change().double() - exact).norm() / exact.norm())


SPACES = pytest.mark.parametrize("output_space", [False, True], ids=["input", "output"])


@SPACES
@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.6])
def test_float32_weights(alpha: float, output_space: bool, monkeypatch: pytest.MonkeyPatch):
    case = Case(torch.float32, alpha, 0.05, output_space)
    assert error(case, split_addmm_, monkeypatch) < 5e-6
    assert error(case, one_part_addmm_, monkeypatch) > 2e-5


@SPACES
@pytest.mark.parametrize("tasks", [1, 8])
@pytest.mark.parametrize(("alpha", "ridge"), [(0.1, 1.0), (0.3, 0.05), (0.6, 1e-3), (1.0, 0.05)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights(
    dtype: torch.dtype, alpha: float, ridge: float, tasks: int, output_space: bool, monkeypatch: pytest.MonkeyPatch
):
    """A tenth of what rounding the result costs is the most that the products may; and bfloat16 takes two of them."""
    taken = []

    def noted(*args: Any, precision: str) -> Tensor:
        taken.append(precision)
        return split_addmm_(*args, precision=precision)

    case = Case(dtype, alpha, ridge, output_space, tasks)
    assert error(case, noted, monkeypatch) < 0.1 * case.rounding(case.exact())
    assert set(taken) == {"fp16x2" if dtype == torch.bfloat16 else "fp16x3"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_ridges_take_every_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """What float32 sums lose at this lambda stays as it is; one product would lose a hundred times as much."""
    case = Case(dtype, 0.6, 1e-5, output_space=True)
    plain, ours = (error(case, op, monkeypatch) for op in (fold.addmm_, split_addmm_))
    assert ours < 1.5 * plain
    assert error(case, one_part_addmm_, monkeypatch) > 100 * plain


@SPACES
def test_what_a_groups_modules_share_is_packed_once(output_space: bool, monkeypatch: pytest.MonkeyPatch):
    """In two panels: S, and in input space Q, for three modules."""
    packed, multiplied, addmm_ = [], [], fold.addmm_

    def pack(b: Tensor) -> Any:
        packed.append(SimpleNamespace(x=b))
        return packed[-1]

    def noted(out: Tensor, a: Tensor, b: Any, scale: Tensor, **options: Any) -> Tensor:
        multiplied.append(b)
        return addmm_(out, a, b, scale, **options)

    monkeypatch.setattr(fold, "pack", pack)
    monkeypatch.setattr(fold, "addmm_", noted)
    monkeypatch.setattr(fold, "fold_columns", lambda scratch, device: 160)
    names = ("one", "two", "three")
    block = nn.ModuleDict({name: nn.Linear(WIDTH, 128, bias=False) for name in names}).requires_grad_(False)
    group = InputGroup(names, WIDTH, (128, 128, 128), None)
    scratch = GroupMoments(group, False, 1 if output_space else 10**9, torch.device("cpu"))
    assert scratch.output_space == output_space
    system = GroupSystem(group, torch.zeros(WIDTH, WIDTH))
    fold_in(system, scratch, dict(block.named_parameters()), Anchor(block, block, 1.0), Settings())
    assert [len(each.x) for each in packed] == ([160, 96] if output_space else [160, 160, 96, 96])
    assert sorted(map(id, multiplied)) == sorted(3 * list(map(id, packed)))


@pytest.mark.parametrize(
    ("size", "outs", "columns", "rows"),
    [
        (4096, (4096, 1024, 1024), 4096, 4096),
        (4096, (4096,), 4096, 4096),
        (4096, (14336, 14336), 4096, 4096),
        (14336, (4096,), 7168, 1152),
    ],
    ids=["q, k, v", "o", "gate, up", "down"],
)
def test_a_gpu_folds_a_llama_8b_at_once_but_for_down_proj(size: int, outs: tuple[int, ...], columns: int, rows: int):
    """And a plan counts the wider weights, of which so many rows at a time are formed in float32."""
    meta = torch.device("meta")
    scratch = GroupMoments(InputGroup(("a", "b", "c")[: len(outs)], size, outs, None), False, 2**17, meta)
    assert min(size, fold_columns(scratch, torch.device("cuda"))) == columns
    moments = SimpleNamespace(groups={"a": scratch})
    assert footprint._larger_weights(moments, meta) == 0
    assert footprint._larger_weights(moments, torch.device("cuda")) == 4 * rows * (columns - 2048)
