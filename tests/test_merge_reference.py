"""Every merger against its formula in float64, over shapes, dtypes, numbers of experts and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product

import merge_reference as reference
import pytest
import torch
from torch import Tensor

from featcal_fast.merging import stack
from featcal_fast.merging.dare import kept
from featcal_fast.merging.matrices import matrix_method
from featcal_fast.merging.merged import merge_stack, merge_tensor
from featcal_fast.merging.method import Options
from featcal_fast.merging.methods import METHODS

Judge = Callable[[Tensor, dict[str, Tensor], Options], Tensor]
SHAPES = [(13,), (1,), (7, 12), (12, 7), (5, 3, 4), ()]
SOME_WEIGHTS = (1.0, 0.5, 2.0, 0.0, 0.25)
EXPERTS = {"slerp": [2], "model_stock": [2, 3, 5]}  # else 1, 2, 3, 5


def masks(base: Tensor, experts: dict[str, Tensor], o: Options) -> list[Tensor]:
    """What DARE keeps of a tensor that is called `tensor`."""
    size = base.numel()
    return [
        kept(o.seed, task, "tensor", 0, size, o.density, torch.device("cpu")).view_as(base)
        if o.density < 1
        else torch.ones_like(base, dtype=torch.bool)
        for task in experts
    ]


def matrix_or_mean(method: Callable[..., Tensor], *names: str) -> Judge:
    """A method of linear weights; other tensors move by the mean of the changes."""

    def judge(base: Tensor, experts: dict[str, Tensor], o: Options) -> Tensor:
        own = list(experts.values())
        if base.ndim == 2:
            return method(base, own, o.scaling, *(getattr(o, name) for name in names))
        return base.double() + o.scaling * reference.changes(base, own).mean(0)

    return judge


JUDGES: dict[str, Judge] = {
    "average": lambda base, own, o: reference.average(base, list(own.values()), o.weights),
    "task_arithmetic": lambda base, own, o: reference.task_arithmetic(base, list(own.values()), o.weights, o.scaling),
    "ties": lambda base, own, o: reference.ties(base, list(own.values()), o.weights, o.scaling, o.density),
    "dare_linear": lambda base, own, o: reference.dare_linear(
        base, list(own.values()), o.weights, o.scaling, o.density, masks(base, own, o)
    ),
    "dare_ties": lambda base, own, o: reference.dare_ties(
        base, list(own.values()), o.weights, o.scaling, o.density, masks(base, own, o)
    ),
    "slerp": lambda _base, own, o: reference.slerp(*own.values(), o.t),
    "model_stock": lambda base, own, _o: reference.model_stock(base, list(own.values())),
    "wudi": matrix_or_mean(reference.wudi, "steps"),
    "iso_c": matrix_or_mean(reference.iso_c),
    "tsv": matrix_or_mean(reference.tsv),
}


def models(shape: tuple[int, ...], count: int, dtype: torch.dtype, spread: float = 0.1) -> tuple[Tensor, dict]:
    generator = torch.Generator().manual_seed(len(shape) + count)
    base = torch.randn(shape, generator=generator)
    experts = [base + spread * torch.randn(shape, generator=generator) for _ in range(count)]
    return base.to(dtype), {f"task{k}": expert.to(dtype) for k, expert in enumerate(experts)}


def options(method: str, count: int, **given: float) -> Options:
    found = METHODS[method]
    return Options(SOME_WEIGHTS[:count] if found.weighted else (1.0,) * count, **{**found.defaults, **given})


def check(found: Tensor, wanted: Tensor, base: Tensor) -> None:
    """Float32: to 1e-5 of the update, and the rounding of the weights themselves; less: to half a last digit."""
    assert found.dtype == base.dtype
    assert found.shape == base.shape
    error = (found.double() - wanted).abs()
    if base.dtype == torch.float32:
        rounding = 1.2e-7 * (base.double().norm() + wanted.norm())
        assert error.norm() <= 1e-5 * (wanted - base.double()).norm() + rounding
    else:
        half = torch.finfo(base.dtype).eps / 2
        assert (error <= 1.01 * half * wanted.abs() + 1e-5 * (wanted - base.double()).abs().max() + 1e-7).all()


def test_every_method_has_a_judge() -> None:
    assert JUDGES.keys() == METHODS.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_as_the_formula_has_it(method: str, dtype: torch.dtype) -> None:
    for shape, count in product(SHAPES, EXPERTS.get(method, [1, 2, 3, 5])):
        base, experts = models(shape, count, dtype)
        before = [tensor.clone() for tensor in (base, *experts.values())]
        told = options(method, count, **({"steps": 40} if method == "wudi" else {}))
        found = merge_tensor(METHODS[method], told, base, experts)
        check(found, JUDGES[method](base, experts, told), base)
        assert all(torch.equal(a, b) for a, b in zip(before, (base, *experts.values()), strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
def test_scalings_and_densities(method: str, density: float) -> None:
    count = EXPERTS.get(method, [3])[-1]
    base, experts = models((11, 9), count, torch.float32)
    named = {"scaling": -0.7, "density": density, "t": density, "seed": 5, "steps": 3}
    told = options(method, count, **{name: value for name, value in named.items() if name in METHODS[method].defaults})
    check(merge_tensor(METHODS[method], told, base, experts), JUDGES[method](base, experts, told), base)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_of_several_parts(method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bfloat16 has many equal magnitudes at the threshold of TIES, over parts."""
    monkeypatch.setattr(stack, "PART", 50)
    base, experts = models((21, 52), 2, dtype)
    told = options(method, 2, **({"steps": 2} if method == "wudi" else {}))
    check(merge_tensor(METHODS[method], told, base, experts), JUDGES[method](base, experts, told), base)


@pytest.mark.parametrize("method", METHODS)
def test_experts_that_are_the_base(method: str) -> None:
    count = EXPERTS.get(method, [2])[-1]
    base, _ = models((6, 8), count, torch.float32)
    told = Options((1.0,) * count, **METHODS[method].defaults)
    found = merge_tensor(METHODS[method], told, base, {f"task{k}": base for k in range(count)})
    torch.testing.assert_close(found, base, rtol=2e-7, atol=0)


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_changes_that_cancel_out_count_as_positive(method: str) -> None:
    base, change = torch.zeros(4), torch.tensor([0.6, -0.6, 0.0, 0.6])
    told = Options((1.0, 1.0), scaling=1.0, density=1.0)
    found = merge_tensor(METHODS[method], told, base, {"a": change, "b": -change})
    assert found.tolist() == pytest.approx([0.6, 0.6, 0.0, 0.6])


@pytest.mark.parametrize("method", ["wudi", "iso_c", "tsv"])
@pytest.mark.parametrize("shape", [(6, 9), (3, 4, 5)])
def test_linear_weights_that_are_stored_the_other_way_round(method: str, shape: tuple[int, ...]) -> None:
    """As GPT-2's, and as experts of a mixture: matrices stacked."""
    base, experts = models(shape, 3, torch.float32)
    told = options(method, 3)
    for transposed in (False, True):
        own = {task: stack.whole(tensor) for task, tensor in experts.items()}
        given = stack.Stack("it", shape, stack.whole(base), own, torch.device("cpu"), transposed)
        found = merge_stack(METHODS[method], told, given, torch.float32)
        judge, turned = JUDGES[method], (lambda tensor: tensor.mT) if transposed else (lambda tensor: tensor)
        for place, merged in enumerate(found.view(-1, *shape[-2:])):
            one, *others = (turned(t.view(-1, *shape[-2:])[place]) for t in (base, *experts.values()))
            check(turned(merged), judge(one, dict(zip(experts, others, strict=True)), told), one)


def test_products_stay_float32() -> None:
    """Whatever the process allows."""
    seen = []

    def change(deltas: Iterable[Tensor], _count: int, _options: Options) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return sum(deltas, torch.zeros(3, 3))

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        base, experts = models((3, 3), 2, torch.float32)
        merge_tensor(matrix_method(change, lambda _shape, _count: 0), options("tsv", 2), base, experts)
        assert (seen, torch.get_float32_matmul_precision()) == (["highest"], "medium")
    finally:
        torch.set_float32_matmul_precision(before)
