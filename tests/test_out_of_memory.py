"""A device that runs out of memory: chunks are halved, each sample counts once, and the result stays."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pico
import pytest
import torch
from torch import Tensor

import featcal_fast as ff
from featcal_fast.forward.calls import BatchCalls
from featcal_fast.layer import moments
from featcal_fast.layer.tokens import Tokens
from featcal_fast.streaming.chunks import Chunks

CPU = torch.device("cpu")


class Device:
    """Refuses some of the work that is done on it, as a full device does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuses: Callable[[Tensor, int], bool]) -> None:
        self.calls = self.refused = 0
        self._refuses = refuses
        for name in ("gram_cross_", "cross_", "_column_sums"):
            monkeypatch.setattr(moments, name, self._guarded(getattr(moments, name), position=-2))
        monkeypatch.setattr(BatchCalls, "run", self._guarded(BatchCalls.run, position=-1))

    def _guarded(self, work: Callable, position: int) -> Callable:
        def guarded(*args):
            self.calls += 1
            x = args[position] if isinstance(args[position], Tensor) else args[0]
            if self._refuses(x, self.calls):
                self.refused += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
            return work(*args)

        return guarded


def weights(job: pico.Job) -> dict[str, Tensor]:
    merged = copy.deepcopy(job.merged)
    ff.calibrate_model(merged, base=job.base, experts=job.experts, batches=job.batches)
    return {name: value.double() for name, value in merged.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], job: pico.Job) -> None:
    for name, start in job.merged.named_parameters():
        assert expected[name].isfinite().all(), name
        update = (expected[name] - start).norm()
        if update > 1e-3 * start.norm():
            error = (found[name] - expected[name]).norm() / update
            assert error < 2e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("kind", ["llama", "clip", "t5"])
def test_wherever_memory_runs_out_the_result_is_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = pico.job(kind, 2)
    expected = weights(job)
    with monkeypatch.context() as patch:
        whole = Device(patch, lambda _x, _call: False)
        weights(job)
    step = whole.calls // 9
    for first in range(0, whole.calls, step):
        with monkeypatch.context() as patch:
            device = Device(patch, lambda x, call, first=first: call in (first, first + 3) and len(x) > 1)
            found = weights(job)
        if device.refused:
            assert_same(found, expected, job)
        step = step + 1  # other places in a layer each time


def test_a_device_that_takes_one_sample_at_a_time_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    job = pico.job("llama", 2)
    expected = weights(job)
    with monkeypatch.context() as patch:
        device = Device(patch, lambda x, _call: x.ndim == 3 and x.shape[0] > 1)
        found = weights(job)
    assert device.refused > 0
    assert_same(found, expected, job)


def test_one_sample_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    job = pico.job("llama", 1)
    before = copy.deepcopy(job.merged).state_dict()
    Device(monkeypatch, lambda _x, call: call > 40)
    with pytest.raises(ff.FeatCalError, match=r"however few samples .*\(CUDA out of memory.*GiB.\).*max_length"):
        ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)
    assert all(torch.equal(value, before[name]) for name, value in job.merged.state_dict().items())


def cover(chunks: Chunks, shape: tuple[int, int], most: int) -> list[slice]:
    """What of a batch passes a device that has room for `most` samples at a time."""
    passed = []
    for chunk in chunks.of(0, Tokens(None, shape, CPU)):
        with chunk:
            if chunk.rows.stop - chunk.rows.start > most:
                raise torch.OutOfMemoryError("full")
            assert chunk.tokens.shape == (chunk.rows.stop - chunk.rows.start, shape[1])
            passed.append(chunk.rows)
    return passed


def test_every_sample_passes_once_in_order() -> None:
    for most in (1, 2, 3, 5, 7):
        chunks = Chunks(CPU)
        for size in (11, 1, 4):
            passed = cover(chunks, (size, 10), most)
            assert [row for rows in passed for row in range(rows.start, rows.stop)] == list(range(size))
        assert chunks.limit is not None
        assert chunks.limit <= 10 * most


def test_what_failed_is_finished_before_anything_after_it_begins() -> None:
    """Sums may hold some of its samples already, up to its end: nothing may reach across that."""
    chunks = Chunks(CPU, limit=50)
    assert cover(chunks, (9, 10), 4) == [slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 7), slice(7, 9)]


def test_a_limit_is_of_tokens() -> None:
    chunks = Chunks(CPU, limit=64)
    passed = [rows for shape in ((8, 16), (4, 16), (2, 100), (9, 8)) for rows in cover(chunks, shape, 100)]
    assert [rows.stop - rows.start for rows in passed] == [4, 4, 4, 1, 1, 8, 1]
