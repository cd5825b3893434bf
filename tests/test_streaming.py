"""Blocks arrive one ahead, each read once; hidden states wait in memory or on disk with the same result."""

from __future__ import annotations

import time
from pathlib import Path

import pico
import pytest
import torch
from torch import nn

from featcal_fast.activations import Stream
from featcal_fast.experts import BlockReader
from featcal_fast.sources import ModuleSource


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
    with BlockReader((source, index) for index in range(10)) as reader:
        for _ in range(10):
            reader.next()
            time.sleep(0.05)
    assert time.perf_counter() - started < 1.15 * 11 * 0.05
    assert source.reads == list(range(10))


def test_no_more_than_one_block_is_read_ahead() -> None:
    source = SlowSource(0.0)
    with BlockReader((source, index) for index in range(5)) as reader:
        reader.next()
        time.sleep(0.1)
        assert source.reads == [0, 1]


def test_an_error_while_reading_is_raised_where_the_block_is_needed() -> None:
    with BlockReader([(SlowSource(0.0), 0), (SlowSource(0.0), 99)]) as reader:
        reader.next()
        with pytest.raises(ValueError, match="block 99 is broken"):
            reader.next()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_on_disk_hold_the_same_states(tmp_path: Path, dtype: torch.dtype) -> None:
    model, cpu = pico.llama().to(dtype), torch.device("cpu")
    source, batches = ModuleSource(model, "model", cpu), pico.texts(3, seed=0)
    with torch.no_grad():
        memory, disk = (Stream(source, "task", batches, cpu, place) for place in (cpu, tmp_path))
        for index in range(2):
            for batch in range(len(batches)):
                a = memory.advance(index, source.block(index), batch)
                b = disk.advance(index, source.block(index), batch)
                assert torch.equal(a, b)
                assert disk.load(batch)[0].dtype == dtype
    assert list(tmp_path.iterdir()) == []
