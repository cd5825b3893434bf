"""Mergers of whole matrices: any shape, rank and size of values; and what they say of their memory."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import merge_reference as reference
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from featcal_fast.errors import CheckpointError
from featcal_fast.merging import model_stock, spectrum
from featcal_fast.merging.iso_c import iso_c, iso_c_bytes
from featcal_fast.merging.method import Options
from featcal_fast.merging.methods import METHODS
from featcal_fast.merging.stack import Stack
from featcal_fast.merging.tsv import tsv, tsv_bytes
from featcal_fast.merging.wudi import wudi, wudi_bytes

CHANGES: dict[str, Callable[[Iterable[Tensor], int], Tensor]] = {"wudi": wudi, "iso_c": iso_c, "tsv": tsv}
REFERENCES: dict[str, Callable[..., Tensor]] = {
    "wudi": reference.wudi,
    "iso_c": reference.iso_c,
    "tsv": reference.tsv,
}
BYTES = {"wudi": wudi_bytes, "iso_c": iso_c_bytes, "tsv": tsv_bytes}
SHAPES = [(7, 12), (12, 7), (9, 9), (1, 5), (5, 1), (1, 1)]

every_method = pytest.mark.parametrize("method", CHANGES)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected(method: str, deltas: list[Tensor]) -> Tensor:
    return REFERENCES[method](torch.zeros_like(deltas[0]), deltas, scaling=1.0)


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@every_method
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_as_the_papers_have_it(method: str, shape: tuple[int, int], count: int) -> None:
    deltas = [1e-3 * random(*shape, seed=seed) for seed in range(count)]
    before = [delta.clone() for delta in deltas]
    found = CHANGES[method](iter(deltas), count)
    assert (found.dtype, found.shape) == (torch.float32, shape)
    assert difference(found, expected(method, deltas)) < 2e-5
    assert all(torch.equal(delta, own) for delta, own in zip(deltas, before, strict=True))
    assert torch.equal(found, CHANGES[method](iter(deltas), count))


@every_method
@pytest.mark.parametrize("count", [2, 3])
def test_changes_of_low_rank(method: str, count: int) -> None:
    """As of adapters."""
    deltas = [1e-3 * random(12, 2, seed=seed) @ random(2, 20, seed=seed + 9) for seed in range(count)]
    assert difference(CHANGES[method](deltas, count), expected(method, deltas)) < 1e-4
    deltas = [delta.mT for delta in deltas]  # as of weights that are stored the other way round
    assert difference(CHANGES[method](deltas, count), expected(method, deltas)) < 1e-4


@every_method
@pytest.mark.parametrize("zeros", [{0}, {1}, {0, 2}, {0, 1, 2}])
def test_experts_that_changed_nothing(method: str, zeros: set[int]) -> None:
    deltas = [torch.zeros(6, 8) if place in zeros else 1e-3 * random(6, 8, seed=place) for place in range(3)]
    found = CHANGES[method](deltas, 3)
    if len(zeros) == 3:
        assert not found.any()
    else:
        assert difference(found, expected(method, deltas)) < 2e-5


@pytest.mark.parametrize("count", [2, 3])
def test_identical_experts(count: int) -> None:
    delta = 1e-3 * random(6, 9)
    deltas = [delta] * count
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    assert difference(tsv(deltas, count), (u[:, : 6 // count] * s[: 6 // count]) @ vh[: 6 // count]) < 1e-5
    assert difference(iso_c(deltas, count), count * s.mean() * u @ vh) < 1e-5
    assert difference(wudi(deltas, count), expected("wudi", deltas)) < 2e-5


@every_method
def test_more_experts_than_a_matrix_has_rows(method: str) -> None:
    deltas = [1e-3 * random(3, 5, seed=seed) for seed in range(8)]
    assert difference(CHANGES[method](deltas, 8), expected(method, deltas)) < 2e-5


@pytest.mark.parametrize("method", ["iso_c", "tsv"])
@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e4, 1e30])
def test_values_of_any_size(method: str, size: float) -> None:
    """These are as large as what they are given; powers of 2 change no digit."""
    factor = 2.0 ** round(math.log2(size))
    deltas = [random(6, 9, seed=seed) for seed in range(3)]
    found = CHANGES[method]([delta * factor for delta in deltas], 3)
    assert torch.equal(found, CHANGES[method](deltas, 3) * factor)


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e4, 1e30])
def test_a_descent_of_values_of_any_size(size: float) -> None:
    """Its steps have a size of their own, unlike what it is given."""
    deltas = [size * random(6, 9, seed=seed) for seed in range(3)]
    found = wudi(deltas, 3)
    assert found.isfinite().all()
    if 1e-20 < size < 1e18:  # where Adam's squares are float32's
        assert difference(found, expected("wudi", deltas)) < (1e-2 if size < 1e-5 else 2e-5)


@every_method
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("count", [1, 3])
def test_changes_beyond_float32_are_an_error(method: str, bad: float, count: int) -> None:
    deltas = [random(4, 4, seed=seed) for seed in range(count)]
    deltas[-1][1, 2] = bad
    with pytest.raises(CheckpointError, match="more than float32 holds"):
        CHANGES[method](deltas, count)


@every_method
def test_one_change_is_in_memory_at_a_time(method: str) -> None:
    last: list[weakref.ref[Tensor]] = []

    def deltas() -> Iterator[Tensor]:
        for seed in range(4):
            assert all(each() is None for each in last)
            delta = random(5, 6, seed=seed)
            last.append(weakref.ref(delta))
            yield delta
            del delta

    CHANGES[method](deltas(), 4)
    assert len(last) == 4


def test_wudi_descends() -> None:
    """The published loss falls, and the steps are Adam's."""
    deltas = 1e-3 * random(3, 6, 4)

    def loss(merged: Tensor) -> float:
        return float((((merged - deltas) @ deltas.mT).square().sum((1, 2)) / deltas.square().sum((1, 2))).sum())

    losses = [loss(wudi(deltas, 3, steps=steps, rate=1e-4)) for steps in (0, 10, 100, 300)]
    assert torch.equal(wudi(deltas, 3, steps=0), deltas.sum(0))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.7 * losses[0]
    moved = wudi(deltas, 3, steps=1, rate=1e-4) - deltas.sum(0)
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 1e-4), rtol=1e-2, atol=0)


class Live(TorchDispatchMode):
    """Bytes of the tensors that operations made and that are still there, and the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, list | tuple) else [result]:
            if isinstance(each, Tensor) and (key := each.untyped_storage().data_ptr()) not in self._known:
                storage, size = each.untyped_storage(), each.untyped_storage().nbytes()
                self._known.add(key)
                weakref.finalize(storage, self._free, key, size)
                self.now += size
                self.most = max(self.most, self.now)
        return result

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@every_method
@pytest.mark.parametrize(("shape", "count"), [((200, 300), 2), ((300, 200), 3), ((250, 250), 1)])
def test_bytes_are_what_it_says(
    method: str, shape: tuple[int, int], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what LAPACK works in, which is gone when a decomposition returns; there is as much at other times."""
    monkeypatch.setattr(spectrum, "BLOCK", 2**12)

    def deltas() -> Iterator[Tensor]:
        for seed in range(count):
            yield random(*shape, seed=seed)

    with Live() as live:
        result = wudi(deltas(), count, steps=2) if method == "wudi" else CHANGES[method](deltas(), count)
    said = BYTES[method](shape, count) + result.nbytes
    work = 2 * 8 * min(shape) ** 2 if method == "iso_c" else 0
    assert live.now == result.nbytes
    assert 0.9 * said - work <= live.most <= 1.05 * said + 2**16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("method", METHODS)
def test_parts_are_as_many_as_it_says(
    method: str, count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is read, summed up, and given."""
    size, own, tasks = 2**18, METHODS[method], [str(task) for task in range(min(count, METHODS[method].experts[1]))]
    monkeypatch.setattr(model_stock, "COLUMNS", 2**14)

    def read(start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, dtype=dtype).mul_(3.7).remainder_(1.3)

    with Live() as live:
        stack = Stack("w", (2 * size,), read, dict.fromkeys(tasks, read), torch.device("cpu"), None, size)
        for part in own.merge(stack, Options((1.0,) * len(tasks), **own.defaults)):
            part.to(dtype)
    counted = 8 * 2**16 * len(tasks) if method == "ties" else 0  # how often there are magnitudes
    assert live.most <= 4 * size * (own.rooms(len(tasks)) + 0.1) + counted
    assert live.most >= 4 * size * (own.rooms(len(tasks)) - 2.1)
