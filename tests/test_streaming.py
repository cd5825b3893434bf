"""Blocks arrive one ahead, each read once; hidden states wait in memory or on disk with the same result."""

from __future__ import annotations

import time
import weakref
from pathlib import Path

import pico
import pytest
import torch
from torch import nn

import featcal_fast as ff
from featcal_fast.activations import Stream
from featcal_fast.experts import BlockReader
from featcal_fast.moments import TaskMoments
from featcal_fast.sources import ModuleSource

CPU = torch.device("cpu")


class SlowSource:
    """A source whose blocks take time to read; counts the blocks alive."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.reads = seconds, []

    def block(self, index: int) -> nn.Module:
        time.sleep(self.seconds)
        self.reads.append(index)
        if index == 99:
            raise ValueError("block 99 is broken")
        return nn.Linear(1, 1)


def test_reading_overlaps_computing() -> None:
    """Reading as fast as computing takes little longer than either alone."""
    source = SlowSource(0.05)
    started = time.perf_counter()
    with BlockReader(((source, index) for index in range(10)), CPU) as reader:
        for _ in range(10):
            reader.next()
            time.sleep(0.05)
    assert time.perf_counter() - started < 1.15 * 11 * 0.05
    assert source.reads == list(range(10))


def test_no_more_than_one_block_is_read_ahead() -> None:
    source = SlowSource(0.0)
    with BlockReader(((source, index) for index in range(5)), CPU) as reader:
        reader.next()
        time.sleep(0.1)
        assert source.reads == [0, 1]


def test_an_error_while_reading_is_raised_where_the_block_is_needed() -> None:
    with BlockReader([(SlowSource(0.0), 0), (SlowSource(0.0), 99)], CPU) as reader:
        reader.next()
        with pytest.raises(ValueError, match="block 99 is broken"):
            reader.next()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_on_disk_hold_the_same_states(tmp_path: Path, dtype: torch.dtype) -> None:
    model, cpu = pico.llama().to(dtype), torch.device("cpu")
    source, batches = ModuleSource(model, "model", cpu), pico.texts(3, seed=0)
    with torch.no_grad():
        memory, disk = (Stream(source, "task", cpu, place) for place in (cpu, tmp_path))
        memory.enter(0, batches)
        disk.enter(0, batches)
        for index in range(2):
            for batch in range(len(batches)):
                rows = slice(0, memory.shape(batch)[0])
                memory.advance(index, source.block(index), batch, rows)
                disk.advance(index, source.block(index), batch, rows)
                (a, _), (b, _) = memory.load(batch, rows), disk.load(batch, rows)
                assert torch.equal(a, b)
                assert b.dtype == dtype
    assert list(tmp_path.iterdir()) == []


def test_no_more_blocks_are_alive_than_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Student and one expert (of the base only its weights); nothing of a layer is left when the next one begins."""
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    scratch: weakref.WeakSet[TaskMoments] = weakref.WeakSet()
    most = []
    take, make = BlockReader.next, TaskMoments.__init__

    def counted(reader: BlockReader) -> nn.Module:
        block = take(reader)
        alive.add(block)
        most.append(len(alive))
        return block

    def made(moments: TaskMoments, *args: object) -> None:
        assert len(scratch) == 0
        make(moments, *args)
        scratch.add(moments)

    monkeypatch.setattr(BlockReader, "next", counted)
    monkeypatch.setattr(TaskMoments, "__init__", made)
    job = pico.job("llama", 3)
    ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)
    assert max(most) == 2
